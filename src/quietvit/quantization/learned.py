"""``learn_steps``: turn the steps of a quantized model's uniform quantizers into parameters.

The straight-through rounding is in ``quantizers``; ``train`` runs whole trainings.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.quantization.calibration import run_model
from quietvit.quantization.quantized import QuantizedModel
from quietvit.quantization.quantizers import AffineQuantizer, Quantizer
from quietvit.quantization.slot import Slot
from quietvit.quantization.storage import zero_image
from quietvit.tracing import evaluating


class LearnedAffine(AffineQuantizer):
    """A uniform quantizer whose step is learned: step = ``start`` * exp(``log_ratio``).

    ``start``: the calibrated step, a buffer. ``log_ratio``: a parameter of the same shape, 0 at the
    start. So the quantizer starts bit for bit as the calibrated one, and its step stays positive.
    Adam with learning rate r changes a step by about 100 r percent, whatever its size. Weight decay
    pulls a step back to the calibrated one.

    The gradient of the step s is that of LSQ (Esser et al., arXiv 1902.08153): equation 3, times
    ``share`` = 1/sqrt(N Q_P) of its section 2.2. ``log_ratio`` gets this gradient divided by s.
    Then a step of SGD changes s as in LSQ, to first order (derived here). The zero point stays.
    """

    start: Tensor
    log_ratio: nn.Parameter

    def __init__(self, calibrated: AffineQuantizer, share: float) -> None:
        Quantizer.__init__(self, calibrated.bits)
        self.signed, self.axis, self.share = calibrated.signed, calibrated.axis, share
        self.register_buffer("start", calibrated.scale.detach().clone())
        self.register_buffer("zero_point", calibrated.zero_point.clone())
        self.log_ratio = nn.Parameter(torch.zeros_like(self.start))

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """The step, () or (channels,)."""
        step: Tensor = _Step.apply(self.start, self.log_ratio, self.share)
        return step

    def fixed(self) -> AffineQuantizer:
        """Return the quantizer with its present step as a buffer."""
        found = self.scale, self.zero_point.clone()
        return AffineQuantizer(*found, bits=self.bits, signed=self.signed, axis=self.axis)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, start: Tensor, log_ratio: Tensor, share: float) -> Tensor:
        step = start * log_ratio.exp()
        ctx.save_for_backward(step)
        ctx.share = share
        return step

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (step,) = ctx.saved_tensors
        return None, gradients[0] * (ctx.share / step), None


def learn_steps(quantized: QuantizedModel) -> list[nn.Parameter]:
    """Make the steps of all uniform quantizers trainable, and return the new parameters.

    Call it before you make the optimizer, and train ``quantized`` like any module. Without it, all
    steps stay as calibrated and only the model's own parameters train. The outputs do not change.
    ``save`` and ``export`` write the learned steps.

    Steps are learned as in LSQ (Esser et al., arXiv 1902.08153); see
    ``quietvit.quantization.LearnedAffine``. N is the number of values of one image that share a
    step, Q_P the largest code. These steps stay fixed: those of quantizers that are not uniform
    (logarithmic, two ranges, tangent), and those that their method restricts, such as the powers of
    two of HPTQ. A second call returns the same parameters.

    Args:
        quantized: changed in place.

    Raises:
        QuietvitError: not a QuantizedModel, or no step can be learned. Then nothing is changed.
    """
    if not isinstance(quantized, QuantizedModel):
        raise QuietvitError(
            f"a {type(quantized).__name__} has no steps to learn. Quantize it first, with "
            "quietvit.quantize(model, method, images)."
        )
    uniform = {
        slot: quantizer
        for slot in quantized.slots()
        if isinstance(quantizer := quantized.quantizers[slot.key], AffineQuantizer)
        and quantized.method.may_learn_step(slot)
    }
    if not uniform:
        raise QuietvitError(
            f"this {quantized.method.name} model has no step that can be learned: none of its "
            f"{len(quantized.slots())} quantizers is uniform with a free step. Train it with "
            "fixed steps: leave out learn_steps."
        )
    new = {s: q for s, q in uniform.items() if not isinstance(q, LearnedAffine)}
    if new:
        sizes = _values_of_one_image(quantized)
        for slot, quantizer in new.items():
            values = sizes[slot] / quantizer.scale.numel()
            share = 1 / math.sqrt(values * quantizer.code_range[1])
            learned = LearnedAffine(quantizer, share).train(quantizer.training)
            quantized.quantizers[slot.key] = learned
        quantized.refresh()
    return [quantized.quantizers[slot.key].log_ratio for slot in uniform]  # type: ignore[misc]


def with_fixed_steps(quantized: QuantizedModel) -> QuantizedModel:
    """Return a copy whose learned steps are fixed at their values; the model itself if none is."""
    if not any(isinstance(q, LearnedAffine) for q in quantized.quantizers.values()):
        return quantized
    copied = copy.deepcopy(quantized)
    for key, quantizer in quantized.quantizers.items():
        if isinstance(quantizer, LearnedAffine):
            copied.quantizers[key] = quantizer.fixed()
    return copied


def _values_of_one_image(quantized: QuantizedModel) -> dict[Slot, int]:
    sizes: dict[Slot, int] = {}

    def count(slot: Slot, x: Tensor) -> Tensor:
        sizes[slot] = x.numel()
        return x

    with evaluating(quantized), torch.no_grad(), quantized.replacing(count):
        run_model(quantized, zero_image(quantized.model, quantized.input_shape))
    return sizes
