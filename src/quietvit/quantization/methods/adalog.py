"""AdaLog: logarithmic steps with a searched base after softmax and GELU, uniform steps elsewhere.

The search is in ``search``; ``products`` records the products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import StrictBool
from torch import Tensor, nn

from quietvit.quantization.calibrated import Calibrated
from quietvit.quantization.calibration import Calibration
from quietvit.quantization.fitting.products import Product, has_heads
from quietvit.quantization.fitting.search import Affine, Groups, Log, Proposals, Side, portions
from quietvit.quantization.fitting.search_method import SearchMethod
from quietvit.quantization.method import register_method
from quietvit.quantization.nonuniform import GELU_SHIFT
from quietvit.quantization.quantizers import affine_parameters
from quietvit.quantization.reparametrize import NormLink, hidden_norm_links, reparametrize
from quietvit.quantization.slot import Slot
from quietvit.quantization.weights import read_weight
from quietvit.tracing import Trace

BASES = 128
"""Numerators q that are tried for the base 2^(-q/37): 1 to 128."""
_ENDS = 12
_INNER = 0.1
_NARROWEST = 1e-4

Propose = Callable[[Tensor], Tensor]


@register_method("adalog")
class AdaLog(SearchMethod):
    """Adaptive-logarithm quantization (Wu et al., arXiv 2407.12951).

    Post-softmax operands have the levels 2^(-k q/37), post-GELU inputs s·2^(-k q/37) - 0.16997, for
    k below 2^b, and zero. q is searched, and s for GELU. All other operands are uniform with a zero
    point: weights per output channel, activations per tensor, attention's other operands per head.
    Steps are searched for each product, on operands of the float model. Weight and input (or both
    operands of attention) are searched in turns, ``rounds`` times, by the squared error of the
    output. Before that, norms that only linears read are re-parametrized, so that one step fits all
    their channels, as in RepQ-ViT (arXiv 2212.08254). The head's norm is not.

    As in the authors' code: the patch embedding's weights have the working bits, its input is float
    (``patch_input_bits``), the head has the working bits, and there are 32 images.

    Deviations:

    - The search is simpler than the paper's six stages of 128 candidates (derived here). It tries a
      grid of both ends of the range, from the 10 % quantiles to the extremes, then ever closer
      neighbours of the best.
    - q runs from 1 to 128, not from 10 to 137: the authors' smallest is too coarse at 8 bits.
    - ``rows`` random tokens of each site represent all (derived here; None takes all).
    - Levels are not rounded to the authors' table of 2^(b+1) - 2 values.
    - The shift of 0.16997 is not folded into the bias, which would change no value.

    ``hessian`` weighs output errors by gradients as PTQ4ViT does; the published method does not.
    """

    summary: ClassVar[str] = "adaptive logarithm behind softmax and GELU, output-error search"
    source: ClassVar[str] = "arXiv 2407.12951"
    needs: ClassVar[tuple[str, ...]] = ("images",)
    cost: ClassVar[str] = "minutes"
    deployable: ClassVar[bool] = False
    published: ClassVar[str] = "32 images, 3 rounds; DeiT-T W6A6 71.38, W4A4 63.52"

    reparametrization: StrictBool = True
    """Whether norms are re-parametrized first, as in RepQ-ViT."""

    def side(self, slot: Slot, x: Tensor, dtype: torch.dtype, trace: Trace) -> Side:
        bits, role = self.slot_bits(slot), slot.role
        assert bits is not None
        if role in ("post_softmax", "post_gelu"):
            shift = GELU_SHIFT if role == "post_gelu" else 0.0
            return Log(x, Groups.along(x), bits, dtype, shift=shift)
        dims = (1, 3) if slot.is_weight else (1,) if has_heads(slot.site) else ()
        return Affine(x, Groups.along(x, *dims), bits, dtype, signed=False)

    def start(self, side: Side, product: Product, index: int) -> Tensor:
        """Return the best fit to the operand itself; the other operand is searched against it."""
        if isinstance(side, Log):
            scale = _gelu_ends(side)[1] if side.shift else side.x.new_ones(())
            return nearest(side, _bases(scale.view(1, 1)))
        return nearest(side, end_points(side))

    def proposals(self, side: Side, start: Tensor) -> Proposals:
        """Return a grid for the first round, and ever closer neighbours of the best for all."""
        if isinstance(side, Log):
            if not side.shift:
                return ((_bases,),)
            closer = (_log_nearby(0.1), _log_nearby(0.03))
            return ((_bases, _scales(*_gelu_ends(side), 8), *closer), closer)
        table = end_points(side)
        around = (_nearby(side.bits, 0.1), _nearby(side.bits, 0.03))
        return ((lambda standing: table, *around), around)

    def prepare(
        self, calibration: Calibration, products: dict[str, Product], calibrated: Calibrated
    ) -> None:
        if not self.reparametrization:
            return
        hidden = hidden_norm_links(calibration.model, calibration.trace)
        calibrated.notes += hidden.notes(self.name)
        for link in hidden.links:
            self._reparametrize(calibration.model, link, products, calibrated)

    def _reparametrize(
        self,
        model: nn.Module,
        link: NormLink,
        products: dict[str, Product],
        calibrated: Calibrated,
    ) -> None:
        """Give all channels of a norm one step and zero point, and update the recorded products."""
        readers = [
            (products[site.name], site, list(columns))
            for site, columns in zip(link.consumers, link.columns, strict=True)
            if site.name in products and self.slot_bits(Slot(site, 0)) is not None
        ]
        if not readers:
            return
        product, site, columns = readers[0]
        bits = self.slot_bits(Slot(site, 0))
        x = product.left
        if x is None or bits is None or sorted(columns) != list(range(link.channels)):
            why = "its channels do not each reach a linear exactly once"
            calibrated.notes.append(f"{self.name} did not re-parametrize {link.norm.name}: {why}")
            return
        values = x.new_empty(link.channels, x.shape[1] * x.shape[2])
        values[columns] = x.flatten(0, 2).mT
        gain, shift = even_out(values, bits)
        reparametrize(model, link, calibrated, gain=gain, shift=shift)
        for product, site, columns in readers:
            assert product.left is not None
            product.left = product.left * gain[columns] + shift[columns]
            product.right = read_weight(model, site).flatten(1).float().mT[None, None]


def even_out(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return gain and shift, (channels,), that give all channels the same step and zero point.

    ``values``: (channels, n). Each channel's own step s and zero point z have the least squared
    error; the common ones are their means (RepQ-ViT, arXiv 2212.08254). A channel of zeros keeps
    its scale.
    """
    x = values.T[None, None]
    groups = Groups.along(x, 3)
    side = Affine(x, groups, bits, torch.float32, signed=False)
    step, zero = nearest(side, end_points(side)).double().unbind(1)
    alive = values.abs().amax(1) > 0
    if not bool(alive.any()):
        return torch.ones_like(step), torch.zeros_like(step)
    common, common_zero = step[alive].mean(), zero[alive].mean().round()
    step = torch.where(alive, step, common).clamp_min(float(common) * _NARROWEST)
    zero = torch.where(alive, zero, common_zero)
    gain = common / step
    return gain.float(), ((zero - common_zero) * common).float()


