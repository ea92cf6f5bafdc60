"""A linear that multiplies int8 with torchao, and its weight. ``model`` chooses the linears."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INSTALL = "quietvit[torchao]"


class IntegerLinear(nn.Linear):
    """A linear with what torchao lacks: fewer than 256 input codes, and weight zero points.

    ``low`` and ``high`` clip the input first. ``offset`` (out,) is scale times zero point of the
    weight. Then the weight has one more row, of ones, whose output is Σx:
    s (q - z) x = s q x - s z Σx. Example: (768, 192) is stored as (769, 192), and forward drops the
    last output. All sums are integers. Each of the three is None if it is not needed.
    """

    low: Tensor | None
    high: Tensor | None
    offset: Tensor | None

    @classmethod
    def in_place_of(
        cls, linear: nn.Linear, low: Tensor | None, high: Tensor | None, offset: Tensor | None
    ) -> None:
        """Convert ``linear`` in place, so that existing references to it stay valid."""
        linear.__class__ = cls
        for name, value in (("low", low), ("high", high), ("offset", offset)):
            linear.register_buffer(name, value)

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.low is None else input.clamp(self.low, self.high)
        if self.offset is None:
            return F.linear(x, self.weight, self.bias)
        y = F.linear(x, self.weight)
        y = y[..., :-1] - y[..., -1:] * self.offset
        return y if self.bias is None else y + self.bias


def int8_tensor(
    codes: Tensor, scale: Tensor, input_scale: Tensor | None, input_zero: Tensor | None
) -> Any:
    """Return torchao's weight: int8 codes (out, in), scale (out, 1), input scale (1, ..., 1)."""
    from torchao.quantization.granularity import PerTensor
    from torchao.quantization.quant_primitives import MappingType
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import (
        Int8Tensor,
        QuantizeTensorToInt8Kwargs,
    )

    kwargs = None
    if input_scale is not None:
        shifted = input_zero is not None and bool((input_zero != 0).any())
        mapping = MappingType.ASYMMETRIC if shifted else MappingType.SYMMETRIC
        kwargs = QuantizeTensorToInt8Kwargs(PerTensor(), mapping_type=mapping)
    return Int8Tensor(
        codes,
        scale,
        [1, codes.shape[1]],
        torch.float32,
        act_quant_scale=input_scale,
        act_quant_zero_point=input_zero,
        act_quant_kwargs=kwargs,
    )
