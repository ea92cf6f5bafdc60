"""FQ-ViT: power-of-two factors for inputs of norms, log-int-softmax; quantizes everything.

The quantizers are in ``nonuniform``; the integer softmax, which only this method has, is here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from quietvit.quantization.adjustments import Adjustment, channel_axis, register_adjustment
from quietvit.quantization.calibrated import Calibrated
from quietvit.quantization.calibration import Calibration
from quietvit.quantization.method import Bits, EdgeBits, Method, register_method
from quietvit.quantization.nonuniform import LogQuantizer, power_of_two_factor
from quietvit.quantization.quantizers import AffineQuantizer, Quantizer, affine_parameters
from quietvit.quantization.ranges import MinMaxRange, Stream
from quietvit.quantization.slot import Slot
from quietvit.quantization.weights import weight_axis
from quietvit.tracing import MATMUL_KINDS, Site, Trace
from quietvit.tracing.ops import TOKEN_NORMS

LARGEST_EXPONENT = 3
MASKED = 80.0
"""Scores this far below the largest have a softmax of zero in float32, so they must be a mask."""
_BLOCK = 64


@register_method("fq-vit")
class FQViT(Method):
    """FQ-ViT (Lin et al., arXiv 2111.13824): min-max ranges, and all parts for integer inference.

    - Weights are symmetric per output channel, activations affine per tensor, both by min-max.
    - Post-softmax values are powers of two, with scale 1.
    - ``everything`` adds the inputs of layer norms and the residual stream by a power-of-two factor
      (equation 9 there): one scale s and zero point, and channel j has the step 2^a_j s, with a_j
      in 0..3 of least squared error. It also adds the branches of residual adds and the scores
      before the softmax per tensor, and the softmax in integers (below).

    Differences from the authors' code:

    - The residual stream is quantized where it is read, not once where it is written. The norm and
      the next add have their own factors.
    - Logits are not quantized. Layer norms run in float on quantized inputs.
    - Residual adds of images whose channels are not the last dim (CNN stems) are per tensor.
    - Attention maps outside 0..1 (mixed heads) get a uniform quantizer. A note says so.
    - Scores with a mask (entries more than 80 below the largest) stay float, and so do softmaxes
      over another dim than the last. A note says so.
    """

    summary: ClassVar[str] = "fully quantized: power-of-two factors, log-int-softmax"
    source: ClassVar[str] = "arXiv 2111.13824; integer exponential arXiv 2101.01321"
    published: ClassVar[str] = "W8A8, 4-bit attention, min-max, everything; ~1000 images"
    deployable: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = MATMUL_KINDS | {"norm", "softmax", "add"}

    head_bits: EdgeBits = "same"
    """Bits of both operands of the last layer, like ``patch_embed_bits``."""
    patch_embed_bits: EdgeBits = "same"
    """Bits of both operands of the first layer: a number, None for float, or ``"same"``."""
    attention_bits: Bits = 4
    """Bits of post-softmax values, 4 in the paper; None keeps them in float."""
    residual_bits: Bits = 8
    """Bits of norm inputs and residual adds, 8 in the paper; None keeps them in float."""
    everything: bool = True
    """Whether to quantize norm inputs, residual stream and softmax, or only matrix products."""

    def calibrate(self, calibration: Calibration) -> Calibrated:
        """Run one pass: extremes, and a histogram per channel of the inputs of norms."""
        ranges: dict[Slot, MinMaxRange] = {}
        streams: dict[Slot, Stream] = {}
        left: dict[str, str] = {}

        def handler(site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]) -> Tensor:
            output = run(*operands)
            if site.kind == "softmax" and site.name not in left:
                reason = _why_not_integer(operands[0], output)
                if reason:
                    left[site.name] = reason
            for index, operand in enumerate(operands):
                slot = Slot(site, index)
                if self.slot_bits(slot) is None or site.name in left:
                    continue
                if slot.is_weight and slot in ranges:
                    continue
                if slot not in ranges:
                    ranges[slot] = MinMaxRange(weight_axis(site) if slot.is_weight else None)
                    if _by_factors(slot, calibration.trace):
                        streams[slot] = Stream(-1)
                ranges[slot].update(operand)
                if slot in streams:
                    streams[slot].update(operand)
            return output

        kinds = self.kinds if self.everything else MATMUL_KINDS
        calibration.observe(handler, kinds=kinds, label=f"{self.name} {self.label}")
        calibrated = Calibrated()
        for slot, watched in ranges.items():
            if slot.site.name not in left:
                calibrated.quantizers[slot] = self._quantizer(slot, watched, streams.get(slot))
        for slot in calibrated.quantizers:
            if slot.site.kind == "softmax":
                calibrated.adjustments[slot.site.name] = IntegerSoftmax()
        calibrated.notes += _notes(calibrated, left)
        calibrated.notes += [
            f"{slot.site.name}: attention maps outside 0..1 take a uniform quantizer"
            for slot, watched in ranges.items()
            if _is_attention(slot) and _outside(watched)
        ]
        return calibrated

    def working_bits(self, slot: Slot) -> int | None:
        """Return an operand's bits by its kind of site; norms, softmaxes and adds have bits too."""
        if slot.site.kind in MATMUL_KINDS:
            bits = super().working_bits(slot)
            return self.attention_bits if bits and _is_attention(slot) else bits
        if not self.everything or self.activation_bits is None:
            return None
        if slot.site.kind == "norm" and slot.site.function not in TOKEN_NORMS:
            return None
        return self.activation_bits if slot.site.kind == "softmax" else self.residual_bits

    def may_learn_step(self, slot: Slot) -> bool:
        return slot.site.kind not in ("norm", "add")  # their steps differ by powers of two

    def why_working_float(self, slot: Slot) -> str:
        if _is_attention(slot) and super().working_bits(slot) is not None:
            return "attention_bits=None"
        return super().why_working_float(slot)

    def _quantizer(self, slot: Slot, watched: MinMaxRange, stream: Stream | None) -> Quantizer:
        bits = self.slot_bits(slot)
        assert bits is not None
        minimum, maximum = watched.finish()
        if _is_attention(slot) and not _outside(watched):
            return LogQuantizer.base2(torch.ones_like(maximum), bits=bits)
        if stream is not None:
            return factor_quantizer(stream, minimum, maximum, bits)
        return AffineQuantizer.from_range(
            minimum, maximum, bits=bits, symmetric=slot.is_weight, axis=watched.axis
        )

    def policy(self) -> str:
        if not self.everything:
            return super().policy()
        text = super().policy().partition("; norms")[0]
        return (
            f"{text}; post-softmax {self.attention_bits} bits, layer norm inputs and residual adds "
            f"{self.residual_bits} bits, softmax in integers; activation functions, biases and "
            "logits float"
        )


