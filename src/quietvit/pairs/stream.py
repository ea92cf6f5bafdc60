"""Norms and the residual stream: what reads a norm's gains, and what wrote the norm's input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import replace

from quietvit.pairs.maps import inputs, is_matrix, is_whole, outputs, shaping
from quietvit.pairs.pair import COMPUTED, DENSE_KINDS, Finding, MatrixPair
from quietvit.pairs.scales import gain_of
from quietvit.tracing import Site, Trace, WeightView
from quietvit.tracing.weights import select_rows


def norm_readers(trace: Trace) -> Iterator[tuple[Site, Site, WeightView, tuple[int, ...]]]:
    """Yield (norm, linear that reads it, gains that it reads, their channels).

    The gains of a BatchNorm with stored statistics are its full factors in eval mode.
    """
    for link in trace.links:
        norm, reader = trace[link.source], trace[link.consumer]
        if norm.kind != "norm" or shaping(link.through) or norm.weight is None:
            continue
        if not is_matrix(reader) or reader.role in ("constant", "head"):
            continue
        if inputs(reader) == len(link.channels) and min(link.channels) >= 0:
            gains = gain_of(norm, link.channels)
            if gains is None:
                gains = select_rows(norm.weight, link.channels, outputs(norm))
            yield norm, reader, gains, link.channels


def residual(trace: Trace, adapters: Set[str]) -> Iterator[Finding]:
    """Yield pairs of what writes the stream before a norm -> what reads that norm."""
    sites = {site.name: site for site in trace.sites}
    for norm, reader, gains, channels in norm_readers(trace):
        for writer in (sites[name] for name in _writers(norm, sites)):
            if adapters & {writer.name, reader.name}:
                continue
            if not is_matrix(writer) or not is_whole(writer):
                continue
            if writer.role == "patch_embed" or outputs(writer) != outputs(norm):
                continue
            if writer.weight is None or reader.weight is None:
                yield f"{writer.name} -> {reader.name}", COMPUTED
                continue
            first = select_rows(writer.weight, channels, outputs(writer))
            through = ("residual", "norm")
            yield MatrixPair(first, reader.weight, "residual", through=through, between=gains)


def _writers(norm: Site, sites: Mapping[str, Site]) -> Iterator[str]:
    """Yield the sites that wrote to the residual stream since its last reader before ``norm``.

    Example: x1 = x0 + proj(norm1(x0)), then ``norm`` reads x1. Only proj is yielded: x0 feeds
    norm1, so norm1 already saw what wrote x0.
    """

    def fed(name: str) -> set[str]:
        return {sites[to].kind for to in sites[name].feeds}

    first = norm.operands[0].fed_by
    waiting = [name for name in first if sites[name].kind == "add"]
    yield from (name for name in first if sites[name].kind != "add" and "add" in fed(name))
    while waiting:
        add = sites[waiting.pop()]
        for name in (name for operand in add.operands for name in operand.fed_by):
            if fed(name) == {"add"}:
                if sites[name].kind == "add":
                    waiting.append(name)
                else:
                    yield name


def folded(pairs: tuple[MatrixPair, ...], trace: Trace) -> tuple[MatrixPair, ...]:
    """Return the pairs with the gain of the norm that the first matrix reads as ``before``."""
    gains = {
        reader.weight.parameter_name: gain
        for _, reader, gain, _ in norm_readers(trace)
        if reader.weight is not None
    }
    return tuple(
        replace(pair, before=gains.get(pair.first.parameter_name))
        if pair.kind in DENSE_KINDS
        else pair
        for pair in pairs
    )
