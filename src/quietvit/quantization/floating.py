"""Simulate the floating-point formats of GPUs: FP8, MXFP8, MXFP6, MXFP4 and NVFP4.

``methods.rtn`` chooses formats and scales. ``quantizers`` has the uniform quantizers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from quietvit.errors import QuietvitError
from quietvit.quantization.quantizers import SMALLEST_SCALE, Quantizer, register_quantizer

_EXPONENT = 0x7F800000
"""Mask of a float32's exponent bits."""
_SMALLEST_NORMAL = -126
"""The exponent of the smallest normal float32."""


@dataclass(frozen=True)
class Minifloat:
    """A float format of few bits: sign, exponent, mantissa. It has subnormals but no infinities.

    e4m3 and e5m2 come from the OCP 8-bit Floating Point Specification. e3m2, e2m3 and e2m1 come
    from the OCP Microscaling Formats Specification 1.0, section 5.3.
    """

    exponent_bits: int
    mantissa_bits: int
    largest: float

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def smallest_exponent(self) -> int:
        """The exponent of the smallest normal number. Subnormal numbers share it."""
        return 2 - (1 << (self.exponent_bits - 1))

    @property
    def largest_exponent(self) -> int:
        """floor(log2(largest))."""
        return int(self.largest).bit_length() - 1

    @property
    def last_code(self) -> int:
        """The code of ``largest``."""
        return int(self.codes(torch.tensor(self.largest)))

    def round(self, x: Tensor) -> Tensor:
        """Round each x (float32) to the nearest number, ties to even, and clip to ``largest``."""
        step = self._powers(x).mul_(2.0**-self.mantissa_bits)
        return x.clamp(-self.largest, self.largest).div_(step).round_().mul_(step)

    def codes(self, numbers: Tensor) -> Tensor:
        """Return the codes of numbers from ``round``, int32.

        A code is the exponent and mantissa bits of the magnitude, with the sign of the number. In
        e2m1, 1.5 has exponent bits 01 and mantissa bit 1, so its code is 3. -1.5 has the code -3.
        """
        powers = self._powers(numbers)
        exponents = powers.view(torch.int32).bitwise_right_shift(23) - 127 - self.smallest_exponent
        mantissas = (numbers.abs() / powers * (1 << self.mantissa_bits)).to(torch.int32)
        magnitudes = (exponents << self.mantissa_bits) + mantissas
        return magnitudes * numbers.sign().to(torch.int32)

    def numbers(self, codes: Tensor) -> Tensor:
        """Return the numbers of ``codes``, float32."""
        magnitudes = codes.abs()
        exponents = (magnitudes >> self.mantissa_bits).clamp(min=1) - 1
        mantissas = magnitudes - (exponents << self.mantissa_bits)
        powers = _power_of_two(exponents + (self.smallest_exponent - self.mantissa_bits))
        return mantissas * powers * codes.sign()

    def _powers(self, x: Tensor) -> Tensor:
        """Return 2^e for the exponent e of each x, with e clamped to the range of this format."""
        bits = x.clamp(-self.largest, self.largest).view(torch.int32).bitwise_and_(_EXPONENT)
        return bits.view(torch.float32).clamp_min_(2.0**self.smallest_exponent)


def _power_of_two(exponents: Tensor) -> Tensor:
    """Return 2^e exactly as float32, for integers e from -127 to 127."""
    bits = torch.where(exponents < _SMALLEST_NORMAL, 1 << 22, (exponents + 127) << 23)
    return bits.to(torch.int32).view(torch.float32)


ELEMENTS: Mapping[str, Minifloat] = MappingProxyType(
    {
        "e4m3": Minifloat(4, 3, 448.0),
        "e5m2": Minifloat(5, 2, 57344.0),
        "e3m2": Minifloat(3, 2, 28.0),
        "e2m3": Minifloat(2, 3, 7.5),
        "e2m1": Minifloat(2, 1, 6.0),
    }
)
E4M3 = ELEMENTS["e4m3"]
BLOCKS: Mapping[str, int] = MappingProxyType({"e8m0": 32, "e4m3": 16})
"""Number of values that share a scale, by scale type: e8m0 of MX formats, e4m3 of NVFP4."""


