"""How a regularizer changes weights: after the optimizer's step, or as a gradient before it.

Base classes for regularizers of your own too. When they run is in ``attach``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quietvit.decay.attach import WeightRegularizer
from quietvit.decay.averages import carried
from quietvit.decay.checks import number
from quietvit.decay.following import unwrapped
from quietvit.decay.schedule import Schedule, one_schedule
from quietvit.tensors import sharded_like


class DecoupledUpdate(WeightRegularizer):
    """A change of weights after each optimizer step, in units of the step's learning rate.

    It runs as ``register_step_post_hook``. Each parameter moves at the learning rate that its own
    group has at that moment, or that the optimizer found by itself (``rates``), whether or not it
    received a gradient. What an optimizer averages moves along (``averages``).

    Weights below float32 are computed in float32 and rounded once when written. A change under half
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
    """A decoupled update of one strength whose changes are all known before one is written.

    The base for a decoupled regularizer of your own: say ``parameter_names``, ``changes`` and
    ``penalties``.

    Args:
        model: the model whose parameters the optimizer holds.
        strength: at least 0.
        every, schedule: see ``WeightRegularizer``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float,
        every: int = 1,
        schedule: Schedule | None = None,
    ) -> None:
        own = type(self).__name__
        super().__init__(model, every=every, schedule=one_schedule(schedule, own))
        self.strength = number(strength, "strength", own)

    @abstractmethod
    def changes(
        self, parameters: Mapping[str, Tensor], rates: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """Return what to add to the parameters, strength included, shaped like them.

        Args:
            parameters: whole and detached, by name; tied names hold one tensor.
            rates: learning rate x schedule x every of each parameter that may move now. Return no
                others, and a tied parameter once.
        """

    def settings(self) -> dict[str, Any]:
        return {"strength": self.strength, "every": self.every}

    def _write(self, rates: Mapping[str, float]) -> None:
        whole = self.parameters()
        with torch.autocast(next(iter(whole.values())).device.type, enabled=False):
            changes = self.changes(whole, rates)
        for name, change in changes.items():
            parameter = self._read(name)
            parameter.add_(sharded_like(parameter, change))


class PenaltyGradient(WholeUpdate):
    """A penalty whose gradient is added to ``.grad`` before each step, or applied decoupled.

    Coupled, it goes through the optimizer's moments as the gradient of the task loss does. It is
    added in ``register_step_pre_hook``. That is after ``GradScaler`` has unscaled (multiplied by
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
        every: int = 1,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(model, strength=strength, every=every, schedule=schedule)
        self.coupled = bool(coupled)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"coupled": self.coupled}

    @abstractmethod
    def gradients(
        self, parameters: Mapping[str, Tensor], names: Collection[str]
    ) -> dict[str, Tensor]:
        """Return the gradient of parameters among ``names``, strength included; tied ones once.

        Parameters whose gradient is zero may be left out.
        """

    def changes(
        self, parameters: Mapping[str, Tensor], rates: Mapping[str, float]
    ) -> dict[str, Tensor]:
        gradients = self.gradients(parameters, rates)
        return {name: gradient * -rates[name] for name, gradient in gradients.items()}

    def _apply(self, optimizer: Optimizer, factor: float) -> None:
        if factor == 0 or self.strength == 0:
            return
        if not self.coupled:
            super()._apply(optimizer, factor)
            return
        groups = self._groups(optimizer)
        if not groups:
            return
        whole = self.parameters()
        with torch.autocast(next(iter(whole.values())).device.type, enabled=False):
            gradients = self.gradients(whole, groups)
        scale = getattr(optimizer, "grad_scale", None)
        for name, gradient in gradients.items():
            # Where the optimizer maximizes, the penalty must still go down.
            added = gradient * (-factor if groups[name].get("maximize") else factor)
            self._add(name, added if scale is None else added * scale.to(added))

    def _add(self, name: str, gradient: Tensor) -> None:
        parameter = self._read(name)
        own = sharded_like(parameter, gradient)
        if parameter.grad is None:
            parameter.grad = own.to(parameter.dtype)
        else:
            parameter.grad.add_(own)
