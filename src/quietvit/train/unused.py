"""Parameters that take no part in the forward pass: found by their missing gradient, and frozen.

What is frozen because a configuration says so is in ``finetune``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from quietvit.errors import QuietvitError
from quietvit.train.order import generator_states, set_generator_states

Outputs = Callable[[Callable[..., Any], Any], tuple[Tensor, ...]]


def freeze_unused(model: nn.Module, batches: Sequence[Any], outputs: Outputs) -> list[str]:
    """Freeze what would train without ever getting a gradient, and return those names.

    The mask token of a pre-trained transformers model is such a parameter. In one process it does
    no harm. DDP waits for its gradient, and FSDP2 misses its state when a run is resumed. A
    parameter is used when the gradient of the outputs reaches it, in eval or in training mode.

    Args:
        model: weights, buffers, gradients and modes stay as they are, and so do all generators.
        batches: one of one image, and one of two images.
        outputs: ``outputs(forward, batch)`` calls the model, and returns the tensors that the loss
            is made of.

    Raises:
        QuietvitError: no parameter that trains takes part in the forward pass.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    one, two = batches
    with _left_alone(model, next(model.parameters()).device):
        used = _reached(model.eval(), one, trainable, outputs)
        if len(used) < len(trainable):
            # Two images, because batch norms refuse a single value a channel.
            used |= _reached(model.train(), two, trainable, outputs)
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
def _reached(
    model: nn.Module, batch: Any, parameters: Mapping[str, Tensor], outputs: Outputs
) -> set[str]:
    """Return the names that the gradient of the outputs reaches. Statistics move in copies."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = outputs(lambda *given: functional_call(model, buffers, given), batch)
    total = torch.stack([output.sum() for output in found])
    if not total.requires_grad:
        return set()
    gradients = torch.autograd.grad(total.sum(), list(parameters.values()), allow_unused=True)
    return {
        name for name, reached in zip(parameters, gradients, strict=True) if reached is not None
    }


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
