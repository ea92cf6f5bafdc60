"""Names of exported files: which target a suffix means, and which files belong to an export.

Reading and writing them is the business of each target's room.
"""

from __future__ import annotations

from pathlib import Path

from quietvit.errors import QuietvitError

TARGETS = ("onnx", "openvino", "torchao")
SUFFIXES = {".onnx": "onnx", ".xml": "openvino"}
DATA = ".data"
LIMIT = 2_000_000_000
"""Bytes of weights up to which one ONNX file holds them: a protobuf message ends at 2 GiB."""


def too_large(weights: int) -> bool:
    """Whether so many bytes of weights need a file of their own beside an ONNX graph."""
    return weights > LIMIT


def data_of(path: Path) -> Path:
    """Where the weights of an ONNX file lie that is too large to hold them."""
    return path.with_name(path.name + DATA)


def parts_of(path: Path) -> list[Path]:
    """The files an artifact is made of."""
    if path.is_dir():
        return sorted(path.iterdir())
    if path.suffix == ".xml":
        return [path, path.with_suffix(".bin")]
    return [path, data_of(path)] if data_of(path).is_file() else [path]


def target_of(path: Path, to: str | None) -> str:
    """The target that ``to`` or the suffix names. Raises QuietvitError where they disagree."""
    target = SUFFIXES.get(path.suffix) if to is None else to
    if target not in TARGETS or SUFFIXES.get(path.suffix, target) != target:
        raise QuietvitError(
            f"{path} with to={to!r} names nothing that can be written: choose model.onnx "
            "(to='onnx'), model.xml (to='openvino'), or a folder (to='torchao')."
        )
    if path.suffix not in SUFFIXES and target != "torchao":
        wanted = next(suffix for suffix, name in SUFFIXES.items() if name == target)
        raise QuietvitError(
            f"{path} does not end in {wanted}, as files for {target} do; name it so."
        )
    return target
