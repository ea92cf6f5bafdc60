"""Re-parametrization between a norm and the linears that read it: exact in float.

The norm's output becomes x' = gain * x + shift. Each consumer gets W' = W / gain and bias' = bias
- W (shift / gain). Methods choose gain and shift; this module finds where it is possible.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.quantization.adjustments import ChannelAffine
from quietvit.quantization.calibrated import Calibrated
from quietvit.quantization.weights import read_weight, why_fixed, write_weight
from quietvit.tracing import Site, Trace
from quietvit.tracing.ops import norm_channel_dim


@dataclass(frozen=True, eq=False)
class NormLink:
    """A norm and all its readers; column j of reader i reads channel ``columns[i][j]``."""

    norm: Site
    consumers: tuple[Site, ...]
    columns: tuple[tuple[int, ...], ...]

    @property
    def channels(self) -> int:
        return self.norm.output_shape[norm_channel_dim(self.norm.function)]


@dataclass(frozen=True)
class NormLinks:
    """The links of a model. ``skipped``: each other norm that feeds a linear, with the reason."""

    links: tuple[NormLink, ...]
    skipped: tuple[tuple[str, str], ...]

    def notes(self, what: str) -> list[str]:
        """Return one line for the report about skipped norms, or an empty list."""
        shown = "; ".join(f"{name}: {reason}" for name, reason in self.skipped)
        return [f"{what} skipped {len(self.skipped)} norms: {shown}"] if shown else []


def norm_links(model: nn.Module, trace: Trace) -> NormLinks:
    """Find every norm whose output reaches only linears, channel by channel and unchanged.

    Convolutions of kernel size 1 count as linears. A norm is skipped, with the reason, if it also
    feeds a residual or leaves the model. It is also skipped if something stands between it and the
    linear (padding, a class token, pooling, a gate), or if a consumer's weight is shared or
    computed. Found from the trace; derived here.
    """
    links, skipped = [], []
    sites = {site.name: site for site in trace.sites}
    for norm in trace.sites:
        if norm.kind != "norm" or norm.function == "batch_norm" or not _feeds_weight(norm, sites):
            continue
        link = _link(model, trace, norm, [sites[name] for name in norm.feeds])
        if isinstance(link, str):
            skipped.append((norm.name, link))
        else:
            links.append(link)
    return NormLinks(tuple(links), tuple(skipped))


def hidden_norm_links(model: nn.Module, trace: Trace) -> NormLinks:
    """Like ``norm_links``, but skip the norm in front of the head.

    If the head reads one token, each image gives only one value per channel. That is too few to fit
    channels one by one.
    """
    plain = norm_links(model, trace)
    links, skipped = [], list(plain.skipped)
    for link in plain.links:
        heads = [site.name for site in link.consumers if site.role == "head"]
        if heads:
            skipped.append((link.norm.name, f"it feeds the head {heads[0]}"))
        else:
            links.append(link)
    return NormLinks(tuple(links), tuple(skipped))


def reparametrize(
    model: nn.Module, link: NormLink, calibrated: Calibrated, *, gain: Tensor, shift: Tensor
) -> None:
    """Scale and shift a norm's output, and undo it in the consumers. The model's outputs stay.

    ``gain``, ``shift``: (channels,). Changes the weights in ``model`` and adds adjustments: gain
    and shift to the norm, a bias to the consumers.

    Raises QuietvitError unless all gains are positive and finite, and all shifts finite.
    """
    gain, shift = gain.detach().double(), shift.detach().double()
    if not bool(((gain > 0) & gain.isfinite() & shift.isfinite()).all()):
        channel = int((~((gain > 0) & gain.isfinite() & shift.isfinite())).int().argmax())
        raise QuietvitError(
            f"{link.norm.name}: channel {channel} would be scaled by {gain[channel]:g} and shifted "
            f"by {shift[channel]:g}; a re-parametrization needs finite values and a positive scale."
        )
    calibrated.add(link.norm, ChannelAffine.of(link.norm, gain=gain, bias=shift))
    for site, columns in zip(link.consumers, link.columns, strict=True):
        weight = read_weight(model, site)
        chosen = list(columns)
        shape = [1, -1] + [1] * (weight.dim() - 2)
        scaled = weight.double() / gain[chosen].view(shape)
        write_weight(model, site, scaled.to(weight.dtype))
        offset = -(scaled.flatten(1) @ shift[chosen])
        if bool((shift != 0).any()):
            calibrated.add(site, ChannelAffine.of(site, bias=offset))


def _feeds_weight(norm: Site, sites: dict[str, Site]) -> bool:
    return any(sites[name].kind in ("linear", "conv") for name in norm.feeds)


def _link(model: nn.Module, trace: Trace, norm: Site, fed: list[Site]) -> NormLink | str:
    if norm.name in trace.outputs:
        return "it leaves the model"
    if norm.function == "group_norm":
        return "the channels of a group norm are not the channels of a token"
    columns = []
    for site in fed:
        if site.kind == "add":
            return f"it feeds the residual at {site.name}"
        if site.kind not in ("linear", "conv"):
            return f"it feeds {site.name}, a {site.kind}"
        channels = _columns(trace, norm, site)
        if isinstance(channels, str):
            return channels
        columns.append(channels)
        reason = why_fixed(model, trace, site)
        if reason is not None:
            return reason
    return NormLink(norm, tuple(fed), tuple(columns))


def _columns(trace: Trace, norm: Site, site: Site) -> tuple[int, ...] | str:
    shape = site.weight_shape or ()
    if any(size != 1 for size in shape[2:]):
        return f"{site.name} is a convolution of kernel {shape[2:]}; padding cannot be shifted"
    dims = len(shape) - 2
    if dims > 0 and site.output_shape[-dims:] != site.operands[0].shape[-dims:]:
        return f"{site.name} is a convolution with stride or padding, which cannot be shifted"
    ends = norm.name, site.name
    links = [link for link in trace.links if (link.source, link.consumer) == ends]
    mixed = site.operands[0].fed_by != (norm.name,)
    if len(links) != 1 or mixed or len(links[0].channels) != shape[1]:
        return f"its channels do not reach {site.name} unchanged"
    if links[0].through or links[0].partial or min(links[0].channels) < 0:
        between = ", ".join(links[0].through) or "padding or other tokens"
        return f"{between} between it and {site.name}"
    return links[0].channels
