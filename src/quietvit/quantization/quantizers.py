"""Quantizers: from a float tensor to integer codes and back, with a straight-through gradient.

``ranges`` chooses their ranges; ``methods`` decides which tensor gets which quantizer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.quantization.registry import rebuild, registering

MIN_BITS, MAX_BITS = 2, 16
SMALLEST_SCALE = 2.0**-100

QUANTIZERS: dict[str, type[Quantizer]] = {}
Q = TypeVar("Q", bound="type[Quantizer]")


def register_quantizer(name: str) -> Callable[[Q], Q]:
    """Class decorator: register a quantizer under ``name``, which saved models refer to."""
    return registering(QUANTIZERS, name, "a quantizer")


def build_quantizer(kind: str, config: dict[str, Any]) -> Quantizer:
    """Rebuild a quantizer from ``kind`` and ``config()``; its buffers are loaded afterwards."""
    return rebuild(QUANTIZERS, kind, config, "quantizer")  # type: ignore[no-any-return]


class Quantizer(nn.Module, ABC):
    """Base class: ``quantizer(x)`` is x quantized and dequantized, with the same shape and dtype.

    A subclass defines ``codes`` and ``dequantize``. Without gradient, forward(x) equals
    dequantize(codes(x)). With gradient, forward uses a straight-through estimator. Values learnt
    from calibration are buffers; values chosen beforehand are in ``config``. Tests check three laws
    for every quantizer: it is idempotent, it is monotone, and codes lie in ``code_range``.

    ``deployable`` says whether standard integer kernels compute with these codes.
    """

    kind: ClassVar[str] = ""
    deployable: ClassVar[bool] = False

    def __init__(self, bits: int) -> None:
        super().__init__()
        if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
            raise QuietvitError(
                f"a quantizer cannot have {bits!r} bits. Choose {MIN_BITS} to {MAX_BITS}, or None "
                "to keep the tensor in float."
            )
        self.bits = bits

    @property
    @abstractmethod
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""

    @abstractmethod
    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of x, int32, same shape as x."""

    @abstractmethod
    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of the codes, same shape as the codes."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize x."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON-able arguments from which ``from_config`` rebuilds the quantizer without buffers."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> Quantizer:
        """Inverse of ``config``; the buffers hold placeholders of the right shape."""

    @property
    def label(self) -> str:
        """What coverage and reports call it: its bits, or a number format such as ``MXFP4``."""
        return str(self.bits)

    def fixed(self) -> Quantizer:
        """Return it without parameters, as files hold it; itself if it has none."""
        return self


def affine_code_range(bits: int, signed: bool) -> tuple[int, int]:
    """[-2^(b-1), 2^(b-1) - 1] if signed, else [0, 2^b - 1]."""
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def affine_parameters(
    minimum: Tensor, maximum: Tensor, bits: int, *, symmetric: bool, signed: bool | None = None
) -> tuple[Tensor, Tensor, bool]:
    """Return scale, zero point and signedness of a uniform quantizer for [minimum, maximum].

    Affine: the range is extended to contain zero. s = (max - min)/(2^b - 1), z = round(-min/s), and
    codes are in [0, 2^b - 1]. Symmetric: z = 0 and s = max(|min|, |max|)/hi. Codes are signed, or
    unsigned if no value is negative; ``signed`` overrides that. Both represent zero exactly. A step
    below 2^-100 becomes 1, because float32 arithmetic treats such a tensor as all zeros.

    Shapes: minimum, maximum, scale (float32) and zero point (int32) are all () or (channels,).
    Raises QuietvitError if the range is not finite or minimum > maximum.
    """
    low, high = minimum.detach().double(), maximum.detach().double()
    if not bool((torch.isfinite(low) & torch.isfinite(high) & (low <= high)).all()):
        raise QuietvitError(
            f"the range [{low.min().item():g}, {high.max().item():g}] cannot be quantized: its "
            "ends must be finite and in order. Look for NaN or inf in the weights and activations."
        )
    if signed is None:
        signed = symmetric and bool((low < 0).any())
    code_low, code_high = affine_code_range(bits, signed)
    if symmetric:
        scale = torch.maximum(low.abs(), high.abs()) / code_high
    else:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        scale = (high - low) / (code_high - code_low)
    scale = torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale).float()
    if symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32), signed
    zero_point = (code_low - torch.round(low / scale.double())).clamp(code_low, code_high)
    return scale, zero_point.to(torch.int32), signed


