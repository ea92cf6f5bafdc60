"""Quantizers with two ranges (PTQ4ViT) and with tangent companding (after DopQ-ViT's TanQ).

``nonuniform`` holds what they share with logarithmic quantizers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quietvit.errors import QuietvitError
from quietvit.quantization.nonuniform import GELU_SHIFT, LevelQuantizer, positive_scalar
from quietvit.quantization.quantizers import register_quantizer

SMALLEST_CURVATURE = 2.0**-20


@register_quantizer("twin")
class TwinQuantizer(LevelQuantizer):
    """PTQ4ViT's twin uniform quantizer (arXiv 2111.12293): two ranges, each with its own step.

    h = 2^(b-1). The steps are ``low_step`` Δ1 and ``high_step`` Δ2 (float32, ()):

    Signed (post-GELU): codes [-h, h-1], value q·Δ1 for q < 0, else q·Δ2. The sign is the flag.

    Unsigned (post-softmax): codes [0, 2h-1], the upper bit is the flag. The value is q·Δ1 for
    q < h, else (q - h + j)·Δ2, at most (h-1)·Δ2. j·Δ2 is the first multiple of Δ2 above (h-1)·Δ1. x
    takes the nearest level. The paper numbers the upper range from zero and chooses the range by
    the split alone. Both differ here, which keeps codes and values monotone and never increases an
    error.

    Unsigned needs Δ1 <= Δ2. Zero is exact.
    """

    low_step: Tensor
    high_step: Tensor

    def __init__(self, low_step: Tensor, high_step: Tensor, *, bits: int, signed: bool) -> None:
        super().__init__(bits)
        self.signed = signed
        low_step = positive_scalar(low_step, "low_step")
        high_step = positive_scalar(high_step, "high_step")
        if not signed and bool(low_step > high_step):
            raise QuietvitError(
                f"the step near zero, {low_step.item():g}, is above that of the upper range, "
                f"{high_step.item():g}. Give the range near zero the finer step."
            )
        self.register_buffer("low_step", low_step)
        self.register_buffer("high_step", high_step)

    @classmethod
    def softmax(
        cls, split: float, *, bits: int, device: torch.device | None = None
    ) -> TwinQuantizer:
        """Make one for values in [0, 1]: [0, split] and [0, 1] have h - 1 steps each.

        split = 2^-i, i < 20. The steps are those of the authors' code, which reaches 1; the paper
        has Δ2 = 1/h. In both, Δ2/Δ1 is a power of two.
        """
        if not 0 < split <= 1:
            raise QuietvitError(f"split={split} must lie in (0, 1]; powers of two are usual.")
        step = torch.tensor(1 / ((1 << (bits - 1)) - 1), device=device)
        return cls(step * split, step, bits=bits, signed=False)

    @classmethod
    def gelu(cls, high_step: Tensor, *, bits: int) -> TwinQuantizer:
        """Make one for post-GELU values: the negative step 0.16997/h covers the whole minimum."""
        low_step = torch.full_like(high_step, GELU_SHIFT / (1 << (bits - 1)))
        return cls(low_step, high_step, bits=bits, signed=True)

    @property
    def code_range(self) -> tuple[int, int]:
        half = 1 << (self.bits - 1)
        return (-half, half - 1) if self.signed else (0, 2 * half - 1)

    def _seam(self) -> tuple[Tensor, Tensor]:
        """Return the top of the lower range, and the upper range's first level in steps of Δ2."""
        top = self.low_step.double() * ((1 << (self.bits - 1)) - 1)
        return top, torch.floor(top / self.high_step.double()) + 1

    def _positions(self, x: Tensor) -> Tensor:
        half = 1 << (self.bits - 1)
        low_rate, high_step = self.low_step.double().reciprocal(), self.high_step.double()
        if self.signed:
            places = (x * low_rate).clamp_(-half, 0)
            return places.add_((x * high_step.reciprocal()).clamp_(0, half - 1)).add_(half)
        top, first = self._seam()
        # Between the lower range's top and the upper range's first level, the code grows by one.
        gap = (first * high_step - top).reciprocal()
        places = (x * low_rate).clamp_(0, half - 1)
        places.add_((x - top).mul_(gap).clamp_(0, 1))
        return places.add_((x * high_step.reciprocal()).sub_(first).clamp_(0, half))

    def _levels(self) -> Tensor:
        low, high = self.code_range
        half = 1 << (self.bits - 1)
        q = torch.arange(low, high + 1, dtype=torch.float64, device=self.low_step.device)
        if self.signed:
            return torch.where(q < 0, q * self.low_step, q * self.high_step)
        top, first = self._seam()
        upper = (q - half + first).clamp_max(half - 1) * self.high_step
        return torch.where(q < half, q * self.low_step, torch.maximum(upper, top))

    def config(self) -> dict[str, Any]:
        return {"bits": self.bits, "signed": self.signed}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TwinQuantizer:
        return cls(torch.ones(()), torch.ones(()), **config)

    def extra_repr(self) -> str:
        return f"{self.bits} bits, two ranges, {'signed' if self.signed else 'unsigned'}"


@register_quantizer("tan")
class TanQuantizer(LevelQuantizer):
    """Tangent companding for values in [0, s], with fine steps at both ends; derived here.

    The equation of DopQ-ViT's TanQ (arXiv 2408.03291) is not public. This one follows its
    description. With n = 2^b - 1 and T(u) = tan(c(2u-1))/tan(c):

    q = clip(round(n·(1 + T(x/s))/2), 0, n), value s·(1 + atan((2q/n - 1)·tan c)/c)/2.

    The end levels are exactly 0 and s. c is at least 2^-20 in the computation, which float32 cannot
    distinguish from uniform.

    ``scale``: s, float32, (). ``curvature``: c, float32, (), in [0, π/2).
    """

    scale: Tensor
    curvature: Tensor

    def __init__(self, scale: Tensor, curvature: Tensor, *, bits: int) -> None:
        super().__init__(bits)
        if curvature.dim() != 0 or not bool((curvature >= 0) & (curvature < math.pi / 2)):
            raise QuietvitError(
                f"curvature of shape {tuple(curvature.shape)} must be one number in [0, π/2); "
                "1.0 to 1.4 suits attention maps."
            )
        self.register_buffer("scale", positive_scalar(scale, "scale"))
        self.register_buffer("curvature", curvature.detach().float())

    @property
    def code_range(self) -> tuple[int, int]:
        return 0, (1 << self.bits) - 1

    def _positions(self, x: Tensor) -> Tensor:
        c = self.curvature.double().clamp_min(SMALLEST_CURVATURE)
        half = self.code_range[1] / 2
        # Clamping is several times faster with numbers as bounds than with tensors.
        u = (x * (2 / self.scale.double())).sub_(1).clamp_(-1, 1)
        return u.mul_(c).tan_().mul_(half / c.tan()).add_(half)

    def _levels(self) -> Tensor:
        c = self.curvature.double().clamp_min(SMALLEST_CURVATURE)
        n = self.code_range[1]
        t = torch.arange(-n, n + 1, 2, dtype=torch.float64, device=c.device) / n
        levels = (1 + torch.atan(t * c.tan()) / c) / 2
        levels[0], levels[-1] = 0, 1
        return levels * self.scale

    def config(self) -> dict[str, Any]:
        return {"bits": self.bits}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TanQuantizer:
        return cls(torch.ones(()), torch.ones(()), **config)

    def extra_repr(self) -> str:
        return f"{self.bits} bits, tangent of curvature {self.curvature.item():.3g}"
