"""ERQ: ridge regressions compensate the errors of quantized activations, then those of weights.

Activation quantizers come from the base. Rows and solvers are in ``least_squares``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from quietvit.quantization.adjustments import ChannelAffine
from quietvit.quantization.calibrated import Calibrated
from quietvit.quantization.calibration import Calibration
from quietvit.quantization.fitting.least_squares import (
    Gram,
    grouped,
    movable,
    nearest,
    passes,
    ridge,
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
from quietvit.tracing import Site

FLIPS = 100
BUDGET = 1 << 26
"""Entries of Gram matrices held at once, 256 MB. Each such lot needs a pass over the images."""


@register_method("erq")
class ERQ(OnTop):
    """ERQ (Zhong et al., ICML 2024, arXiv 2407.06794), after the paper and the authors' code.

    For every linear and convolution, with the float model's input x and the quantized x̂, a column
    of ones for the bias, and λ = ``ridge``:

    1. Activation error: [W, b] += [(ÂᵀÂ + λI)⁻¹ Âᵀ(Y - Â[W, b]ᵀ)]ᵀ. Â has the rows [x̂, 1], and
       Y = ``[x, 1] [W, b]ᵀ`` is the float layer's output.
    2. Weight error: round half of the columns that remain, in order. δ is the change. Compensate it
       in the other half and the bias: -(Â₂ᵀÂ₂ + λI)⁻¹ Â₂ᵀÂ₁ δ. Repeat until all are rounded.
       ``refine``: before each compensation, round up to 100 weights per output the other way, each
       if that lowers δᵀ E[x̂x̂ᵀ] δ.

    λ = 1000 corresponds to the authors' coefficient of 10000 for 32 images (Â has 6304 rows there).

    Differs from the authors': (1) Weights get uniform quantizers, one range per output (theirs of
    2025 give a twentieth of the columns ranges of their own). (2) The range is ``weight_range``
    (they search ten percentiles). (3) The flip that lowers the proxy most is taken (derived here;
    they take the largest gradient). (4) There is one λ (they take 0.1 in step 1 for the head, ten
    times more for convolutions, and leave the patch embedding out of step 1). (5) Layers without
    bias get one.

    Memory holds sums of outer products, not images; large models need several passes. Weights that
    are shared, computed, or of transposed convolutions stay as the base rounds them.
    """

    summary: ClassVar[str] = "closed-form ridge compensation of activation and weight errors"
    source: ClassVar[str] = "arXiv 2407.06794 (ICML 2024), authors' code"
    published: ClassVar[str] = "W4A4, 32 images, RepQ-ViT's activation quantizers; DeiT-T 60.29"
    default_base: ClassVar[str] = "repq-vit"

    ridge: Annotated[float, between(0.0, 1e12)] = 1000.0
    """λ, the strength of the ridge regressions."""
    weight_range: RangeName = "omse"
    """How the grid of a weight is chosen, as in ``RTN``."""
    weight_symmetric: bool = False
    """Whether the zero point of weights is 0."""
    refine: bool = True
    """Whether single weights are rounded the other way if that lowers the error."""

    def calibrate(self, calibration: Calibration) -> Calibrated:
        """Calibrate the base, then run one pass for each lot of sums that fits into memory."""
        calibrated = self.calibrate_base(calibration)
        sites = movable(calibration, calibrated, self._touches, "ERQ")
        solved: dict[str, Solved] = {}
        lots = list(_lots(sites))
        for lot, label in passes(calibration, lots, f"{self.name} {self.label}"):
            for site, sums in self._sums(calibration, calibrated, lot, label).items():
                solved[site.name] = self._solve(read_weight(calibration.model, site), site, sums)
        for site in sites:
            solution = solved.pop(site.name)
            write_weight(calibration.model, site, solution.weight)
            calibrated.add(site, ChannelAffine.of(site, bias=solution.bias))
            if solution.grid is not None:
                calibrated.quantizers[Slot(site, 1)] = solution.grid
        return calibrated

    def _touches(self, site: Site) -> bool:
        return any(self.slot_bits(Slot(site, index)) is not None for index in (0, 1))

    def _sums(
        self, calibration: Calibration, calibrated: Calibrated, lot: list[Site], label: str | None
    ) -> dict[Site, Sums]:
        sums = {site: Sums() for site in lot}

        def look(site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]) -> None:
            if site not in sums:
                return
            x, weight = operands
            quantizer = calibrated.quantizers.get(Slot(site, 0))
            quantized = x if quantizer is None else quantizer(x)
            for there, here in zip(rows(x, weight, run), rows(quantized, weight, run), strict=True):
                sums[site].update(there, here)

        run_to(calibration, calibrated, lot[-1], look, quantized=False, label=label)
        return sums

    def _solve(self, weight: Tensor, site: Site, sums: Sums) -> Solved:
        gram, lost = sums.gram.finish(site.name), sums.lost.finish(site.name)
        float_weight = grouped(weight, gram.shape[0])
        moved = ridge(gram, lost @ float_weight.mT, self.ridge).mT
        moved[..., :-1] += float_weight
        bits = self.slot_bits(Slot(site, 1))
        grid = None
        if bits is not None:
            wanted = moved[..., :-1].reshape(weight.shape).float()
            grid = weight_grid(wanted, bits, self.weight_range, self.weight_symmetric)
            moved = round_by_halves(moved, gram, grid, self.ridge, refine=self.refine)
        rounded = moved[..., :-1].reshape(weight.shape).to(weight.dtype)
        return Solved(rounded, moved[..., -1].flatten(), grid)


class Sums:
    """Sums over rows of x and x̂: [x̂, 1]ᵀ[x̂, 1] and [x̂, 1]ᵀ(x - x̂)."""

    def __init__(self) -> None:
        self.gram, self.lost = Gram(), Gram()

    def update(self, x: Tensor, quantized: Tensor) -> None:
        """Add x and quantized, both (groups, rows, features)."""
        left = torch.nn.functional.pad(quantized, (0, 1), value=1.0)
        self.gram.update(left, left)
        self.lost.update(left, x - quantized)


@dataclass
class Solved:
    """A site's new weight, the change of its bias, and the weight's grid (None if float)."""

    weight: Tensor
    bias: Tensor
    grid: AffineQuantizer | None


def round_by_halves(
    weight: Tensor, gram: Tensor, grid: AffineQuantizer, strength: float, *, refine: bool = True
) -> Tensor:
    """Step 2 of ERQ: (groups, outputs, f + 1), all columns but the last (the bias) on the grid.

    gram: (groups, f + 1, f + 1), the sum of outer products of [quantized input, 1]. float64.
    """
    weight = weight.clone()
    end, total = 0, weight.shape[-1]
    while end < total - 1:
        start, end = end, end + (total - end) // 2
        before = weight[..., start:end].clone()
        after = nearest(grid, before)
        if refine:
            after = flip(before, after, gram[:, start:end, start:end], grid)
        caused = gram[:, end:, start:end] @ (after - before).mT
        weight[..., start:end] = after
        weight[..., end:] -= ridge(gram[:, end:, end:], caused, strength).mT
    return weight


def flip(wanted: Tensor, rounded: Tensor, gram: Tensor, grid: AffineQuantizer) -> Tensor:
    """Round single weights the other way while δᵀ gram δ falls, at most 100 per row.

    δ = rounded - wanted. wanted, rounded: (groups, outputs, n), rounded on the grid; gram (groups,
    n, n). The flip with the largest decrease comes first. A weight cannot leave the grid.
    """
    shape = (*wanted.shape[:2], 1)
    scale, zero = grid.scale.to(wanted).view(shape), grid.zero_point.to(wanted).view(shape)
    low, high = ((code - zero) * scale for code in grid.code_range)
    delta = rounded - wanted
    step = torch.where(delta > 0, -scale, scale)
    outside = (rounded + step < low - scale / 2) | (rounded + step > high + scale / 2)
    step = torch.where(outside, torch.zeros_like(step), step)
    slope = 2 * delta @ gram
    curvature = gram.diagonal(dim1=-2, dim2=-1)[:, None]
    for _ in range(FLIPS):
        best, place = (step * (slope + step * curvature)).min(-1, keepdim=True)
        taken = torch.where(best < 0, step.gather(-1, place), torch.zeros_like(best))
        if not bool(taken.any()):
            break
        delta.scatter_add_(-1, place, taken)
        step.scatter_add_(-1, place, -2 * taken)
        slope += 2 * taken * gram.gather(1, place.expand(-1, -1, gram.shape[-1]))
    return nearest(grid, wanted + delta)


def _lots(sites: list[Site]) -> Iterator[list[Site]]:
    """Yield lots of sites, in order, with at most ``BUDGET`` entries of sums or one site each."""
    lot: list[Site] = []
    size = 0
    for site in sites:
        assert site.weight_shape is not None
        features = math.prod(site.weight_shape[1:])
        entries = 2 * (features + 1) ** 2
        if lot and size + entries > BUDGET:
            yield lot
            lot, size = [], 0
        lot.append(site)
        size += entries
    if lot:
        yield lot
