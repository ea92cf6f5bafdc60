"""Parameters that take no part in the forward pass: found by their missing gradient, and frozen.

What is frozen because a configuration says so is in ``finetune``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from quietvit.errors import QuietvitError
from quietvit.train.order import generator_states, set_generator_states
from quietvit.train.step import heads


def freeze_unused(model: nn.Module, example: Tensor) -> list[str]:
    """Freeze what would train without ever getting a gradient, and return those names.

    The mask token of a pre-trained transformers model is such a parameter. In one process it only
    idles; DDP waits for its gradient, and FSDP2 misses its state when a run is resumed. Used is
    what the gradient of the logits reaches in eval mode or, if not there, in training mode.

    Args:
        model: weights, buffers, gradients and modes stay as they are, and so do all generators.
        example: one image (1, 3, H, W) as the model takes it.

    Raises:
        QuietvitError: no parameter that trains takes part in the forward pass.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with _left_alone(model, example.device):
        used = _reached(model.eval(), example, trainable)
        if len(used) < len(trainable):
            # Two images, because batch norms refuse a single value a channel.
            used |= _reached(model.train(), torch.cat([example, example]), trainable)
    if not used:
        raise QuietvitError(
            f"none of the {len(trainable)} parameters of {type(model).__name__} that are to train "
            f"(first {next(iter(trainable), 'none')}) takes part in its forward pass; freeze fewer "
            "by model.freeze and model.freeze_blocks."
        )
    unused = [name for name in trainable if name not in used]
    for name in unused:
        trainable[name].requires_grad_(False)
    return unused


@torch.enable_grad()
def _reached(model: nn.Module, images: Tensor, parameters: Mapping[str, Tensor]) -> set[str]:
    """Return the names that the gradient of the logits reaches; statistics move in copies."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    total = torch.stack([head.sum() for head in heads(functional_call(model, buffers, images))])
    if not total.requires_grad:
        return set()
    found = torch.autograd.grad(total.sum(), list(parameters.values()), allow_unused=True)
    return {name for name, reached in zip(parameters, found, strict=True) if reached is not None}


@contextmanager
def _left_alone(model: nn.Module, device: torch.device) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    states = generator_states(device)
    try:
        yield
    finally:
        set_generator_states(states, device)
        model.train()  # some models keep tables computed in eval mode until they train again
        for module, mode in modes:
            module.training = mode
