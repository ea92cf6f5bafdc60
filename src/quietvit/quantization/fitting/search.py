"""Search the quantizers of a product's two operands among candidates, by the error of its output.

``products`` records what is multiplied; methods choose the candidates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from quietvit.errors import QuietvitError
from quietvit.quantization.companding import TwinQuantizer
from quietvit.quantization.nonuniform import ADALOG_DENOMINATOR, GELU_SHIFT, LogQuantizer
from quietvit.quantization.quantizers import (
    SMALLEST_SCALE,
    AffineQuantizer,
    Quantizer,
    affine_code_range,
)
from quietvit.tensors import has_fast_bfloat16

Fake = tuple[Tensor, Tensor | None]
"""Values of an operand in the dtype for multiplication, and the scale still to be applied."""
_AT_ONCE = 1 << 18
"""Entries of an operand or an output, over all candidates that are judged together."""
Proposals = Sequence[Sequence[Callable[[Tensor], Tensor]]]
"""For each round: functions from the current parameters (groups, n) to (count, groups, n)."""


def product_dtype(device: torch.device, bits: Sequence[int | None]) -> torch.dtype:
    """Return bfloat16 if it is fast and holds every uniform code (up to 8 bits), else float32.

    In bfloat16, products of such codes are exact; only their sums are rounded, by a relative 2^-9.
    Values of other quantizers are rounded by the same amount before they are multiplied.
    """
    is_exact = all(width is not None and width <= 8 for width in bits)
    return torch.bfloat16 if is_exact and has_fast_bfloat16(device) else torch.float32


@dataclass(eq=False)
class Groups:
    """Which entries of an operand (D, H, R, K) share their parameters.

    ``shape`` broadcasts against the operand. ``index`` has the group of each entry of that shape,
    int64. Example: one group per head of (32, 3, 197, 64) has the shape (1, 3, 1, 1).
    """

    shape: tuple[int, int, int, int]
    index: Tensor

    @classmethod
    def along(cls, x: Tensor, *dims: int, parts: Tensor | None = None) -> Groups:
        """Make a group per place along ``dims``; no dims: one group. ``parts`` merges places."""
        wanted = {dim % 4 for dim in dims}
        sizes = [x.shape[dim] if dim in wanted else 1 for dim in range(4)]
        shape = (sizes[0], sizes[1], sizes[2], sizes[3])
        count = torch.Size(shape).numel()
        index = torch.arange(count, device=x.device) if parts is None else parts.to(x.device)
        return cls(shape, index)

    @cached_property
    def count(self) -> int:
        return int(self.index.max()) + 1

    def spread(self, parameter: Tensor) -> Tensor:
        """Spread one number per group, (..., count), to broadcast against the operand."""
        return parameter[..., self.index].unflatten(-1, self.shape)

    def reduce(self, x: Tensor) -> Tensor:
        """Sum an operand-sized x, (..., D, H, R, K), by group: (..., count), float64.

        Sums within a place are float32, sums over the places of a group float64.
        """
        dims = [dim - 4 for dim in range(4) if self.shape[dim] == 1]
        places = (x.sum(dims) if dims else x).reshape(*x.shape[:-4], -1).double()
        total = places.new_zeros(*places.shape[:-1], self.count)
        return total.index_add_(-1, self.index, places)

    def rows(self, x: Tensor) -> Tensor:
        """Return an operand's values at each entry of ``shape``, (entries, n)."""
        own = [dim for dim in range(4) if self.shape[dim] > 1]
        rest = [dim for dim in range(4) if self.shape[dim] == 1]
        return x.permute(*own, *rest).reshape(len(self.index), -1)

    def largest(self, x: Tensor) -> Tensor:
        """Return the largest entry of an operand in each group, (count,), at least 0."""
        most = self.rows(x).amax(1)
        return torch.zeros(self.count, device=x.device).scatter_reduce_(0, self.index, most, "amax")


class Side(ABC):
    """One operand of a product and the family of its quantizers.

    ``x``: (D, H, R, K). Parameters (groups, n), float32, define a quantizer; n depends on the
    family. Several candidates at once are (candidates, groups, n), and give (candidates, D, H, R,
    K).
    """

    def __init__(self, x: Tensor, groups: Groups, bits: int, dtype: torch.dtype) -> None:
        self.x, self.groups, self.bits, self.dtype = x, groups, bits, dtype

    @abstractmethod
    def fake(self, parameters: Tensor) -> Fake:
        """Return x as the quantizer with these parameters gives it."""

    @abstractmethod
    def quantizer(self, parameters: Tensor, axis: int | None = None) -> Quantizer:
        """Return the quantizer; ``axis`` is the dim of the groups in the model's own tensor."""


