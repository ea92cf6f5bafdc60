"""``Budget``: the time that a search may take, and the error when it is over.

The callers decide what still fits.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class OutOfTimeError(Exception):
    """The time is over. ``advise`` catches it and keeps what was measured."""


class Budget:
    """A number of seconds from now on. ``now`` gives the time in seconds."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.now = seconds, now
        self._start = now()

    @property
    def spent(self) -> float:
        return self.now() - self._start

    @property
    def left(self) -> float:
        return self.seconds - self.spent

    def check(self) -> None:
        """Raise OutOfTimeError if no time is left. Call it before each piece of work."""
        if self.left <= 0:
            raise OutOfTimeError
