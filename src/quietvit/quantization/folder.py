"""Folders with JSON facts and tensors: written atomically, read with checks.

The callers decide what the facts say, and which tensors belong to them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from quietvit.errors import QuietvitError
from quietvit.files import beside, json_text, put_in_place, refuse_other_bytes, save_tensors

TENSORS = "model.safetensors"
# Suffixes of files that a folder must not have; True if an export writes such a file.
FILES = dict.fromkeys((".onnx", ".xml"), True) | dict.fromkeys(
    (".bin", ".pt", ".pth", ".ckpt", ".safetensors", ".npz", ".tflite", ".engine"), False
)


@dataclass(frozen=True)
class FolderFormat:
    """A kind of folder, which holds ``TENSORS`` and ``facts``, and the ends of its error texts.

    ``earlier``: what an existing one is called. ``suffix``: the end of its name. The last four
    complete the errors for a folder with a ``missing`` file, a ``damaged`` one, a ``foreign`` one,
    and one of another version (``outdated``).
    """

    name: str
    version: int
    facts: str
    earlier: str
    suffix: str
    missing: str
    damaged: str
    foreign: str
    outdated: str

    @property
    def files(self) -> tuple[str, str]:
        """Names of the files in a folder of this kind."""
        return TENSORS, self.facts

    def holds(self, path: Path) -> bool:
        """Whether ``path`` is a folder of this kind, judged by file names only."""
        return (path / self.facts).is_file()

    def refuse(self, path: Path, force: bool) -> None:
        """Raise QuietvitError if ``path`` cannot be written. Call it before long work.

        That is: if ``path`` exists (``force`` allows a folder of this kind), if its suffix is that
        of another file format, or if the place is not writable.
        """
        refuse_other_bytes(path)
        if path.suffix.lower() in FILES:
            target = FILES[path.suffix.lower()]
            export = f", and make {path.name} from it with 'quietvit export'" if target else ""
            raise QuietvitError(
                f"{path} is the name of a file, but a {self.name} is a folder; name it "
                f"{path.with_suffix(self.suffix)}{export}."
            )
        with beside(path):
            pass
        if not path.exists():
            return
        if not force:
            raise QuietvitError(
                f"{path} exists already; choose another name, or pass force (--force) to replace "
                "it."
            )
        names = {entry.name for entry in path.iterdir()} if path.is_dir() else {path.name}
        if not path.is_dir() or names - set(self.files):
            raise QuietvitError(
                f"{path} is not an earlier {self.earlier} (it is or holds "
                f"{', '.join(sorted(names)[:3])}), so force does not replace it; choose another "
                "name."
            )

    def write(self, path: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write the folder ``path`` and replace an existing one.

        Raises QuietvitError if the place cannot be written; what was there stays untouched.
        """
        content = {"format": self.name, "version": self.version, **facts}
        plain = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
        with beside(path, SafetensorError) as folder:
            new = folder / path.name
            new.mkdir()
            save_tensors(plain, new / TENSORS)
            text = json_text(content, indent=1) + "\n"
            (new / self.facts).write_text(text, encoding="utf-8")
            put_in_place(folder, path)

    def read(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Read facts and tensors. Raises QuietvitError for another kind or version."""
        refuse_other_bytes(path)
        if not path.exists():
            raise QuietvitError(f"{path} does not exist; check the path, and {self.missing}.")
        if not path.is_dir():
            raise QuietvitError(f"{path} is a file, but a {self.name} is a folder; {self.missing}.")
        for name in (self.facts, TENSORS):
            if not (path / name).is_file():
                raise QuietvitError(f"{path} holds no {name}; {self.missing}.")
        try:
            facts = json.loads((path / self.facts).read_text(encoding="utf-8"))
            tensors = load_file(path / TENSORS)
        except (ValueError, SafetensorError, OSError) as error:
            raise QuietvitError(
                f"{path} is damaged or cut short ({error}); {self.damaged}."
            ) from error
        if not isinstance(facts, dict) or facts.get("format") != self.name:
            raise QuietvitError(f"{path / self.facts} {self.foreign}.")
        if facts.get("version") != self.version:
            raise QuietvitError(
                f"{path} has format version {facts.get('version')}, this quietvit reads "
                f"{self.version}; {self.outdated}."
            )
        return facts, tensors