class Float(Side):
    """An operand that stays float."""

    def __init__(self, x: Tensor, dtype: torch.dtype) -> None:
        super().__init__(x, Groups.along(x), 16, dtype)

    def fake(self, parameters: Tensor) -> Fake:
        return self.x.to(self.dtype), None

    def quantizer(self, parameters: Tensor, axis: int | None = None) -> Quantizer:
        raise QuietvitError("an operand that stays float has no quantizer.")


class Affine(Side):
    """Uniform quantizers: the parameters are scale and zero point."""

    def __init__(
        self, x: Tensor, groups: Groups, bits: int, dtype: torch.dtype, *, signed: bool
    ) -> None:
        super().__init__(x, groups, bits, dtype)
        self.signed = signed

    def fake(self, parameters: Tensor) -> Fake:
        low, high = affine_code_range(self.bits, self.signed)
        scale = self.groups.spread(parameters[..., 0])
        zero = self.groups.spread(parameters[..., 1])
        codes = (self.x * scale.reciprocal()).round_()
        if bool((parameters[..., 1] == 0).all()):
            codes.clamp_(low, high)
        else:
            codes.add_(zero).clamp_(low, high).sub_(zero)
        return codes.to(self.dtype), scale

    def quantizer(self, parameters: Tensor, axis: int | None = None) -> Quantizer:
        scale, zero = parameters.unbind(1)
        if axis is None:
            scale, zero = scale[0], zero[0]
        elif len(scale) != len(self.groups.index):
            scale, zero = scale[self.groups.index], zero[self.groups.index]
        return AffineQuantizer(
            scale.clone(), zero.to(torch.int32), bits=self.bits, signed=self.signed, axis=axis
        )


class TwinGelu(Side):
    """PTQ4ViT's two ranges for post-GELU values: the parameter is the positive step."""

    def __init__(self, x: Tensor, groups: Groups, bits: int, dtype: torch.dtype) -> None:
        super().__init__(x, groups, bits, dtype)
        half = 1 << (bits - 1)
        step = GELU_SHIFT / half
        self.below = (x / step).round_().clamp_(-half, 0).mul_(step)

    def fake(self, parameters: Tensor) -> Fake:
        step = _alone(parameters[..., 0])
        above = (self.x * step.reciprocal()).round_().clamp_(0, (1 << (self.bits - 1)) - 1)
        return torch.add(self.below, above.mul_(step)).to(self.dtype), None

    def quantizer(self, parameters: Tensor, axis: int | None = None) -> Quantizer:
        return TwinQuantizer.gelu(parameters[0, 0].clone(), bits=self.bits)


class TwinSoftmax(Side):
    """PTQ4ViT's two ranges for post-softmax values: the parameter is the split."""

    def fake(self, parameters: Tensor) -> Fake:
        if parameters.dim() > 2:
            return torch.stack([self.fake(row)[0] for row in parameters]), None
        return self.quantizer(parameters)(self.x).to(self.dtype), None

    def quantizer(self, parameters: Tensor, axis: int | None = None) -> Quantizer:
        split, device = float(parameters[0, 0]), self.x.device
        return TwinQuantizer.softmax(split, bits=self.bits, device=device)


class Log(Side):
    """AdaLog: the parameters are the scale of x + shift, and the numerator of the exponent."""

    def __init__(
        self, x: Tensor, groups: Groups, bits: int, dtype: torch.dtype, *, shift: float
    ) -> None:
        super().__init__(x, groups, bits, dtype)
        self.shift = shift
        self.octaves = (x + shift).clamp_min_(0).log2_()

    def fake(self, parameters: Tensor) -> Fake:
        scale, q = (_alone(column) for column in parameters.double().unbind(-1))
        rate, last = q / ADALOG_DENOMINATOR, (1 << self.bits) - 1
        codes = (self.octaves * (-1 / rate).float()).add_((scale.log2() / rate).float()).round_()
        values = (codes.clamp_min_(0) * (-rate).float()).exp2_().mul_(scale.float())
        values.masked_fill_(codes > last, 0.0)
        return values.sub_(self.shift).to(self.dtype), None

    def quantizer(self, parameters: Tensor, axis: int | None = None) -> Quantizer:
        scale, q = parameters[0]
        return LogQuantizer.adalog(scale.clone(), int(q), bits=self.bits, shift=self.shift)


def _alone(parameter: Tensor) -> Tensor:
    """Reshape the parameter of a single group, (..., 1), to broadcast against an operand."""
    return parameter[..., None, None, None]


