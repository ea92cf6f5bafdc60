"""Quantizers with unequal steps: their common base and the logarithmic ones.

Twin-range and tangent quantizers are in ``companding``, uniform ones in ``quantizers``.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from quietvit.errors import QuietvitError
from quietvit.quantization.quantizers import (
    SMALLEST_SCALE,
    AffineQuantizer,
    Quantizer,
    register_quantizer,
)

GELU_SHIFT = 0.16997
"""Depth of GELU's minimum: -0.16997 at x = -0.7518."""
ADALOG_DENOMINATOR = 37
EXPONENT_CODES = 100
"""Largest code that can be read from a float32's exponent, which ends at -126."""

ZeroCode = Literal["extra", "last"]
ZERO_CODES: tuple[str, ...] = get_args(ZeroCode)


def positive_scalar(value: Tensor, name: str) -> Tensor:
    """Return a float32 copy of a scalar. Below 2^-100 it becomes 1: all-zero tensors need no scale.

    Raises QuietvitError unless it is one finite number of at least zero.
    """
    if value.dim() != 0 or not bool(torch.isfinite(value) & (value >= 0)):
        shown = f"{value.item():g}" if value.numel() == 1 else "several values"
        raise QuietvitError(
            f"{name} of shape {tuple(value.shape)} and {shown} cannot be used: it must be one "
            "finite number, not below zero; calibrate for the whole tensor."
        )
    value = value.detach().float()
    return torch.where(value < SMALLEST_SCALE, torch.ones_like(value), value)


def squared_error(quantizer: Quantizer, x: Tensor, counts: Tensor | None = None) -> Tensor:
    """Sum of (quantizer(x) - x)², float64, (). ``counts`` (shape of x) weigh the values."""
    with torch.no_grad():
        error = quantizer(x).sub_(x).square_()
        if counts is not None:
            error.mul_(counts)
        return error.sum(dtype=torch.float64)


def power_of_two_factor(
    scale: Tensor,
    zero_point: Tensor,
    exponents: Tensor,
    *,
    bits: int,
    signed: bool = False,
    axis: int = -1,
) -> AffineQuantizer:
    """FQ-ViT's power-of-two factor (arXiv 2111.13824): channel j has the step scale·2^exponents[j].

    x̂ = 2^a·s·(clip(round(x/(2^a·s)) + z) - z). All channels share the scalars scale and zero point.
    Exponents are integers (channels,), 0 to 3 in the paper. The result is an ordinary per-channel
    uniform quantizer, so it needs no class of its own.
    """
    if exponents.dim() != 1 or exponents.is_floating_point() or bool((exponents < 0).any()):
        raise QuietvitError(
            f"exponents of shape {tuple(exponents.shape)} and {exponents.dtype} do not fit: give "
            "one integer of at least zero per channel."
        )
    scales = positive_scalar(scale, "scale") * torch.pow(2, exponents)
    zero_points = zero_point.to(torch.int32).expand(scales.shape).clone()
    return AffineQuantizer(scales, zero_points, bits=bits, signed=signed, axis=axis)


class LevelQuantizer(Quantizer):
    """Base class for one list of levels per tensor: codes are rounded positions, values a lookup.

    A subclass defines ``_positions`` and ``_levels``. Computed in at least float32, returned in x's
    dtype; NaN stays NaN. Rounding can move a level into another level's cell. Such a level takes
    that level's value, so the quantizer is idempotent bit for bit in every dtype.
    Gradient to x: 1 from the smallest to the largest level, 0 outside. Buffers get no gradient.
    """

    @abstractmethod
    def _positions(self, x: Tensor) -> Tensor:
        """Return code minus smallest code, before rounding and clipping; new memory, same dtype.

        It is monotone, and NaN only for NaN.
        """

    @abstractmethod
    def _levels(self) -> Tensor:
        """Return the value of every code from the smallest on, float64, monotone."""

    def _indices(self, x: Tensor) -> Tensor:
        """Return indices into ``_table``, int32; NaN gets the last one."""
        low, high = self.code_range
        wide = torch.promote_types(x.dtype, torch.float32)
        places = self._positions(x.detach().to(wide)).round_().clamp_(0, high - low)
        return places.nan_to_num_(nan=high - low + 1).to(torch.int32)

    def _table(self, dtype: torch.dtype) -> Tensor:
        """Return the level of every code, then NaN."""
        levels = self._levels().to(dtype)
        # Map each level to its own code until nothing changes. The map is monotone, so repeating it
        # ends. ``settled[settled]`` doubles the repetitions: bits + 1 times are enough.
        settled = self._indices(levels)
        for _ in range(self.bits + 1):
            settled = settled[settled]
        return torch.cat((levels[settled], levels.new_full((1,), torch.nan)))

    def codes(self, x: Tensor) -> Tensor:
        low, high = self.code_range
        return self._indices(x).clamp_(max=high - low).add_(low)

    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        places = codes.to(torch.int32) - self.code_range[0]
        return self._table(dtype).index_select(0, places.reshape(-1)).view(codes.shape)

    def forward(self, x: Tensor) -> Tensor:
        table = self._table(x.dtype)
        fake = table.index_select(0, self._indices(x).reshape(-1)).view(x.shape)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return fake
        inside = x.clamp(table[:-1].amin(), table[:-1].amax())
        return fake + (inside - inside.detach())

    @property
    def lower(self) -> Tensor:
        """Smallest value that it returns in float32, ()."""
        return self._table(torch.float32)[:-1].amin()

    @property
    def upper(self) -> Tensor:
        """Largest value that it returns in float32, ()."""
        return self._table(torch.float32)[:-1].amax()


