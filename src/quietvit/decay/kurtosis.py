"""KURE: moves the kurtosis of weight matrices towards that of a uniform distribution.

When and how its gradient is applied is in ``attach`` and ``decoupled``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from quietvit.decay.checks import number, refuse_unless_finite
from quietvit.decay.choice import warn_of_left_out
from quietvit.decay.config import Strength, WeightRegularizerConfig
from quietvit.decay.decoupled import PenaltyGradient
from quietvit.decay.schedule import Schedule
from quietvit.errors import QuietvitError
from quietvit.pairs.pair import COMPUTED
from quietvit.tensors import untied, wide
from quietvit.tracing import trace

# Deviations below so many units of rounding are those of a weight with equal entries.
_FLAT = 64


class KurtosisConfig(WeightRegularizerConfig):
    """KURE, ``quietvit.KurtosisRegularization``: kurtosis of weights towards ``target``.

    Source: arXiv 2002.07686.
    """

    strength: Strength = 1.0
    """In units of the loss's gradient (coupled) or of the learning rate. 0 is off."""
    target: float = Field(default=1.8, ge=1)
    """The kurtosis aimed at: 1.8 is that of a uniform distribution, 3 of a normal one."""
    coupled: bool = True
    """Add the gradient before the optimizer's step, as published; else a decoupled update."""


class KurtosisRegularization(PenaltyGradient):
    """KURE: ``strength / L sum_l |K(W_l) - target|^2`` over L weights of linears and convolutions.

    K(W) = mean(((W - mean) / deviation)^4) over all entries of a weight: 1.8 for a uniform
    distribution, 3 for a normal one. A weight whose entries are all equal has no kurtosis and is
    left alone. Coupled (as published) the gradient enters ``.grad``, see ``PenaltyGradient``.
    arXiv 2002.07686; the gradient in closed form and the decoupled form are derived here.

    Args:
        model: the model whose parameters the optimizer holds, built before FSDP or compilation.
        example: input for ``quietvit.trace``, by which the weights are found.
        strength: at least 0, in units of the loss's gradient (coupled) or of the rate (decoupled).
        target: the kurtosis aimed at, 1 or more.
        coupled, every, schedule: see ``PenaltyGradient``, ``ColinearityDecay``.

    Raises:
        QuietvitError: bad values, or a model without such weights. While training: a weight is NaN
            or infinite (no weight is changed then), or steps pass without a call.

    One device synchronization per step.
    """

    concerns = "weights of linears and convolutions"

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        *,
        strength: float = 1.0,
        target: float = 1.8,
        coupled: bool = True,
        every: int = 1,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(model, strength=strength, coupled=coupled, every=every, schedule=schedule)
        own = type(self).__name__
        self.target = number(target, "target", own, least=1.0)
        traced = trace(self.model, example)
        sites = [site for site in traced.sites if site.kind in ("linear", "conv")]
        names = dict.fromkeys(s.weight.parameter_name for s in sites if s.weight is not None)
        first = untied({name: self._read(name) for name in names})
        self.weights: tuple[str, ...] = tuple(name for name in names if first[name] == name)
        if not self.weights:
            raise QuietvitError(
                f"{own} has nothing to act on: {traced.model_name} has no linear or convolution "
                "whose weight is a parameter. print(quietvit.trace(model, example)) shows what it "
                "has."
            )
        warn_of_left_out(own, [(site.name, COMPUTED) for site in sites if site.weight is None])

    def penalty(self) -> float:
        """Return the mean over weights of |K - target|^2, strength not included. One sync each."""
        return math.fsum(self.penalties().values()) / len(self.weights)

    @torch.no_grad()
    def penalties(self) -> dict[str, float]:
        """Return |K - target|^2 of each weight by its name, 0 where all entries are equal."""
        result = {}
        for name, whole in self.parameters().items():
            z, deviation = standardized(wide(whole))
            square = (z.square().square().mean() - self.target).square()
            result[name] = float(torch.where(deviation > 0, square, 0.0))
        return result

    def parameter_names(self) -> tuple[str, ...]:
        return self.weights

    def settings(self) -> dict[str, Any]:
        own = {"penalty": "kurtosis", "weights": len(self.weights), "target": self.target}
        return super().settings() | own

    def gradients(
        self, parameters: Mapping[str, Tensor], names: Collection[str]
    ) -> dict[str, Tensor]:
        share = self.strength / len(self.weights)
        result = {
            name: kurtosis_gradient(wide(parameters[name]), self.target) * share
            for name in self.weights
            if name in names
        }
        refuse_unless_finite(result, parameters)
        return result


def kurtosis_gradient(W: Tensor, target: float) -> Tensor:
    """Return the gradient of |K(W) - target|^2, shaped like W, 0 where all entries are equal.

    With z = (W - mean) / deviation over n entries,
    dK/dW = 4 / (n deviation) (z^3 - mean(z^3) - K z).
    """
    z, deviation = standardized(W)
    cube = z * z.square()
    K = (cube * z).mean()
    slope = cube - cube.mean() - K * z
    flat = deviation == 0
    scale = 8 * (K - target) / (W.numel() * torch.where(flat, 1.0, deviation))
    return slope * torch.where(flat, 0.0, scale)


def standardized(W: Tensor) -> tuple[Tensor, Tensor]:
    """Return (W - mean) / deviation and the deviation; both 0 where it is only rounding."""
    largest = W.abs().amax()
    tiny = torch.finfo(W.dtype).tiny
    W = W / largest.clamp_min(tiny)
    centred = W - W.mean()
    deviation = centred.square().mean().sqrt()
    flat = (largest < tiny) | (deviation < _FLAT * torch.finfo(W.dtype).eps)
    deviation = torch.where(flat, 0.0, deviation)
    return centred / torch.where(flat, 1.0, deviation) * ~flat, deviation * largest
