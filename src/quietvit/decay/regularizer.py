"""What all regularizers share: the protocol, and their settings, step counter and saved state.

At which moment of a step they act is in ``attach`` (on weights) and ``tweo`` (on activations).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol, Self, runtime_checkable

from torch import nn
from torch.optim import Optimizer

from quietvit.decay.schedule import Schedule, checked_schedule, factor_at, schedule_state
from quietvit.errors import QuietvitError
from quietvit.signatures import show_plain_types
from quietvit.tracing import plain_model


@runtime_checkable
class Regularizer(Protocol):
    """Something that keeps weights or activations small while an optimizer trains.

    ``steps`` counts the optimizer's steps since ``attach``, resumed runs included. All regularizers
    raise QuietvitError if they are attached twice, if a saved state has other settings, and if
    training goes on without them.

    Two methods are optional. ``loss()`` returns a term of the loss, strength included: a scalar
    tensor. ``figures()`` returns numbers to log beside the penalty, by name.
    """

    steps: int

    def attach(self, optimizer: Optimizer) -> Self:
        """Follow every step of ``optimizer`` from now on. Returns itself."""
        ...

    def detach(self) -> None:
        """Stop following. Does nothing if not attached."""
        ...

    def penalty(self) -> float:
        """Return the current penalty, strength not included. Synchronizes the device."""
        ...

    def penalties(self) -> dict[str, float]:
        """Return the parts of ``penalty`` by the names of what they belong to."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what an exact resume needs: numbers, strings and tensors only."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a ``state_dict``. Raises QuietvitError if the settings differ."""
        ...


class BaseRegularizer(ABC):
    """The base of every regularizer: it follows one optimizer, counts steps, saves and resumes.

    Copies and pickles of a regularizer, or of a model that holds it, are attached to nothing.
    """

    def __init__(
        self, model: nn.Module, *, schedule: Schedule | Mapping[str, Schedule] | None
    ) -> None:
        self.model = plain_model(model)
        self.schedule = checked_schedule(schedule)
        self.steps = 0
        self._handles: list[Any] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        show_plain_types(cls)

    @abstractmethod
    def attach(self, optimizer: Optimizer) -> Self:
        """Follow every step of ``optimizer`` from now on. Returns itself."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the settings that a saved state must agree with: numbers and strings."""

    @abstractmethod
    def penalties(self) -> dict[str, float]:
        """Return the parts of ``penalty`` by the names of what they belong to."""

    def penalty(self) -> float:
        """Return the sum of ``penalties``, strength not included. Synchronizes the device."""
        return math.fsum(self.penalties().values())

    def detach(self) -> None:
        """Stop following the optimizer. Does nothing if not attached."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """Return the step counter and the settings: numbers, strings and tensors only."""
        return {"steps": self.steps, "settings": self._all_settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a ``state_dict``. Raises QuietvitError if it was saved with other settings."""
        own, settings = type(self).__name__, self._all_settings()
        if "steps" not in state or "settings" not in state:
            raise QuietvitError(
                f"this is no state of a {own}: it has the keys {sorted(state)}, not 'steps' and "
                "'settings'. Load what state_dict() returned."
            )
        saved = dict(state["settings"])
        for key in sorted(settings.keys() | saved.keys()):
            if settings.get(key) != saved.get(key):
                raise QuietvitError(
                    f"the state was saved with {key}={saved.get(key)!r}, this {own} has "
                    f"{key}={settings.get(key)!r}. Build it with the saved settings, or start "
                    "without loading the state."
                )
        self.steps = int(state["steps"])

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold: everything but hooks, as after ``detach``."""
        return self.__dict__ | {"_handles": []}

    def __repr__(self) -> str:
        parts = [f"{k}={v!r}" for k, v in self._all_settings().items() if v is not None]
        state = f"attached, {self.steps} steps" if self._handles else "not attached"
        return f"{type(self).__name__}({', '.join(parts)}; {state})"

    def _all_settings(self) -> dict[str, Any]:
        schedule = {} if self.schedule is None else {"schedule": schedule_state(self.schedule)}
        return self.settings() | schedule

    def _factor(self) -> float:
        """The schedule's factor now; 1 where each kind of pair has a schedule of its own."""
        shared = None if isinstance(self.schedule, Mapping) else self.schedule
        return factor_at(shared, self.steps)

    def _refuse_if_attached(self) -> None:
        if self._handles:
            raise QuietvitError(
                f"this {type(self).__name__} is already attached to an optimizer. Call detach() "
                "first, or build a second one."
            )
