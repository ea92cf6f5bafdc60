"""Blocks: the modules of a model that can be run, and fitted, one after the other.

Found from the trace, so that timm, transformers and torchvision are alike. What is fitted in a
block is the business of ``methods``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.tracing import MATMUL_KINDS, Site, Trace, intercept
from quietvit.tracing.intercept import Handler
from quietvit.tracing.ops import FAMILIES


@dataclass(frozen=True, eq=False)
class Block:
    """A module that is called once, and the part of the trace that runs inside it.

    ``trace`` holds its sites, counted from the block's own start, so that ``intercept`` works on
    the block alone. ``residual``: whether it is a residual block; else it is what lies between
    residual blocks, down to single linears and convolutions.
    """

    name: str
    trace: Trace
    residual: bool

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.trace.sites


def find_blocks(trace: Trace) -> tuple[Block, ...]:
    """The blocks of a model in order of execution; every matrix product with a weight is in one.

    A residual block is the outermost module below a container of several like it: the largest
    module that holds a residual add and no add of another such module beside its own. All other
    linears and convolutions are blocks of their own. Derived here (BRECQ, arXiv 2102.05426, takes
    the blocks of a ResNet by name).
    """
    residual = _residual_modules(trace)
    blocks: list[tuple[int, Block]] = []
    inside: set[str] = set()
    order = {site.name: place for place, site in enumerate(trace.sites)}
    for module in residual:
        sites = [site for site in trace.sites if _within(site.module, module)]
        if not sites or not any(site.macs for site in sites):
            continue
        part = subtrace(trace, sites)
        if part is None:
            continue
        inside |= {site.name for site in sites}
        blocks.append((order[sites[0].name], Block(module, part, True)))
    for site in trace.matmuls:
        if site.name in inside or site.kind not in ("linear", "conv") or not site.module:
            continue
        sites = [other for other in trace.sites if other.module == site.module]
        part = subtrace(trace, sites)
        if part is not None and sum(other.macs > 0 for other in sites) == 1:
            blocks.append((order[site.name], Block(site.module, part, False)))
    return tuple(block for _, block in sorted(blocks, key=lambda pair: pair[0]))


def subtrace(trace: Trace, sites: Collection[Site]) -> Trace | None:
    """A trace of some sites alone, if they follow each other without another of their family."""
    moved: list[Site] = []
    counts: Counter[str] = Counter()
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}
    for site in sites:
        family = FAMILIES.get(site.kind, site.kind)
        starts.setdefault(family, site.ordinal)
        ends[family] = site.ordinal
        counts[family] += 1
        moved.append(replace(site, ordinal=site.ordinal - starts[family]))
    for family, count in counts.items():
        if family != "add" and ends[family] - starts[family] + 1 != count:
            return None
    names = {site.name for site in sites}
    links = tuple(k for k in trace.links if k.source in names and k.consumer in names)
    scores = tuple(score for score in trace.scores if score.site in names)
    whole = {family: counts[family] for family in trace.counts}
    return Trace(trace.model_name, tuple(moved), links, scores, whole)


@contextmanager
def watching_blocks(
    model: nn.Module,
    names: Collection[str],
    look: Callable[[str, tuple[Any, ...], dict[str, Any], Any], Any],
) -> Iterator[None]:
    """Show the arguments and output of modules to ``look(name, args, kwargs, output)``.

    What ``look`` returns, unless None, takes the place of the output.
    """
    hooks = []
    for name in names:

        def hook(
            module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            output: Any,
            name: str = name,
        ) -> Any:
            return look(name, args, kwargs, output)

        hooks.append(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def first_tensor(nested: Any) -> Tensor:
    """The first floating-point tensor in a module's input or output."""
    for leaf in torch.utils._pytree.tree_flatten(nested)[0]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise QuietvitError(f"no tensor of numbers in {type(nested).__name__}, a module's argument.")


def with_first_tensor(nested: Any, tensor: Tensor) -> Any:
    """``nested`` with its first floating-point tensor replaced."""
    leaves, spec = torch.utils._pytree.tree_flatten(nested)
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaves[place] = tensor
            return torch.utils._pytree.tree_unflatten(leaves, spec)
    raise QuietvitError(f"no tensor of numbers in {type(nested).__name__}, a module's argument.")


def run_block(
    model: nn.Module,
    block: Block,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    handler: Handler,
    *,
    kinds: Collection[str] = MATMUL_KINDS,
) -> Any:
    """Call a block's module alone, its sites under ``handler``."""
    with intercept(block.trace, handler, kinds=kinds):
        return model.get_submodule(block.name)(*args, **kwargs)


def _within(module: str, outer: str) -> bool:
    return module == outer or module.startswith(outer + ".")


def _residual_modules(trace: Trace) -> list[str]:
    """Paths of residual blocks, in order: see ``find_blocks``."""
    adds = [site for site in trace.sites if site.kind == "add" and site.module]
    paths = list(dict.fromkeys(site.module for site in adds))
    # The add of an attention's relative position is no residual of the block that holds it.
    numbered: dict[str, None] = {}
    for path in paths:
        parts = path.split(".")
        places = [i for i, part in enumerate(parts) if part.rpartition("_")[2].isdigit()]
        cut = places[-1] + 1 if places else len(parts)
        numbered[".".join(parts[:cut])] = None
    found = list(numbered)
    return [p for p in found if not any(q != p and _within(p, q) for q in found)]
