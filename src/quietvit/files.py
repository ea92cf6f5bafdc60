"""Writing files so that nothing is lost: atomic writes, refusal of folders already in use.

What is written, and in which format, is decided by the callers; nothing is read here.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from quietvit.errors import QuietvitError


def write_atomic(path: str | Path, content: bytes | str) -> Path:
    """Write ``content`` (str as UTF-8) to ``path``; readers see the old file or the new, whole.

    The bytes go to a temporary file in the same folder, are flushed to disk, and the file is
    renamed. Missing parent folders are made. Returns the path.

    Raises:
        QuietvitError: the disk is full or the place cannot be written; the old file, if there was
            one, is untouched.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except OSError as error:
        raise QuietvitError(
            f"could not write {path}: {error.strerror or error}. What was there before is "
            "untouched; free some space or choose another place."
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return path


def refuse_nonempty(directory: str | Path, force: bool = False) -> Path:
    """Return ``directory``, made if missing; with ``force`` one that holds files is accepted too.

    Nothing is ever deleted.

    Raises:
        QuietvitError: the folder holds something and ``force`` is False, or the path is a file.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise QuietvitError(f"{directory} is a file, not a folder; choose another output folder.")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        held = sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        raise QuietvitError(
            f"could not use {directory} as the output folder: {error.strerror or error}; choose "
            "another place."
        ) from error
    if held and not force:
        shown = ", ".join(held[:3]) + (", ..." if len(held) > 3 else "")
        raise QuietvitError(
            f"the output folder {directory} is not empty (it holds {shown}); choose another one, "
            "or pass force (--force) to write into it."
        )
    return directory


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
