"""What the recipe sections of regularizers share: strength, schedule in epochs, every n-th step.

The section of a regularizer stands in the regularizer's own module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag
from torch import Tensor

from quietvit.decay.schedule import StrengthSchedule
from quietvit.section import Section

Strength = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]

# Pydantic judges a value by the branch of a union that is named here, and not by each in turn.
# The names stand in the location of an error; ``train.recipe`` takes them out.
ONE, EACH = "<one>", "<one for each kind>"


@dataclass(frozen=True)
class RunFacts:
    """What a regularizer may need to know of the training run it is built for.

    ``images``: returns n training images (n, 3, H, W) as the model takes them. ``rates``: returns
    the learning rate of each step.
    """

    images: Callable[[int], Tensor]
    steps_per_epoch: int
    total_steps: int
    rates: Callable[[], Sequence[float]]


class StrengthScheduleConfig(Section):
    """A factor of a strength over the run, in epochs: see ``quietvit.StrengthSchedule``.

    It is 0 before ``start_epoch``, then rises to 1 within ``warmup_epochs``. Then it is constant,
    or falls to ``final`` at the end of the run.
    """

    shape: Literal["constant", "linear", "cosine"] = "constant"
    """How it falls after the warm-up."""
    start_epoch: float = Field(default=0.0, ge=0)
    """Epochs before the warm-up."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Epochs from 0 to 1."""
    final: float = Field(default=0.0, ge=0)
    """The factor at the end of the run, for ``linear`` and ``cosine``."""

    def late(self, epochs: int) -> str:
        """Return why the schedule does not fit into ``epochs``; "" if it does."""
        if self.start_epoch >= epochs:
            return f"start_epoch ({self.start_epoch:g}) must be below epochs ({epochs})"
        up = self.start_epoch + self.warmup_epochs
        if self.shape != "constant" and up >= epochs:
            return (
                f"start_epoch + warmup_epochs ({up:g}) must be below epochs ({epochs}), or shape "
                f"{self.shape!r} has no way down"
            )
        return ""

    def in_steps(self, facts: RunFacts) -> StrengthSchedule:
        """Return the schedule in optimizer steps."""
        return StrengthSchedule(
            shape=self.shape,
            start=round(self.start_epoch * facts.steps_per_epoch),
            warmup=round(self.warmup_epochs * facts.steps_per_epoch),
            total=None if self.shape == "constant" else facts.total_steps,
            final=self.final,
        )


def _strengths(value: Any) -> str:
    return EACH if isinstance(value, Mapping) else ONE


def _schedules(value: Any) -> str:
    """A table of tables gives one schedule a kind; an empty table is one without settings."""
    holds_tables = isinstance(value, Mapping) and any(
        isinstance(part, Mapping | StrengthScheduleConfig) for part in value.values()
    )
    return EACH if holds_tables else ONE


Strengths = Annotated[
    Annotated[Strength, Tag(ONE)] | Annotated[dict[str, Strength], Tag(EACH)],
    Discriminator(_strengths),
]
Schedules = Annotated[
    Annotated[StrengthScheduleConfig, Tag(ONE)]
    | Annotated[dict[str, StrengthScheduleConfig], Tag(EACH)],
    Discriminator(_schedules),
]


class RegularizerConfig(Section):
    """The recipe section of a regularizer. Its keys are the arguments of the regularizer's class.

    Give ``strength`` a default, so that ``decay.<name>={}`` is enough. A strength of 0 is off.
    """

    strength: Strength
    """0 is off."""
    schedule: StrengthScheduleConfig | None = None
    """Factor of the strength over the run; none: 1 at all steps."""

    @property
    def active(self) -> bool:
        """Whether the regularizer is built at all."""
        return self.strength > 0

    def arguments(self, facts: RunFacts) -> dict[str, Any]:
        """Return the keyword arguments of the regularizer's class, schedules in steps."""
        values = {key: getattr(self, key) for key in type(self).model_fields}
        schedule = values["schedule"]
        if isinstance(schedule, dict):
            values["schedule"] = {kind: own.in_steps(facts) for kind, own in schedule.items()}
        elif schedule is not None:
            values["schedule"] = schedule.in_steps(facts)
        return values

    def restore(self, regularizer: Any, state: Mapping[str, Any]) -> None:
        """Load the state of a checkpoint into the regularizer that this section built."""
        regularizer.load_state_dict(state)


class WeightRegularizerConfig(RegularizerConfig):
    """The recipe section of a regularizer that acts on weights at the optimizer's steps."""

    every: int = Field(default=1, ge=1)
    """Act at every n-th step, n times as strong."""
