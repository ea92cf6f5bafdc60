"""Measure how quantization changes a model's outputs (``Effect``). No labels are needed.

The callers choose the operands to quantize.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.outputs import logits_of, tensors_of
from quietvit.quantization.calibration import run_model
from quietvit.tracing import Trace


@dataclass(frozen=True)
class Effect:
    """Difference between a quantized model's outputs and the float model's, on the same images.

    Attributes:
        error: ‖ŷ − y‖ / ‖y‖ over all images, for a classifier's logits, otherwise for all outputs.
        kl: mean over images of KL(softmax y ‖ softmax ŷ), in nats.
        changed: share of the images whose predicted class changes, 0 to 1.
        drop: forecast of the loss of top-1 accuracy, 0 to 1: mean of p[class of y] − p[class of ŷ]
            with p = softmax y. It is exact if the float model is calibrated (derived here).

    ``kl``, ``changed`` and ``drop`` are None if the model is not a classifier. The fast estimate
    computes only ``kl`` or ``error``.
    """

    error: float | None = None
    kl: float | None = None
    changed: float | None = None
    drop: float | None = None


class FloatOutputs:
    """The float model's outputs on batches of images, as the reference for other models."""

    def __init__(self, model: nn.Module, trace: Trace, batches: Sequence[Tensor]) -> None:
        self.batches = batches
        self.classifies = any(site.role == "head" for site in trace.sites)
        self._outputs: list[Tensor] = []
        self.images = 0
        with torch.no_grad():
            for batch in batches:
                self.images += len(batch)
                output = run_model(model, batch)
                if _has_boxes(output):
                    raise QuietvitError(
                        "the detector returns a list of boxes for each image. Their number and "
                        "order change with the bits, so two outputs cannot be compared. Give the "
                        "part in front of the boxes, such as model.backbone with normalized "
                        "images. Detectors of transformers (hf:FOLDER) work as a whole."
                    )
                self.classifies = self.classifies and _has_logits(output)
                self._outputs.append(self.read(output).detach().cpu())
        for output in self._outputs:
            if not bool(output.isfinite().all()):
                raise QuietvitError(
                    "the float model's outputs hold NaN or inf, so they cannot be a reference. "
                    "Check the weights, or run the model in float32."
                )

    def read(self, output: Any) -> Tensor:
        """Return the tensor to compare: logits (B, classes), or all float outputs as (1, n)."""
        if self.classifies:
            return logits_of(output)
        found = [x for x in tensors_of(output).values() if x.is_floating_point()]
        if not found:
            raise QuietvitError("the model returns no float tensor. Give a model that returns one.")
        return torch.cat([x.flatten() for x in found])[None]

    def expected(self, number: int) -> Tensor:
        """Return the float output of batch ``number`` in the form of ``read``, on the CPU."""
        return self._outputs[number]

    def effect(self, run: Callable[[Tensor], Any]) -> Effect:
        """Run a model on all batches and compare its outputs with the float outputs."""
        signal = noise = kl = drop = 0.0
        changed = images = 0
        with torch.no_grad():
            for batch, wanted in zip(self.batches, self._outputs, strict=True):
                found = self.read(run(batch)).cpu()
                _check_shapes(found, wanted)
                y, z = wanted.double(), found.double()
                signal += float(y.square().sum())
                noise += float((z - y).square().sum())
                images += len(batch)
                if self.classifies:
                    kl += float(divergence(y, z).sum())
                    changed += int((y.argmax(-1) != z.argmax(-1)).sum())
                    p = y.softmax(-1)
                    kept = p.gather(-1, z.argmax(-1, keepdim=True)).squeeze(-1)
                    drop += float((p.amax(-1) - kept).sum())
        error = (noise / signal) ** 0.5 if signal else None
        if not self.classifies:
            return Effect(error)
        return Effect(error, kl / images, changed / images, drop / images)


def divergence(y: Tensor, z: Tensor) -> Tensor:
    """KL(softmax y ‖ softmax z) in nats for logits (B, classes); (B,)."""
    p, q = y.log_softmax(-1), z.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _has_logits(output: Any) -> bool:
    try:
        return logits_of(output).shape[-1] > 1
    except QuietvitError:
        return False


def _has_boxes(output: Any) -> bool:
    """Whether the output is that of torchvision's detectors: a list with the boxes of each image.

    A transformers detector gives the same number of boxes for every image.
    """
    listed = isinstance(output, list) and all(isinstance(each, Mapping) for each in output)
    return listed and all("boxes" in each for each in output)


def _check_shapes(found: Tensor, wanted: Tensor) -> None:
    if found.shape != wanted.shape:
        raise QuietvitError(
            f"the outputs have {found.numel()} values when quantized and {wanted.numel()} in "
            "float, so they cannot be compared. Give a part of the model with a fixed output shape."
        )
