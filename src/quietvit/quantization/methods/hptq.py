"""HPTQ: power-of-two thresholds, and four corrections that are exact in float or fold into biases.

The steps are in ``batchnorm``, ``equalize`` and ``thresholds``; this module combines them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BeforeValidator
from torch import Tensor

from quietvit.errors import QuietvitError
from quietvit.quantization.adjustments import ChannelAffine, channel_axis
from quietvit.quantization.calibrated import Calibrated
from quietvit.quantization.calibration import Calibration
from quietvit.quantization.fitting.batchnorm import fold_batchnorms
from quietvit.quantization.fitting.equalize import equalize
from quietvit.quantization.fitting.thresholds import (
    ErrorName,
    Points,
    Statistics,
    quantizer,
    search,
    without_outliers,
)
from quietvit.quantization.method import Method, between, register_method
from quietvit.quantization.quantizers import AffineQuantizer
from quietvit.quantization.slot import Slot
from quietvit.quantization.weights import weight_axis
from quietvit.tracing import MATMUL_KINDS, Site, Trace

SHIFTED = frozenset({"prelu", "elu", "hardswish", "silu", "gelu"})
"""Activations with a small or bounded negative part, which the shift handles."""
_KINDS = MATMUL_KINDS | {"norm"}
WEIGHT_CANDIDATES, ACTIVATION_CANDIDATES = 10, 20


def _z(value: Any) -> Any:
    if value is None:
        return None
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or not 1 < value < float("inf"):
        raise ValueError("a number above 1, such as 16, or None for no outlier filter")
    return float(value)


@register_method("hptq")
class HPTQ(Method):
    """HPTQ (Habi et al., arXiv 2109.09113; formulas as in its authors' public toolkit).

    Uniform quantizers without zero point, with a power-of-two threshold t: [-t, t - t/2^(b-1)]
    signed, or [0, t - t/2^b] unsigned for operands that are never negative. Weights are signed, per
    output channel.

    Differences from the paper. Histograms have finer bins (see ``ranges.Stream``; the paper has
    2048), so they need not be rebuilt when the range grows. A shifted input's threshold is searched
    again on its shifted grid, and each reader of an activation is shifted separately. Both are
    derived here, as is the form of ``kl``. Operands of attention's products get thresholds like all
    others; residual adds and logits stay float. E[x] does not count padding as zeros.

    Power-of-two thresholds waste up to half of a grid. That costs little at 8 bits and much at 4.
    """

    summary: ClassVar[str] = "power-of-two thresholds, equalization, shift, bias correction; CNNs"
    source: ClassVar[str] = "arXiv 2109.09113"
    published: ClassVar[str] = "W8A8, 500 images: MobileNetV2 -0.35, EfficientNet-B0 -2.98 points"
    images: ClassVar[int] = 500

    batchnorm_folding: bool = True
    """Whether to fold BatchNorms into the weights in front of them."""
    equalization: bool = True
    """Whether to scale channels by min(1/sd, 1) between layers with a ReLU in between.

    sd comes from the BatchNorm's own mean and standard deviation, so it needs the folding.
    """
    z_threshold: Annotated[float | None, BeforeValidator(_z)] = None
    """Ignore histogram bins more than this many (5 to 20) standard deviations off; None: none."""
    weight_error: ErrorName = "mse"
    """Error for the choice among 10 thresholds: ``mse``, ``mae``, ``lp``, ``kl`` or ``noclip``."""
    activation_error: ErrorName = "mse"
    """Like ``weight_error``, among 20 thresholds."""
    p: Annotated[float, between(0.0, 16.0)] = 2.0
    """Exponent of the error ``lp``; 2 is ``mse``."""
    shift_negative: bool = True
    """Whether inputs after PReLU, ELU, Hardswish, SiLU or GELU become unsigned.

    They are shifted up by the smallest grid point that covers their minimum. Here an integer zero
    point does that. It equals adding the shift, padding with it and removing it from the next bias.
    """
    shift_ratio: Annotated[float, between(0.0, 1.0)] = 0.25
    """Largest |minimum| / threshold of a shifted input: 0.25 in the paper, 0.05 in the toolkit."""
    bias_correction: bool = True
    """Whether bias -= Σ_j (W_q - W)_j E[x_j], with E[x] per input channel from the images."""

    def calibrate(self, calibration: Calibration) -> Calibrated:
        """Run one pass over the images, and at most four over the first image."""
        calibrated = Calibrated()
        first = calibration.images.peek()[:1]
        if self.batchnorm_folding:
            folds = fold_batchnorms(calibration, calibrated, first)
            calibrated.notes += folds.notes(self.name)
            if self.equalization:
                equalized = equalize(calibration, calibrated, folds, first)
                calibrated.notes += equalized.notes(self.name)
        statistics = self._statistics(calibration, calibrated)
        self._activations(calibration.trace, statistics, calibrated)
        self._weights(calibration, first, statistics, calibrated)
        return calibrated

    def may_learn_step(self, slot: Slot) -> bool:
        return False  # thresholds are powers of two

    def _statistics(
        self, calibration: Calibration, calibrated: Calibrated
    ) -> dict[Slot, Statistics]:
        """Return statistics of the activations of the float model, folded and equalized."""
        statistics: dict[Slot, Statistics] = {}

        def handler(site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]) -> Tensor:
            slots = [Slot(site, index) for index in range(len(operands))]
            for slot, operand in zip(slots, operands, strict=True):
                if site.kind not in MATMUL_KINDS or slot.is_weight:
                    continue
                if slot not in statistics:
                    means = self.bias_correction and slots[1].is_weight and self.slot_bits(slots[1])
                    statistics[slot] = Statistics(
                        channels=channel_axis(site) if means else None,
                        histogram=self.slot_bits(slot) is not None,
                    )
                try:
                    statistics[slot].update(operand)
                except QuietvitError as error:
                    raise QuietvitError(f"{site.name} ({slot.operand}): {error}") from error
            return calibrated.adjust(site, operands, run)

        calibration.observe(handler, kinds=_KINDS, label=f"{self.name} {self.label}")
        return statistics

    def _activations(
        self, trace: Trace, collected: dict[Slot, Statistics], calibrated: Calibrated
    ) -> None:
        shifted, refused = 0, []
        for slot, statistics in collected.items():
            bits = self.slot_bits(slot)
            if bits is None:
                continue
            signed = bool(statistics.finish()[0] < 0)
            points = statistics.points()
            if self.z_threshold is not None:
                points = without_outliers(points, self.z_threshold)
            threshold = self._threshold(points, bits, signed, False)
            shift = signed and self.shift_negative and _from_shifted(trace, slot)
            if shift and -points.minimum.item() > self.shift_ratio * threshold.item():
                refused.append(slot.site.name)
                shift = False
            if shift:
                shifted, signed = shifted + 1, False
                threshold = self._threshold(points, bits, False, True)
            calibrated.quantizers[slot] = quantizer(
                points, threshold, bits=bits, signed=signed, axis=None, shifted=shift
            )
        if shifted:
            calibrated.notes.append(f"{self.name} shifted the negative part of {shifted} inputs")
        if refused:
            shown = ", ".join(refused[:3]) + (", ..." if len(refused) > 3 else "")
            calibrated.notes.append(
                f"{self.name} kept {len(refused)} inputs signed: their negative part is above "
                f"{self.shift_ratio:g} of the threshold: {shown}"
            )

    def _threshold(self, points: Points, bits: int, signed: bool, shifted: bool) -> Tensor:
        return search(
            points,
            bits=bits,
            signed=signed,
            error=self.activation_error,
            p=self.p,
            candidates=ACTIVATION_CANDIDATES,
            shifted=shifted,
        )

    def _weights(
        self,
        calibration: Calibration,
        image: Tensor,
        statistics: dict[Slot, Statistics],
        calibrated: Calibrated,
    ) -> None:
        uncorrected = []

        def handler(site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]) -> Tensor:
            slot = Slot(site, 1)
            bits = self.slot_bits(slot)
            if not slot.is_weight or bits is None:
                return run(*operands)
            weight = operands[1]
            fitted = self._weight_quantizer(site, weight, bits)
            calibrated.quantizers[slot] = fitted
            if self.bias_correction and "transpose" in site.function:
                uncorrected.append(site.name)
            elif self.bias_correction:
                means = statistics[Slot(site, 0)].means()
                off = mean_error(fitted(weight).double() - weight.double(), means)
                scaled = calibrated.adjustments.get(site.name)
                if isinstance(scaled, ChannelAffine):
                    off = off * scaled.gain
                calibrated.add(site, ChannelAffine.of(site, bias=-off))
            return run(*operands)

        with torch.no_grad():
            calibration.run(image, handler, kinds=MATMUL_KINDS)
        if uncorrected:
            calibrated.notes.append(
                f"{self.name} did not correct the biases of the transposed convolutions "
                f"{', '.join(uncorrected)}"
            )

    def _weight_quantizer(self, site: Site, weight: Tensor, bits: int) -> AffineQuantizer:
        axis = weight_axis(site)
        points = Points.of(weight, axis)
        threshold = search(
            points,
            bits=bits,
            signed=True,
            error=self.weight_error,
            p=self.p,
            candidates=WEIGHT_CANDIDATES,
        )
        return quantizer(points, threshold, bits=bits, signed=True, axis=axis)


def mean_error(off: Tensor, means: Tensor) -> Tensor:
    """Mean output of a linear or (grouped) convolution with weight ``off``, (out,).

    ``off``: (out, in / groups, ...). ``means``: (in,), the mean input of each channel, assumed to
    be the same at every position of the kernel.
    """
    summed = off.flatten(2).sum(2) if off.dim() > 2 else off
    groups = len(means) // summed.shape[1]
    per_output = means.view(groups, -1).repeat_interleave(summed.shape[0] // groups, 0)
    return (summed * per_output).sum(1)


def _from_shifted(trace: Trace, slot: Slot) -> bool:
    """Whether the input of a linear or convolution comes from one activation of ``SHIFTED``."""
    if slot.site.kind not in ("linear", "conv") or slot.index != 0:
        return False
    fed_by = slot.site.operands[0].fed_by
    if len(fed_by) != 1:
        return False
    source = trace[fed_by[0]]
    return source.kind == "activation" and source.function.strip("_") in SHIFTED
