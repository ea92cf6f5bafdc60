"""One forward and backward pass, and the optimizer's step after as many as are accumulated.

What surrounds the steps of a run (epochs, logs, checkpoints) is in ``loop``.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quietvit.train.engine import is_sharded

if TYPE_CHECKING:
    from quietvit.train.parts import Parts


def forward_backward(parts: Parts, images: Tensor, labels: Tensor, step: int) -> Tensor:
    """Run one batch; returns the task loss, detached. ``step`` is that of the learning rate.

    It is kept in ``parts.loss`` too, before anything that may raise because of it.
    Whether the optimizer stepped is in ``parts.accelerator.sync_gradients``. TWEO's penalty is in
    the gradients and not in the loss returned.
    """
    p, clip = parts, parts.config.optimizer.clip_grad
    accelerator = p.accelerator
    targets: Tensor = labels
    if p.mix is not None:
        images, targets = p.mix(images, labels)
    with accelerator.accumulate(p.model):
        # accelerate puts autocast around a whole model, but not around one in parts.
        with accelerator.autocast() if is_sharded(accelerator) else nullcontext():
            outputs = p.compiled(images)
        loss = torch.stack([p.criterion(head, targets) for head in heads(outputs)]).mean()
        p.loss, total = loss.detach(), loss
        if "tweo" in p.regularizers:
            with p.stopwatch.running():
                total = loss + p.regularizers["tweo"].loss()
        accelerator.backward(total)
        if accelerator.sync_gradients:
            if clip is not None:
                accelerator.clip_grad_norm_(p.model.parameters(), clip)
            p.scheduler.step_update(step)
        p.optimizer.step()
        p.optimizer.zero_grad()
    return loss.detach()


def heads(outputs: Any) -> tuple[Tensor, ...]:
    """Return the logits (B, classes) of each head of what a classifier returned."""
    outputs = getattr(outputs, "logits", outputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)