@dataclass(eq=False)
class Output:
    """The output that a product should keep, and the weight of each entry.

    ``target``: (D, H, R, J). The criterion is the sum of (weight·(target - output))². With the
    gradient as ``weight`` it is PTQ4ViT's (arXiv 2111.12293, equation 7), without it the squared
    error.
    """

    target: Tensor
    weight: Tensor | None = None

    @classmethod
    def of(cls, left: Tensor, right: Tensor, gradient: Tensor | None = None) -> Output:
        """Make one from the float product; a gradient of all zeros counts as None."""
        weight = None
        if gradient is not None:
            weight = gradient.float().abs()
            largest = weight.amax()
            # The gradient's scale has no meaning here, and squares of small numbers underflow.
            weight = weight / largest if bool(largest > 0) else None
        return cls(left @ right, weight)

    def errors(self, left: Fake, right: Fake, groups: Groups) -> Tensor:
        """Return the criterion for these operands by group of the output, (..., groups), float64.

        If an operand has leading candidates, the result has one entry for each.
        """
        product = left[0] @ right[0]
        scale = _times(left[1], right[1])
        off = self.target - (product if scale is None else product * scale)
        if self.weight is not None:
            off.mul_(self.weight)
        return groups.reduce(off.square_())


def _times(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one * other


def evaluate(
    output: Output, sides: tuple[Side, Side], index: int, table: Tensor, other: Fake
) -> Tensor:
    """Criterion of each candidate of one operand, (candidates, groups), with the other one fixed.

    ``table``: (candidates, groups, n). Groups of the operand must also be groups of the output:
    matrices, heads, rows of left, columns of right.
    """
    side = sides[index]
    errors = []
    for parameters in portions(table, max(output.target.numel(), side.x.numel())):
        fake = side.fake(parameters)
        pair = (fake, other) if index == 0 else (other, fake)
        errors.append(output.errors(*pair, side.groups))
    return torch.cat(errors)


def portions(table: Tensor, entries: int) -> tuple[Tensor, ...]:
    """Split candidates (candidates, groups, n) to judge, of ``entries`` each, to limit memory."""
    return table.split(max(1, _AT_ONCE // max(1, entries)))


def better(
    table: Tensor, errors: Tensor, standing: Tensor, standing_errors: Tensor
) -> tuple[Tensor, Tensor]:
    """Return each group's best of candidates and ``standing``, (groups, n), and its error."""
    least, place = errors.min(0)
    wins = least < standing_errors
    chosen = table[place, torch.arange(table.shape[1], device=table.device)]
    return (
        torch.where(wins[:, None], chosen, standing),
        torch.where(wins, least, standing_errors),
    )


def fixed(table: Tensor | None) -> Proposals:
    """Propose the same candidates in every round; None proposes nothing."""
    return () if table is None else ((lambda standing: table,),)


def alternate(
    output: Output,
    sides: tuple[Side, Side],
    proposals: tuple[Proposals, Proposals],
    start: tuple[Tensor, Tensor],
    *,
    rounds: int,
    order: tuple[int, int],
) -> tuple[tuple[Tensor, Tensor], list[float]]:
    """Search one operand with the other fixed, in turns; the criterion never rises.

    ``proposals``: for each operand a list with its proposals of each round. The last entry also
    serves all later rounds; an empty list searches nothing. ``start``: initial parameters,
    (groups, n). An operand is searched again only if the other one changed.

    Returns the best parameters, and the criterion of the whole output at the start and after each
    round.
    """
    chosen = list(start)
    fakes = [side.fake(parameters) for side, parameters in zip(sides, start, strict=True)]
    fresh = [bool(proposal) for proposal in proposals]
    totals = [float(output.errors(fakes[0], fakes[1], Groups.along(output.target)))]
    for turn in range(rounds):
        totals.append(totals[-1])
        for index in order:
            if not fresh[index]:
                continue
            fresh[index] = False
            before, groups = chosen[index], sides[index].groups
            now = output.errors(fakes[0], fakes[1], groups)
            for propose in proposals[index][min(turn, len(proposals[index]) - 1)]:
                table = propose(chosen[index])
                errors = evaluate(output, sides, index, table, fakes[1 - index])
                chosen[index], now = better(table, errors, chosen[index], now)
            if not torch.equal(before, chosen[index]):
                totals[-1] = float(now.sum())
                fakes[index] = sides[index].fake(chosen[index])
                fresh[1 - index] = bool(proposals[1 - index])
    return (chosen[0], chosen[1]), totals


def factors(candidates: int, low: float, high: float) -> Tensor:
    """Return ``candidates`` numbers in equal steps from low up to, but without, high."""
    return low + torch.arange(candidates) * ((high - low) / candidates)


def symmetric_start(largest: Tensor, bits: int) -> Tensor:
    """Scale and zero point (groups, 2) whose last code is half a step below ``largest``."""
    scale = largest.float() / ((1 << (bits - 1)) - 0.5)
    scale = torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)
    return torch.stack((scale, torch.zeros_like(scale)), 1)
