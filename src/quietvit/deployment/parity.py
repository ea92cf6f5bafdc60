"""Whether an exported file computes what the simulated model computes, integer by integer.

Logits are no test: one rounding that falls the other way moves them all. So every product is given
the same inputs in both, and its codes and sums of products are compared.
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
"""How far from the middle between two codes a value may be for its rounding to go either way."""
ROUNDING = 2.0**-21
"""Share by which float32 arithmetic may move a sum of products on its way out of the integers."""


@dataclass(frozen=True)
class Agreement:
    """One product on given inputs.

    ``codes``: how many integers went in; ``ties``: how many of them differ by one where the value
    lies in the middle between both; ``wrong``: how many differ otherwise. ``sums``: how many sums
    of products came out; ``off``: how many of them are not those of the codes. Of a convolution
    that gives codes, ``sums`` are these, compared as those that went in are; the middle is then as
    wide as its bias is rounded.
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
    """Compare every product that a file claims to be integer with the simulated model's.

    ``images``: (N, C, H, W) as the model takes them. Raises QuietvitError where file and model do
    not belong together, or where the runtime does not run single products.
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
                f"{runtime.path} multiplies integers in {product.name}, where this "
                f"{quantized.method.name} model has no two quantizers; give the .qvit that "
                "it was exported from."
            )
    operands = _operands(quantized, images)
    parts = runtime.parts([product.name for product in wanted])
    given = {
        name: [
            operands[name][slot.index]
            if facts.product(name).rounded is None
            else _settled(operands[name][slot.index], quantized.quantizers[slot.key])
            for slot in slots[name]
            if not slot.is_weight and not slot.is_output
        ]
        for name in parts.codes
    }
    codes, sums = parts.run(given)
    found = []
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
        found.append(Agreement(name, *compared, count, off))
    return found


def _operands(quantized: QuantizedModel, images: Tensor) -> dict[str, dict[int, Tensor]]:
    """Every operand as its quantizer gets it, in one pass of the simulated model."""
    kept: dict[str, dict[int, Tensor]] = {}

    def keep(slot: Slot, x: Tensor) -> Tensor:
        kept.setdefault(slot.site.name, {})[slot.index] = x.detach().clone()
        result: Tensor = quantized.quantizers[slot.key](x)
        return result

    with torch.no_grad(), quantized.replacing(keep):
        quantized(images)
    return kept


def _settled(x: Tensor, quantizer: Any) -> Tensor:
    """The values, but those in the middle between two codes as the simulated model rounds them.

    A file may round these the other way. A convolution that gives codes would carry that step to
    its output, where only its own rounding is allowed for.
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
    """(codes, ties, wrong) of both operands; the integers multiplied; their scale.

    ``corrected``: the file takes a weight's zero points out and corrects the sums in float.
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
    """(codes, ties, others that differ) of a convolution that gives the codes of its reader."""
    assert product.rounded is not None
    site, _, operand = product.rounded["slot"].rpartition(":")
    slot = next((slot for slot in slots.get(site, []) if slot.operand == operand), None)
    if slot is None:
        raise QuietvitError(
            f"{runtime.path} quantizes the output of {product.name} as {site} ({operand}), where "
            f"this {quantized.method.name} model has no quantizer; give the .qvit that it was "
            "exported from."
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
    """(ties, others) among codes that differ; ``tie`` is how far from the middle one may be."""
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
    product: Product, sides: list[np.ndarray], scale: np.ndarray, found: np.ndarray, corrected: bool
) -> tuple[int, int]:
    """(how many, how many differ) of scale times the sums of products of the integers.

    Where sums are ``corrected`` two large float32 numbers may have left a small one: the rounding
    is then in shares of the sum of absolute products and of 128 for each code.
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
    apart = np.abs(found.astype(np.float64).reshape(exact.shape) - exact)
    return exact.size, int((apart > ROUNDING * size).sum())


def _patch_product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """A convolution of patches as (B, L, out), as the file has it."""
    out, channels, kh, kw = weight.shape
    batch, _, height, width = x.shape
    h, w = height // kh, width // kw
    cut = x.reshape(batch, channels, h, kh, w, kw).transpose(0, 2, 4, 1, 3, 5)
    return cut.reshape(batch, h * w, -1) @ weight.reshape(out, -1).T  # type: ignore[no-any-return]
