"""Streaming statistics of one activation tensor over many batches: its tail, and where it peaks.

``diagnose`` decides what to measure at which site; ``colinearity`` measures weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quietvit.errors import QuietvitError

MANTISSA_BITS = 6
_BINS = 1 << (8 + MANTISSA_BITS)
_SHIFT = 23 - MANTISSA_BITS

PERCENTILE_ACCURACY = 2.0 ** -(MANTISSA_BITS + 1)


@dataclass(frozen=True)
class SiteStatistics:
    """Statistics of one activation tensor over all images. Derived here.

    Attributes:
        site: name of the site in the trace.
        operand: ``input``, ``left``, ``right`` (operands of a matrix product) or ``output``.
        role: role of the tensor in the trace.
        count: number of values seen.
        max: largest ``|x|``.
        rms: root mean square.
        max_over_rms: ``max / rms``; 0 if every value is 0.
        kurtosis: fourth standardized moment (3 for a Gaussian); nan if the variance is 0.
        percentile_ratio: 99.99 % quantile over 50 % quantile of ``|x|``, each with a relative error
            of at most 2^-7; inf if more than half of the values are 0.
        channels: size of the channel axis (heads times channels for query, key and value).
        top_channels: number of channels in ``top_share``: 4 or 1 %, whichever is larger.
        top_share: share of the energy Σx² in the ``top_channels`` channels with the most energy.
            Evenly spread energy gives ``top_channels / channels``.
        worst_channel: channel that holds the largest ``|x|``.
        worst_value: that value, with its sign.
        worst_index: its index in the tensor of its batch.
        worst_image: index of its image, counted over all batches; None if the first axis of the
            tensor does not count images.
        channel_max: largest ``|x|`` of each channel.
    """

    site: str
    operand: str
    role: str
    count: int
    max: float
    rms: float
    max_over_rms: float
    kurtosis: float
    percentile_ratio: float
    channels: int
    top_channels: int
    top_share: float
    worst_channel: int
    worst_value: float
    worst_index: tuple[int, ...]
    worst_image: int | None
    channel_max: tuple[float, ...] = field(repr=False)

    @property
    def name(self) -> str:
        """The site name, followed by the operand unless it is the only input."""
        return self.site if self.operand == "input" else f"{self.site}:{self.operand}"


class RunningStatistics:
    """Statistics of a stream of tensors with equal layout; memory does not grow with the stream.

    Central moments are merged batch by batch in float64 (Pébay 2008, eq. 3.1), which avoids
    cancellation for a large mean. Quantiles come from a histogram of ``|x|`` with 64 bins per
    octave of float32 (16384 counters).

    Args:
        channel_axes: the axes that together form the channel index, in that order.
    """

    def __init__(self, channel_axes: tuple[int, ...] = (-1,)) -> None:
        self.channel_axes = channel_axes
        self.count = 0
        self._mean = self._m2 = self._m3 = self._m4 = 0.0
        self._histogram: Tensor | None = None
        self._energy: Tensor | None = None
        self._channel_max: Tensor | None = None
        self._worst: tuple[float, float, int, tuple[int, ...], int | None]
        self._worst = (-1.0, 0.0, 0, (), None)

    def update(self, x: Tensor, *, images: int | None = None, first_image: int = 0) -> None:
        """Add a tensor of finite values.

        Args:
            images: number of images along axis 0, in equal parts; None if axis 0 does not count
                images.
            first_image: index of the first of these images.

        Raises:
            QuietvitError: the number of channels differs from that of earlier tensors.
        """
        if x.numel() == 0:
            return
        x = x.detach()
        if x.device.type == "mps":
            x = x.cpu()
        magnitude = x.abs()
        axes = tuple(axis % x.ndim for axis in self.channel_axes)
        others = [axis for axis in range(x.ndim) if axis not in axes]
        wide = x.double()
        energy = _by_channel(wide.square().sum(others) if others else wide.square(), axes)
        peaks = _by_channel(magnitude.amax(others) if others else magnitude, axes).double()
        if self._energy is None or self._channel_max is None:
            self._energy, self._channel_max = energy, peaks
        elif self._energy.shape != energy.shape:
            raise QuietvitError(
                f"this batch has {energy.numel()} channels, earlier ones had "
                f"{self._energy.numel()}. Give images of one size."
            )
        else:
            self._energy += energy
            self._channel_max = torch.maximum(self._channel_max, peaks)
        self._update_histogram(magnitude)
        self._update_moments(wide)
        self._update_worst(x, magnitude, axes, images, first_image)

    def _update_histogram(self, magnitude: Tensor) -> None:
        # The upper bits of a positive float (exponent and first mantissa bits) grow with its value.
        # Read as an integer, they are the bin of a logarithmic histogram, without a logarithm.
        bins = magnitude.float().contiguous().view(torch.int32).flatten() >> _SHIFT
        counts = torch.bincount(bins, minlength=_BINS)
        self._histogram = counts if self._histogram is None else self._histogram + counts

    def _update_moments(self, wide: Tensor) -> None:
        # Sums of powers cancel if the mean is large. So each batch gets its own central moments,
        # which are merged with the earlier ones (Pébay 2008, SAND2008-6212, equation 2.1).
        n, mean = wide.numel(), wide.mean()
        centred = wide - mean
        squared = centred.square()
        sums = torch.stack([squared.sum(), (squared * centred).sum(), squared.square().sum()])
        m2, m3, m4 = sums.tolist()
        a, b, total = self.count, n, self.count + n
        delta = mean.item() - self._mean
        self._m4 += (
            m4
            + delta**4 * a * b * (a * a - a * b + b * b) / total**3
            + 6 * delta**2 * (a * a * m2 + b * b * self._m2) / total**2
            + 4 * delta * (a * m3 - b * self._m3) / total
        )
        self._m3 += (
            m3 + delta**3 * a * b * (a - b) / total**2 + 3 * delta * (a * m2 - b * self._m2) / total
        )
        self._m2 += m2 + delta**2 * a * b / total
        self._mean += delta * b / total
        self.count = total

    def _update_worst(
        self,
        x: Tensor,
        magnitude: Tensor,
        axes: tuple[int, ...],
        images: int | None,
        first_image: int,
    ) -> None:
        position = int(magnitude.argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(position), x.shape))
        value = float(x[index])
        if abs(value) <= self._worst[0]:
            return
        channel = 0
        for axis in axes:
            channel = channel * x.shape[axis] + index[axis]
        image = None
        if images and x.shape[0] % images == 0:
            image = first_image + index[0] // (x.shape[0] // images)
        self._worst = (abs(value), value, channel, index, image)

    def quantile(self, p: float) -> float:
        """Return the p-quantile of ``|x|``, with a relative error of at most 2^-7.

        It is the centre of the bin that holds the ⌈p·n⌉-th smallest value. Values under 2^-126
        count as 0.

        Raises:
            QuietvitError: no value was seen yet.
        """
        if self._histogram is None:
            raise QuietvitError("no value was seen yet, so there is no quantile; give images.")
        cumulative = self._histogram.cumsum(0)
        rank = torch.tensor(max(1, math.ceil(p * self.count)), device=cumulative.device)
        bin_ = int(torch.searchsorted(cumulative, rank))
        if bin_ >> MANTISSA_BITS == 0:
            return 0.0
        edges = torch.tensor([bin_, bin_ + 1], dtype=torch.int32) << _SHIFT
        low, high = edges.view(torch.float32).double().tolist()
        return float((low + high) / 2)

    def finish(self, site: str, operand: str, role: str) -> SiteStatistics:
        """Return the statistics so far. Raises QuietvitError if no value was seen."""
        if self._energy is None or self._channel_max is None:
            raise QuietvitError(f"nothing reached {operand} of site {site}; give images.")
        energy = self._energy
        total = float(energy.sum())
        rms = math.sqrt(total / self.count)
        channels = energy.numel()
        top = min(channels, max(4, math.ceil(channels / 100)))
        share = float(energy.topk(top).values.sum()) / total if total else top / channels
        median = self.quantile(0.5)
        maximum, value, channel, index, image = self._worst
        return SiteStatistics(
            site=site,
            operand=operand,
            role=role,
            count=self.count,
            max=maximum,
            rms=rms,
            max_over_rms=maximum / rms if rms else 0.0,
            kurtosis=self._m4 * self.count / self._m2**2 if self._m2 else math.nan,
            percentile_ratio=self.quantile(0.9999) / median if median else math.inf,
            channels=channels,
            top_channels=top,
            top_share=share,
            worst_channel=channel,
            worst_value=value,
            worst_index=index,
            worst_image=image,
            channel_max=tuple(self._channel_max.tolist()),
        )


def _by_channel(reduced: Tensor, axes: tuple[int, ...]) -> Tensor:
    order = sorted(axes)
    return reduced.permute([order.index(axis) for axis in axes]).flatten()
