"""What block reconstruction learns: the rounding direction of weights, and activation scales.

``reconstruct`` fits blocks with them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quietvit.quantization.quantizers import AffineQuantizer

GAMMA, ZETA = -0.1, 1.1
"""Ends of the stretched sigmoid, AdaRound (arXiv 2004.10568), equation 23."""


def _along(quantizer: AffineQuantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and zero point in a shape that broadcasts against x."""
    if quantizer.axis is None:
        return quantizer.scale, quantizer.zero_point
    shape = [1] * x.dim()
    shape[quantizer.axis] = -1
    return quantizer.scale.view(shape), quantizer.zero_point.view(shape)


class Rounding(nn.Module):
    """AdaRound (arXiv 2004.10568): each weight has an h(V) in [0, 1], how far it is rounded up.

    The soft weight is s·(clip(floor(W/s) + h(V) + z, lo, hi) - z) with h(V) =
    clip(1.2·sigmoid(V) - 0.1, 0, 1) (equations 22 and 23). V starts where it equals W, inside the
    range. ``hard`` turns h >= 1/2 into 1 and the rest into 0. The result lies on the quantizer's
    grid, so quantizing it again changes nothing.
    """

    def __init__(self, weight: Tensor, quantizer: AffineQuantizer) -> None:
        super().__init__()
        scale, zero = _along(quantizer, weight)
        low, high = quantizer.code_range
        steps = weight.detach().float() * scale.reciprocal()
        down = steps.floor()
        rest = steps - down
        self.scale, self.down, self.dtype = scale, down, weight.dtype
        self.low, self.high = (low - zero).float(), (high - zero).float()
        start = ((rest - GAMMA) / (ZETA - GAMMA)).logit()
        self.v = nn.Parameter(start)

    def up(self) -> Tensor:
        """h(V)."""
        return (torch.sigmoid(self.v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def at(self, up: Tensor) -> Tensor:
        steps = (self.down + up).clamp(self.low, self.high)
        return (steps * self.scale).to(self.dtype)

    def hard(self) -> Tensor:
        """Return the weight with final rounding, detached."""
        return self.at((self.v.detach() >= 0).float())


def undecided(up: Tensor, beta: float) -> Tensor:
    """AdaRound's regularizer Σ(1 - |2h - 1|^β) (equation 24), (): zero if every h is 0 or 1."""
    return (1 - (2 * up - 1).abs().pow(beta)).sum()


class LearnedScale(nn.Module):
    """LSQ (arXiv 1902.08153) on a uniform quantizer: its scale is s₀·exp(t), t learned from 0.

    The logarithm is a choice made here. It keeps the scale positive and makes the learning rate
    relative, the same for all tensors.
    """

    def __init__(self, quantizer: AffineQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.start = quantizer.scale.detach().clone()
        self.t = nn.Parameter(torch.zeros_like(self.start))

    def scale(self) -> Tensor:
        return self.start * self.t.exp()

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Quantize x. Where ``keep`` (float32, 0 or 1, shape of x) is 1, x stays as it is."""
        low, high = self.quantizer.code_range
        scale = self.scale()
        zero = self.quantizer.zero_point
        if self.quantizer.axis is None:
            offset = int(zero)
            return LearnedStep.apply(x, scale, low - offset, high - offset, keep)  # type: ignore[no-any-return, no-untyped-call]
        shape = [1] * x.dim()
        shape[self.quantizer.axis] = -1
        ends = (low - zero).view(shape), (high - zero).view(shape)
        return LearnedStep.apply(x, scale.view(shape), *ends, keep)  # type: ignore[no-any-return, no-untyped-call]

    def write(self) -> None:
        with torch.no_grad():
            self.quantizer.scale.copy_(self.scale())

    def undo(self) -> None:
        with torch.no_grad():
            self.quantizer.scale.copy_(self.start)


class LearnedStep(torch.autograd.Function):
    """Fake quantization s·round(clip(x/s, low, high)) with LSQ's gradient to the scale.

    Gradient to x: 1 inside the range, 0 outside. Gradient to the scale (LSQ, equation 3), with
    v = x/s: the sum of round(v) - v inside, low or high outside. LSQ's gradient scale is left out,
    because Adam cancels it. Where ``keep`` is 1, x passes unchanged. The code uses operations that
    a CPU vectorizes, several times faster than masks and autograd.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, low: Any, high: Any, keep: Tensor | None
    ) -> Tensor:
        wide = x.float()
        steps = wide * scale.reciprocal()
        if keep is not None:
            steps.addcmul_(steps, keep, value=-1)
        out = steps.clamp(low, high).round_().mul_(scale)
        if keep is not None:
            out.addcmul_(wide, keep)
        ctx.save_for_backward(steps, scale)
        ctx.ends = low, high
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        steps, scale = ctx.saved_tensors
        low, high = ctx.ends
        grad = grads[0].float()
        if isinstance(low, Tensor):
            passed = grad * ((steps >= low) & (steps <= high))
        else:  # strict comparisons, so widen the range to include its ends
            passed = torch.ops.aten.hardtanh_backward(grad, steps, low - 1e-3, high + 1e-3)
        gained = _inner(grad, steps.clamp(low, high).round_().sub_(steps), scale)
        gained = gained + _inner(grad - passed, steps, scale)
        return passed.to(grads[0].dtype), gained, None, None, None


def _inner(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Σ a·b over the dims along which ``like`` has size 1."""
    if like.dim() == 0:
        return torch.dot(a.reshape(-1), b.reshape(-1))
    return (a * b).sum([d for d, n in enumerate(like.shape) if n == 1], keepdim=True)


def random_keep(like: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Random float32 mask like ``like``: 1 with the probability (to 1/256), else 0.

    Each random 64-bit number from the CPU gives eight entries. Otherwise masks would take longer
    than the matrix products.
    """
    words = torch.empty(-(-like.numel() // 8), dtype=torch.int64)
    words.random_(-(2**63), None, generator=generator)
    entries = words.view(torch.uint8)[: like.numel()].view(like.shape).to(like.device)
    level = round(256 * probability)
    return (entries < level).float() if level < 256 else torch.ones_like(like, dtype=torch.float32)
