"""GPTQ: round weights column by column; the columns not yet rounded absorb each error.

Activation quantizers come from the base. The rounding is in ``least_squares``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from quietvit.quantization.blocks import find_blocks
from quietvit.quantization.calibrated import Calibrated
from quietvit.quantization.calibration import Calibration
from quietvit.quantization.fitting.least_squares import (
    Gram,
    damped,
    grouped,
    movable,
    nearest,
    passes,
    round_with_feedback,
    rows,
    run_to,
    weight_grid,
)
from quietvit.quantization.method import between, register_method
from quietvit.quantization.on_top import OnTop
from quietvit.quantization.quantizers import AffineQuantizer
from quietvit.quantization.ranges import RangeName
from quietvit.quantization.slot import Slot
from quietvit.quantization.weights import read_weight, write_weight
from quietvit.tracing import Site, Trace


@register_method("gptq")
class GPTQ(OnTop):
    """GPTQ (Frantar et al., arXiv 2210.17323) with the activation quantizers of ``base``.

    H = 2/n Σ x xᵀ over the quantized inputs x of a linear or convolution (patches, per group of
    channels), plus ``damp`` times its mean diagonal. Then weights are rounded with error feedback
    in blocks of ``block`` columns (algorithm 1 of the paper). The grid is uniform, with one range
    per output channel of the float weight.

    The model's blocks are processed in order, as the authors do. For each block, one pass over the
    images gives H for its layers, with all earlier blocks quantized. Memory holds the H of one
    block, however many images there are.

    Differs from the authors': activations are quantized too (theirs stay float). Columns that see
    only zeros are rounded to nearest (they set them to zero). The arithmetic is float64 instead of
    float32. Weights that are shared, computed, or of transposed convolutions stay as the base
    rounds them.
    """

    summary: ClassVar[str] = "rounding with error feedback, on the base's activation quantizers"
    source: ClassVar[str] = "arXiv 2210.17323"
    published: ClassVar[str] = "W4 and W3, activations float, of language models"
    default_base: ClassVar[str] = "rtn"

    weight_range: RangeName = "omse"
    """How the grid of a weight is chosen, as in ``RTN``."""
    weight_symmetric: bool = False
    """Whether the zero point of weights is 0."""
    damp: Annotated[float, between(0.0, 1.0)] = 0.01
    """Added to the diagonal of H, as a share of its mean."""
    block: Annotated[int, Field(ge=1)] = 128
    """Columns rounded before their error reaches all later ones."""
    act_order: bool = False
    """Whether columns with large diag H are rounded first."""
    in_sequence: bool = True
    """Whether the blocks of the model are processed one after the other, as the authors do.

    False: one pass with all H in memory at once, and float weights.
    """

    def calibrate(self, calibration: Calibration) -> Calibrated:
        """Calibrate the base, then run one pass for each block of the model."""
        calibrated = self.calibrate_base(calibration)
        sites = movable(calibration, calibrated, self._touches, "GPTQ")
        groups = _by_block(calibration.trace, sites) if self.in_sequence else [sites]
        for site in sites:
            calibrated.quantizers.pop(Slot(site, 1), None)
        grids: dict[Slot, AffineQuantizer] = {}
        for group, label in passes(calibration, groups, f"{self.name} {self.label}"):
            hessians = self._hessians(calibration, calibrated, group, label)
            for site in group:
                gram = hessians.pop(site.name)
                grids[Slot(site, 1)] = self._round(calibration.model, site, gram)
        calibrated.quantizers |= grids
        return calibrated

    def _touches(self, site: Site) -> bool:
        return self.slot_bits(Slot(site, 1)) is not None

    def _hessians(
        self, calibration: Calibration, calibrated: Calibrated, group: list[Site], label: str | None
    ) -> dict[str, Gram]:
        grams = {site.name: Gram() for site in group}

        def look(site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]) -> None:
            if site.name in grams:
                x, weight = operands
                for piece in rows(x, weight, run):
                    grams[site.name].update(piece, piece)

        run_to(calibration, calibrated, group[-1], look, quantized=True, label=label)
        return grams

    def _round(self, model: nn.Module, site: Site, gram: Gram) -> AffineQuantizer:
        bits = self.slot_bits(Slot(site, 1))
        assert bits is not None
        weight = read_weight(model, site)
        grid = weight_grid(weight, bits, self.weight_range, self.weight_symmetric)
        hessian = damped(gram.finish(site.name) * (2 / gram.rows), self.damp)
        rounded = round_with_feedback(
            grouped(weight, hessian.shape[0]),
            hessian,
            lambda column: nearest(grid, column),
            block=self.block,
            act_order=self.act_order,
        )
        write_weight(model, site, rounded.reshape(weight.shape).to(weight.dtype))
        return grid


def _by_block(trace: Trace, sites: list[Site]) -> list[list[Site]]:
    """Group sites by block in execution order; a site in no block is a group of its own."""
    home = {site.name: block.name for block in find_blocks(trace) for site in block.sites}
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(home.get(site.name, f"site {site.name}"), []).append(site)
    return list(groups.values())
