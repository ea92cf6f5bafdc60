"""Check boxes when they are read: count wrong annotations, and raise above a limit.

``coco`` and ``voc`` read the files.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from quietvit.errors import QuietvitError

logger = logging.getLogger("quietvit")

MAX_BAD_BOXES = 10
"""Above 0, because COCO's own training annotations hold two boxes without area."""

_ROOM = 1.0
"""A box may extend this many pixels outside: tools round, and count pixels from 0 or 1."""


@dataclass
class Problems:
    """The wrong annotations of the data set ``name``. Up to ``limit`` of them are tolerated."""

    name: str
    limit: int = MAX_BAD_BOXES
    wrong: list[str] = field(default_factory=list)

    def add(self, what: str) -> None:
        self.wrong.append(what)

    def tell(self) -> None:
        """Log the wrong annotations. Raises QuietvitError if there are more than ``limit``."""
        if not self.wrong:
            return
        told = f"{self.name} has {len(self.wrong)} wrong annotations: {'; '.join(self.wrong[:5])}"
        told += "; ..." if len(self.wrong) > 5 else ""
        if len(self.wrong) > self.limit:
            raise QuietvitError(
                f"{told}. The limit is {self.limit}. Correct the annotations, or raise "
                "max_bad_boxes (in a recipe: task_settings.max_bad_boxes)."
            )
        logger.warning("%s. These are left out or clipped to the image.", told)


def checked_boxes(
    boxes: np.ndarray, size: tuple[int, int], names: Sequence[str], problems: Problems
) -> tuple[np.ndarray, np.ndarray]:
    """Clip boxes to their image, and find those with an area.

    Args:
        boxes: corners (N, 4) in pixels.
        size: width and height of the image in pixels.
        names: name of each box in messages, such as ``annotation 7 of a.jpg``.
        problems: collects the wrong boxes. A box without area, with NaN or with inf is left out.
            A box that extends more than a pixel outside is clipped and kept.

    Returns:
        The clipped boxes (N, 4), float32, and a mask (N,), bool, of the boxes to keep.
    """
    corners = np.asarray(boxes, np.float64).reshape(-1, 4)
    bounds = np.array([*size, *size], np.float64)
    finite = np.asarray(np.isfinite(corners).all(axis=1))
    clipped = np.clip(np.where(finite[:, None], corners, 0.0), 0.0, bounds).astype(np.float32)
    sound = finite & np.asarray((clipped[:, 2:] > clipped[:, :2]).all(axis=1))
    outside = np.abs(corners - clipped).max(1, initial=0.0) > _ROOM
    for index, name in enumerate(names):
        shown = ", ".join(f"{value:g}" for value in corners[index])
        if not sound[index]:
            problems.add(f"the box [{shown}] of {name} has no area in {size[0]} x {size[1]} pixels")
        elif outside[index]:
            problems.add(f"the box [{shown}] of {name} exceeds {size[0]} x {size[1]} pixels")
    return clipped, sound
