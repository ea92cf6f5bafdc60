"""What PTQ4ViT and AdaLog share: record products, then search quantizers for each of them.

Their own files in ``methods`` define the candidates.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated

import torch
from pydantic import Field, StrictBool, StrictInt
from torch import Tensor

from quietvit.quantization.calibrated import Calibrated
from quietvit.quantization.calibration import Calibration
from quietvit.quantization.fitting.products import Product, nearest_step, product_notes, record
from quietvit.quantization.fitting.search import (
    Float,
    Output,
    Proposals,
    Side,
    alternate,
    product_dtype,
)
from quietvit.quantization.method import Bits, EdgeBits, Method
from quietvit.quantization.quantizers import Quantizer
from quietvit.quantization.slot import Slot
from quietvit.quantization.weights import weight_axis
from quietvit.tracing import Trace


class SearchMethod(Method):
    """Base config of methods that search the two operands of each product in turns.

    Candidates are multiplied in bfloat16 if the machine is fast at it and bits are at most 8, else
    in float32 (derived here). So other machines may choose other, about equally good steps. Memory
    holds the chosen rows of every site, and all images unless they come as one tensor.
    """

    patch_embed_bits: EdgeBits = "same"
    """Bits of both operands of the first layer: a number, None for float, or ``"same"``."""
    head_bits: EdgeBits = "same"
    """Bits of both operands of the last layer, like ``patch_embed_bits``."""
    patch_input_bits: Bits = None
    """Bits of the patch embedding's input; None keeps it in float, as in the authors' code."""
    hessian: StrictBool = False
    """Whether to weigh errors of the output by the gradient there."""
    rounds: Annotated[StrictInt, Field(ge=1)] = 3
    """How often both operands are searched."""
    rows: Annotated[StrictInt, Field(ge=1)] | None = 2048
    """Tokens kept of each site, drawn at random; None takes all."""
    seed: StrictInt = 0
    """Seed of that draw."""

    @abstractmethod
    def side(self, slot: Slot, x: Tensor, dtype: torch.dtype, trace: Trace) -> Side:
        """Return the family of quantizers for an operand that has bits."""

    @abstractmethod
    def start(self, side: Side, product: Product, index: int) -> Tensor:
        """Return the initial parameters of the search for an operand, (groups, n)."""

    @abstractmethod
    def proposals(self, side: Side, start: Tensor) -> Proposals:
        """Return the candidates for an operand, by round."""

    def prepare(
        self, calibration: Calibration, products: dict[str, Product], calibrated: Calibrated
    ) -> None:
        """Change the model and the recorded products before the search."""
        return

    def working_bits(self, slot: Slot) -> int | None:
        bits = super().working_bits(slot)
        return self.patch_input_bits if bits is not None and _is_patch_input(slot) else bits

    def why_working_float(self, slot: Slot) -> str:
        if _is_patch_input(slot) and super().working_bits(slot) is not None:
            return "patch_input_bits=None"
        return super().why_working_float(slot)

    def policy(self) -> str:
        bits = self.patch_input_bits
        return f"{super().policy()}; patch embedding's input {f'{bits} bits' if bits else 'float'}"

    def calibrate(self, calibration: Calibration) -> Calibrated:
        """Run one pass over the images (with ``hessian`` also backward), then search by product."""
        label = f"{self.name} {self.label}"
        products = record(
            calibration,
            lambda site: any(self.slot_bits(Slot(site, i)) is not None for i in range(2)),
            rows=self.rows,
            gradients=self.hessian,
            seed=self.seed,
            label=f"{label}: recording",
        )
        calibrated = Calibrated()
        calibrated.notes += product_notes(self.name, products, gradients=self.hessian)
        self.prepare(calibration, products, calibrated)
        names = list(products)
        for name in calibration.track(names, len(names), f"{label}: search"):
            calibrated.quantizers |= self._search(products.pop(name), calibration.trace)
        return calibrated

    def _search(self, product: Product, trace: Trace) -> dict[Slot, Quantizer]:
        slots = (Slot(product.site, 0), Slot(product.site, 1))
        bits = (self.slot_bits(slots[0]), self.slot_bits(slots[1]))
        if product.left is None or product.right is None:
            return {
                slot: nearest_step(product.loose[slot.index], width)
                for slot, width in zip(slots, bits, strict=True)
                if width is not None
            }
        dtype = product_dtype(product.left.device, bits)
        sides, starts, proposals = [], [], []
        for slot, width, x in zip(slots, bits, (product.left, product.right), strict=True):
            side = Float(x, dtype) if width is None else self.side(slot, x, dtype, trace)
            start = x.new_zeros(1, 0) if width is None else self.start(side, product, slot.index)
            sides.append(side)
            starts.append(start)
            proposals.append(() if width is None else self.proposals(side, start))
        best, _ = alternate(
            Output.of(product.left, product.right, product.gradient),
            (sides[0], sides[1]),
            (proposals[0], proposals[1]),
            (starts[0], starts[1]),
            rounds=self.rounds,
            order=(0, 1) if product.site.kind == "matmul" else (1, 0),
        )
        return {
            slot: side.quantizer(parameters, _axis(side, slot))
            for slot, side, parameters in zip(slots, sides, best, strict=True)
            if not isinstance(side, Float)
        }


def _is_patch_input(slot: Slot) -> bool:
    return slot.site.role == "patch_embed" and not slot.is_weight


def _axis(side: Side, slot: Slot) -> int | None:
    """Return the dim of the groups in the model's own tensor: attention heads are dim -3."""
    if side.groups.index.numel() == 1:
        return None
    if not slot.is_weight:
        return -3
    return weight_axis(slot.site)