class FloatingQuantizer(Quantizer):
    """Base class of quantizers with small floats as codes. They only simulate the formats.

    They compute in float32 and return x's dtype. NaN stays NaN. The gradient is 1, or 0 if clipped.
    """

    def __init__(self, element: str) -> None:
        if element not in ELEMENTS:
            raise QuietvitError(
                f"element {element!r} is unknown. Choose from {', '.join(ELEMENTS)}."
            )
        super().__init__(ELEMENTS[element].bits)
        self.element, self.form = element, ELEMENTS[element]

    @abstractmethod
    def _fake(self, x: Tensor) -> Tensor:
        """Quantize and dequantize x (float32)."""

    def _clipped(self, x: Tensor) -> Tensor:
        """Return x clipped to the range of the scale. Here it has no limit."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            fake = self._fake(x.detach().float()).to(x.dtype)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return fake
        inside = self._clipped(x)
        return fake + (inside - inside.detach())


@register_quantizer("scaled_float")
class ScaledFloatQuantizer(FloatingQuantizer):
    """FP8 with a float32 scale per tensor, or per channel of ``axis``: x̂ = scale * fp8(x / scale).

    ``scale`` is float32, () or (channels,). Results equal torchao's float8 casts bit for bit.
    """

    scale: Tensor

    def __init__(self, scale: Tensor, *, element: str, axis: int | None = None) -> None:
        super().__init__(element)
        self.axis = axis
        self.register_buffer("scale", scale.detach().float())

    @classmethod
    def from_largest(
        cls, largest: Tensor, *, element: str, axis: int | None = None
    ) -> ScaledFloatQuantizer:
        """Make a quantizer whose largest number is ``largest``, () or (channels,)."""
        scale = _positive(largest.float() / ELEMENTS[element].largest)
        return cls(scale, element=element, axis=axis)

    @property
    def label(self) -> str:
        return f"FP8-{self.element.upper()}"

    @property
    def code_range(self) -> tuple[int, int]:
        return -self.form.last_code, self.form.last_code

    def _over(self, x: Tensor) -> Tensor:
        """Return the scale in a shape that broadcasts against x."""
        if self.axis is None:
            return self.scale
        shape = [1] * x.dim()
        shape[self.axis] = -1
        return self.scale.view(shape)

    def _fake(self, x: Tensor) -> Tensor:
        scale = self._over(x)
        return self.form.round(x / scale).mul_(scale)

    def _clipped(self, x: Tensor) -> Tensor:
        end = (self._over(x) * self.form.largest).to(x.dtype)
        return torch.clamp(x, -end, end)

    def codes(self, x: Tensor) -> Tensor:
        return self.form.codes(self.form.round(x.detach().float() / self._over(x)))

    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.form.numbers(codes) * self._over(codes)).to(dtype)

    def config(self) -> dict[str, Any]:
        channels = None if self.axis is None else self.scale.shape[0]
        return {"element": self.element, "axis": self.axis, "channels": channels}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ScaledFloatQuantizer:
        shape = () if config["channels"] is None else (config["channels"],)
        return cls(torch.ones(shape), element=config["element"], axis=config["axis"])

    def extra_repr(self) -> str:
        where = "per tensor" if self.axis is None else f"per channel of axis {self.axis}"
        return f"{self.label}, scaled {where}"


@register_quantizer("block_float")
class BlockFloatQuantizer(FloatingQuantizer):
    """MXFP8, MXFP6, MXFP4 and NVFP4: small floats with one scale for each block along ``axis``.

    Each call computes the scales from the values. Zeros fill the last block, if it is not full.
    Results equal torchao's casts bit for bit.

    ``e8m0`` scales (MX) have blocks of 32. The scale is 2^(floor(log2 max|x|) - largest exponent of
    the element), as in section 6.3 of the OCP specification (torchao's FLOOR).

    ``e4m3`` scales (NVFP4) have blocks of 16. The scale is e4m3(max|x| / 6 / t) * t, where the e4m3
    part is 2^-6 to 448. ``tensor_scale`` t, float32, is the calibrated max|x| / (448 * 6).

    A code holds the codes of scale and element: 256 * scale + 128 + element.
    """

    tensor_scale: Tensor | None

    def __init__(self, *, element: str, axis: int, tensor_scale: Tensor | None = None) -> None:
        super().__init__(element)
        self.axis = axis
        self.scales = "e8m0" if tensor_scale is None else "e4m3"
        self.block = BLOCKS[self.scales]
        self.register_buffer(
            "tensor_scale", None if tensor_scale is None else tensor_scale.detach().float()
        )

    @classmethod
    def nvfp4(cls, largest: Tensor, *, axis: int) -> BlockFloatQuantizer:
        """Make an NVFP4 quantizer for values up to ``largest``, ()."""
        form = ELEMENTS["e2m1"]
        scale = _positive(largest.float() / (E4M3.largest * form.largest))
        return cls(element="e2m1", axis=axis, tensor_scale=scale)

    @property
    def label(self) -> str:
        if self.scales == "e4m3":
            return "NVFP4"
        return f"MXFP{self.bits}" + ("" if self.bits == 4 else f"-{self.element.upper()}")

    @property
    def code_range(self) -> tuple[int, int]:
        return 0, (1 << 16) - 1

    def _blocks(self, x: Tensor) -> Tensor:
        """Return x as (..., blocks, block): (B, 197, 192) in blocks of 32 is (B, 197, 6, 32)."""
        moved = x.movedim(self.axis, -1)
        return F.pad(moved, (0, -moved.shape[-1] % self.block)).unflatten(-1, (-1, self.block))

    def _whole(self, blocks: Tensor, x: Tensor) -> Tensor:
        """Undo ``_blocks``."""
        return blocks.flatten(-2)[..., : x.shape[self.axis]].movedim(-1, self.axis)

    def _quantized(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the elements (..., blocks, block) and the codes of the scales (..., blocks, 1)."""
        largest = blocks.abs().amax(-1, keepdim=True)
        if self.tensor_scale is None:
            exponents = largest.view(torch.int32).bitwise_right_shift(23) - 127
            exponents = (exponents - self.form.largest_exponent).clamp_(-127, 127)
            divisor = _power_of_two(exponents.clamp(min=_SMALLEST_NORMAL))  # as torchao
            return self.form.round(blocks / divisor), exponents + 127
        scale = largest / self.form.largest / self.tensor_scale
        scale = E4M3.round(scale.clamp_min(2.0**E4M3.smallest_exponent))
        return self.form.round(blocks * (1 / self.tensor_scale / scale)), E4M3.codes(scale)

    def _scale(self, codes: Tensor) -> Tensor:
        if self.tensor_scale is None:
            return _power_of_two(codes - 127)
        return self.tensor_scale * E4M3.numbers(codes)

    def _fake(self, x: Tensor) -> Tensor:
        elements, codes = self._quantized(self._blocks(x))
        return self._whole(elements * self._scale(codes), x)

    def codes(self, x: Tensor) -> Tensor:
        elements, scales = self._quantized(self._blocks(x.detach().float()))
        return self._whole((scales << 8) + 128 + self.form.codes(elements), x)

    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        elements = self.form.numbers((codes & 255) - 128)
        return (elements * self._scale(codes >> 8)).to(dtype)

    def config(self) -> dict[str, Any]:
        return {"element": self.element, "axis": self.axis, "scales": self.scales}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BlockFloatQuantizer:
        scale = None if config["scales"] == "e8m0" else torch.ones(())
        return cls(element=config["element"], axis=config["axis"], tensor_scale=scale)

    def extra_repr(self) -> str:
        return f"{self.label}, blocks of {self.block} along axis {self.axis}"


def _positive(scale: Tensor) -> Tensor:
    """Replace scales below ``SMALLEST_SCALE`` by 1: float32 treats such a tensor as all zeros."""
    return torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)


