"""Decoupled updates that follow an optimizer: when they run, at which rate, how they write.

What is written is up to the subclass (``colinearity``, ``gains``); no mathematics of pairs here.
"""

from __future__ import annotations

import math
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quietvit.errors import QuietvitError

Schedule = Callable[[int], float]
_WRAPPED = ("optimizer", "_base_optimizer", "base_optimizer", "_optimizer", "inner_optimizer")
_PATIENCE = 3


class DecoupledUpdate(ABC):
    """A change of weights after each optimizer step, in units of the step's learning rate.

    Runs as ``register_step_post_hook`` of the innermost optimizer, so it is skipped with a step
    that ``GradScaler`` skips, and gradient accumulation needs nothing special. Each parameter moves
    at the learning rate its own group has at that moment, whether or not it received a gradient.
    Parameters with ``requires_grad=False`` and parameters the optimizer does not hold are left
    alone. Weights below float32 are computed in float32 and rounded once when written: a change
    under half a unit in the last place (relative 2^-9 for bfloat16) rounds away, so keep float32
    master weights where such small strengths matter.

    If training goes on without the hook being called (weights change between backward passes
    three times in a row), the next backward pass raises QuietvitError.
    """

    def __init__(self, model: nn.Module, *, every: int, schedule: Schedule | None) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise QuietvitError(f"every={every!r}: give a whole number of steps, 1 or more.")
        if schedule is not None and not callable(schedule):
            raise QuietvitError(
                f"schedule={schedule!r}: give a function from the step (0, 1, ...) to a factor."
            )
        self.model = model
        self.every = every
        self.schedule = schedule
        self.steps = 0
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._handles: list[Any] = []
        self._in_step = False
        self._held: set[str] = set()
        self._watched: list[_Watched] = []

    @abstractmethod
    def _names(self) -> tuple[str, ...]:
        """Parameters that may change."""

    @abstractmethod
    def _deltas(self, parameters: Mapping[str, Tensor], rates: Mapping[str, float]) -> _Deltas:
        """Return the change of each parameter in ``rates`` (learning rate x schedule x every)."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What must agree for a state to be loaded: numbers and strings."""

    def attach(self, optimizer: Optimizer) -> Self:
        """Run after every step of ``optimizer`` (wrappers such as accelerate's are looked into).

        Raises QuietvitError if already attached, if the optimizer cannot be hooked, or if it holds
        none of the parameters concerned.
        """
        if self._handles:
            raise QuietvitError(
                f"this {type(self).__name__} is already attached to an optimizer; call detach() "
                "first, or build a second one."
            )
        inner = innermost(optimizer)
        held = self._rates(inner, 1.0)
        if not held:
            raise QuietvitError(
                f"none of the {len(self._names())} parameters of the pairs (first: "
                f"{self._names()[0]}) is trainable and in a group of this "
                f"{type(inner).__name__}; build the optimizer from this model's parameters, after "
                "any load_state_dict(assign=True) or .to()."
            )
        self._optimizer = weakref.ref(inner)
        self._held = set(held)
        self._handles = [
            inner.register_step_pre_hook(self._before_step),
            inner.register_step_post_hook(self._after_step),
        ]
        names = list(held)
        self._watched = [_Watched(name, self._read(name)) for name in {names[0], names[-1]}]
        for watched in self._watched:
            hook = _Watch(self, watched)
            self._handles.append(watched.parameter.register_post_accumulate_grad_hook(hook))
        return self

    def detach(self) -> None:
        """Stop following the optimizer. Does nothing if not attached."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._watched, self._held = [], [], set()
        self._optimizer = None

    @torch.no_grad()
    def step(self, optimizer: Optimizer | None = None) -> None:
        """Apply one step now, for loops whose optimizer cannot be hooked: call it after each step.

        ``optimizer`` gives the learning rates (default: the attached one). An attached object
        already steps by itself.
        """
        if optimizer is None:
            optimizer = self._optimizer() if self._optimizer is not None else None
        if optimizer is None:
            raise QuietvitError(
                f"{type(self).__name__}.step() knows no learning rate; call attach(optimizer) "
                "once, or step(optimizer) after each step."
            )
        count = self.steps + 1
        if count % self.every == 0:
            factor = self._factor() * self.every
            rates = self._rates(optimizer, factor)
            if rates:
                self._write(rates)
        self.steps = count

    def state_dict(self) -> dict[str, Any]:
        """Return the step counter and the settings (numbers, strings and tensors only)."""
        return {"steps": self.steps, "settings": self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the step counter. Raises QuietvitError where the settings saved are others."""
        if "steps" not in state or "settings" not in state:
            raise QuietvitError(
                f"this is no state of a {type(self).__name__}: it has the keys "
                f"{sorted(state)}, not 'steps' and 'settings'."
            )
        mine, saved = self._settings(), dict(state["settings"])
        for key in sorted(mine.keys() | saved.keys()):
            if mine.get(key) != saved.get(key):
                raise QuietvitError(
                    f"the state was saved with {key}={saved.get(key)!r}, this "
                    f"{type(self).__name__} has {key}={mine.get(key)!r}; build it with the same "
                    "settings, or start without loading the state."
                )
        self.steps = int(state["steps"])

    def _factor(self) -> float:
        factor = 1.0 if self.schedule is None else float(self.schedule(self.steps))
        if not (math.isfinite(factor) and factor >= 0):
            raise QuietvitError(
                f"schedule({self.steps}) returned {factor}; it must be finite and not negative."
            )
        return factor

    def _read(self, name: str) -> Tensor:
        module, _, attribute = name.rpartition(".")
        found = getattr(self.model.get_submodule(module), attribute)
        assert isinstance(found, Tensor)
        return found

    def _parameters(self) -> dict[str, Tensor]:
        """Every parameter, whole and detached; names tied to one parameter get one tensor."""
        found: dict[int, Tensor] = {}
        parameters = {name: self._read(name) for name in self._names()}
        for parameter in parameters.values():
            if id(parameter) not in found:
                found[id(parameter)] = _gathered(parameter)
        return {name: found[id(parameter)] for name, parameter in parameters.items()}

    def _rates(self, optimizer: Optimizer, factor: float) -> dict[str, float]:
        """Learning rate x factor of every parameter that may move now."""
        group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
        lr_of: dict[int, float] = {}
        rates = {}
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
                continue
            if not parameter.requires_grad:
                continue
            if id(group) not in lr_of:
                lr_of[id(group)] = float(group["lr"])
            rates[name] = lr_of[id(group)] * factor
        return rates

    def _write(self, rates: Mapping[str, float]) -> None:
        whole = self._parameters()
        with torch.autocast(next(iter(whole.values())).device.type, enabled=False):
            deltas = self._deltas(whole, rates)
        for name, delta in deltas.items():
            parameter = self._read(name)
            parameter.add_(_like(parameter, delta))

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._in_step = True

    @torch.compiler.disable
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._in_step = False
        found_inf = getattr(optimizer, "found_inf", None)
        skipped = found_inf is not None and float(found_inf) > 0
        if not skipped:
            self.step(optimizer)
        for watched in self._watched:
            watched.reset()


