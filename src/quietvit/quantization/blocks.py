"""Blocks: the modules of a model that can be run, and fitted, one after the other.

They come from the trace, so timm, transformers and torchvision models work alike. ``methods``
decide what to fit in a block.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from quietvit.tracing import MATMUL_KINDS, Site, Trace, intercept, refusing
from quietvit.tracing.block_modules import lies_within
from quietvit.tracing.intercept import Handler
from quietvit.tracing.ops import FAMILIES
from quietvit.tracing.places import STEADY, Place


@dataclass(frozen=True, eq=False)
class Block:
    """A module that is called once, and the part of the trace that runs inside it.

    ``trace`` holds its sites, counted from the block's start, so ``intercept`` works on the block
    alone. ``residual``: True for a residual block; False for a module outside of residual blocks,
    mostly a single linear or convolution.
    """

    name: str
    trace: Trace
    residual: bool

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.trace.sites


def find_blocks(trace: Trace) -> tuple[Block, ...]:
    """Find the blocks of a model in order of execution.

    Residual blocks come from ``Trace.blocks``. Every other module that computes a linear or a
    convolution itself is a block of its own, if it is called once.
    """
    blocks: list[tuple[int, Block]] = []
    inside: set[str] = set()
    order = {site.name: place for place, site in enumerate(trace.sites)}
    for module in trace.blocks:
        sites = [site for site in trace.sites if lies_within(site.module, module)]
        if not sites or not any(site.macs for site in sites):
            continue
        block_trace = subtrace(trace, sites)
        if block_trace is None:
            continue
        inside |= {site.name for site in sites}
        blocks.append((order[sites[0].name], Block(module, block_trace, True)))
    for site in trace.matmuls:
        if site.name in inside or site.kind not in ("linear", "conv") or not site.module:
            continue
        sites = [other for other in trace.sites if lies_within(other.module, site.module)]
        weights = [other.weight for other in sites if other.kind in ("linear", "conv")]
        block_trace = subtrace(trace, sites)
        called_once = len(set(weights)) == len(weights)
        if block_trace is not None and called_once and inside.isdisjoint(s.name for s in sites):
            inside |= {other.name for other in sites}
            blocks.append((order[sites[0].name], Block(site.module, block_trace, False)))
    return tuple(block for _, block in sorted(blocks, key=lambda pair: pair[0]))


def subtrace(trace: Trace, sites: Collection[Site]) -> Trace | None:
    """Return a trace of some sites alone; None if another product or norm lies between them.

    ``intercept`` finds a site by counting the products and norms before it. So the counts in the
    new trace start from the block's first one.
    """
    starts: dict[tuple[str, int], int] = {}
    steady: dict[str, list[int]] = {family: [] for family in STEADY}
    for site in sites:
        family = FAMILIES.get(site.kind, site.kind)
        starts.setdefault((family, site.place.after), site.place.ordinal)
        if family in steady:
            steady[family].append(site.place.ordinal)
    for places in steady.values():
        if places and places[-1] - places[0] + 1 != len(places):
            return None
    products = steady["matmul"]
    before = products[0] if products else 0

    def moved(site: Site) -> Site:
        family = FAMILIES.get(site.kind, site.kind)
        ordinal, after = site.place
        if family in steady or after == before:
            ordinal -= starts[family, after]
        return replace(site, place=Place(ordinal, 0 if family in steady else after - before))

    names = {site.name for site in sites}
    links = tuple(k for k in trace.links if k.source in names and k.consumer in names)
    scores = tuple(score for score in trace.scores if score.site in names)
    counts = {family: len(places) for family, places in steady.items()}
    return Trace(trace.model_name, tuple(map(moved, sites)), links, scores, counts)


def run_block(
    model: nn.Module,
    block: Block,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    handler: Handler,
    *,
    kinds: Collection[str] = MATMUL_KINDS,
) -> Any:
    """Call a block's module alone, with its sites under ``handler``.

    Raises QuietvitError if the block fails on the inputs recorded in a whole forward pass.
    """
    with naming_block(block.name), intercept(block.trace, handler, kinds=kinds):
        return model.get_submodule(block.name)(*args, **kwargs)


def naming_block(name: str) -> AbstractContextManager[None]:
    """Turn an error of a block that runs alone into a QuietvitError that names the block."""
    return refusing(
        lambda what: (
            f"the block {name} does not run alone on its recorded inputs ({what}), so nothing can "
            "be fitted to its output; choose a method that fits no blocks, such as "
            "quietvit.RepQViT()."
        )
    )
