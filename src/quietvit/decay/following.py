"""Find the optimizer that really steps, and notice training that bypasses it.

``attach`` decides what happens at its steps.
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
# torch wraps each ``step`` in a closure. All these wrappers share this code object.
_STEP = Optimizer.profile_hook_step(lambda: None).__code__


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer that really steps, without wrappers such as accelerate's.

    Wrappers may be nested or refer to themselves. Each is visited once.
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
    """Return ``unwrapped(optimizer)``. ``several`` is the remedy if it is a list of optimizers.

    Raises QuietvitError for a list, or for an optimizer that would never call our step hooks.
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
            f"{type(optimizer).__name__} does not call step hooks. It is not a torch.optim."
            "Optimizer whose __init__ ran, nor a known wrapper of one. Attach to the torch "
            "optimizer inside it, or call .step(optimizer) after each of its steps (before each if "
            "the regularizer is coupled)."
        )
    return optimizer


@torch.compiler.disable
def is_outermost(optimizer: Optimizer) -> bool:
    """Return whether the outermost ``step`` of this optimizer called the current hook.

    torch wraps ``step`` once per class. If a subclass calls the wrapped step of its base, both
    wrappers call the hooks, and a regularizer would act twice::

        Nested.step (wrapped: hooks) -> super().step() = AdamW.step (wrapped: hooks again)

    So we count the wrappers on the stack. A counter in pre and post hooks would stay wrong after a
    step that raised.
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
    """Return whether an optimizer that unscales by itself found inf, and so skips this step."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and float(found_inf) > 0


class Follower(Protocol):
    """The part of a regularizer that ``MissedStepHook`` reads."""

    in_step: bool


class WatchedParameter:
    """A parameter, and its version after the last optimizer step that called our hooks.

    torch increments a tensor's version at each in-place change.
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
        """Remember the parameter's current version."""
        result = self._parameter()
        self.version = result._version if result is not None else -1
        self.unseen = 0


class MissedStepHook:
    """A gradient hook that counts weight changes by steps that did not call our hooks.

    One such change can be legitimate, such as ``load_state_dict`` or weight clipping. Three in a
    row between backward passes mean that another optimizer steps.
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
                f"call of {type(self._follower).__name__}, so another optimizer than the attached "
                "one trains it. Call detach(), then attach() to the optimizer that trains the "
                "model, or call .step(optimizer) with each step."
            )
