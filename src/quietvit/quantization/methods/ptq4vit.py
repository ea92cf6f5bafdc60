"""PTQ4ViT: two ranges after softmax and GELU, steps searched by the error of each product.

The search is in ``search``; ``products`` records products and gradients.
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

    All steps are symmetric and signed. Post-softmax operands have two ranges, split at 2^-i with i
    from 0 to 19. Post-GELU inputs have two ranges, the negative one with the fixed step
    0.16997/2^(b-1) (see ``TwinQuantizer``). Steps are searched for each product, on operands of the
    float model. Candidates are ``candidates`` factors from 0.01 to 1.2 of absmax/(2^(b-1) - 1/2).
    Weight and input (or both operands of attention's products) are searched in turns, ``rounds``
    times. The criterion is the mean of (g·(o - ô))² over the output o, with g the gradient at it.

    As in the authors' code: weights are per tensor, except for a joint query-key-value linear (one
    step for each of the three) and convolutions (one per output channel). Activations are per
    tensor, attention's operands per head. The patch embedding's weights have the working bits, its
    input is float (``patch_input_bits``). The head has the working bits.

    Deviations:

    - The paper weighs by the gradient of KL(softmax(z0) || softmax(z)) at the float model's own
      logits z0. That gradient is zero, apart from rounding errors. Here it is a random direction
      whose mean square is that loss's second derivative (``curvature_root``; derived here). Both
      do equally well on DeiT-Tiny at W4A4; plain squared error (``hessian=False``) does better
      (docs/lab-log.md).
    - ``rows`` random tokens of each site represent all (derived here; None takes all).
    - The split is searched against the quantized right operand, not the float one. A step changes
      only if a candidate is better, so the criterion never rises.
    - Inputs of convolutions other than the patch embedding are quantized.
    - An operation that is no product of matrices gets the steps of least squared operand error,
      with a note.
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
    """Whether to weigh errors of the output by the gradient there."""
    candidates: Annotated[StrictInt, Field(ge=2)] = 100
    """Candidate steps for each operand and round."""

    def side(self, slot: Slot, x: Tensor, dtype: torch.dtype, trace: Trace) -> Side:
        bits, role = self.slot_bits(slot), slot.role
        assert bits is not None
        if self.twin and role == "post_softmax":
            return TwinSoftmax(x, Groups.along(x), bits, dtype)
        if self.twin and role == "post_gelu":
            return TwinGelu(x, Groups.along(x), bits, dtype)
        return Affine(x, self._groups(slot, trace, x), bits, dtype, signed=True)

    def start(self, side: Side, product: Product, index: int) -> Tensor:
        """Return the step of absmax, or its counterpart in the family."""
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
    """For a joint query-key-value linear, return which of the three each row makes.

    int64, (out,): 0, 1, 2. None for other sites, and if the trace cannot follow the rows.
    """
    for score in trace.scores:
        if score.query == score.key == site.name and site.weight_shape is not None:
            parts = torch.full(site.weight_shape[:1], 2)
            for queries, keys in score.heads:
                parts[list(queries)] = 0
                parts[list(keys)] = 1
            return torch.unique(parts, return_inverse=True)[1]
    return None
