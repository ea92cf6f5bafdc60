"""Residual blocks as modules: which they are, and what goes in and comes out of them.

Found from the trace, so that timm, transformers and torchvision are alike. What is fitted in a
block is the business of ``quantization.blocks``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.tracing.sites import Trace


def residual_modules(trace: Trace) -> list[str]:
    """Paths of the residual blocks of a model in order of execution.

    A residual block is the outermost module below a container of several like it: the largest
    module that holds a residual add and no add of another such module beside its own. Derived here
    (BRECQ, arXiv 2102.05426, takes the blocks of a ResNet by name).
    """
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
    return [p for p in found if not any(q != p and lies_within(p, q) for q in found)]


def lies_within(module: str, outer: str) -> bool:
    """Whether one module path is another, or below it."""
    return module == outer or module.startswith(outer + ".")


@contextmanager
def watching_modules(
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