def factor_quantizer(
    stream: Stream, minimum: Tensor, maximum: Tensor, bits: int
) -> AffineQuantizer:
    """Return the power-of-two factor quantizer with the least squared error for each channel.

    FQ-ViT, arXiv 2111.13824, equations 9 and 10: s = (max - min)/(2^b - 1)/2^3, z from the
    largest step, a_j by the error over channel j's values. ``stream`` has axis -1.
    """
    scale, zero_point, _ = affine_parameters(minimum, maximum, bits, symmetric=False)
    steps = [scale * 2.0 ** (a - LARGEST_EXPONENT) for a in range(LARGEST_EXPONENT + 1)]
    values, counts = stream.points()
    errors = values.new_zeros(len(steps), len(values), dtype=torch.float64)
    low, high = -float(zero_point), float((1 << bits) - 1 - zero_point)
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        weight = None if counts is None else counts[start : start + _BLOCK]
        for a, step in enumerate(steps):
            off = (block / step).round_().clamp_(low, high).mul_(step).sub_(block).square_()
            errors[a, start : start + _BLOCK] = (off if weight is None else off * weight).sum(1)
    # Of equal steps the largest: a constant channel is exact with all, and this one clips least.
    exponents = LARGEST_EXPONENT - errors.flip(0).argmin(0)
    return power_of_two_factor(steps[0], zero_point, exponents.to(torch.int32), bits=bits)