@register_quantizer("log")
class LogQuantizer(LevelQuantizer):
    """Logarithmic quantizer: code q = round(-log2((x + shift)/d)/t), value d·2^(-q·t) - shift.

    t = numerator/denominator octaves per code: 1 in FQ-ViT (arXiv 2111.13824), 1/2 in RepQ-ViT
    (arXiv 2212.08254), q/37 with a searched q in AdaLog (arXiv 2407.12951). Each has a constructor
    of its own. Levels are computed in float64 and rounded once, so a whole t gives d times exact
    powers of two. After the shift, zero, negative values, and values at least half a code below
    the last level become zero (minus the shift).

    ``zero="extra"``: 2^b levels plus zero, codes 0 to 2^b, as in these papers' code. That is one
    value more than b bits can hold. ``"last"``: code 2^b - 1 is zero, which fits b bits.
    Zero is exact if shift = 0.

    ``scale``: d, float32, (), the largest level before the shift. ``numerator``: int32, (); it must
    be 1 if the denominator is 1 or 2. Those codes are read from the exponent of x/d or its square,
    several times faster than a logarithm.
    """

    scale: Tensor
    numerator: Tensor

    def __init__(
        self,
        scale: Tensor,
        numerator: int = 1,
        denominator: int = 1,
        *,
        bits: int,
        shift: float = 0.0,
        zero: ZeroCode = "extra",
    ) -> None:
        super().__init__(bits)
        if numerator < 1 or denominator < 1 or int(numerator) != numerator:
            raise QuietvitError(
                f"{numerator}/{denominator} octaves per code: both must be whole numbers from 1 up."
            )
        if denominator <= 2 and numerator != 1:
            raise QuietvitError(
                f"{numerator}/{denominator} octaves per code: over 1 or 2 the numerator must be 1; "
                f"write {4 * numerator}/{4 * denominator}."
            )
        if zero not in ZERO_CODES:
            raise QuietvitError(f"zero={zero!r} is not known; choose from {', '.join(ZERO_CODES)}.")
        self.denominator = denominator
        self.shift = shift
        self.zero: ZeroCode = zero
        scale = positive_scalar(scale, "scale")
        self.register_buffer("scale", scale)
        whole = torch.tensor(int(numerator), dtype=torch.int32, device=scale.device)
        self.register_buffer("numerator", whole)

    @classmethod
    def base2(cls, scale: Tensor, *, bits: int, zero: ZeroCode = "extra") -> LogQuantizer:
        """Powers of two, for post-softmax values. FQ-ViT's log-int-softmax has scale 1."""
        return cls(scale, bits=bits, zero=zero)

    @classmethod
    def sqrt2(cls, scale: Tensor, *, bits: int, zero: ZeroCode = "extra") -> LogQuantizer:
        """Powers of √2, for post-softmax values, as in RepQ-ViT.

        The paper's d·2^(-⌈q/2⌉)·(1 + (√2-1)(q mod 2)) equals d·2^(-q/2).
        """
        return cls(scale, 1, 2, bits=bits, zero=zero)

    @classmethod
    def adalog(
        cls, scale: Tensor, q: int, *, bits: int, shift: float = 0.0, zero: ZeroCode = "extra"
    ) -> LogQuantizer:
        """Base 2^(-q/37), as in AdaLog: ``scale`` is that of x + shift; GELU has ``GELU_SHIFT``."""
        return cls(scale, q, ADALOG_DENOMINATOR, bits=bits, shift=shift, zero=zero)

    @property
    def code_range(self) -> tuple[int, int]:
        return 0, (1 << self.bits) - (0 if self.zero == "extra" else 1)

    def _positions(self, x: Tensor) -> Tensor:
        x = (x + self.shift).clamp_min_(0) if self.shift else x.clamp_min(0)
        rate = self.denominator / self.numerator.double()
        start = self.scale.double().log2() * rate
        return x.log2_().mul_(-rate).add_(start)

    def _indices(self, x: Tensor) -> Tensor:
        last = self.code_range[1]
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.denominator > 2 or wide != torch.float32 or last > EXPONENT_CODES:
            return super()._indices(x)
        x = x.detach().to(wide)
        x = x + self.shift if self.shift else x
        # y^denominator has the exponent -code; half a code more turns the floor into a rounding.
        # The bounds lie slightly inside the first and last code, away from NaN's exponent.
        y = x * (2 ** (0.5 / self.denominator) / self.scale)
        y.clamp_(1.1 * 2 ** (-last / self.denominator), 1.1)
        if self.denominator == 2:
            y.square_()
        exponents = y.view(torch.int32).bitwise_right_shift_(23).bitwise_and_(255)
        return exponents.bitwise_xor_(127).clamp_(max=last + 1)  # 127 - e, NaN's 255 to 128

    def _levels(self) -> Tensor:
        last = self.code_range[1]
        q = torch.arange(last + 1, dtype=torch.float64, device=self.scale.device)
        levels = torch.exp2(q * -self.numerator / self.denominator) * self.scale
        levels[last] = 0
        return levels - self.shift

    def config(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "denominator": self.denominator,
            "shift": self.shift,
            "zero": self.zero,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LogQuantizer:
        return cls(torch.ones(()), 1, **config)

    def extra_repr(self) -> str:
        values = self.code_range[1] + 1
        shift = f", shift {self.shift:g}" if self.shift else ""
        return (
            f"{self.bits} bits, {values} values, {int(self.numerator)}/{self.denominator} "
            f"octaves per code{shift}"
        )
