"""Schedules: factors of a strength over the steps of an optimizer, and how they are saved.

``attach`` and each regularizer multiply by them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from quietvit.decay.checks import number, whole_number
from quietvit.errors import QuietvitError, nearest
from quietvit.pairs import KINDS

Schedule = Callable[[int], float]
SHAPES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class StrengthSchedule:
    """A factor of a strength, counted in optimizer steps (0, 1, ...).

    It is 0 before ``start``, then rises in a straight line from 0 to 1 within ``warmup`` steps.
    Then it stays 1 (``constant``), or falls to ``final`` at step ``total`` and stays there: in a
    straight line (``linear``) or as half a cosine (``cosine``).

    Args:
        shape: ``constant``, ``linear`` or ``cosine``.
        start: steps before the warm-up.
        warmup: steps of the warm-up.
        total: the step at which ``final`` is reached; ``constant`` does not need it.
        final: the last factor, 0 or more.

    Raises:
        QuietvitError: a number is negative, not finite or not whole, the shape is unknown, or there
            is no step between the warm-up and ``total``.
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
    """Return the schedule, or the mapping of schedules. Raises QuietvitError if not callable."""
    if isinstance(schedule, Mapping):
        for kind, own in schedule.items():
            _checked(own, f"schedule[{kind!r}]")
        return dict(schedule)
    if schedule is not None:
        _checked(schedule, "schedule")
    return schedule


def one_schedule(schedule: Schedule | None, owner: str) -> Schedule | None:
    """Return the schedule. Raises QuietvitError if it is a mapping."""
    if isinstance(schedule, Mapping):
        raise QuietvitError(
            f"{owner}(schedule=...) takes one function, not one for each kind of pair."
        )
    return schedule


def check_kinds(schedule: Mapping[str, Schedule], kinds: Collection[str]) -> None:
    """Raise QuietvitError if one of ``kinds`` has no schedule, or an unknown kind has one."""
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


def schedule_state(schedule: Schedule | Mapping[str, Schedule] | None) -> Any:
    """Return what a saved state keeps of a schedule: the numbers of a ``StrengthSchedule``.

    Two functions cannot be compared, so any function is saved as "a function".
    """
    if isinstance(schedule, Mapping):
        return {kind: schedule_state(own) for kind, own in schedule.items()}
    if schedule is None or isinstance(schedule, StrengthSchedule):
        return schedule and asdict(schedule)
    return "a function"


def _checked(schedule: Any, name: str) -> None:
    if not callable(schedule):
        raise QuietvitError(
            f"{name}={schedule!r}: give a function from the step (0, 1, ...) to a factor, such as "
            "quietvit.StrengthSchedule(warmup=1000)."
        )
