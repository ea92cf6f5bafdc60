"""Find residual blocks as modules, and observe their inputs and outputs.

Uses the trace, so it works for timm, transformers and torchvision. ``quantization.blocks`` fits.
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
    """Return the paths of a model's residual blocks in order of execution.

    A block is a module that contains a residual add. Its path is cut behind the last number, and
    blocks inside another block are dropped. Derived here (BRECQ, arXiv 2102.05426, selects the
    blocks of a ResNet by name).
    """
    adds = [site for site in trace.sites if site.kind == "add" and site.module]
    paths = list(dict.fromkeys(site.module for site in adds))
    # "blocks.0.attn" also has an add if it adds relative positions: cut it to "blocks.0".
    numbered: dict[str, None] = {}
    for path in paths:
        parts = path.split(".")
        places = [i for i, part in enumerate(parts) if part.rpartition("_")[2].isdigit()]
        cut = places[-1] + 1 if places else len(parts)
        numbered[".".join(parts[:cut])] = None
    blocks = list(numbered)
    return [p for p in blocks if not any(q != p and lies_within(p, q) for q in blocks)]


def lies_within(module: str, outer: str) -> bool:
    """Whether a module path equals ``outer`` or lies below it."""
    return module == outer or module.startswith(outer + ".")


@contextmanager
def watching_modules(
    model: nn.Module,
    names: Collection[str],
    look: Callable[[str, tuple[Any, ...], dict[str, Any], Any], Any],
) -> Iterator[None]:
    """Call ``look(name, args, kwargs, output)`` after each module; a result replaces the output."""
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
    """Return the first floating-point tensor in a module's input or output."""
    for leaf in torch.utils._pytree.tree_flatten(nested)[0]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise QuietvitError(f"no tensor of numbers in {type(nested).__name__}, a module's argument.")


def with_first_tensor(nested: Any, tensor: Tensor) -> Any:
    """Return ``nested`` with its first floating-point tensor replaced."""
    leaves, spec = torch.utils._pytree.tree_flatten(nested)
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaves[place] = tensor
            return torch.utils._pytree.tree_unflatten(leaves, spec)
    raise QuietvitError(f"no tensor of numbers in {type(nested).__name__}, a module's argument.")
