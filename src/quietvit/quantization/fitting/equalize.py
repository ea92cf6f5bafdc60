"""Equalize channels between two layers with a ReLU in between: exact in float.

ReLU(s x) = s ReLU(x) for s > 0. So the first layer's outputs are scaled by s, and the second's
input columns by 1/s. The first layer has a folded BatchNorm (``batchnorm``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quietvit.quantization.adjustments import (
    HOMOGENEOUS,
    SCALED_THROUGH,
    ChannelAffine,
    channel_axis,
)
from quietvit.quantization.calibrated import Calibrated
from quietvit.quantization.calibration import Calibration
from quietvit.quantization.fitting.batchnorm import Folded, Folds, scale_weight, skipped_note
from quietvit.quantization.weights import read_weight, why_fixed, write_weight
from quietvit.tracing import Site, Trace

_WATCHED = frozenset({"linear", "conv", "norm"})


@dataclass(frozen=True, eq=False)
class Between:
    """A folded BatchNorm and the layers behind its ReLU; ``columns`` as in ``NormLink``."""

    folded: Folded
    consumers: tuple[Site, ...]
    columns: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Equalized:
    """Scales (channels,) by the name of the BatchNorm, and skipped BatchNorms with reasons."""

    scales: dict[str, Tensor]
    skipped: tuple[tuple[str, str], ...]

    def notes(self, what: str) -> list[str]:
        done = [f"{what} equalized the channels of {len(self.scales)} layers"]
        left = skipped_note(f"{what} did not equalize", "layers", self.skipped)
        return (done if self.scales else []) + left


def std_after_relu(mean: Tensor, std: Tensor) -> Tensor:
    """Standard deviation of max(x, 0) for Gaussian x, elementwise; 0 if ``std`` is 0.

    Var = (m^2 + s^2) P(m/s) + m s p(m/s) - (m P(m/s) + s p(m/s))^2. p and P are the density and
    the distribution function of the unit Gaussian.
    """
    mean, std = mean.double(), std.double()
    ratio = torch.where(std > 0, mean / std.clamp(min=1e-300), torch.zeros_like(mean))
    below = torch.special.ndtr(ratio)
    density = torch.exp(-0.5 * ratio.square()) / (2 * torch.pi) ** 0.5
    first = mean * below + std * density
    second = (mean.square() + std.square()) * below + mean * std * density
    result = (second - first.square()).clamp(min=0).sqrt()
    return torch.where(std > 0, result, torch.zeros_like(result))


def equalize(
    calibration: Calibration, calibrated: Calibrated, folds: Folds, image: Tensor
) -> Equalized:
    """Scale channel k of each folded BatchNorm by min(1/sd_k, 1), and its readers by the inverse.

    sd_k is the standard deviation after the ReLU, for a Gaussian with the BatchNorm's mean and
    standard deviation (HPTQ, arXiv 2109.09113). Changes the weights of ``calibration.model`` and
    adjusts the BatchNorms. Only the outputs of these BatchNorms and their ReLUs change. ``image``
    (1, C, H, W) runs twice, to check that what lies between two layers (pooling, padding) passes
    scales on.
    """
    model = calibration.model
    links, skipped = [], []
    for folded in folds.folded:
        between = _between(model, calibration.trace, folded)
        if isinstance(between, Between):
            links.append(between)
        elif between is not None:
            skipped.append((folded.norm.name, between))
    kept = _hand_on_scales(calibration, links, image) if links else set()
    scales = {}
    for between in links:
        name = between.folded.norm.name
        if name not in kept:
            skipped.append((name, "an operation after its activation does not pass the scales on"))
            continue
        spread = std_after_relu(between.folded.mean, between.folded.std)
        scales[name] = 1 / spread.clamp(min=1.0)
        whole = replace(between.folded, scale=between.folded.scale * scales[name])
        scale_weight(model, calibrated, whole, scales[name])
        calibrated.add(whole.norm, ChannelAffine.of(whole.norm, gain=scales[name]))
        for site, columns in zip(between.consumers, between.columns, strict=True):
            _scale_inputs(model, site, 1 / scales[name][list(columns)])
    return Equalized(scales, tuple(skipped))


def _between(model: nn.Module, trace: Trace, folded: Folded) -> Between | str | None:
    """Return the place to equalize, else the reason against it; None if no activation follows."""
    sites = {site.name: site for site in trace.sites}
    fed = [sites[name] for name in folded.norm.feeds]
    if not any(site.kind == "activation" for site in fed):
        return None
    activation = fed[0]
    if len(fed) != 1 or folded.norm.name in trace.outputs:
        return "other sites read it beside its activation"
    if activation.function.strip("_") not in HOMOGENEOUS:
        return f"{activation.function.strip('_')} is not positively homogeneous"
    consumers = [sites[name] for name in activation.feeds]
    if activation.name in trace.outputs or not consumers:
        return "its activation leaves the model"
    columns = []
    for site in consumers:
        if site.kind not in ("linear", "conv") or "transpose" in site.function:
            return f"its activation feeds a site of kind {site.kind} ({site.function})"
        reason = why_fixed(model, trace, site)
        if reason is not None:
            return reason
        ends = folded.norm.name, site.name
        links = [
            link
            for link in trace.links
            if (link.source, link.consumer) == ends and SCALED_THROUGH.issuperset(link.through)
        ]
        width = site.operands[0].shape[channel_axis(site)]
        if len(links) != 1 or len(links[0].channels) != width or min(links[0].channels) < 0:
            return "its channels do not pass the activation one by one"
        columns.append(links[0].channels)
    return Between(folded, tuple(consumers), tuple(columns))


def _hand_on_scales(calibration: Calibration, links: Sequence[Between], image: Tensor) -> set[str]:
    """Return the BatchNorms whose readers get scaled channels if the BatchNorm is scaled.

    The scales are powers of two, so the comparison is exact. Each reader runs on its unscaled
    input, so one test does not disturb the next.
    """
    tried = {
        between.folded.norm.name: torch.exp2(
            (torch.arange(len(between.folded.mean), device=image.device) * 3 % 7 - 3).to(image)
        )
        for between in links
    }
    readers = {
        site.name: tried[between.folded.norm.name][list(columns)]
        for between in links
        for site, columns in zip(between.consumers, between.columns, strict=True)
    }
    plain: dict[str, Tensor] = {}
    wrong: set[str] = set()

    def look(site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]) -> Tensor:
        if site.name in readers:
            plain[site.name] = operands[0].clone()
        return run(*operands)

    def scaled(site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]) -> Tensor:
        if site.name in tried:
            return run(*operands) * tried[site.name].view([1, -1] + [1] * (operands[0].dim() - 2))
        if site.name in readers:
            shape = [1] * operands[0].dim()
            shape[channel_axis(site)] = -1
            expected = plain[site.name] * readers[site.name].view(shape)
            if not torch.equal(operands[0], expected):
                wrong.add(site.name)
            return run(plain[site.name], operands[1])
        return run(*operands)

    with torch.no_grad():
        calibration.run(image, look, kinds=_WATCHED)
        calibration.run(image, scaled, kinds=_WATCHED)
    return {
        between.folded.norm.name
        for between in links
        if not any(site.name in wrong for site in between.consumers)
    }


def _scale_inputs(model: nn.Module, site: Site, scale: Tensor) -> None:
    """Multiply the input columns of a linear or (grouped) convolution by ``scale``, (inputs,)."""
    weight = read_weight(model, site)
    out, width = weight.shape[:2]
    groups = len(scale) // width
    factors = scale.view(groups, width).repeat_interleave(out // groups, 0)
    shaped = factors.view([out, width] + [1] * (weight.dim() - 2))
    write_weight(model, site, (weight.double() * shaped).to(weight.dtype))
