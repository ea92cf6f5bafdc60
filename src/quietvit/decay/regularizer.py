"""What every regularizer of the library offers, whatever it acts on.

Only the common shape and the check of a strength; how one follows an optimizer is in ``attach``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, Self, runtime_checkable

from torch.optim import Optimizer

from quietvit.errors import QuietvitError


@runtime_checkable
class Regularizer(Protocol):
    """Something that quiets weights or activations while an optimizer trains.

    ``steps`` counts the optimizer's steps since ``attach``, over resumes. All regularizers raise
    QuietvitError where they are attached twice, where a saved state has other settings, and where
    training goes on without them.
    """

    steps: int

    def attach(self, optimizer: Optimizer) -> Self:
        """Follow every step of ``optimizer`` from now on. Returns itself."""
        ...

    def detach(self) -> None:
        """Stop following. Does nothing if not attached."""
        ...

    def penalty(self) -> float:
        """Return the penalty as it is now, strength not included. Synchronizes the device."""
        ...

    def penalties(self) -> dict[str, float]:
        """Return the parts of ``penalty`` by the names of what they belong to."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what an exact resume needs: numbers, strings and tensors only."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave. Raises QuietvitError where settings differ."""
        ...


def one_strength(strength: Any, owner: str) -> float:
    """Return a strength as a float. Raises QuietvitError if it is not finite and at least 0."""
    return number(strength, "strength", owner)


def number(value: Any, name: str, owner: str, *, least: float = 0.0) -> float:
    """Return ``value`` as a float. Raises QuietvitError if not finite or below ``least``."""
    try:
        found = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not (math.isfinite(found) and found >= least):
        raise QuietvitError(
            f"{owner}({name}={value!r}): give one finite number, {least:g} or more."
        )
    return found


def whole_number(value: Any, name: str, owner: str, *, least: int = 1) -> int:
    """Return ``value``. Raises QuietvitError if it is no int, or below ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise QuietvitError(f"{owner}({name}={value!r}): give a whole number, {least} or more.")
    return value


def checked_state(owner: object, mine: Mapping[str, Any], state: Mapping[str, Any]) -> int:
    """Return the saved step counter. Raises QuietvitError where the settings saved are others."""
    kind = type(owner).__name__
    if "steps" not in state or "settings" not in state:
        raise QuietvitError(
            f"this is no state of a {kind}: it has the keys {sorted(state)}, not 'steps' and "
            "'settings'."
        )
    saved = dict(state["settings"])
    for key in sorted(mine.keys() | saved.keys()):
        if mine.get(key) != saved.get(key):
            raise QuietvitError(
                f"the state was saved with {key}={saved.get(key)!r}, this {kind} has "
                f"{key}={mine.get(key)!r}; build it with the same settings, or start without "
                "loading the state."
            )
    return int(state["steps"])


def shown(owner: Any, settings: Mapping[str, Any], attached: bool) -> str:
    """Return the settings of a regularizer, and whether it follows an optimizer, in one line."""
    parts = [f"{key}={value!r}" for key, value in settings.items() if value is not None]
    state = f"attached, {owner.steps} steps" if attached else "not attached"
    return f"{type(owner).__name__}({', '.join(parts)}; {state})"
