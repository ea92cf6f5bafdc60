"""``Target``: the description of one kind of exported file, and ``Export``, its input.

``for_onnx``, ``for_openvino`` and ``for_torchao`` define targets. ``targets`` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quietvit.deployment.extras import need
from quietvit.deployment.facts import Facts
from quietvit.deployment.grids import Grid
from quietvit.deployment.paths import head_file
from quietvit.deployment.runtime import Runtime
from quietvit.detection.static_parts import HEADS
from quietvit.errors import QuietvitError
from quietvit.files import refuse_other_bytes, refuse_unwritable
from quietvit.quantization import QuantizedModel
from quietvit.quantization.folder import FolderFormat

SETTINGS = {"opset": 21, "signed": False}
"""Settings of ``export`` that only some targets take, and their defaults."""
_GIVEN = {"opset": "opset (--opset)", "signed": "signed (--signed) and as_='symmetric'"}


@dataclass(frozen=True)
class Export:
    """The input of ``Target.write``.

    ``quantized`` is the model in float32 on any device. The file must store ``facts.to_json()``.
    ``grids`` holds the integers of each quantizer by slot key. ``onnx_graph(at_once)`` returns an
    ``onnx_ir.Model`` and its facts, for targets made from ONNX. Set ``at_once`` if the runtime has
    integer convolutions with a quantized output.
    """

    quantized: QuantizedModel
    path: Path
    facts: Facts
    grids: Mapping[str, Grid]
    onnx_graph: Callable[[bool], tuple[Any, Facts]]


@dataclass(frozen=True)
class Target:
    """One kind of exported file. ``register_target`` makes it known to every command.

    Args:
        name: its name in ``export(to=...)`` and ``--to``.
        suffix: the suffix of its paths, such as ``.onnx``.
        runtime: its runtime's name in ``open_runtime(runtime=...)`` and ``--runtime``.
        write: writes the whole ``export.path`` and returns the facts stored in the file.
        open: opens a path with a number of threads (0: the runtime's choice). Raises QuietvitError
            for a truncated or foreign file.
        needs: packages that ``write`` imports.
        install: the pip requirement that provides them.
        files: all files that an export to a path may write, None for the path alone. Some may be
            missing.
        folder: the format if the target is a folder, None if it is a file.
        settings: the keys of ``SETTINGS`` that it takes. Others are refused.
        leaves_float: True if products without an integer kernel stay in float and the facts say so.
            If False, export refuses quantizers without an integer kernel.
        reads: suffixes of other targets that its runtime also opens.
    """

    name: str
    suffix: str
    runtime: str
    write: Callable[[Export], Facts]
    open: Callable[[Path, int], Runtime]
    needs: tuple[str, ...] = ()
    install: str = ""
    files: Callable[[Path], list[Path]] | None = None
    folder: FolderFormat | None = None
    settings: frozenset[str] = frozenset()
    leaves_float: bool = False
    reads: tuple[str, ...] = ()

    def files_of(self, path: Path) -> list[Path]:
        """Return all files that an export to ``path`` may write.

        A detector of torchvision also has those of its heads (``paths.head_file``).
        """
        own = [path] if self.files is None else self.files(path)
        return [*own, *self.head_files_of(path)]

    def head_files_of(self, path: Path) -> list[Path]:
        """Return the files that the heads of a detector at ``path`` may have."""
        if self.folder is not None:
            return []
        heads = [head_file(path, head) for head in HEADS]
        return heads if self.files is None else [file for h in heads for file in self.files(h)]

    def holds(self, path: Path) -> bool:
        """Return whether ``path`` exists and looks like an export of this target."""
        if self.folder is not None:
            return self.folder.holds(path)
        return path.is_file() and path.suffix == self.suffix

    def refuse_settings(self, **settings: Any) -> None:
        """Raise QuietvitError if ``settings`` change one that the target does not take."""
        for name, value in settings.items():
            if value != SETTINGS[name] and name not in self.settings:
                raise QuietvitError(
                    f"{name}={value!r} has no meaning for {self.name}; leave out {_GIVEN[name]}."
                )

    def refuse_path(self, path: Path, force: bool) -> None:
        """Raise QuietvitError if ``path`` exists or cannot be written.

        ``force`` allows replacing an existing file, or a folder that is an earlier export.
        """
        if self.folder is not None:
            self.folder.refuse(path, force)
            return
        refuse_other_bytes(path)
        for file in self.files_of(path):
            if file.is_dir():
                raise QuietvitError(f"{file} is a folder; name a file, such as model{self.suffix}.")
            if file.exists() and not force:
                raise QuietvitError(
                    f"{file} exists already; choose another name, or pass force (--force) to "
                    "replace it."
                )
        refuse_unwritable(path)

    def need(self) -> None:
        """Raise QuietvitError with the install command if a package is missing."""
        need(*self.needs, install=self.install)
