"""BRECQ: rounding and activation scales learned block by block.

The loop is in ``reconstruct``; ``qdrop`` adds random float activations.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quietvit.quantization.blocks import Block
from quietvit.quantization.calibration import run_model
from quietvit.quantization.fitting.block_data import BlockData, BlockLayout
from quietvit.quantization.fitting.reconstruct import Reconstruction
from quietvit.quantization.method import register_method
from quietvit.tracing.block_modules import first_tensor, with_first_tensor


@register_method("brecq")
class BRECQ(Reconstruction):
    """BRECQ (Li et al., arXiv 2102.05426) on top of ``base``; see ``Reconstruction`` for the fit.

    The paper weighs errors by gradients (``fisher``); here plain squared error is the default.
    """

    summary: ClassVar[str] = "rounding and activation scales learned block by block"
    source: ClassVar[str] = "arXiv 2102.05426; AdaRound arXiv 2004.10568, LSQ arXiv 1902.08153"
    published: ClassVar[str] = "20000 iterations a block, batch 32, 1024 images"

    fisher: bool = False
    """Whether to weigh squared output errors by the squared gradient there.

    The gradient is that of KL(float ‖ quantized), scaled to mean 1: the paper's diagonal Fisher
    matrix. It costs a forward and backward pass of the whole model per block and image.
    """

    def output_weights(self, data: BlockData, block: Block, layout: BlockLayout) -> Tensor | None:
        return squared_gradients(data, block, layout) if self.fisher else None


def squared_gradients(data: BlockData, block: Block, layout: BlockLayout) -> Tensor | None:
    """Return squared gradients of KL(float ‖ quantized) at the block's output, scaled to mean 1.

    Shape (images, rows, ...). KL is over the last dim of the model's first output. None if all are
    zero.
    """
    parts = []
    for images in data.images:
        kept: list[Tensor] = []

        def hold(module: nn.Module, args: Any, output: Any, kept: list[Tensor] = kept) -> Any:
            kept.append(first_tensor(output).detach().requires_grad_())
            # A copy, because later code may change the output in place.
            return with_first_tensor(output, kept[-1].clone())

        hook = data.model.get_submodule(block.name).register_forward_hook(hold)
        try:
            with torch.no_grad():
                wanted = first_tensor(run_model(data.reference, images)).softmax(-1)
            with torch.enable_grad():
                got = first_tensor(data.whole(images)).log_softmax(-1)
                divergence = F.kl_div(got, wanted, reduction="sum")
                if not divergence.requires_grad:
                    return None
                gradient = torch.autograd.grad(divergence, kept[0])[0]
        finally:
            hook.remove()
        parts.append(layout.split_output(gradient.square()))
    squares = torch.cat(parts)
    mean = squares.mean()
    return squares / mean if bool(mean > 0) else None
