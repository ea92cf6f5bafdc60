"""Replace quantizers without an integer kernel by uniform or symmetric ones, and measure the loss.

The replacement depends on the quantizer alone. Calibrating on images is the better way.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quietvit.deployment.grids import why_none
from quietvit.errors import QuietvitError
from quietvit.quantization import QuantizedModel
from quietvit.quantization.floating import FloatingQuantizer
from quietvit.quantization.quantizers import AffineQuantizer, Quantizer, affine_fake
from quietvit.quantization.slot import Slot


@dataclass(frozen=True)
class Replaced:
    """One replaced quantizer: its site, its old kind, and the loss.

    ``error`` is the largest change of a level of the old quantizer, relative to the range. ``lost``
    counts the distinct levels that the new quantizer merges, out of ``levels``.
    """

    site: str
    operand: str
    was: str
    bits: int
    error: float
    levels: int
    lost: int

    def __str__(self) -> str:
        return (
            f"{self.site} ({self.operand}): {self.was} became {self.bits} uniform bits; "
            f"{self.lost} of {self.levels} levels fall together, error up to "
            f"{100 * self.error:.2g} % of the range"
        )


REPLACEMENTS = ("uniform", "symmetric")


def replacing_codes(
    quantized: QuantizedModel, by: str, bits: int = 8
) -> tuple[QuantizedModel, list[Replaced]]:
    """Return a copy with uniform quantizers of at most 8 bits, and the list of replacements.

    ``by`` is one of ``REPLACEMENTS``. ``symmetric`` means signed codes without zero points, which
    TensorRT needs.

    Derived here: unequal steps become affine codes of ``bits`` from the smallest to the largest
    level. Scales per channel of an activation become one scale over all their ranges. More than 8
    bits become ``bits``. Weights keep the range of each channel. A symmetric quantizer spans minus
    to plus the largest old magnitude. So half of its levels are lost if no value is negative.
    """
    signed = by == "symmetric"
    own = copy.deepcopy(quantized)
    replaced = []
    for slot in own.slots():
        old = own.quantizers[slot.key]
        assert isinstance(old, Quantizer)
        if why_none(slot, old, signed) is None:
            continue
        if isinstance(old, FloatingQuantizer):
            raise QuietvitError(
                f"{slot.site.name} ({slot.operand}) is {old.label}, a floating-point format, which "
                "no uniform code replaces. Quantize with number_format='integer' to export it."
            )
        new = _uniform(slot, old, bits, signed)
        own.quantizers[slot.key] = new
        replaced.append(_loss(slot, old, new))
    own.refresh()
    return own, replaced


def _uniform(slot: Slot, old: Quantizer, bits: int, signed: bool) -> AffineQuantizer:
    low, high = _ends(old)
    axis = old.axis if slot.is_weight and isinstance(old, AffineQuantizer) else None
    if axis is None:
        low, high = low.min(), high.max()
    affine = isinstance(old, AffineQuantizer)
    if signed and affine:
        bits = min(bits, old.bits)
    symmetric = signed or (slot.is_weight and affine and bool(getattr(old, "signed", False)))
    return AffineQuantizer.from_range(
        low, high, bits=bits, symmetric=symmetric, signed=True if symmetric else None, axis=axis
    )


def _ends(old: Quantizer) -> tuple[Tensor, Tensor]:
    if isinstance(old, AffineQuantizer):
        first, last = old.code_range
        zero = old.zero_point.float()
        return (first - zero) * old.scale, (last - zero) * old.scale
    levels = _levels(old)
    return levels.min(), levels.max()


def _levels(old: Quantizer) -> Tensor:
    """Return all values that a quantizer can give, of all channels if it has a scale for each."""
    first, last = old.code_range
    codes = torch.arange(first, last + 1, dtype=torch.int32)
    if isinstance(old, AffineQuantizer):
        zero, scale = old.zero_point.reshape(-1, 1), old.scale.reshape(-1, 1)
        return ((codes - zero) * scale).flatten()
    device = next((buffer.device for buffer in old.buffers()), codes.device)
    return old.dequantize(codes.to(device))


def _loss(slot: Slot, old: Quantizer, new: AffineQuantizer) -> Replaced:
    if slot.is_weight and isinstance(old, AffineQuantizer) and old.axis is not None:
        if old.bits > 8:
            count, kept, error = 1 << old.bits, 1 << new.bits, 0.5 / ((1 << new.bits) - 1)
        else:
            count, kept, error = _loss_of_channels(old, new)
    else:
        levels = _levels(old).unique()
        after: Any = new(levels)
        count, kept = len(levels), len(after.unique())
        spread = float(levels.max() - levels.min()) or 1.0
        error = float((after - levels).abs().max()) / spread
    kind = f"{old.kind} {old.bits} bits"
    return Replaced(slot.site.name, slot.operand, kind, new.bits, error, count, count - kept)


def _loss_of_channels(old: AffineQuantizer, new: AffineQuantizer) -> tuple[int, int, float]:
    """Return (levels of all channels, those still distinct, largest error / channel range)."""
    first, last = old.code_range
    codes = torch.arange(first, last + 1, dtype=torch.int32, device=old.scale.device)
    levels = (codes - old.zero_point[:, None]) * old.scale[:, None]
    after = affine_fake(levels, new.scale[:, None], new.zero_point[:, None], *new.code_range)
    apart = int((after.diff(dim=1) != 0).sum()) + len(levels)
    spread = (levels[:, -1] - levels[:, 0])[:, None]
    return levels.numel(), apart, float(((after - levels).abs() / spread).max())
