"""Round-to-nearest, the baseline: uniform quantizers with ranges from calibration.

It changes no weight; methods that do are in other files.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import model_validator
from torch import Tensor

from quietvit.quantization.calibrated import Calibrated
from quietvit.quantization.calibration import Calibration
from quietvit.quantization.floating import ELEMENT_OF, NumberFormat, floating_quantizer
from quietvit.quantization.method import Granularity, Method, between, register_method
from quietvit.quantization.quantizers import AffineQuantizer, Quantizer
from quietvit.quantization.ranges import RangeEstimator, RangeName, make_range
from quietvit.quantization.slot import Slot
from quietvit.quantization.weights import weight_axis


@register_method("rtn")
class RTN(Method):
    """Round to nearest (Jacob et al., arXiv 1712.05877, uniform affine quantization).

    s = (max - min)/(2^b - 1), z = round(-min/s), or symmetric with z = 0. Weight ranges are exact;
    ``ranges`` tells how accurate activation ranges are.
    """

    summary: ClassVar[str] = "round to nearest; min-max, percentile or OMSE ranges"
    source: ClassVar[str] = "arXiv 1712.05877; OMSE as in arXiv 1902.06822"
    published: ClassVar[str] = "W8A8 per-channel weights, per-tensor activations"

    weight_range: RangeName = "minmax"
    """``minmax``, ``percentile`` (quantiles 1 - p and p) or ``omse`` (least squared error
    among shrunk ranges).
    """
    activation_range: RangeName = "minmax"
    """Like ``weight_range``."""
    percentile: Annotated[float, between(0.5, 1.0)] = 0.99999
    """p of the range ``percentile``, above 0.5."""
    weight_granularity: Granularity = "per_channel"
    """One scale per output channel, or one for the tensor."""
    activation_granularity: Granularity = "per_tensor"
    """``per_channel``: inputs of linears per last dimension, of convolutions per dimension 1.

    Operands of attention's matrix products always have one scale, because their channels are summed
    over or are tokens.
    """
    weight_symmetric: bool = True
    """Whether the zero point of weights is 0."""
    activation_symmetric: bool = False
    """Whether the zero point of activations is 0; codes are unsigned if no value is negative."""
    number_format: NumberFormat = "integer"
    """``integer``, or a floating-point format, which is simulated.

    The bits choose the element. ``fp8_e4m3``, ``fp8_e5m2``: 8 bits, with a float32 scale per tensor
    or channel, from calibration. ``mx``: MXFP4, MXFP6-E2M3 or MXFP8-E4M3, and ``mx_wide``: MXFP4,
    MXFP6-E3M2 or MXFP8-E5M2; blocks of 32 values. ``nvfp4``: NVFP4 at 4 bits, blocks of 16 values,
    and FP8-E4M3 at 8 bits. Blocks lie along the axis that the product sums over: the last one of a
    linear's operands, the channels of a convolution. Formats have no zero point.
    """

    @model_validator(mode="after")
    def _format_fits(self) -> Self:
        if self.number_format == "integer":
            return self
        known = ELEMENT_OF[self.number_format]
        edges = [self.patch_embed_bits, self.head_bits]
        wanted: list[Any] = [self.weight_bits, self.activation_bits, *edges]
        wanted += [bits for pair in self.overrides.values() for bits in pair]
        for bits in wanted:
            if bits not in (None, "same") and bits not in known:
                raise ValueError(
                    f"number_format={self.number_format!r} has {_listed(known)} bits, not {bits}; "
                    "change weight_bits, activation_bits, patch_embed_bits, head_bits or overrides"
                )
        ranges = {self.weight_range, self.activation_range}
        if "omse" in ranges:
            raise ValueError(
                f"the range omse fits integer codes, not number_format={self.number_format!r}; use "
                "minmax or percentile"
            )
        if self.number_format.startswith("mx") and "percentile" in ranges:
            raise ValueError(
                f"number_format={self.number_format!r} takes each block's scale from its values, "
                "so the range percentile has no effect; use minmax"
            )
        if self.conv_output_bits is not None:
            raise ValueError(
                "conv_output_bits is for integer kernels, and "
                f"number_format={self.number_format!r} has none; leave it out"
            )
        return self

    def calibrate(self, calibration: Calibration) -> Calibrated:
        """Run one pass over the images; weights are read once."""
        ranges: dict[Slot, RangeEstimator] = {}

        def look(slot: Slot, tensor: Tensor) -> None:
            bits = self.slot_bits(slot)
            if bits is None or (slot.is_weight and slot in ranges):
                return
            if slot not in ranges:
                ranges[slot] = make_range(
                    self.weight_range if slot.is_weight else self.activation_range,
                    bits=bits,
                    symmetric=self._symmetric(slot),
                    signed=self._signed(slot),
                    axis=self._axis(slot),
                    percentile=self.percentile,
                    exact=slot.is_weight,
                )
            ranges[slot].update(tensor)

        calibration.watch(look, label=f"{self.name} {self.label}")
        calibrated = Calibrated()
        for slot, watched in ranges.items():
            bits = self.slot_bits(slot)
            assert bits is not None
            if self.number_format != "integer":
                calibrated.quantizers[slot] = self._floating(slot, watched, bits)
                continue
            calibrated.quantizers[slot] = AffineQuantizer.from_range(
                *watched.finish(),
                bits=bits,
                symmetric=self._symmetric(slot),
                signed=self._signed(slot),
                axis=self._axis(slot),
            )
        return calibrated

    def may_learn_step(self, slot: Slot) -> bool:
        return self.number_format == "integer"

    def policy(self) -> str:
        if self.number_format == "integer":
            return super().policy()
        return f"{super().policy()}; number format {self.number_format}"

    def _floating(self, slot: Slot, watched: RangeEstimator, bits: int) -> Quantizer:
        low, high = watched.finish()
        return floating_quantizer(
            self.number_format,
            bits,
            torch.maximum(low.abs(), high.abs()),
            channels=self._axis(slot),
            contracted=_contracted(slot),
        )

    def _symmetric(self, slot: Slot) -> bool:
        return self.weight_symmetric if slot.is_weight else self.activation_symmetric

    def _signed(self, slot: Slot) -> bool | None:
        return True if slot.is_weight and self.weight_symmetric else None

    def _axis(self, slot: Slot) -> int | None:
        if slot.is_weight:
            outputs = weight_axis(slot.site)
            return outputs if self.weight_granularity == "per_channel" else None
        if self.activation_granularity == "per_tensor" or slot.site.kind not in ("linear", "conv"):
            return None
        return -1 if slot.site.kind == "linear" else 1


def _contracted(slot: Slot) -> int:
    """Return the axis of an operand that its product sums over."""
    site = slot.site
    if site.kind == "conv" and site.weight_shape is not None:
        if slot.is_weight:
            return 1 - weight_axis(site)
        return 1 - len(site.weight_shape)
    if site.kind == "linear" or slot.index == 0:
        return -1
    # An einsum names its axes itself: values behind an attention map are summed over the tokens.
    maps = site.operands[0].role == "post_softmax"
    return -2 if site.kind == "matmul" or maps else -1


def _listed(bits: Iterable[int]) -> str:
    return " or ".join(map(str, bits))
