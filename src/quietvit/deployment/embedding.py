"""``Embedding``: the output of an exported encoder or backbone for one image."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quietvit.files import write_atomic


@dataclass(frozen=True, eq=False)
class Embedding:
    """The output of a file without class scores: an embedding or a feature map.

    ``name`` is the output's name. ``values`` is float32 without the batch, (dim,) for an embedding.
    """

    name: str
    values: np.ndarray

    def __str__(self) -> str:
        first = ", ".join(f"{value:.4g}" for value in self.values.flat[:5])
        more = ", ..." if self.values.size > 5 else ""
        shape = " x ".join(map(str, self.values.shape))
        return f"{self.name}, {shape} values: {first}{more}"

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """Return name, shape and values (nested lists) for JSON."""
        shape = list(self.values.shape)
        return {"output": self.name, "shape": shape, "values": self.values.tolist()}


def save_embeddings(path: str | Path, embeddings: list[Embedding]) -> Path:
    """Write all values, (images, ...), to a .npy file for ``numpy.load``."""
    content = io.BytesIO()
    np.save(content, np.stack([embedding.values for embedding in embeddings]), allow_pickle=False)
    return write_atomic(path, content.getvalue())
