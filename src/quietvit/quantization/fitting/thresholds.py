"""Power-of-two thresholds: statistics of a stream, an outlier filter, a search by error measure.

The quantizer covers [-t, t - step] or [0, t - step] with step t/2^(bits - signed). ``methods``
decide which tensor gets which threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from quietvit.errors import QuietvitError, nearest
from quietvit.quantization.quantizers import AffineQuantizer, affine_code_range, affine_fake
from quietvit.quantization.ranges import RangeEstimator, Stream

ErrorName = Literal["mse", "mae", "lp", "kl", "noclip"]
ERRORS: tuple[str, ...] = get_args(ErrorName)
SMALLEST_THRESHOLD = 2.0**-16
KL_BINS = 2048
_PART = 1 << 17


@dataclass(frozen=True)
class Points:
    """A distribution: ``values`` (channels, n) float32, and ``counts``; None if every count is 1.

    ``minimum``, ``maximum``: (channels,), float32, the extremes that were seen.
    """

    values: Tensor
    counts: Tensor | None
    minimum: Tensor
    maximum: Tensor

    @classmethod
    def of(cls, weight: Tensor, axis: int) -> Points:
        """Take all entries of a weight, separately for each index of ``axis``."""
        values = weight.detach().float().movedim(axis, 0).flatten(1)
        return cls(values, None, values.amin(1), values.amax(1))


class Statistics(RangeEstimator):
    """One stream's extremes, its histogram and, along ``channels``, the channel means.

    Memory is bounded: see ``ranges.Stream``. A bin's width is a power of two, at most 2^-13 of the
    largest absolute value. Without ``histogram``, only extremes and means are kept.
    """

    def __init__(self, *, channels: int | None, histogram: bool = True) -> None:
        super().__init__(None)
        self.channels = channels
        self.stream = Stream() if histogram else None
        self.sum: Tensor | None = None
        self.vectors = 0

    def _collect(self, x: Tensor) -> None:
        if self.stream is not None:
            for piece in x.reshape(-1).split(_PART):  # small enough to stay in the cache
                self.stream.update(piece)
        if self.channels is None:
            return
        axis = self.channels % x.dim()
        rest = [dim for dim in range(x.dim()) if dim != axis]
        total = (x.sum(rest, dtype=torch.float32) if rest else x).double()
        if self.sum is not None and self.sum.shape != total.shape:
            raise QuietvitError(
                f"a batch has {total.numel()} channels, the ones before had {self.sum.numel()}."
            )
        self.sum = total if self.sum is None else self.sum + total
        self.vectors += x.numel() // x.shape[axis]

    def _finish(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        return minimum, maximum

    def means(self) -> Tensor:
        """Return the mean of each channel, (channels,), double."""
        self.finish()
        assert self.sum is not None
        return self.sum / self.vectors

    def points(self) -> Points:
        """Return the histogram; the outermost bins stand for the extremes seen."""
        minimum, maximum = self.finish()
        assert self.stream is not None
        values, counts = self.stream.points()
        values = values.clone()
        values[:, 0], values[:, -1] = minimum, maximum
        return Points(values, counts, minimum.view(1), maximum.view(1))


def without_outliers(points: Points, z: float) -> Points:
    """Set the count of each value with abs(value - mean)/std > z to 0.

    ``minimum`` and ``maximum`` are those of the remaining values. A constant has no outliers.
    """
    values = points.values.double()
    counts = torch.ones_like(values) if points.counts is None else points.counts.double()
    total = counts.sum(1, keepdim=True)
    mean = (values * counts).sum(1, keepdim=True) / total
    std = (((values - mean).square() * counts).sum(1, keepdim=True) / total).sqrt()
    kept = (values - mean).abs() <= z * std
    kept |= ~kept.any(1, keepdim=True)
    inf = torch.full_like(points.values, float("inf"))
    return Points(
        points.values,
        counts * kept,
        torch.where(kept, points.values, inf).amin(1),
        torch.where(kept, points.values, -inf).amax(1),
    )


def search(
    points: Points,
    *,
    bits: int,
    signed: bool,
    error: str = "mse",
    p: float = 2.0,
    candidates: int = 10,
    shifted: bool = False,
) -> Tensor:
    """Return each channel's threshold of least error among t0/2^i, t0 = 2·2^ceil(log2 max|x|).

    It is at least 2^-16; of equal candidates, the smallest wins. ``error``: ``mse``, ``mae``,
    ``lp`` (mean |x - q(x)|^p), ``kl`` (see ``_kl``) or ``noclip`` (number of values outside [-t, t]
    or [0, t]). With ``shifted``, the unsigned grid starts at minus the smallest grid point that
    covers the minimum. Returns (channels,), float32.
    """
    if error not in ERRORS:
        raise QuietvitError(
            f"unknown error measure {error!r}; choose from {', '.join(ERRORS)}"
            f"{nearest(error, ERRORS)}"
        )
    largest = torch.maximum(points.minimum.abs(), points.maximum.abs())
    highest = 2 * power_of_two_above(largest)
    tried = [(highest / 2**i).clamp(min=SMALLEST_THRESHOLD) for i in range(candidates)]
    errors = torch.stack(
        [
            _error(points, *grid(points, t, bits=bits, signed=signed, shifted=shifted), error, p)
            for t in reversed(tried)
        ]
    )
    return torch.stack(tried[::-1]).gather(0, errors.argmin(0)[None])[0]


def power_of_two_above(x: Tensor) -> Tensor:
    """The smallest power of two that is at least x, elementwise and exact; 0 for 0."""
    mantissa, exponent = torch.frexp(x.double())
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    return torch.where(x > 0, torch.exp2(exponent.double()), 0.0).to(x.dtype)


Grid = tuple[Tensor, Tensor, tuple[int, int]]


def grid(
    points: Points, threshold: Tensor, *, bits: int, signed: bool, shifted: bool = False
) -> Grid:
    """Return step, zero point and code range for this threshold; tensors are (channels,)."""
    codes = affine_code_range(bits, signed)
    step = threshold / 2 ** (bits - signed)
    zero = torch.zeros_like(step)
    if shifted:
        zero = torch.ceil(-points.minimum.clamp(max=0.0) / step).clamp(max=codes[1])
    return step, zero, codes


def quantizer(
    points: Points,
    threshold: Tensor,
    *,
    bits: int,
    signed: bool,
    axis: int | None,
    shifted: bool = False,
) -> AffineQuantizer:
    """Return the quantizer for this threshold, (channels,). If ``axis`` is None, channels is 1."""
    step, zero, _ = grid(points, threshold, bits=bits, signed=signed, shifted=shifted)
    if axis is None:
        step, zero = step[0], zero[0]
    return AffineQuantizer(step, zero.to(torch.int32), bits=bits, signed=signed, axis=axis)


def _error(
    points: Points, step: Tensor, zero: Tensor, codes: tuple[int, int], name: str, p: float
) -> Tensor:
    """Sum of the error over the values, weighted by their counts; (channels,) double."""
    if name == "kl":
        return _kl(points, step, zero, codes)
    step, zero = step[:, None], zero[:, None]
    if name == "noclip":
        below, above = step * (codes[0] - zero), step * (codes[1] + 1 - zero)
        off = ((points.values < below) | (points.values > above)).float()
    else:
        off = affine_fake(points.values, step, zero, *codes).sub_(points.values)
        off = _MEASURES[name](off, p)
    if points.counts is not None:
        off = off * points.counts
    return off.sum(1, dtype=torch.float64)


_MEASURES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "mse": lambda off, p: off.square_(),
    "mae": lambda off, p: off.abs_(),
    "lp": lambda off, p: off.abs_().pow_(p),
}


def _kl(points: Points, step: Tensor, zero: Tensor, codes: tuple[int, int]) -> Tensor:
    """Kullback-Leibler divergence of the quantized from the float histogram.

    A variant of TensorRT's calibration (Migacz, GTC 2017) with ``KL_BINS`` equal bins between the
    extremes. P is the float histogram; clipped mass is added to the outermost unclipped bins. Q
    spreads each level's unclipped mass evenly over the level's bins. Q sums only to the unclipped
    share, so a threshold that clips nearly everything gets a large divergence.
    """
    low = points.minimum[:, None].double()
    width = ((points.maximum[:, None] - low) / KL_BINS).clamp(min=1e-30)
    values = points.values.double()
    counts = torch.ones_like(values) if points.counts is None else points.counts.double()
    bins = ((values - low) / width).floor_().clamp_(0, KL_BINS - 1).to(torch.int64)
    empty = torch.zeros(len(low), KL_BINS, dtype=torch.float64, device=low.device)
    mass = empty.scatter_add(1, bins, counts)
    centres = low + (torch.arange(KL_BINS, device=low.device) + 0.5) * width
    levels = (centres / step[:, None]).round_().add_(zero[:, None])
    below, above = levels < codes[0], levels > codes[1]
    inside = ~(below | above)
    # A level is a run of equal entries, since levels ascend with the bins.
    runs = torch.zeros_like(levels, dtype=torch.int64)
    runs[:, 1:] = (levels[:, 1:] != levels[:, :-1]).cumsum(1)
    kept = mass * inside
    members = empty.scatter_add(1, runs, inside.double()).gather(1, runs)
    quantized = empty.scatter_add(1, runs, kept).gather(1, runs) / members.clamp(min=1)
    quantized = quantized * inside / mass.sum(1, keepdim=True)
    first = inside.int().argmax(1, keepdim=True)
    last = KL_BINS - 1 - inside.flip(1).int().argmax(1, keepdim=True)
    kept.scatter_add_(1, first, (mass * below).sum(1, keepdim=True))
    kept.scatter_add_(1, last, (mass * above).sum(1, keepdim=True))
    kept /= kept.sum(1, keepdim=True)
    terms = torch.special.xlogy(kept, kept) - torch.special.xlogy(kept, quantized)
    return torch.where(inside.any(1), terms.sum(1), torch.inf)
