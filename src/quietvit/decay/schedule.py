"""Schedules: factors of a strength over the steps of an optimizer, and how they are saved.

Who multiplies by them is ``attach``'s and each regularizer's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from quietvit.decay.regularizer import number, whole_number
from quietvit.errors import QuietvitError, nearest
from quietvit.pairs import KINDS

Schedule = Callable[[int], float]
SHAPES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class StrengthSchedule:
    """A factor of a strength, counted in optimizer steps (0, 1, ...).

    0 before ``start``; then up in a straight line from 0 to 1 within ``warmup`` steps; from there
    ``constant``, or down to ``final``, which is reached at step ``total`` and kept: in a straight
    line (``linear``), or as half a cosine. ``total`` is needed for these two, and not looked at by
    ``constant``.

    Raises QuietvitError on numbers that are negative, not finite or not whole, on an unknown shape,
    and where the way down would have no step.
    """

    shape: str = "constant"
    start: int = 0
    warmup: int = 0
    total: int | None = None
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise QuietvitError(
                f"StrengthSchedule(shape={self.shape!r}) is unknown"
                f"{nearest(str(self.shape), SHAPES)}; known: {', '.join(SHAPES)}."
            )
        whole_number(self.start, "start", "StrengthSchedule", least=0)
        whole_number(self.warmup, "warmup", "StrengthSchedule", least=0)
        number(self.final, "final", "StrengthSchedule")
        if self.total is not None:
            whole_number(self.total, "total", "StrengthSchedule")
        if self.shape == "constant":
            return
        if self.total is None or self.total <= self.start + self.warmup:
            raise QuietvitError(
                f"StrengthSchedule(shape={self.shape!r}, start={self.start}, "
                f"warmup={self.warmup}, total={self.total}): give a total above start + warmup, "
                "the step at which the factor has come down to final."
            )

    def __call__(self, step: int) -> float:
        """Return the factor at ``step``."""
        since = step - self.start
        if since < 0:
            return 0.0
        if since < self.warmup:
            return since / self.warmup
        if self.shape == "constant":
            return 1.0
        assert self.total is not None
        gone = min(1.0, (since - self.warmup) / (self.total - self.start - self.warmup))
        left = 1 - gone if self.shape == "linear" else (1 + math.cos(math.pi * gone)) / 2
        return self.final + (1 - self.final) * left


def checked_schedule(
    schedule: Schedule | Mapping[str, Schedule] | None,
) -> Schedule | dict[str, Schedule] | None:
    """Return the schedule. Raises QuietvitError if it, or one of a mapping's, cannot be called."""
    if isinstance(schedule, Mapping):
        for kind, own in schedule.items():
            _checked(own, f"schedule[{kind!r}]")
        return dict(schedule)
    if schedule is not None:
        _checked(schedule, "schedule")
    return schedule


def one_schedule(schedule: Schedule | None, owner: str) -> Schedule | None:
    """Return the schedule. Raises QuietvitError where it is a mapping."""
    if isinstance(schedule, Mapping):
        raise QuietvitError(f"{owner} takes one schedule, not one for each kind of pair.")
    return schedule


def check_kinds(schedule: Mapping[str, Schedule], kinds: Collection[str]) -> None:
    """Raise QuietvitError unless a schedule for each kind has all of ``kinds``, and known ones."""
    for kind in kinds:
        if kind not in schedule:
            raise QuietvitError(
                f"pairs of kind {kind!r} have no schedule{nearest(kind, schedule)}; schedule is "
                f"given for {sorted(schedule)}."
            )
    for kind in schedule:
        if kind not in KINDS and kind not in kinds:
            raise QuietvitError(
                f"schedule names the kind {kind!r}, which is unknown{nearest(kind, KINDS)}; "
                f"known: {', '.join(KINDS)}."
            )


def factor_at(schedule: Schedule | None, step: int, name: str = "schedule") -> float:
    """Return the factor at ``step``. Raises QuietvitError if it is negative or not finite."""
    factor = 1.0 if schedule is None else float(schedule(step))
    if not (math.isfinite(factor) and factor >= 0):
        raise QuietvitError(
            f"{name}({step}) returned {factor}; it must be finite and not negative."
        )
    return factor


def described(schedule: Schedule | Mapping[str, Schedule] | None) -> Any:
    """Return what a state keeps of a schedule: of a ``StrengthSchedule`` all its numbers.

    A function cannot be told from another one: of it only that it is one.
    """
    if isinstance(schedule, Mapping):
        return {kind: described(own) for kind, own in schedule.items()}
    if schedule is None or isinstance(schedule, StrengthSchedule):
        return schedule and asdict(schedule)
    return "a function"


def _checked(schedule: Any, name: str) -> None:
    if not callable(schedule):
        raise QuietvitError(
            f"{name}={schedule!r}: give a function from the step (0, 1, ...) to a factor, such as "
            "quietvit.decay.StrengthSchedule(warmup=1000)."
        )
