"""Diagonal maps before or between the matrices of a pair: BatchNorms in eval mode.

``tracing.scales`` computes the scale of a module.
"""

from __future__ import annotations

from quietvit.tracing import Link, Site, Trace, WeightView
from quietvit.tracing.weights import scale_view

BRANCHES = "BatchNorms in parallel branches stand between, and their outputs are added"
BESIDE = "a BatchNorm stands between and reads a depthwise convolution plus a parallel path"
REORDERED = (
    "BatchNorms stand between and see the channels in different orders, or only some of them"
)


def between_of(link: Link, trace: Trace) -> WeightView | str | None:
    """Return the scale between two matrices, with one entry for every column of the second.

    None if no BatchNorm stands between; the reason (str) if there is no single scale.
    """
    if "batch_norm" not in link.through:
        return None
    if "branches" in link.through:
        return BRANCHES
    passed = [trace[name] for name in link.scales]
    last = max(i for i, site in enumerate(passed) if site.kind == "norm")
    if "beside" in link.through and any(site.kind == "conv" for site in passed[:last]):
        return BESIDE
    modules: list[str] = []
    orders: set[tuple[int, ...]] = set()
    for site in passed[: last + 1]:
        order = _channels(site, link, trace)
        if order is None or site.weight is None:
            return REORDERED
        orders.add(order)
        modules.append(site.weight.module)
    if len(orders) != 1:
        return REORDERED
    rows = orders.pop()
    return scale_view(modules, rows, passed[last].output_shape[1])


def gain_of(norm: Site, channels: tuple[int, ...]) -> WeightView | None:
    """Return the scale of a BatchNorm at the given channels; None for other norms."""
    if not norm.has_scale or norm.weight is None:
        return None
    return scale_view([norm.weight.module], channels, norm.output_shape[1])


def _channels(site: Site, link: Link, trace: Trace) -> tuple[int, ...] | None:
    """Return the channel of ``site`` that each column of the link's consumer carries."""
    candidates = [
        other.channels
        for other in trace.links
        if other.source == site.name
        and other.consumer == link.consumer
        and all(
            c >= 0 for c, wanted in zip(other.channels, link.channels, strict=True) if wanted >= 0
        )
    ]
    if link.channels in candidates:
        return link.channels
    return candidates[0] if len(candidates) == 1 else None
