"""Percentile ranges of least error, and one step for all channels after a norm (RepQ-ViT).

These are pure functions; ``reparametrize`` applies the results to a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quietvit.errors import QuietvitError
from quietvit.quantization.quantizers import SMALLEST_SCALE, AffineQuantizer, affine_fake
from quietvit.quantization.ranges import EMPTY, NOT_FINITE

PERCENTILES = (0.999, 0.9999, 0.99999)
"""The candidates in the code of RepQ-ViT's authors (arXiv 2212.08254)."""
CONSTANT = 2.0**-16
"""A channel counts as constant if its range is at most this share of its largest magnitude."""

BLOCK = 1 << 18

Centre = Callable[[Tensor], Tensor]


def quantiles(
    rows: Tensor, percentiles: Sequence[float] = PERCENTILES
) -> list[tuple[Tensor, Tensor]]:
    """Return the (1 - p)- and p-quantile of each row for each p.

    They are exact, and linear between order statistics. ``rows``: (rows, values), float32; each
    quantile is (rows,). Only the tails are sorted. Raises QuietvitError for no values, NaN and inf.
    """
    last = rows.shape[1] - 1
    if last < 0:
        raise QuietvitError(EMPTY)
    count = min(int((1 - min(percentiles)) * last) + 2, last + 1)
    tails = [_tail(rows, count, upper) for upper in (False, True)]
    if not all(bool(torch.isfinite(tail).all()) for tail in tails):
        raise QuietvitError(NOT_FINITE)

    def between(tail: Tensor, p: float) -> Tensor:
        depth = (1 - p) * last
        inner = min(int(depth) + 1, tail.shape[1] - 1)
        return torch.lerp(tail[:, int(depth)], tail[:, inner], depth - int(depth))

    return [(between(tails[0], p), between(tails[1], p)) for p in percentiles]


def _tail(rows: Tensor, count: int, upper: bool) -> Tensor:
    parts = [block.topk(min(count, block.shape[1]), 1, upper).values for block in blocks(rows)]
    return torch.cat(parts, 1).topk(count, 1, upper).values


def blocks(rows: Tensor) -> tuple[Tensor, ...]:
    """Split into views of some columns each, so that results for one view fit the CPU caches."""
    return rows.split(max(1 << 10, BLOCK // rows.shape[0]), dim=1)


def percentile_range(
    x: Tensor, bits: int, *, axis: int | None = None, hold_zero: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the quantiles (1 - p, p), p in ``PERCENTILES``, with the least squared error.

    As in RepQ-ViT's code, each channel of ``axis`` is chosen separately. Of equal candidates, the
    first wins. ``hold_zero``: widen each candidate to contain zero, as in
    ``AffineQuantizer.from_range``. A candidate of zero width is taken only if all are. Returns
    (min, max), () or (channels,), float32.
    """
    rows = x.detach().float()
    rows = rows.reshape(1, -1) if axis is None else rows.movedim(axis, 0).flatten(1)
    candidates = [torch.stack(ends) for ends in quantiles(rows)]
    if hold_zero:
        candidates = [torch.stack((c[0].clamp(max=0), c[1].clamp(min=0))) for c in candidates]
    errors = torch.stack([_squared_error(rows, c[0], c[1], bits) for c in candidates])
    every = torch.arange(len(rows), device=rows.device)
    low, high = torch.stack(candidates)[errors.argmin(0), :, every].unbind(1)
    return (low, high) if axis is not None else (low[0], high[0])


def _squared_error(rows: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    steps = ChannelSteps.of(low, high, bits)
    scale, zero = (t.float()[:, None] for t in (steps.scale, steps.zero_point))
    error = torch.zeros_like(steps.scale)
    for block in blocks(rows):
        fake = affine_fake(block, scale, zero, 0, (1 << bits) - 1)
        error += fake.sub_(block).square_().sum(1)
    return torch.where(steps.constant, torch.inf, error)


@dataclass(frozen=True)
class ChannelSteps:
    """One uniform quantizer per channel: clip(round(x/s_j) + z_j, 0, 2^b - 1).

    ``scale``, ``zero_point``: (channels,), float64. Zero points are whole numbers, but may lie
    outside the codes. ``constant``: (channels,), bool: channels without a range; their scale and
    zero point are 1 and 0 and mean nothing. ``middle``: (channels,), float64, the range's middle.
    """

    bits: int
    scale: Tensor
    zero_point: Tensor
    constant: Tensor
    middle: Tensor

    @classmethod
    def of(cls, low: Tensor, high: Tensor, bits: int) -> ChannelSteps:
        """s = (max - min)/(2^b - 1), z = round(-min/s); zero need not lie in the range."""
        low, high = low.double(), high.double()
        scale = (high - low) / ((1 << bits) - 1)
        largest = torch.maximum(low.abs(), high.abs())
        constant = ((high - low) <= CONSTANT * largest) | (scale < SMALLEST_SCALE)
        scale = torch.where(constant, torch.ones_like(scale), scale)
        zero_point = torch.where(constant, torch.zeros_like(scale), torch.round(-low / scale))
        return cls(bits, scale, zero_point, constant, (low + high) / 2)


@dataclass(frozen=True)
class Layerwise:
    """One quantizer for all channels of x' = gain·x + shift; gain, shift: (channels,), float64."""

    quantizer: AffineQuantizer
    gain: Tensor
    shift: Tensor


def layerwise(
    steps: ChannelSteps, *, scale_centre: Centre = torch.mean, zero_centre: Centre = torch.mean
) -> Layerwise:
    """RepQ-ViT's scale re-parametrization (arXiv 2212.08254, section 3.3), with an integer z̃.

    s̃ = centre of s_j, z̃ = round(centre of z_j), gain = s̃/s_j, shift = s̃(z_j - z̃). Then
    round(x'/s̃) + z̃ = round(x/s_j) + z_j, so the codes do not change. With weights quantized per
    output channel s̃ has no effect, because weights take 1/gain. z̃ decides which values multiply
    the weights' rounding error. It is clipped to the codes, so that integer kernels can hold it.

    A constant channel (a norm gain of zero) does not count in the centres. It is moved to zero,
    exactly, because its value goes into the consumers' biases. Its gain belongs to the median step,
    so that its column widens a weight's range only a little. Derived here.
    """
    varying = ~steps.constant
    one = torch.ones((), dtype=torch.float64, device=steps.scale.device)
    typical = scale = one
    zero = torch.zeros_like(one)
    if bool(varying.any()):
        typical = steps.scale[varying].median()
        # Rounded to float32 like the quantizer's scale, so that codes agree.
        scale = scale_centre(steps.scale[varying]).float().double()
        zero = torch.round(zero_centre(steps.zero_point[varying])).clamp(0, (1 << steps.bits) - 1)
    gain = scale / torch.where(varying, steps.scale, typical)
    shift = torch.where(varying, scale * (steps.zero_point - zero), -gain * steps.middle)
    quantizer = AffineQuantizer(scale, zero, bits=steps.bits, signed=False)
    return Layerwise(quantizer, gain, shift)
