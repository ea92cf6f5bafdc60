"""Read, turn and encode the masks of objects with faster-coco-eval's mask functions.

``coco`` reads the annotations, ``average_precision`` computes AP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from quietvit.detection.checks import Problems
from quietvit.errors import QuietvitError

Polygons = tuple[np.ndarray, ...]
RLE = Mapping[str, Any]
"""COCO's compressed run lengths: ``size`` (height, width) and ``counts`` (bytes)."""


ON = 0.5
"""Probability from which a pixel is on the object, as in Mask R-CNN (arXiv 1703.06870)."""


@dataclass(frozen=True)
class Outline:
    """The mask of one object as it is annotated, in pixels of the stored image.

    ``shape`` is polygons, each x1, y1, x2, y2, ... (float64), or an ``RLE``. A bitmap takes much
    more memory, so it is made when the image is read. ``what`` names the object in messages.
    """

    what: str
    shape: Polygons | RLE

    @property
    def content(self) -> bytes:
        """The bytes that ``shape`` consists of."""
        if isinstance(self.shape, tuple):
            return b"".join(polygon.tobytes() for polygon in self.shape)
        return bytes(self.shape["counts"])


def mask_functions() -> Any:
    """Return faster-coco-eval's mask module. Raises QuietvitError if it is not installed."""
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise QuietvitError(
            "masks need the package faster-coco-eval. Run: pip install 'quietvit[detection]'."
        ) from error
    return mask


def outline_of(
    segmentation: Any, size: tuple[int, int], what: str, file: str, problems: Problems
) -> Outline | None:
    """Read the ``segmentation`` of an annotation: a list of polygons, or run lengths (RLE).

    Args:
        size: width and height of the image in pixels.
        what: name of the object in messages, such as ``annotation 7 of a.jpg``.
        file: name of the annotation file in messages.
        problems: collects wrong masks. None is returned for them.

    Raises:
        QuietvitError: there is no segmentation.
    """
    if not segmentation:
        raise QuietvitError(
            f"{what} in {file} has no segmentation, and a mask detector needs the mask of every "
            "object. Add it, or use a detector of boxes (task_settings.detector: faster_rcnn)."
        )
    try:
        shape = (
            _run_lengths(segmentation, size)
            if isinstance(segmentation, Mapping)
            else _polygons(segmentation, size)
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        problems.add(f"the segmentation of {what} is wrong ({_told(error)})")
        return None
    return Outline(what, shape)


def bitmaps(outlines: Sequence[Outline], size: tuple[int, int]) -> np.ndarray:
    """Draw outlines on an image of ``size`` (width, height): (N, height, width), uint8, 0 or 1.

    Raises:
        QuietvitError: the run lengths of an object are damaged.
    """
    width, height = size
    functions = mask_functions()
    drawn = np.zeros((len(outlines), height, width), np.uint8)
    for bitmap, outline in zip(drawn, outlines, strict=True):
        shape = outline.shape
        try:
            if isinstance(shape, tuple):
                listed = [polygon.tolist() for polygon in shape]
                shape = functions.merge(functions.frPyObjects(listed, height, width))
            bitmap[:] = functions.decode(dict(shape))
        except (ValueError, RuntimeError) as error:
            raise QuietvitError(
                f"the segmentation of {outline.what} could not be decoded ({error}). Correct or "
                "remove this annotation."
            ) from error
    return drawn


def turned_bitmaps(masks: np.ndarray, orientation: int) -> np.ndarray:
    """Turn bitmaps (N, height, width) of a stored image as EXIF's ``orientation`` (1 to 8) says."""
    if orientation in (2, 3, 7, 8):  # as dataset.turned does with boxes
        masks = masks[:, :, ::-1]
    if orientation in (3, 4, 6, 7):
        masks = masks[:, ::-1]
    if orientation >= 5:
        masks = masks.swapaxes(1, 2)
    return np.ascontiguousarray(masks)


def encoded(masks: Tensor) -> list[RLE]:
    """Encode masks (N, height, width), bool or 0 and 1, as COCO's compressed run lengths."""
    functions = mask_functions()
    # One at a time: a copy of all of them in the order of columns would double the memory.
    return [
        functions.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8))) for mask in masks
    ]


def _polygons(polygons: Any, size: tuple[int, int]) -> Polygons:
    found = tuple(np.array(polygon, np.float64) for polygon in polygons)
    room = np.array(size, np.float64)
    for points in found:
        if points.ndim != 1 or len(points) < 6 or len(points) % 2:
            raise ValueError(f"a polygon needs at least 3 points (x, y), not {points.size} numbers")
        pairs = points.reshape(-1, 2)
        # The library's memory grows with the length of an edge, and it crashes at NaN.
        if not (np.isfinite(pairs).all() and (pairs > -room).all() and (pairs < 2 * room).all()):
            raise ValueError(f"a polygon lies outside the image of {size[0]} x {size[1]} pixels")
    return found


def _run_lengths(rle: Mapping[str, Any], size: tuple[int, int]) -> RLE:
    width, height = size
    counts, stated = rle["counts"], [int(side) for side in rle["size"]]
    if stated != [height, width]:
        raise ValueError(
            f"its size (height, width) is {stated}, and the image has {height} x {width} pixels"
        )
    if isinstance(counts, str | bytes):
        code = counts.encode("ascii") if isinstance(counts, str) else counts
        return {"size": stated, "counts": code}
    if sum(counts) != math.prod(size):
        raise ValueError(f"its counts add up to {sum(counts)}, not to {height} x {width} pixels")
    coded: RLE = mask_functions().frPyObjects({"size": stated, "counts": counts}, height, width)
    return coded


def _told(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)
