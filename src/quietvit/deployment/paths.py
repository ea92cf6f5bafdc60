"""Where the weights of an ONNX graph lie: in its file, or beside it where they are too large."""

from __future__ import annotations

from pathlib import Path

DATA = ".data"
LIMIT = 2_000_000_000
"""Bytes of weights up to which one ONNX file holds them: a protobuf message ends at 2 GiB."""


def too_large(weights: int) -> bool:
    """Whether so many bytes of weights need a file of their own beside an ONNX graph."""
    return weights > LIMIT


def data_of(path: Path) -> Path:
    """Where the weights of an ONNX file lie that is too large to hold them."""
    return path.with_name(path.name + DATA)
