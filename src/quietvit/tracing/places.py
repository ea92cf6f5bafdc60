"""The place of a call in a forward pass, by which it is found again in the next pass.

Which calls are counted is decided in ``ops``; what is recorded about them in ``record``.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

# Families whose calls must be the same in every pass. How many calls of the others a pass makes may
# depend on the images: a detector adds offsets to each box, and squashes the scores of each image.
STEADY = frozenset({"matmul", "norm"})


class Place(NamedTuple):
    """``ordinal``: how many calls of the same family came before.

    In families that are not ``STEADY`` only calls since the last product count, and ``after`` is
    the number of products so far. It is 0 in the others.
    """

    ordinal: int
    after: int = 0


class Places:
    """Gives each call of a pass its place."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._since: Counter[str] = Counter()

    def next(self, family: str) -> Place:
        """The place of the next call of a family."""
        if family == "matmul":
            self._since.clear()
        if family in STEADY:
            self.counts[family] += 1
            return Place(self.counts[family] - 1)
        self._since[family] += 1
        return Place(self._since[family] - 1, self.counts["matmul"])
