"""``Grid``: the integers of a quantizer as a runtime holds them, 8 bits wide, and their scales.

Which operand stands on which grid is the quantized model's business; nodes are written in
``for_onnx``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from quietvit.errors import QuietvitError
from quietvit.quantization import QuantizedModel
from quietvit.quantization.quantizers import AffineQuantizer, Quantizer
from quietvit.quantization.slot import Slot


@dataclass(frozen=True)
class Grid:
    """value = scale * (code - zero_point), codes from ``low`` to ``high``.

    Derived here: the codes of the quantizer moved by a whole number, ``moved``, and the zero point
    with them, so that activations are unsigned (0 to 2^b - 1) and weights signed (-2^(b-1) to
    2^(b-1) - 1), which is what integer kernels take; no value changes. In files with signed codes
    activations are signed, too. ``scale`` float32 and ``zero_point`` are () or (channels,) along
    ``axis``.
    """

    bits: int
    signed: bool
    moved: int
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int | None

    @classmethod
    def of(cls, slot: Slot, quantizer: Quantizer, signed: bool = False) -> Grid:
        """The grid of a slot's quantizer; with ``signed`` its codes are signed, zero points zero.

        Raises QuietvitError, naming the site, where no integer kernel has it: more than 8 bits,
        unequal steps, or activations with a scale for each channel. With ``signed`` also where the
        same integers have no zero point of zero.
        """
        reason = why_none(slot, quantizer, signed)
        if reason is not None:
            raise QuietvitError(
                f"{slot.site.name} ({slot.operand}) cannot be exported: {reason}. {remedy(signed)}"
            )
        assert isinstance(quantizer, AffineQuantizer)
        middle = 1 << (quantizer.bits - 1)
        is_signed = slot.is_weight or signed
        moved = (0 if quantizer.signed else -middle) if is_signed else middle * quantizer.signed
        zero_point = quantizer.zero_point.cpu().numpy().astype(np.int64) + moved
        return cls(
            quantizer.bits,
            is_signed,
            moved,
            quantizer.scale.detach().cpu().numpy().astype(np.float32),
            zero_point,
            quantizer.axis,
        )

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        return self.low + (1 << self.bits) - 1

    @property
    def dtype(self) -> Any:
        return np.int8 if self.signed else np.uint8

    @property
    def ends(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Smallest and largest value, where the codes are fewer than the 8-bit type holds."""
        if self.bits == 8:
            return None
        low = (self.low - self.zero_point) * self.scale.astype(np.float64)
        high = (self.high - self.zero_point) * self.scale.astype(np.float64)
        return low.astype(np.float32), high.astype(np.float32)

    def codes(self, quantizer: Quantizer, x: Tensor) -> np.ndarray:
        """Codes of x on this grid, as the 8-bit type, shape of x."""
        found = quantizer.codes(x).cpu().numpy().astype(np.int64) + self.moved
        assert found.size == 0 or (found.min() >= self.low and found.max() <= self.high)
        return found.astype(self.dtype)

    @property
    def facts(self) -> dict[str, Any]:
        """JSON-able; scales as they are, since float32 survives JSON."""
        return {
            "bits": self.bits,
            "moved": self.moved,
            "axis": self.axis,
            "scale": self.scale.astype(np.float64).tolist(),
            "zero_point": self.zero_point.tolist(),
        }


def grids_of(
    quantized: QuantizedModel, strict: bool = True, signed: bool = False
) -> dict[str, Grid]:
    """The grid of every slot, by its key, with ``signed`` codes or with unsigned activations.

    Where a slot has none it is left out, or with ``strict`` QuietvitError is raised.
    """
    found = {}
    for slot in quantized.slots():
        quantizer = quantized.quantizers[slot.key]
        assert isinstance(quantizer, Quantizer)
        if strict or why_none(slot, quantizer, signed) is None:
            found[slot.key] = Grid.of(slot, quantizer, signed)
    return found


def remedy(signed: bool) -> str:
    """What to do about codes that no integer kernel has, or that are not signed."""
    if signed:
        return (
            'as_="symmetric" (--as symmetric) puts symmetric quantizers in their place and says '
            "what is lost; activation_symmetric=True and weight_symmetric=True of the method make "
            "most of them symmetric from the start."
        )
    return (
        'as_="uniform" (--as uniform) puts uniform quantizers of 8 bits at most in their place and '
        "says what is lost."
    )


def why_none(slot: Slot, quantizer: Quantizer, signed: bool = False) -> str | None:
    """Why no integer kernel computes with the codes of a quantizer; None where one does.

    With ``signed``: one that takes signed codes without zero points alone.
    """
    if not isinstance(quantizer, AffineQuantizer):
        return f"its {quantizer.kind} codes are not evenly spaced, and no integer kernel takes them"
    if quantizer.bits > 8:
        return f"integer kernels multiply 8 bits at most, it has {quantizer.bits}"
    if not slot.is_weight and quantizer.axis is not None:
        return "activations need one scale for the tensor, it has one for each channel"
    middle = 0 if quantizer.signed else 1 << (quantizer.bits - 1)
    if signed and bool((quantizer.zero_point != middle).any()):
        if not quantizer.signed and not bool(quantizer.zero_point.any()):
            return "its codes are unsigned, none of its values is negative"
        return "its values have a zero point"
    return None
