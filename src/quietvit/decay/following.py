"""Which optimizer really steps, and whether training goes on without it.

What is done at its steps is in ``attach``.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from quietvit.errors import QuietvitError

_WRAPPED = ("optimizer", "_base_optimizer", "base_optimizer", "_optimizer", "inner_optimizer")
_PATIENCE = 3
# What torch wraps around each step; every wrapper has this code.
_STEP = Optimizer.profile_hook_step(lambda: None).__code__


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer that really steps, out of its wrappers."""
    seen: set[int] = set()
    while id(optimizer) not in seen:
        seen.add(id(optimizer))
        for attribute in _WRAPPED:
            inner = getattr(optimizer, attribute, None)
            if inner is not None and hasattr(inner, "param_groups"):
                optimizer = inner
                break
    return optimizer


def innermost(optimizer: Any, several: str = "build and attach one for each of them") -> Optimizer:
    """Return ``unwrapped(optimizer)``.

    Raises QuietvitError where step hooks registered on it would never fire, and on a list of
    optimizers, for which ``several`` is the remedy.
    """
    if isinstance(optimizer, (list, tuple)):
        raise QuietvitError(
            f"attach() was given a {type(optimizer).__name__} of {len(optimizer)}, but one "
            f"regularizer follows one optimizer; {several}."
        )
    optimizer = unwrapped(optimizer)
    hooked = getattr(type(optimizer).step, "hooked", False) if hasattr(optimizer, "step") else False
    if not isinstance(optimizer, Optimizer) or not hooked:
        raise QuietvitError(
            f"{type(optimizer).__name__} does not call step hooks (it is no torch.optim.Optimizer "
            "whose __init__ ran, and holds none that is known); attach to the torch optimizer "
            "inside it, or call .step(optimizer) after each of its steps (before, where the "
            "regularizer is coupled)."
        )
    return optimizer


@torch.compiler.disable
def is_outermost(optimizer: Optimizer) -> bool:
    """Whether a hook that runs now is called by the outermost ``step`` of this optimizer.

    torch wraps ``step`` class by class. Where a subclass's step calls that of a base that is
    wrapped too, hooks are called by both. The stack is asked, for a count of calls before and after
    would be off for good once a step raised.
    """
    own = (vars(base).get("step") for base in type(optimizer).__mro__)
    if sum(bool(getattr(step, "hooked", False)) for step in own) < 2:
        return True
    running, frame = 0, inspect.currentframe()
    while frame is not None:
        if frame.f_code is _STEP and frame.f_locals.get("self") is optimizer:
            running += 1
        frame = frame.f_back
    return running < 2


def is_skipped(optimizer: Optimizer) -> bool:
    """Whether this step of an optimizer that unscales gradients itself changes nothing."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and float(found_inf) > 0


class Follower(Protocol):
    """What a ``Watch`` asks of the one it belongs to."""

    in_step: bool


class Watched:
    """A parameter and the version it had after the last step we saw."""

    def __init__(self, name: str, parameter: Tensor) -> None:
        self.name = name
        self._parameter = weakref.ref(parameter)
        self.reset()

    @property
    def parameter(self) -> Tensor:
        found = self._parameter()
        assert found is not None
        return found

    def reset(self) -> None:
        """Take the version that the parameter has now."""
        found = self._parameter()
        self.version = found._version if found is not None else -1
        self.unseen = 0


class Watch:
    """Counts changes of a weight between backward passes that no hook of ours accompanied."""

    def __init__(self, follower: Follower, watched: Watched) -> None:
        self._follower = follower
        self._watched = watched

    @torch.compiler.disable
    def __call__(self, parameter: Tensor) -> None:
        watched = self._watched
        if self._follower.in_step or parameter._version == watched.version:
            return
        watched.version = parameter._version
        watched.unseen += 1
        if watched.unseen >= _PATIENCE:
            raise QuietvitError(
                f"{watched.name} changed {watched.unseen} times between backward passes without a "
                f"call of {type(self._follower).__name__}: another optimizer steps than the one it "
                "is attached to. Call detach() and attach() to the optimizer that trains the "
                "model, or call .step(optimizer) with each step."
            )
