"""Range estimators: streaming observers that choose the (min, max) a quantizer covers.

Their memory does not grow with the number of images. ``quantizers`` holds the quantizers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor

from quietvit.errors import QuietvitError, nearest
from quietvit.quantization.quantizers import affine_code_range, affine_fake, affine_parameters

RangeName = Literal["minmax", "percentile", "omse"]
RANGES: tuple[str, ...] = get_args(RangeName)
EMPTY = "an empty tensor has no range; calibrate with some images."
NOT_FINITE = (
    "the values to quantize contain NaN or inf. Check the weights and the images, and whether this "
    "model overflows in half precision."
)

EXACT_VALUES = 1 << 15
"""Number of values, over all channels, kept exactly before the stream becomes a histogram."""
OMSE_CANDIDATES = 90
_BLOCK = 1 << 16


class RangeEstimator(ABC):
    """Call ``update`` with batches, then ``finish`` for (min, max), each () or (channels,).

    ``axis`` None: one range for the tensor; else one range per index of that axis.
    """

    def __init__(self, axis: int | None = None) -> None:
        self.axis = axis
        self.minimum: Tensor | None = None
        self.maximum: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Add a batch. Raises QuietvitError for NaN, inf, no values, or another channel count."""
        x = x.detach()
        x = x if x.is_floating_point() and x.dtype != torch.float64 else x.float()
        if x.numel() == 0:
            raise QuietvitError(EMPTY)
        minimum, maximum = _extremes(x, self.axis)
        if not bool(torch.isfinite(minimum).all() & torch.isfinite(maximum).all()):
            raise QuietvitError(NOT_FINITE)
        if self.minimum is not None and self.minimum.shape != minimum.shape:
            raise QuietvitError(
                f"a batch has {minimum.numel()} channels, the ones before had "
                f"{self.minimum.numel()}; use per-tensor ranges here."
            )
        self.minimum = minimum if self.minimum is None else torch.minimum(self.minimum, minimum)
        self.maximum = maximum if self.maximum is None else torch.maximum(self.maximum, maximum)
        self._collect(x)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the range, float32. Raises QuietvitError if there were no values."""
        if self.minimum is None or self.maximum is None:
            raise QuietvitError("there is no range before any value was seen. Calibrate first.")
        return self._finish(self.minimum, self.maximum)

    def _collect(self, x: Tensor) -> None:
        """Collect what is needed beyond the extremes."""
        return

    @abstractmethod
    def _finish(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]: ...


class MinMaxRange(RangeEstimator):
    """The exact extremes of the stream."""

    def _finish(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        return minimum, maximum


class PercentileRange(RangeEstimator):
    """Quantiles 1 - p and p, linear between order statistics, p = 0.99999 by default.

    Exact for up to ``EXACT_VALUES`` values, or always with ``exact``. Beyond that, a histogram is
    accurate to one bin: absmax/8192 for a tensor, at worst absmax/256 for a channel (``Stream``).
    """

    def __init__(
        self, percentile: float = 0.99999, axis: int | None = None, exact: bool = False
    ) -> None:
        super().__init__(axis)
        if not 0.5 < percentile <= 1:
            raise QuietvitError(f"percentile={percentile} must lie in (0.5, 1]; 0.99999 is usual.")
        self.percentile = percentile
        self.stream = Stream(axis, exact)

    def _collect(self, x: Tensor) -> None:
        self.stream.update(x)

    def _finish(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        values, counts = self.stream.points()
        low = _quantile(values, counts, 1 - self.percentile).view_as(minimum)
        high = _quantile(values, counts, self.percentile).view_as(maximum)
        return low.clamp(minimum, maximum), high.clamp(minimum, maximum)


class OmseRange(RangeEstimator):
    """The range (min, max)·(1 - 0.01 i), 0 <= i < 90, with the least squared quantization error.

    The error is that of the uniform quantizer with ``bits``, ``symmetric`` or affine. Of equal
    candidates, the first wins. Each channel is chosen separately. Exact for up to ``EXACT_VALUES``
    values, or always with ``exact``. Beyond that, it uses the centres of histogram bins. Their
    width is at most 1/32 of an 8-bit step of a tensor.
    """

    def __init__(
        self,
        bits: int,
        *,
        symmetric: bool,
        signed: bool | None = None,
        axis: int | None = None,
        exact: bool = False,
    ) -> None:
        super().__init__(axis)
        self.bits = bits
        self.symmetric = symmetric
        self.signed = signed
        self.stream = Stream(axis, exact)

    def _collect(self, x: Tensor) -> None:
        self.stream.update(x)

    def _finish(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        values, counts = self.stream.points()
        low, high = minimum.reshape(-1, 1), maximum.reshape(-1, 1)
        signed = self.symmetric and bool((low < 0).any()) if self.signed is None else self.signed
        codes = affine_code_range(self.bits, signed)
        shrinks = [1 - 0.01 * i for i in range(OMSE_CANDIDATES)]
        best = [
            affine_parameters(
                low * shrink, high * shrink, self.bits, symmetric=self.symmetric, signed=signed
            )[:2]
            for shrink in shrinks
        ]
        channels, size = values.shape
        errors = torch.zeros(len(shrinks), channels, dtype=torch.float64, device=values.device)
        rows, columns = max(1, _BLOCK // size), min(size, _BLOCK)
        for r in range(0, channels, rows):
            for c in range(0, size, columns):
                block = values[r : r + rows, c : c + columns]
                weights = None if counts is None else counts[r : r + rows, c : c + columns]
                for i, (scale, zero_point) in enumerate(best):
                    off = affine_fake(block, scale[r : r + rows], zero_point[r : r + rows], *codes)
                    off.sub_(block).square_()
                    if weights is not None:
                        off.mul_(weights)
                    errors[i, r : r + rows] += off.sum(1)
        shrink = torch.tensor(shrinks, dtype=minimum.dtype, device=values.device)
        chosen = shrink[errors.argmin(0)].view_as(minimum)
        return minimum * chosen, maximum * chosen


class Stream:
    """The distribution of a stream in bounded memory, independent of the order of the batches.

    The first ``EXACT_VALUES`` values are kept. After that, each channel has a histogram over
    [-R, R], with R the power of two just above the largest absolute value so far. When R doubles,
    pairs of bins are merged, which only costs resolution: a bin is at most 4·absmax/bins wide.
    There are 2^15 bins for one channel. Many channels share 2^20 bins, but get at least 2^10 each.
    Counts are int64.
    """

    def __init__(self, axis: int | None = None, exact: bool = False) -> None:
        self.axis = axis
        self.exact = exact
        self.kept: list[Tensor] = []
        self.counts: Tensor | None = None
        self.bound: Tensor | None = None

    def update(self, x: Tensor) -> None:
        rows = _rows(x, self.axis)
        if self.counts is None:
            self.kept.append(rows.clone() if rows.data_ptr() == x.data_ptr() else rows)
            if self.exact or sum(piece.numel() for piece in self.kept) <= EXACT_VALUES:
                return
            parts, self.kept = self.kept, []
            channels = rows.shape[0]
            bins = min(1 << 15, max(1 << 10, 1 << ((1 << 20) // channels).bit_length() - 1))
            self.counts = torch.zeros(channels, bins, dtype=torch.int64, device=x.device)
            self.bound = torch.zeros(channels, device=x.device)
        else:
            parts = [rows]
        for piece in parts:
            self._count(piece)

    def _count(self, rows: Tensor) -> None:
        assert self.counts is not None
        assert self.bound is not None
        channels, bins = self.counts.shape
        absmax = torch.maximum(rows.amax(1), -rows.amin(1)).clamp(min=2.0**-100)
        wanted = torch.maximum(torch.exp2(torch.floor(torch.log2(absmax)) + 1), self.bound)
        # Twice the range with the same number of bins: each new bin takes two old ones, and the old
        # range fills the middle half. With 8 bins, [a b c d e f g h] -> [0 0 ab cd ef gh 0 0].
        while bool((growing := (self.bound > 0) & (self.bound < wanted)).any()):
            folded = self.counts[growing].view(-1, bins // 2, 2).sum(2)
            grown = torch.zeros_like(self.counts[growing])
            grown[:, bins // 4 : bins // 4 + bins // 2] = folded
            self.counts[growing] = grown
            self.bound[growing] *= 2
        self.bound = wanted
        index = rows * (bins / 2 / wanted)[:, None]
        index = index.floor_().add_(bins // 2).clamp_(0, bins - 1).to(torch.int64)
        if channels > 1:
            index += torch.arange(channels, device=rows.device)[:, None] * bins
        self.counts += torch.bincount(index.reshape(-1), minlength=channels * bins).view(-1, bins)

    def points(self) -> tuple[Tensor, Tensor | None]:
        """Return ascending values (channels, n) and their counts; None if every count is 1."""
        if self.counts is None or self.bound is None:
            return torch.cat(self.kept, 1).sort(1).values, None
        bins = self.counts.shape[1]
        centres = (torch.arange(bins, device=self.bound.device) + 0.5) * (2 / bins) - 1
        used = (self.counts > 0).any(0)
        return self.bound[:, None] * centres[used], self.counts[:, used].float()


def make_range(
    name: str,
    *,
    bits: int,
    symmetric: bool,
    signed: bool | None = None,
    axis: int | None = None,
    percentile: float = 0.99999,
    exact: bool = False,
) -> RangeEstimator:
    """Return the range estimator of this name: ``minmax``, ``percentile`` or ``omse``."""
    if name == "minmax":
        return MinMaxRange(axis)
    if name == "percentile":
        return PercentileRange(percentile, axis, exact)
    if name == "omse":
        return OmseRange(bits, symmetric=symmetric, signed=signed, axis=axis, exact=exact)
    raise QuietvitError(
        f"unknown range {name!r}; choose from {', '.join(RANGES)}{nearest(name, RANGES)}"
    )


def _rows(x: Tensor, axis: int | None) -> Tensor:
    x = x.float()
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)


def _extremes(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    if axis is None:
        low, high = torch.aminmax(x)
    else:
        rest = [dim for dim in range(x.dim()) if dim != axis % x.dim()]
        low, high = (x.amin(rest), x.amax(rest)) if rest else (x, x)
    return low.float(), high.float()


def _quantile(values: Tensor, counts: Tensor | None, share: float) -> Tensor:
    if counts is None:
        position = share * (values.shape[1] - 1)
        lower = min(int(position), values.shape[1] - 1)
        upper = min(lower + 1, values.shape[1] - 1)
        return torch.lerp(values[:, lower], values[:, upper], position - lower)
    total = counts.double().cumsum(1)
    position64 = share * (total[:, -1:] - 1)
    lower64 = position64.floor()
    last = values.shape[1] - 1
    at = torch.searchsorted(total, lower64, right=True).clamp(max=last)
    after = torch.searchsorted(total, lower64 + 1, right=True).clamp(max=last)
    start, end = values.gather(1, at), values.gather(1, after)
    return torch.lerp(start, end, (position64 - lower64).float())[:, 0]
