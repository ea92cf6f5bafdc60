"""Which optimizer really steps, and whether training goes on without it.

``attach`` says what is done at its steps.
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
    """Return the optimizer that really steps, from inside wrappers such as accelerate's.

    Wrappers may be nested, or refer to themselves: each is visited once.
    """
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
    """Return ``unwrapped(optimizer)``. ``several`` is the remedy for a list of optimizers.

    Raises:
        QuietvitError: step hooks registered on it would never run, or it is a list.
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
            f"{type(optimizer).__name__} does not call step hooks: it is no torch.optim.Optimizer "
            "whose __init__ ran, and holds none that is known. Attach to the torch optimizer "
            "inside it, or call .step(optimizer) after each of its steps (before each if the "
            "regularizer is coupled)."
        )
    return optimizer


@torch.compiler.disable
def is_outermost(optimizer: Optimizer) -> bool:
    """Whether the hook that runs now is called by the outermost ``step`` of this optimizer.

    torch wraps ``step`` once for each class. If the step of a subclass calls the step of a base
    that is wrapped too, both call the hooks, and a regularizer would act twice::

        Nested.step (wrapped: hooks) -> super().step() = AdamW.step (wrapped: hooks again)

    We count the wrappers on the stack. A counter of calls before and after would be wrong for good
    once a step raised.
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
    """Whether this step changes nothing: the optimizer unscales by itself, and found inf."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and float(found_inf) > 0


class Follower(Protocol):
    """What a ``MissedStepHook`` asks of its regularizer."""

    in_step: bool


class WatchedParameter:
    """A parameter, and the version it had after the last optimizer step that called our hooks.

    torch counts a tensor's version up at each change in place.
    """

    def __init__(self, name: str, parameter: Tensor) -> None:
        self.name = name
        self._parameter = weakref.ref(parameter)
        self.reset()

    @property
    def parameter(self) -> Tensor:
        result = self._parameter()
        assert result is not None
        return result

    def reset(self) -> None:
        """Remember the version that the parameter has now."""
        result = self._parameter()
        self.version = result._version if result is not None else -1
        self.unseen = 0


class MissedStepHook:
    """A gradient hook that counts changes of a weight by steps that did not call our hooks.

    One such change may be a legitimate one: ``load_state_dict``, or clipping of weights. Three
    changes between backward passes in a row are the steps of another optimizer.
    """

    def __init__(self, follower: Follower, watched: WatchedParameter) -> None:
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
                f"call of {type(self._follower).__name__}: another optimizer trains it than the "
                "one it is attached to. Call detach(), then attach() to the optimizer that trains "
                "the model, or call .step(optimizer) with each step."
            )
