"""Round-to-nearest, the baseline: uniform quantizers with ranges from calibration.

It changes no weight; methods that do are in other files.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from torch import Tensor

from quietvit.quantization.calibrated import Calibrated
from quietvit.quantization.calibration import Calibration
from quietvit.quantization.method import Granularity, Method, between, register_method
from quietvit.quantization.quantizers import AffineQuantizer
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
            calibrated.quantizers[slot] = AffineQuantizer.from_range(
                *watched.finish(),
                bits=bits,
                symmetric=self._symmetric(slot),
                signed=self._signed(slot),
                axis=self._axis(slot),
            )
        return calibrated

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