NumberFormat = Literal["integer", "fp8_e4m3", "fp8_e5m2", "mx", "mx_wide", "nvfp4"]
ELEMENT_OF: Mapping[str, Mapping[int, str]] = MappingProxyType(
    {
        "fp8_e4m3": MappingProxyType({8: "e4m3"}),
        "fp8_e5m2": MappingProxyType({8: "e5m2"}),
        "mx": MappingProxyType({4: "e2m1", 6: "e2m3", 8: "e4m3"}),
        "mx_wide": MappingProxyType({4: "e2m1", 6: "e3m2", 8: "e5m2"}),
        "nvfp4": MappingProxyType({4: "e2m1", 8: "e4m3"}),
    }
)
"""The element of each number format by bits. At 8 bits, NVFP4 uses FP8 operands."""
assert {"integer", *ELEMENT_OF} == set(get_args(NumberFormat))


def floating_quantizer(
    number_format: str, bits: int, largest: Tensor, *, channels: int | None, contracted: int
) -> FloatingQuantizer:
    """Make the quantizer of a number format at ``bits``, which ``ELEMENT_OF`` must list.

    Args:
        largest: largest magnitude, () or (channels,). MX formats ignore it.
        channels: axis of per-channel scales, or None for one scale. Only FP8 uses it.
        contracted: axis that the product sums over. Blocks lie along it.
    """
    element = ELEMENT_OF[number_format][bits]
    if number_format.startswith("mx"):
        return BlockFloatQuantizer(element=element, axis=contracted)
    if bits == 4:
        return BlockFloatQuantizer.nvfp4(largest.amax(), axis=contracted)
    return ScaledFloatQuantizer.from_largest(largest, element=element, axis=channels)
