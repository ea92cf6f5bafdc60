"""``Target``: all that quietvit knows about one kind of exported file, and what it is given.

The targets lie in ``for_onnx``, ``for_openvino`` and ``for_torchao``; ``targets`` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quietvit.deployment.extras import need
from quietvit.deployment.facts import Facts
from quietvit.deployment.grids import Grid
from quietvit.deployment.runtime import Runtime
from quietvit.errors import QuietvitError
from quietvit.files import refuse_other_bytes, refuse_unwritable
from quietvit.quantization import QuantizedModel
from quietvit.quantization.folder import FolderFormat

SETTINGS = {"opset": 21, "signed": False}
"""Settings of ``export`` that only some targets take, and their defaults."""
_GIVEN = {"opset": "opset (--opset)", "signed": "signed (--signed) and as_='symmetric'"}


@dataclass(frozen=True)
class Export:
    """One export, as ``Target.write`` gets it.

    ``quantized``: the model in float32, on the CPU or not. ``facts``: what must travel in the file
    as ``facts.to_json()``. ``grids``: the integers of each quantizer, by the key of its slot.
    ``onnx_graph(at_once)``: the model as an ``onnx_ir.Model`` with its facts, for targets that are
    made from ONNX. ``at_once``: the runtime has integer convolutions where the output is quantized.
    """

    quantized: QuantizedModel
    path: Path
    facts: Facts
    grids: Mapping[str, Grid]
    onnx_graph: Callable[[bool], tuple[Any, Facts]]


def _itself(path: Path) -> list[Path]:
    return [path]


@dataclass(frozen=True)
class Target:
    """One kind of exported file. ``register_target`` makes it known to every command.

    Args:
        name: what ``export(to=...)`` and ``--to`` call it.
        suffix: how its paths end, such as ``.onnx``.
        runtime: what ``open_runtime(runtime=...)`` and ``--runtime`` call its runtime.
        write: writes ``export.path`` whole, and returns the facts as they are in the file.
        open: opens a path, with a number of threads (0: the runtime's choice). Raises
            QuietvitError for a file that is cut short or foreign.
        needs: packages that must be there to write it.
        install: what pip installs to have them.
        files: all files that an export to a path may write. Not all of them need to be there.
        folder: the format of a target that is a folder; None for a file.
        settings: which of ``SETTINGS`` it takes; others are refused.
        leaves_float: it leaves products in float that have no integer kernel, and says so in the
            facts. Otherwise export refuses quantizers without an integer kernel.
        reads: suffixes of other targets that its runtime opens, too.
    """

    name: str
    suffix: str
    runtime: str
    write: Callable[[Export], Facts]
    open: Callable[[Path, int], Runtime]
    needs: tuple[str, ...] = ()
    install: str = ""
    files: Callable[[Path], list[Path]] = _itself
    folder: FolderFormat | None = None
    settings: frozenset[str] = frozenset()
    leaves_float: bool = False
    reads: tuple[str, ...] = ()

    def holds(self, path: Path) -> bool:
        """Whether ``path`` is there, and is an export of this target as far as names tell."""
        if self.folder is not None:
            return self.folder.holds(path)
        return path.is_file() and path.suffix == self.suffix

    def refuse_settings(self, **given: Any) -> None:
        """Raise QuietvitError where one of ``given`` is changed and the target does not take it."""
        for name, value in given.items():
            if value != SETTINGS[name] and name not in self.settings:
                raise QuietvitError(
                    f"{name}={value!r} has no meaning for {self.name}; leave {_GIVEN[name]} out."
                )

    def refuse_path(self, path: Path, force: bool) -> None:
        """Raise QuietvitError where ``path`` cannot be written, or something is there already.

        With ``force`` an earlier export is replaced. A folder is replaced only if it is one.
        """
        if self.folder is not None:
            self.folder.refuse(path, force)
            return
        refuse_other_bytes(path)
        for file in self.files(path):
            if file.is_dir():
                raise QuietvitError(f"{file} is a folder; name a file, such as model{self.suffix}.")
            if file.exists() and not force:
                raise QuietvitError(
                    f"{file} exists already; choose another name, or pass force (--force) to "
                    "replace it."
                )
        refuse_unwritable(path)

    def need(self) -> None:
        """Raise QuietvitError, saying what to install, where a package is missing."""
        need(*self.needs, install=self.install)
