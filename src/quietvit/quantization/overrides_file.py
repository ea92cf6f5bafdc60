"""The file of overrides, such as ``bits.toml``: written by ``choose-bits``, read as ``overrides``.

``overrides`` decides which bits are allowed. Recipes and saved models have files of their own.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quietvit.errors import QuietvitError
from quietvit.files import not_utf8, write_atomic
from quietvit.text import is_utf8

SUFFIX = ".toml"
_TABLE = "overrides"


def is_overrides_file(text: str) -> bool:
    """Whether ``text`` names a file of overrides, judged by its suffix."""
    return text.endswith(SUFFIX)


def read_overrides(path: str | Path) -> dict[str, Any]:
    """Return the table ``[overrides]`` of a TOML file, with its values unchecked.

    Raises:
        QuietvitError: the file is missing or no TOML, or has no such table or other keys.
    """
    path = Path(path).expanduser()
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise QuietvitError(
            f"could not read the overrides {path}: {error.strerror or error}. Check the path. "
            "'quietvit choose-bits' writes such a file."
        ) from error
    except ValueError as error:  # no TOML or no UTF-8
        raise QuietvitError(f"{path} is not a TOML file ({error}). {_EXPECTED}") from error
    found = content.pop(_TABLE, None)
    if not isinstance(found, dict) or content:
        held = ", ".join(map(repr, content)) or "no such table"
        raise QuietvitError(f"{path} is not a file of overrides: it holds {held}. {_EXPECTED}")
    return found


_EXPECTED = f"It needs one table [{_TABLE}] with lines such as \"blocks.0.attn.qkv\" = 'W4A8'."


def write_overrides(path: str | Path, overrides: Mapping[str, Any], comment: str) -> Path:
    """Write overrides in plain form (``Overrides.plain``) to a TOML file atomically.

    ``comment`` becomes the first line. Returns the path.
    """
    refuse_other_suffix(path)
    lines = [f"# {' '.join(comment.split())}", f"[{_TABLE}]"]
    for key, bits in overrides.items():
        if not is_utf8(key):
            raise QuietvitError(f"overrides: {not_utf8(key)}")
        lines.append(f"{_quoted(key)} = {_value(bits)}")
    return write_atomic(path, "\n".join(lines) + "\n")


def refuse_other_suffix(path: str | Path) -> None:
    """Raise QuietvitError if ``path`` could not be read as overrides because of its suffix."""
    if Path(path).suffix != SUFFIX:
        raise QuietvitError(
            f"{path} would not be read as a file of overrides. Name it "
            f"{Path(path).with_suffix(SUFFIX)}."
        )


def _value(bits: Any) -> str:
    if isinstance(bits, list):
        return f"[{', '.join(map(_value, bits))}]"
    return _quoted("float") if bits is None else json.dumps(bits)


def _quoted(text: str) -> str:
    """Return a basic string of TOML. JSON has the same escapes."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
