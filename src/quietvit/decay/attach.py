"""Regularizers that act on weights at the steps of an optimizer: when, at which rate, how.

What is computed is up to the subclasses; no mathematics of pairs or layers here.
"""

from __future__ import annotations

import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quietvit.decay.averages import carried
from quietvit.decay.following import (
    Watch,
    Watched,
    innermost,
    is_outermost,
    is_skipped,
    unwrapped,
)
from quietvit.decay.rates import StepRates, estimated, refuse_unknown_rate
from quietvit.decay.regularizer import checked_state, one_strength, shown
from quietvit.decay.schedule import (
    Schedule,
    checked_schedule,
    described,
    factor_at,
    one_schedule,
)
from quietvit.decay.whole import like, read, whole_parameters
from quietvit.errors import QuietvitError
from quietvit.tracing import plain_model

__all__ = ["Attachment", "DecoupledUpdate", "PenaltyGradient", "Schedule", "WholeUpdate"]


class Attachment(ABC):
    """Something that acts on weights at each step of an optimizer.

    Runs in hooks of the innermost optimizer, so it is skipped with a step that ``GradScaler``
    skips, and gradient accumulation needs nothing special. Parameters with ``requires_grad=False``
    and parameters the optimizer does not hold are left alone. Copies and pickles of it, or of a
    model that holds it, are attached to nothing.

    If training goes on without the hooks being called (weights change between backward passes
    three times in a row), the next backward pass raises QuietvitError.
    """

    coupled: bool = False
    concerns: ClassVar[str] = "parameters concerned"

    def __init__(
        self, model: nn.Module, *, every: int, schedule: Schedule | Mapping[str, Schedule] | None
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise QuietvitError(f"every={every!r}: give a whole number of steps, 1 or more.")
        self.model = plain_model(model)
        self.every = every
        self.schedule = checked_schedule(schedule)
        self.steps = 0
        self.in_step = False
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._handles: list[Any] = []
        self._held: set[str] = set()
        self._watched: list[Watched] = []
        self._estimates: dict[int, float] = {}

    @abstractmethod
    def _names(self) -> tuple[str, ...]:
        """Parameters that may change."""

    @abstractmethod
    def _apply(self, optimizer: Optimizer, factor: float) -> None:
        """Act once, ``factor`` (schedule x every) as strong."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What must agree for a state to be loaded: numbers and strings."""

    def attach(self, optimizer: Optimizer) -> Self:
        """Act at every step of ``optimizer`` (wrappers such as accelerate's are looked into).

        Trainable parameters concerned that are in none of its groups stay as they are, and a
        warning says so. Raises QuietvitError if already attached, if the optimizer cannot be
        hooked, if it holds none of the parameters concerned, if all are frozen, or if a decoupled
        regularizer cannot know the optimizer's rate (docs/method.md lists the optimizers).
        """
        if self._handles:
            raise QuietvitError(
                f"this {type(self).__name__} is already attached to an optimizer; call detach() "
                "first, or build a second one."
            )
        inner = innermost(optimizer)
        held = self._groups(inner)
        if not held:
            raise self._without_any(inner)
        if not self.coupled:
            for group in held.values():
                refuse_unknown_rate(inner, group, type(self).__name__)
        self._warn_of_others(held, inner)
        self._warn_of_rounding(held)
        self._optimizer = weakref.ref(inner)
        self._held = set(held)
        self._handles = [
            inner.register_step_pre_hook(self._before_step),
            inner.register_step_post_hook(self._after_step),
        ]
        names = list(held)
        self._watched = [Watched(name, self._read(name)) for name in {names[0], names[-1]}]
        for watched in self._watched:
            hook = Watch(self, watched)
            self._handles.append(watched.parameter.register_post_accumulate_grad_hook(hook))
        return self

    def _without_any(self, optimizer: Optimizer) -> QuietvitError:
        """Why no parameter would move: all are frozen, or the optimizer has others."""
        names = dict.fromkeys(self._names())
        which = f"{len(names)} {self.concerns} (first: {next(iter(names))})"
        if not any(self._read(name).requires_grad for name in names):
            return QuietvitError(
                f"all of the {which} are frozen (requires_grad=False), so {type(self).__name__} "
                "can change nothing; freeze fewer, or leave it out (in a recipe its key is set to "
                "none, as in decay.cd=none)."
            )
        return QuietvitError(
            f"none of the {which} is trainable and in a group of this {type(optimizer).__name__}; "
            "build the optimizer from this model's parameters, after any "
            "load_state_dict(assign=True) or .to()."
        )

    def _warn_of_others(self, held: Collection[str], optimizer: Optimizer) -> None:
        """Say which parameters another optimizer, or none, has."""
        names = dict.fromkeys(self._names())
        others = [n for n in names if n not in held and self._read(n).requires_grad]
        if others:
            warnings.warn(
                f"{type(self).__name__}: {len(others)} of {len(names)} {self.concerns} are "
                f"trainable but in no group of this {type(optimizer).__name__} (first: "
                f"{others[0]}), so they stay as they are; if a second optimizer trains them, "
                "attach another one to it.",
                stacklevel=3,
            )

    def _warn_of_rounding(self, held: Collection[str]) -> None:
        """Say that a decoupled change may be too small for weights below float32."""
        low = [name for name in held if self._read(name).dtype.itemsize < 4]
        if low and not self.coupled:
            dtype = self._read(low[0]).dtype
            warnings.warn(
                f"{type(self).__name__}: {len(low)} of {len(held)} {self.concerns} are {dtype} "
                f"(first: {low[0]}). A decoupled step below about {torch.finfo(dtype).eps / 2:.2g} "
                "of a weight rounds away there, and most steps are smaller; keep the weights in "
                "float32 and compute in autocast.",
                stacklevel=3,
            )

    def detach(self) -> None:
        """Stop following the optimizer. Does nothing if not attached."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._watched, self._held = [], [], set()
        self._optimizer = None

    def step(self, optimizer: Optimizer | None = None) -> None:
        """Apply one step now, for loops whose optimizer cannot be hooked: call it after each step.

        What is coupled is called before each step in its place, with gradients unscaled.
        ``optimizer`` gives parameters and learning rates. Raises QuietvitError where it is attached
        to this optimizer, at whose steps it acts by itself.
        """
        attached = self._optimizer() if self._optimizer is not None else None
        if attached is not None and (optimizer is None or unwrapped(optimizer) is attached):
            raise QuietvitError(
                f"this {type(self).__name__} is attached to the {type(attached).__name__} and acts "
                "at each of its steps; step() would act twice. Leave it out, or detach() first."
            )
        if optimizer is None:
            raise QuietvitError(
                f"{type(self).__name__}.step() knows no learning rate; call attach(optimizer) "
                "once, or step(optimizer) after each step."
            )
        self._act(optimizer)
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the step counter and the settings (numbers, strings and tensors only)."""
        return {"steps": self.steps, "settings": self._all_settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the step counter. Raises QuietvitError where the settings saved are others."""
        self.steps = checked_state(self, self._all_settings(), state)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take along: all but the optimizer and the hooks, as detached."""
        free: dict[str, Any] = {"in_step": False, "_optimizer": None, "_estimates": {}}
        return self.__dict__ | free | {"_handles": [], "_watched": [], "_held": set()}

    def __repr__(self) -> str:
        return shown(self, self._all_settings(), bool(self._handles))

    def _all_settings(self) -> dict[str, Any]:
        schedule = {} if self.schedule is None else {"schedule": described(self.schedule)}
        return self._settings() | schedule

    @torch.no_grad()
    def _act(self, optimizer: Optimizer) -> None:
        if (self.steps + 1) % self.every == 0:
            self._apply(optimizer, self._factor() * self.every)

    def _factor(self) -> float:
        """The factor that all strengths share; one for each kind is the subclass's business."""
        shared = None if isinstance(self.schedule, Mapping) else self.schedule
        return factor_at(shared, self.steps)

    def _read(self, name: str) -> Tensor:
        return read(self.model, name)

    def _parameters(self) -> dict[str, Tensor]:
        """Every parameter, whole and detached; names tied to one parameter get one tensor."""
        return whole_parameters(self.model, self._names())

    def _groups(self, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
        """The group of every parameter that may change now."""
        group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
        found = {}
        for name in self._names():
            parameter = self._read(name)
            group = group_of.get(id(parameter))
            if group is None:
                if name in self._held:
                    raise QuietvitError(
                        f"{name} was in the optimizer when {type(self).__name__} was attached and "
                        "is not any more (load_state_dict(assign=True) and some wrappers replace "
                        "parameters); build the optimizer anew, then detach() and attach() to it."
                    )
            elif parameter.requires_grad:
                found[name] = group
        return found

    def _rates(self, optimizer: Optimizer, factor: float) -> dict[str, float]:
        """The optimizer's own rate x factor of every parameter that may move now."""
        rates = StepRates(unwrapped(optimizer), self._estimates, type(self).__name__)
        return {
            name: rates.of(group, self._read(name)) * factor
            for name, group in self._groups(optimizer).items()
        }

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self.in_step = True
        self._estimates = {id(group): estimated(group) for group in optimizer.param_groups}
        if self.coupled and is_outermost(optimizer):
            return self._couple(optimizer, args, kwargs)
        return None

    @torch.compiler.disable
    def _couple(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Act before the step, or, where a closure computes the gradients, after each call of it.

        Returns None, or the arguments of the step with another closure.
        """
        if is_skipped(optimizer):
            return None
        if "grad_scaler" in kwargs:
            raise QuietvitError(
                f"{type(optimizer).__name__}.step takes a grad_scaler and unscales gradients by "
                f"itself, so {type(self).__name__} cannot add to them; use coupled=False, or an "
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


class DecoupledUpdate(Attachment):
    """A change of weights after each optimizer step, in units of the step's learning rate.

    Runs as ``register_step_post_hook``. Each parameter moves at the learning rate its own group has
    at that moment, or at the one that the optimizer found by itself (``rates``), whether or not it
    received a gradient. What an optimizer averages moves along (``averages``).

    Weights below float32 are computed in float32 and rounded once when written: a change under half
    a unit in the last place (relative 2^-9 for bfloat16) rounds away, so keep float32 master
    weights where small strengths matter.
    """

    @abstractmethod
    def _write(self, rates: Mapping[str, float]) -> None:
        """Change the parameters in ``rates``, each by its learning rate x schedule x every."""

    def _apply(self, optimizer: Optimizer, factor: float) -> None:
        rates = self._rates(optimizer, factor)
        if rates:
            with carried(unwrapped(optimizer), map(self._read, rates)):
                self._write(rates)


class WholeUpdate(DecoupledUpdate):
    """A decoupled update whose changes are all known before the first of them is written."""

    @abstractmethod
    def _deltas(self, parameters: Mapping[str, Tensor], rates: Mapping[str, float]) -> _Deltas:
        """Return the changes of parameters in ``rates``, strength included; tied ones once."""

    def _write(self, rates: Mapping[str, float]) -> None:
        whole = self._parameters()
        with torch.autocast(next(iter(whole.values())).device.type, enabled=False):
            deltas = self._deltas(whole, rates)
        for name, delta in deltas.items():
            parameter = self._read(name)
            parameter.add_(like(parameter, delta))


class PenaltyGradient(WholeUpdate):
    """A penalty whose gradient is added to ``.grad`` before each step (``coupled``), or decoupled.

    Coupled, it goes through the optimizer's moments as the gradient of the task loss does. It is
    added in ``register_step_pre_hook``: after ``GradScaler`` has unscaled (multiplied by
    ``grad_scale`` where the optimizer unscales by itself), after DDP has averaged, and after any
    clipping, so it is not clipped together with the loss's gradient. A parameter without a gradient
    gets one. Where the step takes a closure, the gradient is added after each call of it, and the
    loss it returns lacks the penalty.

    Decoupled, it is W <- W - (learning rate) x (gradient), as ``DecoupledUpdate`` describes.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float,
        coupled: bool,
        every: int,
        schedule: Schedule | None,
    ) -> None:
        own = type(self).__name__
        super().__init__(model, every=every, schedule=one_schedule(schedule, own))
        self.strength = one_strength(strength, own)
        self.coupled = bool(coupled)

    def _settings(self) -> dict[str, Any]:
        return {"strength": self.strength, "coupled": self.coupled, "every": self.every}

    @abstractmethod
    def _gradients(
        self, parameters: Mapping[str, Tensor], names: Collection[str]
    ) -> dict[str, Tensor]:
        """Return the gradient, strength included, of parameters among ``names``; tied ones once.

        Parameters whose gradient is zero may be left out.
        """

    def _deltas(self, parameters: Mapping[str, Tensor], rates: Mapping[str, float]) -> _Deltas:
        found = self._gradients(parameters, rates)
        return {name: gradient * -rates[name] for name, gradient in found.items()}

    def _apply(self, optimizer: Optimizer, factor: float) -> None:
        if factor == 0 or self.strength == 0:
            return
        if not self.coupled:
            super()._apply(optimizer, factor)
            return
        groups = self._groups(optimizer)
        if not groups:
            return
        whole = self._parameters()
        with torch.autocast(next(iter(whole.values())).device.type, enabled=False):
            gradients = self._gradients(whole, groups)
        scale = getattr(optimizer, "grad_scale", None)
        for name, gradient in gradients.items():
            # Where the optimizer goes up the gradient, the penalty still has to go down.
            added = gradient * (-factor if groups[name].get("maximize") else factor)
            self._add(name, added if scale is None else added * scale.to(added))

    def _add(self, name: str, gradient: Tensor) -> None:
        parameter = self._read(name)
        own = like(parameter, gradient)
        if parameter.grad is None:
            parameter.grad = own.to(parameter.dtype)
        else:
            parameter.grad.add_(own)


_Deltas = dict[str, Tensor]
