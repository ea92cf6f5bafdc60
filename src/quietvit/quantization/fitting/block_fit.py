"""Fit one block: what it learns, the handler it runs under, and the iterations.

``rounding`` holds roundings and learned scales; ``reconstruct`` goes over the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quietvit.quantization.blocks import Block
from quietvit.quantization.calibrated import Calibrated
from quietvit.quantization.fitting.block_data import BlockData, Leaves
from quietvit.quantization.fitting.rounding import LearnedScale, Rounding, random_keep, undecided
from quietvit.quantization.quantizers import AffineQuantizer
from quietvit.quantization.slot import Slot
from quietvit.quantization.weights import read_weight, why_fixed
from quietvit.tracing import Site


@dataclass(frozen=True)
class FitSettings:
    """Settings for the fit of a block.

    ``rounding_rate`` and ``scale_rate``: Adam's learning rates for roundings and scales.
    ``regularizer``: factor of AdaRound's term, which is off for the first ``warm_up`` (a share) of
    the iterations. ``keep``: probability that an entry of an activation stays float (QDrop).
    """

    rounding_rate: float
    scale_rate: float
    batch_size: int
    regularizer: float
    warm_up: float
    keep: float


@dataclass
class Learned:
    """What one block learns, and the handler under which it runs while it learns."""

    calibrated: Calibrated
    rounding: dict[Slot, Rounding] = field(default_factory=dict)
    scales: dict[Slot, LearnedScale] = field(default_factory=dict)
    fixed: dict[Slot, Tensor] = field(default_factory=dict)
    keep: float = 0.0
    generator: torch.Generator | None = None

    @classmethod
    def of(cls, data: BlockData, block: Block, keep: float) -> Learned:
        """Take every uniform quantizer in the block, but only weights that may be changed."""
        learned = cls(data.calibrated, keep=keep)
        for slot, quantizer in data.calibrated.quantizers.items():
            inside = any(site.name == slot.site.name for site in block.sites)
            if not inside or not isinstance(quantizer, AffineQuantizer):
                continue
            if not slot.is_weight:
                learned.scales[slot] = LearnedScale(quantizer)
            elif why_fixed(data.model, data.trace, slot.site) is None:
                weight = read_weight(data.model, slot.site)
                learned.rounding[slot] = Rounding(weight, quantizer)
        return learned

    def __bool__(self) -> bool:
        return bool(self.rounding or self.scales)

    def handler(self, weights: dict[Slot, Tensor]) -> Callable[..., Tensor]:
        """Return a handler for ``intercept`` that uses these weights instead of the model's."""

        def handle(site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]) -> Tensor:
            new = [self._operand(Slot(site, i), x, weights) for i, x in enumerate(operands)]
            return self.calibrated.adjust(site, tuple(new), run)

        return handle

    def _operand(self, slot: Slot, x: Tensor, weights: dict[Slot, Tensor]) -> Tensor:
        if slot in weights:
            return weights[slot]
        quantizer = self.calibrated.quantizers.get(slot)
        if quantizer is None:
            return x
        if slot.is_weight:
            if slot not in self.fixed:
                self.fixed[slot] = quantizer(x).detach()
            return self.fixed[slot]
        keep = None
        if self.keep and self.generator is not None:
            keep = random_keep(x, self.keep, self.generator)
        if slot in self.scales:
            return self.scales[slot](x, keep)  # type: ignore[no-any-return]
        quantized: Tensor = quantizer(x)
        return quantized if keep is None else quantized.lerp(x, keep.to(x.dtype))


def schedule(step: int, iterations: int, warm_up: float) -> float | None:
    """AdaRound's β at a step: None (no regularizer) in the warm-up, then linear from 20 to 2."""
    start = warm_up * iterations
    if step < start:
        return None
    return 2 + 18 * max(0.0, 1 - (step - start) / max(1.0, iterations - start))


@dataclass
class Samples:
    """The data that a block is fitted to, all (images, rows, ...).

    ``arguments``: the block's arguments in the quantized model. ``mixed``: its first argument in
    the float model; each entry is taken from there with probability ``keep``. None mixes nothing.
    ``importance``: weights of the squared errors.
    """

    arguments: Leaves
    targets: Tensor
    mixed: Tensor | None = None
    importance: Tensor | None = None


def fit(
    settings: FitSettings,
    learned: Learned,
    run: Callable[[Leaves, Callable[..., Tensor]], Tensor],
    samples: Samples,
    channels: int,
    generator: torch.Generator,
    tick: Callable[[], Any],
    iterations: int,
) -> None:
    """Learn rounding and scales of one block by Adam on Σ_channels (output - target)².

    ``run(leaves, handler)`` runs the block; ``tick`` is called before each iteration. Both learning
    rates fall to zero along a half cosine.
    """
    learned.generator = generator
    rounds = [r.v for r in learned.rounding.values()]
    groups = [
        {"params": rounds, "lr": settings.rounding_rate},
        {"params": [s.t for s in learned.scales.values()], "lr": settings.scale_rate},
    ]
    groups = [group for group in groups if group["params"]]
    adam = torch.optim.Adam(groups, fused=True)
    rates = [group["lr"] for group in adam.param_groups]
    targets, mixed, importance = samples.targets, samples.mixed, samples.importance
    for step in range(iterations):
        tick()
        for group, rate in zip(adam.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / iterations))
        rows = torch.randperm(targets.shape[0], generator=generator)[: settings.batch_size].to(
            targets.device
        )
        leaves = [leaf[rows] for leaf in samples.arguments]
        if mixed is not None:
            keep = random_keep(leaves[0], settings.keep, generator)
            leaves[0] = leaves[0].lerp(mixed[rows], keep.to(leaves[0].dtype))
        ups = {slot: rounding.up() for slot, rounding in learned.rounding.items()}
        weights = {slot: learned.rounding[slot].at(up) for slot, up in ups.items()}
        output = run(leaves, learned.handler(weights))
        error = (output - targets[rows]).float().square()
        if importance is not None:
            error = error * importance[rows]
        loss = channels * error.mean()
        beta = schedule(step, iterations, settings.warm_up)
        if beta is not None:
            for up in ups.values():
                loss = loss + settings.regularizer * undecided(up, beta)
        adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    learned.generator = None
