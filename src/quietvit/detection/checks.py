"""Checks of boxes as they are read: what is wrong is counted, and refused above a limit.

How files of annotations are read is the matter of ``coco`` and ``voc``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from quietvit.errors import QuietvitError

logger = logging.getLogger("quietvit")

MAX_BAD_BOXES = 10
"""COCO's own training annotations hold two boxes without area."""

_ROOM = 1.0
"""Pixels by which a box may reach outside: tools round, and count from 0 or 1."""


@dataclass
class Problems:
    """What is wrong in the annotations of ``name``; at most ``limit`` of it is passed over."""

    name: str
    limit: int = MAX_BAD_BOXES
    found: list[str] = field(default_factory=list)

    def add(self, what: str) -> None:
        self.found.append(what)

    def tell(self) -> None:
        """Log what was left out. Raises QuietvitError where it is more than ``limit``."""
        if not self.found:
            return
        told = f"{self.name} has {len(self.found)} wrong annotations: {'; '.join(self.found[:5])}"
        told += "; ..." if len(self.found) > 5 else ""
        if len(self.found) > self.limit:
            raise QuietvitError(
                f"{told}. At most {self.limit} are left out. Correct them, or allow more "
                "(max_bad_boxes; in a recipe task_settings.max_bad_boxes)."
            )
        logger.warning("%s. They are left out or clipped to the image.", told)


def checked_boxes(
    boxes: np.ndarray, size: tuple[int, int], names: Sequence[str], problems: Problems
) -> tuple[np.ndarray, np.ndarray]:
    """Clip boxes to their image, and tell which have an area.

    Args:
        boxes: corners (N, 4) in pixels.
        size: width and height of the image.
        names: names each box in messages, such as ``annotation 7 of a.jpg``.
        problems: receives boxes that are no numbers, have no area, or reach more than a pixel
            outside. Those that reach outside are clipped, the others are left out.

    Returns:
        The clipped boxes (N, 4), float32, and which of them to keep (N,), bool.
    """
    found = np.asarray(boxes, np.float64).reshape(-1, 4)
    bounds = np.array([*size, *size], np.float64)
    finite = np.asarray(np.isfinite(found).all(axis=1))
    clipped = np.clip(np.where(finite[:, None], found, 0.0), 0.0, bounds).astype(np.float32)
    sound = finite & np.asarray((clipped[:, 2:] > clipped[:, :2]).all(axis=1))
    outside = np.abs(found - clipped).max(1, initial=0.0) > _ROOM
    for index, name in enumerate(names):
        shown = ", ".join(f"{value:g}" for value in found[index])
        if not sound[index]:
            problems.add(f"the box [{shown}] of {name} has no area in {size[0]} x {size[1]} pixels")
        elif outside[index]:
            problems.add(f"the box [{shown}] of {name} leaves {size[0]} x {size[1]} pixels")
    return clipped, sound