@register_adjustment("integer_softmax")
class IntegerSoftmax(Adjustment):
    """Softmax over the last dim with the exponential of I-BERT (arXiv 2101.01321, section 4.3).

    exp(x) = 2^-n (0.3585 (p + 1.353)² + 0.344), n = floor(-x / ln 2), p = x + n ln 2, for x minus
    its maximum. The integers' values are computed in at least float32. The error against exp is
    below 0.3 % of 1. The sum and the division that follow are exact to float32.
    """

    deployable: ClassVar[bool] = False

    def forward(self, operands: tuple[Tensor, ...], run: Callable[..., Tensor]) -> Tensor:
        (scores,) = operands
        x = scores.to(torch.promote_types(scores.dtype, torch.float32))
        x = x - x.amax(-1, keepdim=True)
        n = (x * (-1 / math.log(2))).floor().clamp_(max=126)
        p = torch.add(x, n, alpha=math.log(2)).clamp_(min=-math.log(2))
        exponential = (0.3585 * (p + 1.353).square() + 0.344) * torch.exp2(-n)
        return (exponential / exponential.sum(-1, keepdim=True)).to(scores.dtype)

    def config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> IntegerSoftmax:
        return cls()


def _why_not_integer(scores: Tensor, softmax: Tensor) -> str:
    over_last = scores.float().softmax(-1)
    rounding = 2 * torch.finfo(softmax.dtype).eps
    if not torch.allclose(over_last, softmax.float(), rtol=max(1e-5, rounding), atol=1e-5):
        return "a softmax over another dim than the last"
    if bool((scores.amax(-1) - scores.amin(-1) > MASKED).any()):
        return "its scores are masked"
    return ""


def _is_attention(slot: Slot) -> bool:
    return slot.role == "post_softmax" and slot.site.kind in MATMUL_KINDS


def _outside(watched: MinMaxRange) -> bool:
    """Whether the values are not probabilities, for example after a linear that mixes heads."""
    minimum, maximum = watched.finish()
    return bool((minimum < 0) | (maximum > 1.001))


def _by_factors(slot: Slot, trace: Trace) -> bool:
    """Whether an operand is the residual stream: a layer norm's input, or the skip of an add."""
    if slot.site.kind == "norm":
        return True
    if slot.site.kind != "add":
        return False
    operand = slot.site.operands[slot.index]
    fed = [trace[name] for name in operand.fed_by]
    skip = any(site.kind not in MATMUL_KINDS or site.role == "patch_embed" for site in fed)
    return not fed or (skip and all(_channels_last(trace, s, operand.shape) for s in fed))


def _channels_last(trace: Trace, site: Site, shape: tuple[int, ...]) -> bool:
    """Whether the channels of ``site`` are the last dim of an operand of ``shape``.

    Tokens (B, N, C) always have them last. For an image, the last norm or weight before it decides.
    """
    if len(shape) < 4:
        return True
    if site.kind in ("add", "activation"):
        sources = {name for operand in site.operands for name in operand.fed_by}
        return all(_channels_last(trace, trace[name], shape) for name in sources)
    if site.kind not in ("linear", "conv", "norm"):
        return True
    axis = channel_axis(site)
    channels = site.output_shape[axis]
    return shape[-1] == channels and (axis == -1 or shape[1] != channels)


def _notes(calibrated: Calibrated, left: dict[str, str]) -> list[str]:
    kinds = Counter(slot.site.kind for slot in calibrated.quantizers)
    others = {"norm": "norm inputs", "softmax": "softmaxes", "add": "operands of residual adds"}
    counted = [f"{kinds[kind]} {name}" for kind, name in others.items() if kinds[kind]]
    notes = [f"quantized besides matrix products: {', '.join(counted)}"] if counted else []
    reasons = Counter(left.values())
    return notes + [f"{n} softmaxes stay float: {reason}" for reason, n in reasons.items()]
