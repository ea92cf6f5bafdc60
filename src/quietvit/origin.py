"""Remember that images were generated, so that a model calibrated on them can say so.

``synthesis`` generates images and marks them; ``quantization`` saves the mark with the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_MARK = "quietvit_origin"

Origin = dict[str, Any] | None
"""How images were generated, as ``mark`` noted it; None for all other images."""
Origins = tuple[Origin, Origin]
"""The origin of the images that calibrate, and of those that measure."""


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


def counted(count: int, origin: Origin) -> str:
    """Return ``32 images`` or ``32 generated images``."""
    return f"{count} images" if origin is None else f"{count} generated images"


def provenance(origins: Origins) -> list[str]:
    """Return lines that say how images were generated, none for real images."""
    calibrating, measuring = origins
    told = []
    if calibrating is not None:
        told.append(f"calibration images generated without data: {in_words(calibrating)}")
    if measuring is not None:
        told.append(f"measured on images generated without data: {in_words(measuring)}")
        told.append("generated images are not yours: measure again on real ones if you can")
    return told


def origins_of(images: Any, calibration: Any = None) -> Origins:
    """Return the origins of both kinds of images. Without ``calibration``, ``images`` are both."""
    return origin_of(images if calibration is None else calibration), origin_of(images)


def origin_of(images: Any) -> Origin:
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
