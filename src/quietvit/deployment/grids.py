"""``Grid``: a quantizer's integers in the 8-bit form that runtimes store, with their scales.

The quantized model decides which operand has which grid. ``for_onnx`` writes the nodes.
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
    """An affine grid: value = scale * (code - zero_point), with codes from ``low`` to ``high``.

    Integer kernels take unsigned activations (0 to 2^b - 1) and signed weights (-2^(b-1) to
    2^(b-1) - 1). So the quantizer's codes and zero point are shifted by the integer ``moved``,
    which changes no value. Example: signed 8-bit activations get ``moved`` = 128. In files with
    signed codes, activations are signed too. ``scale`` (float32) and ``zero_point`` have shape ()
    or (channels,) along ``axis``. Derived here.
    """

    bits: int
    signed: bool
    moved: int
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int | None

    @classmethod
    def of(cls, slot: Slot, quantizer: Quantizer, signed: bool = False) -> Grid:
        """Return the grid of a slot's quantizer. ``signed`` needs signed codes, zero point 0.

        Raises QuietvitError with the site's name if no integer kernel takes the codes: more than 8
        bits, unequal steps, or activations with a scale per channel. With ``signed`` a zero point
        that the shift does not make 0 is refused too.
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
        """Smallest and largest value if there are fewer codes than the 8-bit type holds."""
        if self.bits == 8:
            return None
        low = (self.low - self.zero_point) * self.scale.astype(np.float64)
        high = (self.high - self.zero_point) * self.scale.astype(np.float64)
        return low.astype(np.float32), high.astype(np.float32)

    def codes(self, quantizer: Quantizer, x: Tensor) -> np.ndarray:
        """Return the codes of x on this grid in the 8-bit type, with the shape of x."""
        codes = quantizer.codes(x).cpu().numpy().astype(np.int64) + self.moved
        assert codes.size == 0 or (codes.min() >= self.low and codes.max() <= self.high)
        return codes.astype(self.dtype)

    @property
    def facts(self) -> dict[str, Any]:
        """The grid for JSON. Scales are exact, because float32 survives JSON."""
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
    """Return the grid of every slot by key. ``signed`` makes activations signed too.

    A slot without a grid is left out, or raises QuietvitError if ``strict``.
    """
    grids = {}
    for slot in quantized.slots():
        quantizer = quantized.quantizers[slot.key]
        assert isinstance(quantizer, Quantizer)
        if strict or why_none(slot, quantizer, signed) is None:
            grids[slot.key] = Grid.of(slot, quantizer, signed)
    return grids


def remedy(signed: bool) -> str:
    """Return the remedy for codes that have no integer kernel, or that are not signed."""
    if signed:
        return (
            'as_="symmetric" (--as symmetric) replaces them by symmetric quantizers and reports '
            "the loss. activation_symmetric=True and weight_symmetric=True of the method make most "
            "of them symmetric from the start."
        )
    return (
        'as_="uniform" (--as uniform) replaces them by uniform quantizers of at most 8 bits and '
        "reports the loss."
    )


def why_none(slot: Slot, quantizer: Quantizer, signed: bool = False) -> str | None:
    """Return why no integer kernel takes a quantizer's codes, or None if one does.

    ``signed`` asks for a kernel that takes only signed codes without zero points.
    """
    if not isinstance(quantizer, AffineQuantizer):
        return f"its {quantizer.kind} codes are not evenly spaced, and no integer kernel takes them"
    if quantizer.bits > 8:
        return f"integer kernels multiply at most 8 bits, but it has {quantizer.bits}"
    if not slot.is_weight and quantizer.axis is not None:
        return "activations need one scale for the tensor, but it has one for each channel"
    middle = 0 if quantizer.signed else 1 << (quantizer.bits - 1)
    if signed and bool((quantizer.zero_point != middle).any()):
        if not quantizer.signed and not bool(quantizer.zero_point.any()):
            return "its codes are unsigned, because none of its values is negative"
        return "its values have a zero point"
    return None
