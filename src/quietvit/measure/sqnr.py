"""Signal-to-quantization-noise ratio of every matrix product, quantized model against float model.

This module does not know how values are quantized: the quantized model runs itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.inputs import Images
from quietvit.measure.images import batches
from quietvit.tracing import Site, Trace, evaluating, intercept, plain_model


def sqnr(
    model: nn.Module,
    quantized: nn.Module,
    images: Images,
    *,
    local: bool = False,
    batch_size: int = 8,
) -> dict[str, float]:
    """Return 10·log10(Σ y² / Σ (y − ŷ)²) in dB for each matrix product's output, by site name.

    y is the float model's output at a site, ŷ the quantized model's output on the same images. The
    sums run over all images in float64. By default each model uses its own activations, so the
    noise includes all noise from earlier sites. The result is inf if the outputs are equal, nan if
    y and the noise are both 0, and -inf if only y is 0. Both models run in eval mode. Afterwards
    they are in the mode they had before.

    Detectors that choose queries by score (D-FINE, RT-DETR, two-stage DETRs) may choose others, or
    another order, after the smallest change. Behind that choice a low value only says that queries
    changed places. Compare such outputs query by query, matched by box or score.
    Where a detector proposes another number of boxes when it is quantized, the result is nan: the
    rows of its box head are then of other boxes.

    Args:
        model: the float model.
        quantized: a module with ``trace`` (sites of ``model``), as ``quietvit.quantize`` returns.
            Its sites are read through ``quantized.observe(handler)`` if it has that method, else
            through ``quietvit.tracing.intercept``.
        images: as for ``quietvit.diagnose``.
        local: give each quantized site the float model's operands, which leaves only this site's
            own noise. It needs ``quantized.observe``, a context manager. Inside it,
            ``handler(site, operands, run)`` gets each site's operands before quantization, ``run``
            quantizes and multiplies, and the handler's result is the site's output.
        batch_size: images per forward pass. One batch's site outputs are held in memory.

    Raises:
        QuietvitError: no images or wrong ones, ``quantized`` without a trace or with other sites,
            ``local`` without ``observe``, NaN or inf at a site of the float model.
    """
    model, quantized = plain_model(model), plain_model(quantized)
    trace = getattr(quantized, "trace", None)
    if not isinstance(trace, Trace):
        raise QuietvitError(
            f"{type(quantized).__name__} has no trace, so its sites cannot be matched with those "
            "of the float model; give what quietvit.quantize returned."
        )
    if local and not hasattr(quantized, "observe"):
        raise QuietvitError(
            f"{type(quantized).__name__} has no observe(handler). local=True needs it to give each "
            "site float operands; leave local out, or add observe."
        )
    meter = _Meter(trace, local)
    with evaluating(model), evaluating(quantized), torch.no_grad():
        for batch in batches(images, model, batch_size):
            meter.start()
            with intercept(trace, meter.reference):
                batch.run(model)
            with _watching(quantized, trace, meter.compare):
                batch.run(quantized)
    return meter.decibels()


class _Meter:
    """Compare each site's quantized output with the float output of the same batch."""

    def __init__(self, trace: Trace, local: bool) -> None:
        self._local = local
        self._outputs: dict[str, Tensor] = {}
        self._operands: dict[str, tuple[Tensor, ...]] = {}
        self._activations = {site.name: len(site.operands) for site in trace.matmuls}
        self._signal = dict.fromkeys((s.name for s in trace.matmuls if s.kind != "opaque"), 0.0)
        self._noise = dict(self._signal)
        self._varying: set[str] = set()  # sites with another number of rows: boxes of a detector

    def start(self) -> None:
        self._outputs.clear()
        self._operands.clear()

    def reference(
        self, site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]
    ) -> Tensor:
        output = run(*operands)
        if not output.isfinite().all():
            raise QuietvitError(
                f"the float model's output of {site.name} ({site.kind}, shape "
                f"{tuple(output.shape)}) holds NaN or inf, so it has no signal-to-noise ratio; "
                "check the weights, or run the model in float32."
            )
        self._outputs[site.name] = output.clone()
        if self._local:
            kept = operands[: self._activations[site.name]]
            self._operands[site.name] = tuple(operand.clone() for operand in kept)
        return output

    def compare(
        self, site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]
    ) -> Tensor:
        wanted = self._outputs.pop(site.name)
        if self._local:
            kept = self._operands.pop(site.name)
            operands = (*kept, *operands[len(kept) :])
        output = run(*operands)
        if output.shape[1:] == wanted.shape[1:] and len(output) != len(wanted):
            self._varying.add(site.name)
            return output
        if output.shape != wanted.shape:
            raise QuietvitError(
                f"{site.name} gives shape {tuple(output.shape)} in the quantized model and "
                f"{tuple(wanted.shape)} in the float model; compare a model with its own quantized "
                "form."
            )
        if wanted.device.type == "mps":
            wanted, output_ = wanted.cpu(), output.cpu()
        else:
            output_ = output.to(wanted.device)
        reference = wanted.double()
        self._signal[site.name] += float(reference.square().sum())
        self._noise[site.name] += float((reference - output_.double()).square().sum())
        return output

    def decibels(self) -> dict[str, float]:
        return {
            name: math.nan if name in self._varying else _decibels(signal, self._noise[name])
            for name, signal in self._signal.items()
        }


def _watching(
    quantized: nn.Module, trace: Trace, handler: Callable[..., Tensor]
) -> AbstractContextManager[Any]:
    observe = getattr(quantized, "observe", None)
    if observe is None:
        return intercept(trace, handler)
    context: AbstractContextManager[Any] = observe(handler)
    return context


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf if signal else math.nan
    return 10 * math.log10(signal / noise) if signal else -math.inf
