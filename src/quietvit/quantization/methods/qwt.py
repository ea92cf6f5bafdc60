"""QwT: after each block, a linear layer that compensates the change by quantization.

``block_data`` feeds the blocks; ``quantized`` applies a compensation.
"""

from __future__ import annotations

import copy
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from quietvit.quantization.adjustments import Compensation
from quietvit.quantization.blocks import Block, find_blocks
from quietvit.quantization.calibrated import Calibrated
from quietvit.quantization.calibration import Calibration
from quietvit.quantization.fitting.block_data import (
    BlockData,
    BlockLayout,
    Leaves,
    channel_dim,
    in_chunks,
    layouts,
)
from quietvit.quantization.fitting.reconstruct import check_base, few, replayable
from quietvit.quantization.method import register_method
from quietvit.quantization.on_top import OnTop
from quietvit.quantization.weights import refuse_inference_mode

SMALLEST_SHARE = 1e-12
"""Input directions with less than this share of the largest variance count as constant."""


@register_method("qwt")
class QwT(OnTop):
    """QwT (Fu et al., arXiv 2411.13918): block(x) becomes block_q(x) + W x + b.

    W and b are the least squares of block(x) - block_q(x) on x. x is the output of the quantized
    and compensated blocks before; blocks are fitted in order. ``base`` quantizes, on its own number
    of images (``base_images``). The compensation is fitted on all images. It runs in float and
    counts as float in the coverage.

    A compensation is kept only if R² > 0. Derived here: R² is adjusted for the number of
    coefficients, 1 - (1 - R²)(n - 1)/(n - p - 1) over n channel vectors of p channels. The plain R²
    of the paper is never negative on the images of the fit. With few images it would keep a
    compensation that fits only these. With hundreds of images both are the same.

    Blocks are the residual blocks of the trace (``blocks.find_blocks``). A block whose input and
    output differ in shape gets no compensation. Notes name the blocks without one.

    Memory holds for all images: the input of one block, its quantized output, and that output with
    compensation. The sums of the fit are float64 and do not grow with the images.
    """

    summary: ClassVar[str] = "a linear compensation behind each block, on top of another method"
    source: ClassVar[str] = "arXiv 2411.13918"
    published: ClassVar[str] = "512 images, on top of RepQ-ViT"
    cost: ClassVar[str] = "minutes"
    images: ClassVar[int] = 512
    default_base: ClassVar[str] = "repq-vit"

    base_images: Annotated[int, Field(ge=1)] | None = None
    """Calibration images of ``base``; None: the number of its published setting."""

    def calibrate(self, calibration: Calibration) -> Calibrated:
        """Calibrate the base, then fit the residual blocks in order."""
        refuse_inference_mode()
        calibration = replayable(calibration)
        reference = copy.deepcopy(calibration.model)
        calibrated = self.base.calibrate(few(calibration, self.base_images or self.base.images))
        check_base(self, calibrated)
        data = BlockData(
            calibration.model, reference, calibration.trace, calibrated, calibration.images
        )
        blocks = [block for block in find_blocks(calibration.trace) if block.residual]
        first = calibration.images.peek()
        known, without = layouts(reference, blocks, first[:1])
        way: Leaves | None = None
        order = [block for block in blocks if block.name in known]
        with torch.no_grad():
            for block in calibration.track(order, len(order), f"{self.name} {self.label}"):
                layout = known[block.name]
                if way is None or not layout.chained:
                    way = data.reach(block.name, layout, quantized=True)
                output, compensation, why = compensate(data, block, layout, way)
                if compensation is None:
                    without[block.name] = why
                else:
                    calibrated.compensations[block.name] = compensation
                way = [output]
        for name, why in without.items():
            calibrated.notes.append(f"no compensation after {name}: it {why}")
        if not blocks:
            calibrated.notes.append("no residual blocks in this model, so no compensation")
        return calibrated


def compensate(
    data: BlockData, block: Block, layout: BlockLayout, leaves: Leaves
) -> tuple[Tensor, Compensation | None, str]:
    """Return the block's output (compensated if kept), the compensation or None, and why not."""
    same = layout.shape == layout.output_shape
    axis = channel_dim(block, layout)
    sums = LinearFit()

    def run(chunk: Leaves) -> Tensor:
        output = data.quantized(block, layout, chunk)
        if same:
            error = data.float(block, layout, chunk) - output
            sums.update(vectors(chunk[0], axis), vectors(error, axis))
        return output

    output = in_chunks(leaves, run)
    if not same:
        return (
            output,
            None,
            f"has output shape {layout.output_shape} for input shape {layout.shape}",
        )
    weight, bias, r2 = sums.finish()
    if not r2 > 0:
        return output, None, f"has an error that x does not explain (adjusted R² {r2:.2g})"
    positions = sums.count // leaves[0].shape[0]
    compensation = Compensation(weight.float(), bias.float(), axis=axis, positions=positions)
    done = in_chunks([leaves[0], output], lambda chunk: compensation(*chunk))
    return done, compensation, ""


def vectors(x: Tensor, axis: int) -> Tensor:
    """Return channel vectors, (positions, channels), float64."""
    return x.movedim(axis, -1).flatten(0, -2).double()


class LinearFit:
    """Least squares of y on x with an intercept, from sums over batches, float64."""

    def __init__(self) -> None:
        self.count = 0
        self.xx = self.xy = self.x = self.y = self.yy = torch.zeros((), dtype=torch.float64)
        self.shift: tuple[Tensor, Tensor] | None = None

    def update(self, x: Tensor, y: Tensor) -> None:
        if self.shift is None:
            self.shift = x.mean(0), y.mean(0)
        x, y = x - self.shift[0], y - self.shift[1]
        self.count += x.shape[0]
        self.xx, self.xy = self.xx + x.mT @ x, self.xy + x.mT @ y
        self.x, self.y = self.x + x.sum(0), self.y + y.sum(0)
        self.yy = self.yy + y.square().sum()

    def finish(self) -> tuple[Tensor, Tensor, float]:
        """Return W (q, p), b (q,) and the adjusted R² over all q, or -inf for too few rows.

        If x leaves W undetermined, ‖W D‖ is the least possible, with D the deviations of x.
        """
        assert self.shift is not None
        n, p = self.count, self.x.shape[0]
        x, y = self.x / n, self.y / n
        xx = self.xx - n * torch.outer(x, x)
        xy = self.xy - n * torch.outer(x, y)
        total = float(self.yy - n * y.square().sum())
        deviation = xx.diagonal().clamp_min(0).sqrt()
        inverse = torch.where(deviation > 0, 1 / deviation, torch.zeros_like(deviation))
        gram = inverse[:, None] * xx * inverse
        solved = torch.linalg.pinv(gram, rtol=SMALLEST_SHARE, hermitian=True) @ (
            inverse[:, None] * xy
        )
        weight = (inverse[:, None] * solved).mT
        bias = (y + self.shift[1]) - weight @ (x + self.shift[0])
        if n <= p + 1 or total <= 0:
            return weight, bias, float("-inf")
        left = max(0.0, total - float((weight.mT * xy).sum()))
        return weight, bias, 1 - left / total * (n - 1) / (n - p - 1)
