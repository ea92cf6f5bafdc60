"""PTQ4ViT: two ranges behind softmax and GELU, steps searched by the error of each product.

The search lives in ``search``, the recording of products and gradients in ``products``.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field, StrictBool, StrictInt
from torch import Tensor

from quietvit.quantization.fitting.products import Product, has_heads
from quietvit.quantization.fitting.search import (
    Affine,
    Groups,
    Proposals,
    Side,
    TwinGelu,
    TwinSoftmax,
    factors,
    fixed,
    symmetric_start,
)
from quietvit.quantization.fitting.search_method import SearchMethod
from quietvit.quantization.method import Granularity, register_method
from quietvit.quantization.slot import Slot
from quietvit.tracing import Site, Trace

SPLITS = 20
"""Candidates for the split of post-softmax values: 1, 1/2, ..., 2^-19."""
_LOWEST, _HIGHEST = 0.01, 1.2


@register_method("ptq4vit")
class PTQ4ViT(SearchMethod):
    """Twin uniform quantization with Hessian-guided search (Yuan et al., arXiv 2111.12293).

    All steps are symmetric, signed. Post-softmax operands have two ranges, split at 2^-i with i
    from 0 to 19; inputs behind GELU have two, the negative with the fixed step 0.16997/2^(b-1)
    (see ``TwinQuantizer``). Steps are searched product by product, on operands of the float model:
    ``candidates`` factors from 0.01 to 1.2 of absmax/(2^(b-1) - 1/2), weight and input (or both
    operands of attention's products) in turns, ``rounds`` times. The criterion is the mean of
    (g·(o - ô))² over the output o, g the gradient at it.

    As in the authors' code: weights per tensor, except that of a joint query-key-value linear (one
    step for each of the three) and those of convolutions (one per output channel); activations per
    tensor, attention's operands per head; weights of the patch embedding at the working bits, its
    input float (``patch_input_bits``); the head at the working bits.

    Deviations. The gradient of KL(softmax(z0) || softmax(z)), by which the paper weighs, is zero at
    the float model's own logits z0, where it is taken, but for rounding errors; here it is a random
    direction whose squares are on average that loss's second derivative (``curvature_root``;
    derived here). Either is worth the same on DeiT-Tiny at W4A4, and plain squared error
    (``hessian=False``) is better there (docs/lab-log.md). ``rows`` tokens of each site, drawn at
    random, stand for all (derived here; None takes all). The split is searched against the
    quantized right operand, not the float one, and a step is kept where no candidate is better, so
    that the criterion never rises. Inputs of
    convolutions other than the patch embedding are quantized. What cannot be laid out as a product
    of matrices gets the steps of least squared error of the operand itself, with a note.
    """

    summary: ClassVar[str] = "twin ranges behind softmax and GELU, Hessian-guided step search"
    source: ClassVar[str] = "arXiv 2111.12293"
    needs: ClassVar[tuple[str, ...]] = ("images", "gradients")
    cost: ClassVar[str] = "minutes"
    deployable: ClassVar[bool] = False
    published: ClassVar[str] = "32 images, 100 candidates, 3 rounds; DeiT-T W6A6 69.68, W4A4 36.96"

    weight_granularity: Granularity = "per_tensor"
    """As ``RTN``'s; a joint query-key-value linear has three scales even ``per_tensor``."""
    twin: StrictBool = True
    """Whether softmax and GELU outputs have two ranges; else one."""
    hessian: StrictBool = True
    """Whether errors of the output are weighed by the gradient there."""
    candidates: Annotated[StrictInt, Field(ge=2)] = 100
    """Steps tried for each operand and round."""

    def side(self, slot: Slot, x: Tensor, dtype: torch.dtype, trace: Trace) -> Side:
        bits, role = self.slot_bits(slot), slot.role
        assert bits is not None
        if self.twin and role == "post_softmax":
            return TwinSoftmax(x, Groups.along(x), bits, dtype)
        if self.twin and role == "post_gelu":
            return TwinGelu(x, Groups.along(x), bits, dtype)
        return Affine(x, self._groups(slot, trace, x), bits, dtype, signed=True)

    def start(self, side: Side, product: Product, index: int) -> Tensor:
        """The step of absmax, or what stands for it in the family."""
        if isinstance(side, TwinSoftmax):
            return side.x.new_ones(1, 1)
        low, high = product.ranges[index]
        if isinstance(side, TwinGelu):
            return symmetric_start(high.amax(0, keepdim=True), side.bits)[:, :1]
        if Slot(product.site, index).is_weight:
            return symmetric_start(side.groups.largest(side.x.abs()), side.bits)
        largest, count = torch.maximum(low.abs(), high.abs()), side.groups.count
        largest = largest.expand(count) if count > 1 else largest.amax(0, keepdim=True)
        return symmetric_start(largest, side.bits)

    def proposals(self, side: Side, start: Tensor) -> Proposals:
        """The same candidates in every round."""
        if isinstance(side, TwinSoftmax):
            return fixed(torch.exp2(-torch.arange(SPLITS)).view(-1, 1, 1).to(start.device))
        steps = factors(self.candidates, _LOWEST, _HIGHEST).to(start.device)
        return fixed(steps[:, None, None] * start)

    def _groups(self, slot: Slot, trace: Trace, x: Tensor) -> Groups:
        if slot.site.kind == "matmul":
            return Groups.along(x, 1) if has_heads(slot.site) else Groups.along(x)
        if not slot.is_weight:
            return Groups.along(x)
        if slot.site.kind == "conv" or self.weight_granularity == "per_channel":
            return Groups.along(x, 1, 3)
        parts = joint_parts(trace, slot.site)
        return Groups.along(x) if parts is None else Groups.along(x, 1, 3, parts=parts)


def joint_parts(trace: Trace, site: Site) -> Tensor | None:
    """For a linear that makes queries, keys and the rest at once: which of them each row makes.

    int64, (out,): 0, 1, 2. None for other sites, and where the trace cannot follow the rows.
    """
    for score in trace.scores:
        if score.query == score.key == site.name and site.weight_shape is not None:
            parts = torch.full(site.weight_shape[:1], 2)
            for queries, keys in score.heads:
                parts[list(queries)] = 0
                parts[list(keys)] = 1
            return torch.unique(parts, return_inverse=True)[1]
    return None
