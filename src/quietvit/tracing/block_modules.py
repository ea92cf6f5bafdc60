"""Observe and replace the inputs and outputs of modules, such as the residual blocks of a trace.

``residual`` finds the blocks. ``quantization.blocks`` fits them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError


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
