"""The place of a call in a forward pass, which identifies it in the next pass.

``ops`` decides which calls are counted, and ``record`` what is stored about them.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

# Families whose calls must be the same in every pass. The number of other calls may depend on the
# images: a detector adds offsets to each box, and applies a sigmoid to the scores of each image.
STEADY = frozenset({"matmul", "norm"})


class Place(NamedTuple):
    """``ordinal``: the number of earlier calls of the same family; ``after`` is 0.

    In families that are not ``STEADY``, ``ordinal`` restarts at each product, and ``after`` is the
    number of products so far. Example: the second add behind the fifth product is Place(1, 5).
    """

    ordinal: int
    after: int = 0


class Places:
    """Counts the calls of a pass and gives each its place."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._since: Counter[str] = Counter()

    def next(self, family: str) -> Place:
        """Count a call of ``family`` and return its place."""
        if family == "matmul":
            self._since.clear()
        if family in STEADY:
            self.counts[family] += 1
            return Place(self.counts[family] - 1)
        self._since[family] += 1
        return Place(self._since[family] - 1, self.counts["matmul"])
