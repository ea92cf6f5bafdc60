"""Remember that images were generated, so that a model calibrated on them can say so.

``synthesis`` generates images and marks them; ``quantization`` saves the mark with the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_MARK = "quietvit_origin"


def mark(images: Tensor, origin: Mapping[str, Any]) -> Tensor:
    """Note on a tensor how its images were made. Returns the tensor itself."""
    setattr(images, _MARK, dict(origin))
    return images


def in_words(origin: Mapping[str, Any]) -> str:
    """Return an origin as a few words, such as ``psaq, seed 0, 120 iterations``."""
    words = f"{origin['method']}, seed {origin['seed']}"
    done = origin.get("iterations_done")
    if done is None:
        return words
    early = f", ended {origin['stopped']}" if origin.get("stopped") else ""
    return f"{words}, {done} iterations{early}"


def origin_of(images: Any) -> dict[str, Any] | None:
    """Return the origin that ``mark`` noted; None for all other images.

    Slices of a marked tensor have its origin. So do mappings, tuples, lists, data sets and loaders
    that hold marked tensors. A copy of a tensor has none.
    """
    if isinstance(images, Tensor):
        base = getattr(images, "_base", None)
        stated = getattr(images, _MARK, None) or getattr(base, _MARK, None)
        return None if stated is None else dict(stated)
    for holder in ("dataset", "tensors"):  # of a DataLoader or Subset, of a TensorDataset
        if hasattr(images, holder):
            return origin_of(getattr(images, holder))
    if isinstance(images, Mapping):
        images = list(images.values())
    if isinstance(images, list | tuple):
        return next((origin for origin in map(origin_of, images) if origin is not None), None)
    return None
