"""Name the files beside an exported file: large weights, and the heads of a detector."""

from __future__ import annotations

from pathlib import Path

DATA = ".data"
LIMIT = 2_000_000_000
"""The most bytes of weights in one ONNX file. A protobuf message ends at 2 GiB."""


def too_large(weights: int) -> bool:
    """Return whether this many bytes of weights need a file of their own."""
    return weights > LIMIT


def data_of(path: Path) -> Path:
    """Return the path of the weights' own file, next to the ONNX file ``path``."""
    return path.with_name(path.name + DATA)


def head_file(path: Path, head: str) -> Path:
    """Return the path of a head's own file, next to the file of the detector at ``path``.

    ``head`` is a key of ``detection.static_parts.HEADS``.
    """
    return path.with_name(f"{path.stem}.{head}{path.suffix}")