def end_points(side: Side) -> Tensor:
    """Return scale and zero point for many pairs of range ends, (pairs, groups, 2).

    On each side, ends run in equal steps from the 10 % quantile of a group's values to the extreme.
    """
    rows = side.groups.rows(side.x)
    inner = max(1, round(_INNER * rows.shape[1]))
    low, high = rows.amin(1), rows.amax(1)
    inner_low = rows.kthvalue(inner, dim=1).values
    inner_high = rows.kthvalue(rows.shape[1] - inner + 1, dim=1).values
    way = torch.linspace(0, 1, _ENDS, device=rows.device)[:, None]
    lows, highs = torch.lerp(low, inner_low, way), torch.lerp(high, inner_high, way)
    pairs = torch.cartesian_prod(torch.arange(_ENDS), torch.arange(_ENDS)).to(rows.device)
    lower = torch.minimum(lows[pairs[:, 0]], highs[pairs[:, 1]])
    scale, zero, _ = affine_parameters(
        lower.flatten(), highs[pairs[:, 1]].flatten(), side.bits, symmetric=False
    )
    return torch.stack((scale, zero.float()), 1).view(len(pairs), -1, 2)


def _nearby(bits: int, width: float) -> Propose:
    """Propose scales within ``width`` of the current one, with zero points a few codes away."""

    def propose(standing: Tensor) -> Tensor:
        factors = torch.linspace(1 - width, 1 + width, 8, device=standing.device)
        offset = max(1, round(width * (1 << bits) / 4))
        offsets = torch.tensor([-offset, 0, offset], device=standing.device)
        grid = torch.cartesian_prod(factors, offsets.float())
        scale = grid[:, :1] * standing[:, 0]
        zero = (grid[:, 1:] + standing[:, 1]).clamp(0, (1 << bits) - 1)
        return torch.stack((scale, zero), 2)

    return propose


def _bases(standing: Tensor) -> Tensor:
    """Propose every q at the current scale."""
    q = torch.arange(1, BASES + 1, device=standing.device).float()
    return torch.stack((standing[0, 0].expand_as(q), q), 1)[:, None]


def _scales(low: Tensor, high: Tensor, reach: int) -> Propose:
    """Propose scales from low to high, with q up to ``reach`` from the current one."""

    def propose(standing: Tensor) -> Tensor:
        steps = torch.linspace(0, 1, 16, device=standing.device) * (high - low) + low
        offsets = torch.tensor([-reach, -reach // 2, 0, reach // 2, reach], device=low.device)
        q = (standing[0, 1] + offsets).clamp(1, BASES)
        return torch.cartesian_prod(steps, q)[:, None]

    return propose


def _log_nearby(width: float) -> Propose:
    def propose(standing: Tensor) -> Tensor:
        factors = torch.linspace(1 - width, 1 + width, 8, device=standing.device)
        q = (standing[0, 1] + torch.tensor([-1, 0, 1], device=standing.device)).clamp(1, BASES)
        return torch.cartesian_prod(factors * standing[0, 0], q)[:, None]

    return propose


def nearest(side: Side, table: Tensor) -> Tensor:
    """Return each group's candidate with the least squared error of the operand, (groups, n)."""
    errors = []
    for parameters in portions(table, side.x.numel()):
        values, scale = side.fake(parameters)
        off = torch.sub(values if scale is None else values * scale, side.x).square_()
        errors.append(side.groups.reduce(off))
    best = torch.cat(errors).argmin(0)
    return table[best, torch.arange(table.shape[1], device=table.device)]


def _gelu_ends(side: Log) -> tuple[Tensor, Tensor]:
    """Return the 90 % quantile of the positive values and the largest, both shifted."""
    positive = side.x[side.x > 0]
    if positive.numel() == 0:
        positive = side.x.new_zeros(1)
    place = max(1, round((1 - _INNER) * positive.numel()))
    return positive.kthvalue(place).values + side.shift, positive.max() + side.shift
