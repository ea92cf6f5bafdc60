"""Compare an exported file with the simulated model, integer by integer.

Logits cannot show this, because one value that rounds the other way changes all of them. So each
product gets the same inputs in both, and its codes and sums of products are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quietvit.deployment.facts import COARSEST, Facts, Product
from quietvit.deployment.grids import Grid
from quietvit.deployment.runtime import Runtime
from quietvit.errors import QuietvitError
from quietvit.quantization import QuantizedModel
from quietvit.quantization.slot import Slot

TIE = 1e-3
"""A value this close to the midpoint of two codes (in steps) is a tie: both codes are right."""
ROUNDING = 2.0**-21
"""The relative float32 error allowed when integer sums of products are scaled to floats."""


@dataclass(frozen=True)
class Agreement:
    """How far the file and the simulated model agree on one product.

    ``codes`` counts the input integers, ``ties`` those that differ by one at a midpoint, ``wrong``
    those that differ otherwise. ``sums`` counts the output sums of products, ``off`` those that do
    not follow from the codes. For a convolution that outputs codes, ``sums`` counts these codes.
    They are compared like the inputs, with a tie width that also covers ``Product.rounded``.
    """

    product: str
    codes: int
    ties: int
    wrong: int
    sums: int
    off: int

    @property
    def equal(self) -> bool:
        return self.wrong == 0 and self.off == 0


def agreements(
    runtime: Runtime, facts: Facts, quantized: QuantizedModel, images: Tensor
) -> list[Agreement]:
    """Compare every product that the file claims to be integer with the simulated model's.

    ``images`` are (N, C, H, W) after the model's transform. Raises QuietvitError if file and model
    do not belong together, or if the runtime cannot run single products.
    """
    wanted = [product for product in facts.products if product.why_float is None]
    if not wanted:
        return []
    slots: dict[str, list[Slot]] = {}
    for slot in quantized.slots():
        slots.setdefault(slot.site.name, []).append(slot)
    for product in wanted:
        if len([s for s in slots.get(product.name, []) if not s.is_output]) != 2:
            raise QuietvitError(
                f"{runtime.path} multiplies integers in {product.name}, but this "
                f"{quantized.method.name} model does not have two quantizers there; give the .qvit "
                "that it was exported from."
            )
    operands = _operands(quantized, images)
    parts = runtime.parts([product.name for product in wanted])
    entering = {
        name: [
            operands[name][slot.index]
            if facts.product(name).rounded is None
            else _settled(operands[name][slot.index], quantized.quantizers[slot.key])
            for slot in slots[name]
            if not slot.is_weight and not slot.is_output
        ]
        for name in parts.codes
    }
    codes, sums = parts.run(entering)
    results = []
    for product in wanted:
        here, name = slots[product.name], product.name
        compared, sides, scale, corrected = _operand_codes(
            product, here, quantized, operands[name], codes[name], parts.corrected
        )
        if product.rounded is None:
            count, off = _sums(product, sides, scale, sums[name], corrected)
        else:
            count, middle, off = _rounded(runtime, product, slots, quantized, operands, sums[name])
            compared = (compared[0], compared[1] + middle, compared[2])
        results.append(Agreement(name, *compared, count, off))
    return results


def _operands(quantized: QuantizedModel, images: Tensor) -> dict[str, dict[int, Tensor]]:
    """Return every operand as its quantizer receives it: site -> operand index -> tensor."""
    kept: dict[str, dict[int, Tensor]] = {}

    def keep(slot: Slot, x: Tensor) -> Tensor:
        kept.setdefault(slot.site.name, {})[slot.index] = x.detach().clone()
        result: Tensor = quantized.quantizers[slot.key](x)
        return result

    with torch.no_grad(), quantized.replacing(keep):
        quantized(images)
    return kept


def _settled(x: Tensor, quantizer: Any) -> Tensor:
    """Return x with ties replaced by the simulated model's rounded values.

    The file may round ties the other way. A convolution that outputs codes would pass that
    difference on to its output, whose tolerance covers only the convolution's own rounding.
    """
    steps = x.double() / float(quantizer.scale)
    middle = (steps - steps.floor() - 0.5).abs() < TIE
    return torch.where(middle, quantizer(x), x)


def _operand_codes(
    product: Product,
    slots: list[Slot],
    quantized: QuantizedModel,
    operands: dict[int, Tensor],
    theirs: list[np.ndarray],
    corrected: bool,
) -> tuple[tuple[int, int, int], list[np.ndarray], Any, bool]:
    """Return (codes, ties, wrong), both sides' integers without zero point, scale, corrected.

    ``corrected`` in: the file takes zero points out of weights and corrects the sums in float.
    ``corrected`` out: this also happens in this product.
    """
    codes, ties, wrong = 0, 0, 0
    sides: list[np.ndarray] = []
    scale: Any = np.float64(1)
    waiting = iter(theirs)
    for slot in sorted(slots, key=lambda slot: slot.index):
        if slot.is_output:
            continue
        quantizer: Any = quantized.quantizers[slot.key]
        moved = product.operands[slot.operand]["moved"]
        x = operands[slot.index]
        own = quantizer.codes(x).cpu().numpy().astype(np.int64) + moved
        used = own
        if not slot.is_weight:
            used = next(waiting).astype(np.int64).reshape(own.shape)
            middle, odd = _differing(own, used, x, quantizer)
            codes, ties, wrong = codes + own.size, ties + middle, wrong + odd
        zero = quantizer.zero_point.cpu().numpy().astype(np.int64) + moved
        sides.append(used - _along(zero, quantizer.axis, own.ndim))
        scale = scale * quantizer.scale.double().cpu().numpy()
        corrected = corrected and (not slot.is_weight or bool(zero.any()))
    return (codes, ties, wrong), sides, scale, corrected


def _rounded(
    runtime: Runtime,
    product: Product,
    slots: dict[str, list[Slot]],
    quantized: QuantizedModel,
    operands: dict[str, dict[int, Tensor]],
    theirs: np.ndarray,
) -> tuple[int, int, int]:
    """Return (codes, ties, wrong) for a convolution that outputs the codes of its reader."""
    assert product.rounded is not None
    site, _, operand = product.rounded["slot"].rpartition(":")
    slot = next((slot for slot in slots.get(site, []) if slot.operand == operand), None)
    if slot is None:
        raise QuietvitError(
            f"{runtime.path} quantizes the output of {product.name} as {site} ({operand}), but "
            f"this {quantized.method.name} model has no quantizer there; give the .qvit that it "
            "was exported from."
        )
    quantizer: Any = quantized.quantizers[slot.key]
    x = operands[site][slot.index]
    own = quantizer.codes(x).cpu().numpy().astype(np.int64) + Grid.of(slot, quantizer).moved
    allowed = np.minimum(np.asarray(product.rounded["rounding"]), COARSEST)
    rounding = _along(allowed, 1, own.ndim) if allowed.size > 1 else allowed
    used = theirs.astype(np.int64).reshape(own.shape)
    return own.size, *_differing(own, used, x, quantizer, TIE + rounding)


def _differing(
    own: np.ndarray, theirs: np.ndarray, x: Tensor, quantizer: Any, tie: Any = TIE
) -> tuple[int, int]:
    """Return (ties, wrong) among differing codes. ``tie`` is the distance from a midpoint."""
    apart = own != theirs
    if not apart.any():
        return 0, 0
    steps = x.double().cpu().numpy() / float(quantizer.scale)
    distance = np.abs(steps - np.floor(steps) - 0.5)
    ties = apart & (np.abs(own - theirs) == 1) & (distance < tie)
    return int(ties.sum()), int((apart & ~ties).sum())


def _along(values: np.ndarray, axis: int | None, ndim: int) -> np.ndarray:
    if axis is None:
        return values
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def _sums(
    product: Product, sides: list[np.ndarray], scale: np.ndarray, sums: np.ndarray, corrected: bool
) -> tuple[int, int]:
    """Return how many scaled sums of products there are, and how many are off.

    A ``corrected`` sum is a difference of two large float32 numbers. So its tolerance is relative
    to the sum of |left| * (|right| + 128) over the two sides' integers, not to the sum itself.
    """
    left, right = (side.astype(np.float64) for side in sides)  # exact: all stay below 2^53

    def multiplied(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if product.kind == "linear":
            return a @ b.T  # type: ignore[no-any-return]
        return _patch_product(a, b) if product.kind == "conv" else a @ b

    exact = multiplied(left, right) * scale
    size = np.abs(exact)
    if corrected:
        size = multiplied(np.abs(left), np.abs(right) + 128) * scale
    apart = np.abs(sums.astype(np.float64).reshape(exact.shape) - exact)
    return exact.size, int((apart > ROUNDING * size).sum())


def _patch_product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return a convolution of patches as the product (B, L, out) that the file contains."""
    out, channels, kh, kw = weight.shape
    batch, _, height, width = x.shape
    h, w = height // kh, width // kw
    cut = x.reshape(batch, channels, h, kh, w, kw).transpose(0, 2, 4, 1, 3, 5)
    return cut.reshape(batch, h * w, -1) @ weight.reshape(out, -1).T  # type: ignore[no-any-return]
