"""``learn_steps``: turn the steps of a quantized model's uniform quantizers into parameters.

``quantizers`` does the straight-through rounding, and ``train`` runs the training.
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

    ``start`` is the calibrated step, a buffer of shape () or (channels,). ``log_ratio`` is a
    parameter of the same shape, 0 at first. So the quantizer initially equals the calibrated one
    bit for bit, and its step stays positive. One update of Adam with learning rate r changes a step
    by about 100 r percent, independent of its size. Weight decay pulls it to the calibrated step.

    The gradient of the step s follows LSQ (Esser et al., arXiv 1902.08153): equation 3 times
    ``share`` = 1/sqrt(N Q_P) of its section 2.2. ``log_ratio`` gets this gradient divided by s, so
    SGD changes s as in LSQ, to first order (derived here). The zero point is fixed.
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
        """Return a quantizer with the current step as a buffer."""
        grid = self.scale, self.zero_point.clone()
        return AffineQuantizer(*grid, bits=self.bits, signed=self.signed, axis=self.axis)


class _Step(torch.autograd.Function):
    """step = start * exp(log_ratio), with the gradient of LSQ instead of the exact one."""

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
    """Make the steps of all uniform quantizers trainable in place, and return the new parameters.

    Call it before you create the optimizer, then train ``quantized`` like any module. Without this
    call, steps stay as calibrated, and only the model's own parameters train. The call changes no
    outputs. A second call returns the same parameters. ``save`` and ``export`` write learned steps.

    Sites that read one tensor, such as query, key and value of transformers, share one step if they
    were calibrated alike. An exported file quantizes such a tensor once, also after training.

    Steps are learned as in LSQ (Esser et al., arXiv 1902.08153). In
    ``quietvit.quantization.LearnedAffine``, N is the number of values of one image that share a
    step, and Q_P is the largest code. Steps of non-uniform quantizers (logarithmic, two ranges,
    tangent) stay fixed. So do steps that the method restricts, such as HPTQ's powers of two.

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
        operands = _operands(quantized)
        shared: dict[Any, LearnedAffine] = {}
        for slot, quantizer in new.items():
            same = _identity(operands[slot]), _grid(quantizer)
            if same not in shared:
                values = operands[slot].numel() / quantizer.scale.numel()
                share = 1 / math.sqrt(values * quantizer.code_range[1])
                shared[same] = LearnedAffine(quantizer, share).train(quantizer.training)
            quantized.quantizers[slot.key] = shared[same]
        quantized.refresh()
    found = [quantized.quantizers[slot.key] for slot in uniform]
    return list({id(q): q.log_ratio for q in found if isinstance(q, LearnedAffine)}.values())


def with_fixed_steps(quantized: QuantizedModel) -> QuantizedModel:
    """Return a copy with fixed steps, or the model itself if no step is learned."""
    if not any(isinstance(q, LearnedAffine) for q in quantized.quantizers.values()):
        return quantized
    copied = copy.deepcopy(quantized)
    for key, quantizer in quantized.quantizers.items():
        if isinstance(quantizer, LearnedAffine):
            copied.quantizers[key] = quantizer.fixed()
    return copied


def _operands(quantized: QuantizedModel) -> dict[Slot, Tensor]:
    """Return each operand for one image, before it is quantized. All are held in memory."""
    found: dict[Slot, Tensor] = {}

    def keep(slot: Slot, x: Tensor) -> Tensor:
        found[slot] = x
        return x

    with evaluating(quantized), torch.no_grad(), quantized.replacing(keep):
        run_model(quantized, zero_image(quantized.model, quantized.input_shape))
    return found


def _identity(x: Tensor) -> tuple[Any, ...]:
    """Return what two operands have in common only if they are the same tensor.

    Both must be in memory. An operation in place between two reads changes the version.
    """
    return x.data_ptr(), x.dtype, x.shape, x.stride(), x._version


def _grid(quantizer: AffineQuantizer) -> tuple[Any, ...]:
    """Return what two quantizers have in common if they round alike."""
    numbers = (tuple(x.flatten().tolist()) for x in (quantizer.scale, quantizer.zero_point))
    return quantizer.bits, quantizer.signed, quantizer.axis, *numbers
