"""Fold the scale of a BatchNorm into the weight in front of it: exact in float.

The trace shows where this is possible. ``equalize`` scales channels between layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quietvit.quantization.adjustments import ChannelAffine, channel_axis
from quietvit.quantization.calibrated import Calibrated
from quietvit.quantization.calibration import Calibration
from quietvit.quantization.weights import read_weight, why_fixed, write_weight
from quietvit.tracing import Site, Trace

_WATCHED = frozenset({"linear", "conv", "norm"})
SMALLEST_FOLDED = 2.0**-30


@dataclass(frozen=True, eq=False)
class Folded:
    """A BatchNorm whose scale is in the weight in front of it. All tensors (channels,), double.

    ``scale``: factor of the weight's rows. ``bias``: what the convolution or linear itself adds.
    ``mean``, ``std``: of the BatchNorm's output, according to its bias and gain.
    """

    source: Site
    norm: Site
    scale: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class Folds:
    """The folded BatchNorms, and the skipped ones with reasons."""

    folded: tuple[Folded, ...]
    skipped: tuple[tuple[str, str], ...]

    def notes(self, what: str) -> list[str]:
        """Return lines for the report; none if the model has no BatchNorm."""
        done = [f"{what} folded {len(self.folded)} BatchNorms"] if self.folded else []
        return done + skipped_note(f"{what} did not fold", "BatchNorms", self.skipped)


def skipped_note(what: str, kind: str, skipped: tuple[tuple[str, str], ...]) -> list[str]:
    """Return one line that counts what was left out by reason, or an empty list."""
    if not skipped:
        return []
    reasons = Counter(reason for _, reason in skipped)
    first = {reason: name for name, reason in reversed(skipped)}
    shown = "; ".join(
        f"{first[reason]}{f' and {n - 1} more' if n > 1 else ''}: {reason}"
        for reason, n in reasons.items()
    )
    return [f"{what} {len(skipped)} {kind}: {shown}"]


def fold_batchnorms(calibration: Calibration, calibrated: Calibrated, image: Tensor) -> Folds:
    """Multiply weights by a = gamma/sqrt(var + eps), and their outputs by 1/a, exactly.

    W x + b = (a W x + b)/a + (b - b/a). The weight in ``calibration.model`` becomes a W. An
    adjustment of the site does the rest, so the site's output is that of the float model. In a
    kernel, 1/a cancels with the BatchNorm's own a, which leaves a W x + offset. A channel with
    abs(a) < 2^-30 keeps its weight.

    A BatchNorm is folded if it reads the unchanged output of one linear or convolution. It must be
    the only reader, and the weight must belong to that site alone. ``image`` (1, C, H, W) runs
    once, to check this and to find the bias.
    """
    model, trace = calibration.model, calibration.trace
    pairs: dict[str, tuple[Site, nn.Module]] = {}
    skipped: dict[str, str] = {}
    norms = [site for site in trace.sites if _is_batchnorm(model, site)]
    if not norms:
        return Folds((), ())
    for norm in norms:
        pair = _pair(model, trace, norm)
        if isinstance(pair, str):
            skipped[norm.name] = pair
        else:
            pairs[norm.name] = pair
    sources = {norm: source.name for norm, (source, _) in pairs.items()}
    biases = _biases_in_front(calibration, image, sources) if sources else {}
    folded = []
    for norm in norms:
        if norm.name not in pairs:
            continue
        source, module = pairs[norm.name]
        if norm.name in biases:
            folded.append(_folded(source, norm, module, biases[norm.name]))
            scale_weight(model, calibrated, folded[-1], folded[-1].scale)
        else:
            skipped[norm.name] = "its input is not the unchanged output of the layer before it"
    left = tuple((norm.name, skipped[norm.name]) for norm in norms if norm.name in skipped)
    return Folds(tuple(folded), left)


def scale_weight(model: nn.Module, calibrated: Calibrated, folded: Folded, scale: Tensor) -> None:
    """Multiply the weight's rows by ``scale``, and set the adjustment for ``folded.scale``."""
    weight = read_weight(model, folded.source)
    shape = [-1] + [1] * (weight.dim() - 1)
    scaled = weight.double() * scale.view(shape)
    write_weight(model, folded.source, scaled.to(weight.dtype))
    gain = 1 / folded.scale
    back = ChannelAffine.of(folded.source, gain=gain, bias=folded.bias * (1 - gain))
    calibrated.adjustments[folded.source.name] = back


def _is_batchnorm(model: nn.Module, site: Site) -> bool:
    """Whether it is a BatchNorm layer. Some models use ``F.batch_norm`` to standardize a weight."""
    if site.kind != "norm" or site.function != "batch_norm":
        return False
    known = isinstance(model.get_submodule(site.module), nn.modules.batchnorm._BatchNorm)
    return known or bool(site.operands[0].fed_by)


def _pair(model: nn.Module, trace: Trace, norm: Site) -> tuple[Site, nn.Module] | str:
    module = model.get_submodule(norm.module)
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return f"its statistics are in a {type(module).__name__}, which is not a known BatchNorm"
    if module.running_mean is None or module.running_var is None:
        return "it normalizes by the batch's own statistics"
    fed_by = norm.operands[0].fed_by
    if len(fed_by) != 1:
        many = "several sites" if fed_by else "the input"
        return f"it is fed by {many}, not by one convolution or linear"
    source = trace[fed_by[0]]
    if source.kind not in ("linear", "conv"):
        return f"it follows a site of kind {source.kind}, not a convolution or linear"
    if "transpose" in source.function:
        return "it follows a transposed convolution"
    if source.feeds != (norm.name,) or source.name in trace.outputs:
        return "the convolution in front of it feeds other sites too"
    reason = why_fixed(model, trace, source)
    return reason if reason is not None else (source, module)


def _rows(x: Tensor, axis: int) -> Tensor:
    """Return vectors of channels, (positions, channels)."""
    moved = x.movedim(axis, -1)
    return moved.reshape(-1, moved.shape[-1])


def _biases_in_front(
    calibration: Calibration, image: Tensor, sources: dict[str, str]
) -> dict[str, Tensor]:
    """Return the source's bias for each norm that reads its source's output unchanged.

    ``sources``: norm to source, by name. The bias is the output for zeros.
    """
    wanted = set(sources.values())
    outputs: dict[str, tuple[Tensor, Tensor]] = {}
    biases: dict[str, Tensor] = {}

    def handler(site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]) -> Tensor:
        if site.name in sources:
            output, bias = outputs.pop(sources[site.name])
            if torch.equal(_rows(operands[0], 1), output):
                biases[site.name] = bias
        result = run(*operands)
        if site.name in wanted:
            axis = channel_axis(site)
            nothing = run(torch.zeros_like(operands[0]), operands[1])
            outputs[site.name] = _rows(result, axis).clone(), _rows(nothing, axis)[0]
        return result

    with torch.no_grad():
        calibration.run(image, handler, kinds=_WATCHED)
    return biases


def _folded(source: Site, norm: Site, module: nn.Module, bias: Tensor) -> Folded:
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    assert module.running_mean is not None
    assert module.running_var is not None
    variance = module.running_var.double()
    gain = torch.ones_like(variance) if module.weight is None else module.weight.detach().double()
    mean = torch.zeros_like(variance) if module.bias is None else module.bias.detach().double()
    scale = gain * (variance + module.eps).rsqrt()
    scale = torch.where(scale.abs() < SMALLEST_FOLDED, torch.ones_like(scale), scale)
    std = gain.abs() * (variance / (variance + module.eps)).sqrt()
    return Folded(source, norm, scale, bias.double(), mean, std)
