"""Diagonal maps between the matrices of a pair, and in front: BatchNorms in eval mode.

How a scale is computed from a module lives in ``tracing.scales``.
"""

from __future__ import annotations

from quietvit.tracing import Link, Site, Trace, WeightView
from quietvit.tracing.weights import scale_view

BRANCHES = "BatchNorms in parallel branches stand between, whose outputs are added"
BESIDE = "a BatchNorm stands between that reads a depthwise convolution and what goes beside it"
REORDERED = (
    "BatchNorms stand between that count the channels in different orders, or read some of them"
)


def between_of(link: Link, trace: Trace) -> WeightView | str | None:
    """The scale between two matrices, an entry for each column of the second.

    None where no BatchNorm stands between, and the reason where there is no such scale. Columns
    that carry no channel of the first have an entry all the same.
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
    """The scale of a BatchNorm at the channels given, None for what is no BatchNorm."""
    if not norm.has_scale or norm.weight is None:
        return None
    return scale_view([norm.weight.module], channels, norm.output_shape[1])


def _channels(site: Site, link: Link, trace: Trace) -> tuple[int, ...] | None:
    """Which channel of ``site`` each column of the link's consumer carries."""
    found = [
        other.channels
        for other in trace.links
        if other.source == site.name
        and other.consumer == link.consumer
        and all(
            c >= 0 for c, wanted in zip(other.channels, link.channels, strict=True) if wanted >= 0
        )
    ]
    if link.channels in found:
        return link.channels
    return found[0] if len(found) == 1 else None