def affine_fake(
    x: Tensor, scale: Tensor, zero_point: Tensor, code_low: int, code_high: int
) -> Tensor:
    """s·(clip(round(x/s) + z, lo, hi) - z); scale and zero point broadcast against x.

    Computed in at least float32, returned in x's dtype. n·s/s rounds back to n for every n of up to
    16 bits, so the function is idempotent bit for bit. Gradient to x: 1 inside the clipping range,
    0 outside. Gradient to the scale: as in LSQ (arXiv 1902.08153, equation 3).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    scale, zero = scale.to(wide), zero_point.to(wide)
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        fake: Tensor = _StraightThrough.apply(x.to(wide), scale, zero, code_low, code_high)
        return fake.to(x.dtype)
    return _rounded(x.to(wide), scale, zero, code_low, code_high).to(x.dtype)


def _rounded(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    # Clamping with numbers as bounds is many times faster on a CPU than with tensors.
    steps = x * scale.reciprocal()
    return steps.round_().add_(zero).clamp_(low, high).sub_(zero).mul_(scale)


class _StraightThrough(torch.autograd.Function):
    """``_rounded`` with LSQ's gradients. It keeps only x, where autograd keeps five tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x, scale, zero)
        ctx.ends = low, high
        return _rounded(x, scale, zero, low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, scale, zero = ctx.saved_tensors
        steps = x * scale.reciprocal()
        places = steps + zero
        inside = (places >= ctx.ends[0]) & (places <= ctx.ends[1])
        to_x = gradients[0] * inside if ctx.needs_input_grad[0] else None
        to_scale = None
        if ctx.needs_input_grad[1]:
            ends = places.clamp_(*ctx.ends).sub_(zero)
            slopes = torch.where(inside, steps.round().sub_(steps), ends).mul_(gradients[0])
            to_scale = slopes.sum_to_size(scale.shape)
        return to_x, to_scale, None, None, None


@register_quantizer("affine")
class AffineQuantizer(Quantizer):
    """Uniform quantizer with one scale and zero point per tensor, or per channel of ``axis``.

    ``scale``: float32, () or (channels,), in units of x per step. ``zero_point``: int32, alike.
    """

    deployable: ClassVar[bool] = True
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        scale: Tensor,
        zero_point: Tensor,
        *,
        bits: int,
        signed: bool,
        axis: int | None = None,
    ) -> None:
        super().__init__(bits)
        if scale.shape != zero_point.shape or scale.dim() != (0 if axis is None else 1):
            raise QuietvitError(
                f"scale of shape {tuple(scale.shape)} and zero point of shape "
                f"{tuple(zero_point.shape)} do not fit axis={axis}; give two scalars for axis=None "
                "or two vectors with one entry per channel."
            )
        self.signed = signed
        self.axis = axis
        self.register_buffer("scale", scale.detach().float())
        self.register_buffer("zero_point", zero_point.detach().to(torch.int32))

    @classmethod
    def from_range(
        cls,
        minimum: Tensor,
        maximum: Tensor,
        *,
        bits: int,
        symmetric: bool,
        signed: bool | None = None,
        axis: int | None = None,
    ) -> AffineQuantizer:
        """Make a quantizer for values in [minimum, maximum]; see ``affine_parameters``."""
        scale, zero_point, signed = affine_parameters(
            minimum, maximum, bits, symmetric=symmetric, signed=signed
        )
        return cls(scale, zero_point, bits=bits, signed=signed, axis=axis)

    @property
    def code_range(self) -> tuple[int, int]:
        return affine_code_range(self.bits, self.signed)

    def _broadcast(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.axis is None:
            return self.scale, self.zero_point
        channels = self.scale.shape[0]
        if not -x.dim() <= self.axis < x.dim() or x.shape[self.axis] != channels:
            raise QuietvitError(
                f"a quantizer with {channels} channels on axis {self.axis} was given a tensor of "
                f"shape {tuple(x.shape)}; it was calibrated for another tensor."
            )
        shape = [1] * x.dim()
        shape[self.axis] = channels
        return self.scale.view(shape), self.zero_point.view(shape)

    def codes(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        scale, zero_point = self._broadcast(x)
        steps = torch.round(x.detach().to(wide) * scale.to(wide).reciprocal()) + zero_point.to(wide)
        return steps.clamp_(*self.code_range).to(torch.int32)

    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        scale, zero_point = self._broadcast(codes)
        steps = (codes.to(torch.int32) - zero_point).to(wide)
        return (steps * scale.to(wide)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return affine_fake(x, *self._broadcast(x), *self.code_range)

    def config(self) -> dict[str, Any]:
        channels = None if self.axis is None else self.scale.shape[0]
        return {"bits": self.bits, "signed": self.signed, "axis": self.axis, "channels": channels}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AffineQuantizer:
        shape = () if config["channels"] is None else (config["channels"],)
        return cls(
            torch.ones(shape),
            torch.zeros(shape, dtype=torch.int32),
            bits=config["bits"],
            signed=config["signed"],
            axis=config["axis"],
        )

    def extra_repr(self) -> str:
        codes = "signed" if self.signed else "unsigned"
        where = "per tensor" if self.axis is None else f"per channel of axis {self.axis}"
        return f"{self.bits} bits, {codes}, {where}"