_Deltas = dict[str, Tensor]


def innermost(optimizer: Any) -> Optimizer:
    """Return the optimizer that really steps, out of its wrappers.

    Raises QuietvitError where step hooks registered on it would never fire.
    """
    seen: set[int] = set()
    while id(optimizer) not in seen:
        seen.add(id(optimizer))
        for attribute in _WRAPPED:
            inner = getattr(optimizer, attribute, None)
            if inner is not None and hasattr(inner, "param_groups"):
                optimizer = inner
                break
    hooked = getattr(type(optimizer).step, "hooked", False) if hasattr(optimizer, "step") else False
    if not isinstance(optimizer, Optimizer) or not hooked:
        raise QuietvitError(
            f"{type(optimizer).__name__} does not call step hooks (it is no torch.optim.Optimizer "
            "whose __init__ ran, and holds none that is known); attach to the torch optimizer "
            "inside it, or call .step(optimizer) after each of its steps."
        )
    return optimizer


class _Watched:
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
        found = self._parameter()
        self.version = found._version if found is not None else -1
        self.unseen = 0


class _Watch:
    """Counts changes of a weight between backward passes that no hook of ours accompanied."""

    def __init__(self, update: DecoupledUpdate, watched: _Watched) -> None:
        self._update = update
        self._watched = watched

    @torch.compiler.disable
    def __call__(self, parameter: Tensor) -> None:
        watched = self._watched
        if self._update._in_step or parameter._version == watched.version:
            return
        watched.version = parameter._version
        watched.unseen += 1
        if watched.unseen >= _PATIENCE:
            raise QuietvitError(
                f"{watched.name} changed {watched.unseen} times between backward passes without a "
                f"call of {type(self._update).__name__}: another optimizer steps than the one it "
                "is attached to. Call detach() and attach() to the optimizer that trains the "
                "model, or call .step(optimizer) after each step."
            )


def _is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; where nobody has loaded torch.distributed.tensor none is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _gathered(parameter: Tensor) -> Tensor:
    whole: Any = parameter.detach()
    gathered: Tensor = whole.full_tensor() if _is_sharded(whole) else whole
    return gathered


def _like(parameter: Any, whole: Tensor) -> Tensor:
    """A full-size tensor, sharded as the parameter is."""
    if not _is_sharded(parameter):
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)
