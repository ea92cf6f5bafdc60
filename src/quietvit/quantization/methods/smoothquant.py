"""SmoothQuant: move outliers after norms into the weights, then round to nearest.

Ranges and quantizers are those of ``rtn``; ``reparametrize`` changes the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from quietvit.errors import QuietvitError
from quietvit.quantization.calibrated import Calibrated
from quietvit.quantization.calibration import Calibration, ImageStream
from quietvit.quantization.method import between, register_method
from quietvit.quantization.methods.rtn import RTN
from quietvit.quantization.ranges import NOT_FINITE
from quietvit.quantization.reparametrize import NormLink, norm_links, reparametrize
from quietvit.quantization.slot import Slot
from quietvit.quantization.weights import read_weight
from quietvit.tracing import MATMUL_KINDS, SITE_KINDS, Site
from quietvit.tracing.intercept import Handler

FLOOR = 1e-5


@register_method("smoothquant")
class SmoothQuant(RTN):
    """SmoothQuant (Xiao et al., arXiv 2211.10438, equation 4), then round to nearest.

    After each norm with a link (see ``norm_links``; notes name the others), channel j is divided by
    s_j = max|X_j|^α / max_k|W_kj|^(1-α). The columns of its consumers are multiplied by s_j. The
    maxima run over all calibration images and all consumers. max|W| and s_j are at least 1e-5, as
    in the authors' code. A channel that is always zero keeps s_j = 1.

    Ranges and granularities are RTN's fields. The authors quantize symmetrically, weights per
    tensor or output channel and activations per tensor or token. Here RTN's defaults apply, so that
    both methods compare. The images are kept in memory for two passes.
    """

    summary: ClassVar[str] = "outliers behind norms divided out into the weights, then RTN"
    source: ClassVar[str] = "arXiv 2211.10438"
    published: ClassVar[str] = "W8A8 of language models, alpha 0.5; no ViT"

    alpha: Annotated[float, between(0.0, 1.0)] = 0.5
    """Share of the outliers that moves into the weights, the paper's migration strength."""

    def calibrate(self, calibration: Calibration) -> Calibrated:
        """Run two passes: magnitudes in the float model, then ranges in the smoothed one."""
        model = calibration.model
        images = ImageStream(calibration.everything(), model)
        first = replace(calibration, images=images)
        linked = norm_links(model, calibration.trace)
        links = [
            link
            for link in linked.links
            if any(self.excluded_by(site) is None for site in link.consumers)
        ]
        smoothed = Calibrated(notes=linked.notes(f"{self.name}'s smoothing"))
        for link, largest in zip(links, largest_inputs(first, links), strict=True):
            scale = smoothing_scale(largest, largest_columns(first, link), self.alpha)
            reparametrize(
                model, link, smoothed, gain=scale.reciprocal(), shift=torch.zeros_like(scale)
            )
        second = _Adjusted(**vars(first), calibrated=smoothed)
        smoothed.quantizers = super().calibrate(second).quantizers
        return smoothed


def smoothing_scale(inputs: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """s_j from max|X_j| and max_k|W_kj|, (channels,) each; float64; 1 if X_j is always zero."""
    inputs, columns = inputs.double(), columns.double().clamp(min=FLOOR)
    scale = (inputs**alpha / columns ** (1 - alpha)).clamp(min=FLOOR)
    return torch.where(inputs == 0, torch.ones_like(scale), scale)


def largest_inputs(calibration: Calibration, links: list[NormLink]) -> list[Tensor]:
    """Return max|X_j| of each norm's channels, (channels,), as its consumers read them."""
    readers = {
        site.name: (index, torch.tensor(columns))
        for index, link in enumerate(links)
        for site, columns in zip(link.consumers, link.columns, strict=True)
    }
    largest: list[Tensor] = [torch.zeros(link.channels) for link in links]

    def look(slot: Slot, x: Tensor) -> None:
        if slot.index != 0 or slot.site.name not in readers:
            return
        index, channels = readers[slot.site.name]
        axis = -1 if slot.site.kind == "linear" else 1
        largest_now = x.abs().movedim(axis, -1).flatten(0, -2).amax(0).float()
        if not bool(largest_now.isfinite().all()):
            raise QuietvitError(NOT_FINITE)
        largest[index] = _raise(largest[index].to(x.device), channels, largest_now)

    calibration.watch(look, label="largest magnitudes")
    return largest


def largest_columns(calibration: Calibration, link: NormLink) -> Tensor:
    """max_k|W_kj| over all consumers of a norm, by its channels, (channels,)."""
    largest = torch.zeros(link.channels)
    for site, columns in zip(link.consumers, link.columns, strict=True):
        weight = read_weight(calibration.model, site).float()
        by_column = weight.abs().transpose(0, 1).flatten(1).amax(1)
        largest = _raise(largest.to(weight.device), torch.tensor(columns), by_column)
    return largest


def _raise(largest: Tensor, channels: Tensor, values: Tensor) -> Tensor:
    return largest.scatter_reduce(0, channels.to(values.device), values, "amax")


@dataclass
class _Adjusted(Calibration):
    """Calibration of a model under the adjustments made so far."""

    calibrated: Calibrated = field(default_factory=Calibrated)

    def observe(
        self, handler: Handler, *, kinds: frozenset[str] = MATMUL_KINDS, label: str = "calibrating"
    ) -> None:
        def adjusted(
            site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]
        ) -> Tensor:
            def through(*replaced: Tensor) -> Tensor:
                return self.calibrated.adjust(site, replaced, run)

            return handler(site, operands, through) if site.kind in kinds else through(*operands)

        super().observe(adjusted, kinds=SITE_KINDS, label=label)
