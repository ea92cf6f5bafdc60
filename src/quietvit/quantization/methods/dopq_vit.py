"""DopQ-ViT: RepQ-ViT with medians after norms (MOSF) and tangent attention maps (TanQ).

What it shares with RepQ-ViT is in ``repq_vit``, the quantizer in ``companding``.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from quietvit.quantization.companding import TanQuantizer
from quietvit.quantization.fitting.postnorm import (
    ChannelSteps,
    Layerwise,
    blocks,
    layerwise,
    quantiles,
)
from quietvit.quantization.method import register_method
from quietvit.quantization.methods.repq_vit import RepQViT
from quietvit.quantization.nonuniform import squared_error
from quietvit.quantization.quantizers import Quantizer
from quietvit.quantization.ranges import Stream

CURVATURES = tuple(0.4 + 0.05 * step for step in range(23))
"""0.4 to 1.5."""


@register_method("dopq-vit")
class DopQViT(RepQViT):
    """DopQ-ViT (Yang et al., arXiv 2408.03291) without its block reconstruction.

    ``mosf``: s̃ after norms is the value of least mean absolute deviation, which is the median of
    the s_j (the paper's statement). That alone changes nothing here, because s̃ cancels (see
    ``postnorm.layerwise``). z̃ does not cancel, so it is the median of the z_j; derived here.

    ``tanq``: attention maps get a ``TanQuantizer``, derived here since the paper's equation is not
    public. Its scale is the largest value or a p-quantile as in RepQ-ViT, its curvature is 0.4 to
    1.5. The pair of least squared error over a histogram of the calibration images is taken.

    Everything else is RepQ-ViT's, and so is a part that is set to False. Do not expect the
    published figures: they include block reconstruction on 1024 images.
    """

    summary: ClassVar[str] = "RepQ-ViT with medians behind norms, tangent attention maps"
    source: ClassVar[str] = "arXiv 2408.03291; tangent quantizer derived here"
    published: ClassVar[str] = "DeiT-T W4A4 65.54, W6A6 71.17, with block reconstruction"

    mosf: bool = True
    """Whether to use medians after norms; else RepQ-ViT's means."""
    tanq: bool = True
    """Whether attention maps get a ``TanQuantizer``; else RepQ-ViT's log √2."""

    def layerwise(self, steps: ChannelSteps) -> Layerwise:
        """Return one quantizer for all channels, from the medians of scales and zero points."""
        if not self.mosf:
            return super().layerwise(steps)
        return layerwise(steps, scale_centre=_median, zero_centre=_median)

    def attention_quantizer(self, x: Tensor, bits: int) -> Quantizer:
        """Return the tangent quantizer of attention maps with the least squared error."""
        if not self.tanq:
            return super().attention_quantizer(x, bits)
        rows = x.detach().float().reshape(1, -1)
        stream = Stream()
        for block in blocks(rows):
            stream.update(block)
        values, counts = stream.points()
        scales = [rows.max(), *(high[0] for _, high in quantiles(rows))]
        choice = [
            TanQuantizer(scale, torch.tensor(curvature, device=x.device), bits=bits)
            for scale in scales
            for curvature in CURVATURES
        ]
        return min(choice, key=lambda tangent: squared_error(tangent, values, counts).item())


def _median(values: Tensor) -> Tensor:
    return values.quantile(0.5)
