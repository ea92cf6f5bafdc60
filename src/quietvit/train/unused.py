"""Find parameters that the forward pass does not use, by their missing gradient; freeze them.

``finetune`` freezes what the configuration names.
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
    """Freeze the trainable parameters that never get a gradient, and return their names.

    An example is the mask token of a pre-trained transformers model. It is harmless in one process,
    but DDP waits for its gradient, and FSDP2 misses its state on resume. A parameter is used if a
    gradient of the outputs reaches it in eval or training mode.

    Args:
        model: its weights, buffers, gradients and modes, and all random generators, stay unchanged.
        batches: one of one image, and one of two images.
        outputs: ``outputs(forward, batch)`` calls the model, and returns the tensors that the loss
            is made of.

    Raises:
        QuietvitError: the forward pass uses no trainable parameter.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    one, two = batches
    with _left_alone(model, next(model.parameters()).device):
        used = _reached(model.eval(), one, trainable, outputs)
        if len(used) < len(trainable):
            # Two images: in training mode batch norm refuses one value a channel, such as (1, C).
            used |= _reached(model.train(), two, trainable, outputs)
    if not used:
        raise QuietvitError(
            f"the forward pass of {type(model).__name__} uses none of its {len(trainable)} "
            f"trainable parameters (first: {next(iter(trainable), 'none')}); freeze fewer with "
            "model.freeze and model.freeze_blocks."
        )
    unused = [name for name in trainable if name not in used]
    for name in unused:
        trainable[name].requires_grad_(False)
    return unused


@torch.enable_grad()
def _reached(
    model: nn.Module, batch: Any, parameters: Mapping[str, Tensor], outputs: Outputs
) -> set[str]:
    """Return the names of the parameters that get a gradient. Buffers are copied, and so stay."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    tensors = outputs(lambda *args: functional_call(model, buffers, args), batch)
    total = torch.stack([output.sum() for output in tensors])
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
        model.train()  # drops tables that some models compute in eval mode and keep until train()
        for module, mode in modes:
            module.training = mode
