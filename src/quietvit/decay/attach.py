"""Regularizers that act on weights at the steps of an optimizer: when they act, at which rate.

What they do to a weight is in ``decoupled`` and in each regularizer's own module.
"""

from __future__ import annotations

import warnings
import weakref
from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quietvit.decay.checks import whole_number
from quietvit.decay.following import (
    MissedStepHook,
    WatchedParameter,
    innermost,
    is_outermost,
    is_skipped,
    unwrapped,
)
from quietvit.decay.rates import StepRates, estimated, refuse_unknown_rate
from quietvit.decay.regularizer import BaseRegularizer
from quietvit.decay.schedule import Schedule
from quietvit.errors import QuietvitError
from quietvit.tensors import all_gathered
from quietvit.tracing.scales import read_entry


class WeightRegularizer(BaseRegularizer):
    """A regularizer that acts on weights at each step of an optimizer.

    It runs in hooks of the innermost optimizer. So it is skipped with a step that ``GradScaler``
    skips, and gradient accumulation needs nothing special. It leaves parameters alone that are
    frozen (``requires_grad=False``) or that the optimizer does not hold.

    If training goes on without the hooks being called (weights change between backward passes
    three times in a row), the next backward pass raises QuietvitError.

    Args:
        model: the model whose parameters the optimizer holds.
        every: act at every n-th step, n times as strong.
        schedule: function from the optimizer step (0, 1, ...) to a factor of the strength.
    """

    coupled: bool = False
    concerns: ClassVar[str] = "parameters concerned"
    """How messages call the parameters that it acts on."""

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 1,
        schedule: Schedule | Mapping[str, Schedule] | None = None,
    ) -> None:
        super().__init__(model, schedule=schedule)
        self.every = whole_number(every, "every", type(self).__name__)
        self.in_step = False
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._held: set[str] = set()
        self._watched: list[WatchedParameter] = []
        self._estimates: dict[int, float] = {}

    @abstractmethod
    def parameter_names(self) -> tuple[str, ...]:
        """Return the names of the parameters that it may change."""

    @abstractmethod
    def _apply(self, optimizer: Optimizer, factor: float) -> None:
        """Act once, ``factor`` (schedule x every) times as strong."""

    def parameters(self) -> dict[str, Tensor]:
        """Return the parameters it may change, whole and detached, by name.

        Names of one tied parameter get one tensor. Under FSDP all processes must call it.
        """
        return all_gathered({name: self._read(name) for name in self.parameter_names()})

    def attach(self, optimizer: Optimizer) -> Self:
        """Act at every step of ``optimizer``. Looks into wrappers such as accelerate's.

        Trainable parameters that are in none of its groups stay as they are, and a warning says so.

        Raises:
            QuietvitError: it is already attached; the optimizer cannot be hooked or holds none of
                the parameters; all of them are frozen; or a decoupled regularizer cannot know the
                optimizer's rate (docs/method.md lists the optimizers).
        """
        self._refuse_if_attached()
        inner = innermost(optimizer)
        groups = self._groups(inner)
        if not groups:
            raise self._nothing_to_update(inner)
        if not self.coupled:
            for group in groups.values():
                refuse_unknown_rate(inner, group, type(self).__name__)
        self._warn_of_others(groups, inner)
        self._warn_of_rounding(groups)
        self._optimizer = weakref.ref(inner)
        self._held = set(groups)
        self._handles = [
            inner.register_step_pre_hook(self._before_step),
            inner.register_step_post_hook(self._after_step),
        ]
        # The first and the last parameter tell whether another optimizer steps: both change then.
        names = list(groups)
        self._watched = [WatchedParameter(name, self._read(name)) for name in {names[0], names[-1]}]
        for watched in self._watched:
            hook = MissedStepHook(self, watched)
            self._handles.append(watched.parameter.register_post_accumulate_grad_hook(hook))
        return self

    def detach(self) -> None:
        """Stop following the optimizer. Does nothing if not attached."""
        super().detach()
        self._watched, self._held, self._optimizer = [], set(), None

    def step(self, optimizer: Optimizer | None = None) -> None:
        """Act once now, for optimizers that cannot be hooked. Call it after each of their steps.

        If it is coupled, call it before each step, when gradients are unscaled. ``optimizer`` gives
        the parameters and learning rates.

        Raises:
            QuietvitError: no optimizer is given, or it is attached to this one and acts by itself.
        """
        attached = self._optimizer() if self._optimizer is not None else None
        if attached is not None and (optimizer is None or unwrapped(optimizer) is attached):
            raise QuietvitError(
                f"this {type(self).__name__} is attached to the {type(attached).__name__} and acts "
                "at each of its steps, so step() would act twice. Remove the call, or detach() "
                "first."
            )
        if optimizer is None:
            raise QuietvitError(
                f"{type(self).__name__}.step() does not know the learning rate. Call "
                "attach(optimizer) once, or step(optimizer) after each step."
            )
        self._act(optimizer)
        self.steps += 1

    def __getstate__(self) -> dict[str, Any]:
        free: dict[str, Any] = {"in_step": False, "_optimizer": None, "_estimates": {}}
        return super().__getstate__() | free | {"_watched": [], "_held": set()}

    def _nothing_to_update(self, optimizer: Optimizer) -> QuietvitError:
        """Return the error for an optimizer that would move no parameter."""
        own, names = type(self).__name__, dict.fromkeys(self.parameter_names())
        which = f"{len(names)} {self.concerns} (first: {next(iter(names))})"
        if not any(self._read(name).requires_grad for name in names):
            return QuietvitError(
                f"{own} has nothing to update: all {which} are frozen (requires_grad=False). "
                f"Unfreeze some, or remove {own} (in a recipe, set its section to none, such as "
                "decay.cd=none)."
            )
        return QuietvitError(
            f"{own} has nothing to update: none of the {which} is trainable and in a group of this "
            f"{type(optimizer).__name__}. To mend it, build the optimizer from this model's "
            "parameters, after any load_state_dict(assign=True) or .to()."
        )

    def _warn_of_others(self, regularized: Collection[str], optimizer: Optimizer) -> None:
        """Warn of trainable parameters that this optimizer does not hold."""
        names = dict.fromkeys(self.parameter_names())
        others = [n for n in names if n not in regularized and self._read(n).requires_grad]
        if others:
            warnings.warn(
                f"{type(self).__name__}: {len(others)} of {len(names)} {self.concerns} are "
                f"trainable but in no group of this {type(optimizer).__name__} (first: "
                f"{others[0]}). They stay as they are. If a second optimizer trains them, attach "
                f"a second {type(self).__name__} to it.",
                stacklevel=3,
            )

    def _warn_of_rounding(self, regularized: Collection[str]) -> None:
        """Warn that a decoupled change may be too small for weights below float32."""
        low = [name for name in regularized if self._read(name).dtype.itemsize < 4]
        if low and not self.coupled:
            dtype = self._read(low[0]).dtype
            warnings.warn(
                f"{type(self).__name__}: {len(low)} of {len(regularized)} {self.concerns} are "
                f"{dtype} (first: {low[0]}). A change below about "
                f"{torch.finfo(dtype).eps / 2:.2g} of a weight rounds away there, and most changes "
                "are smaller. Keep the weights in float32 and compute in autocast.",
                stacklevel=3,
            )

    @torch.no_grad()
    def _act(self, optimizer: Optimizer) -> None:
        if (self.steps + 1) % self.every == 0:
            self._apply(optimizer, self._factor() * self.every)

    def _read(self, name: str) -> Tensor:
        return read_entry(self.model, name)

    def _groups(self, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
        """The optimizer's group of every parameter that may change now."""
        group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
        groups = {}
        for name in self.parameter_names():
            parameter = self._read(name)
            group = group_of.get(id(parameter))
            if group is None:
                if name in self._held:
                    raise QuietvitError(
                        f"{name} was in the optimizer when {type(self).__name__} was attached and "
                        "is not any more: load_state_dict(assign=True) and some wrappers replace "
                        "parameters. Build the optimizer anew, then detach() and attach() to it."
                    )
            elif parameter.requires_grad:
                groups[name] = group
        return groups

    def _rates(self, optimizer: Optimizer, factor: float) -> dict[str, float]:
        """The optimizer's own rate x ``factor`` of every parameter that may move now."""
        rates = StepRates(unwrapped(optimizer), self._estimates, type(self).__name__)
        return {
            name: rates.of(group, self._read(name)) * factor
            for name, group in self._groups(optimizer).items()
        }

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self.in_step = True
        # Prodigy and D-Adaptation step by the estimate they had before the step.
        self._estimates = {id(group): estimated(group) for group in optimizer.param_groups}
        if self.coupled and is_outermost(optimizer):
            return self._couple(optimizer, args, kwargs)
        return None

    @torch.compiler.disable
    def _couple(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Act before the step. If a closure computes the gradients, act after each call of it.

        Returns None, or the arguments of the step with another closure.
        """
        if is_skipped(optimizer):
            return None
        if "grad_scaler" in kwargs:
            raise QuietvitError(
                f"{type(optimizer).__name__}.step takes a grad_scaler and unscales gradients by "
                f"itself, so {type(self).__name__} cannot add to them. Use coupled=False, or an "
                "optimizer that reads grad_scale."
            )
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._act(optimizer)
            return None

        def with_gradient() -> Any:
            loss = closure()
            self._act(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": with_gradient}
        return (args[0], with_gradient, *args[2:]), kwargs

    @torch.compiler.disable
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not is_outermost(optimizer):
            return
        self.in_step = False
        if not is_skipped(optimizer):
            if not self.coupled:
                self._act(optimizer)
            self.steps += 1
        self._estimates = {}
        for watched in self._watched:
            watched.reset()
