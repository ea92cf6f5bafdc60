"""One forward and backward pass, and the optimizer step after the accumulated passes.

Epochs, logs and checkpoints are in ``loop``.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from quietvit.tasks import Batch
from quietvit.train.engine import is_sharded
from quietvit.train.regularizers import loss_terms

if TYPE_CHECKING:
    from quietvit.train.training import Training


def forward_backward(training: Training, batch: Batch, step: int) -> Tensor:
    """Run one batch and return the task's loss, a detached scalar.

    ``step`` sets the learning rate. ``training.accelerator.sync_gradients`` tells afterwards
    whether the optimizer stepped. The loss terms of regularizers enter the gradients but not the
    returned loss. ``training.loss`` is set first, so that it is known if a later part raises.
    """
    t, clip = training, training.config.optimizer.clip_grad
    accelerator = t.accelerator

    def forward(*args: Any, **kwargs: Any) -> Any:
        # accelerate wraps the forward of a model in autocast, but not that of a sharded one.
        with accelerator.autocast() if is_sharded(accelerator) else nullcontext():
            return t.models.compiled(*args, **kwargs)

    with accelerator.accumulate(t.models.wrapped):
        loss = t.task.loss(forward, batch)
        t.loss, total = loss.detach(), loss
        for regularizer in loss_terms(t.optim.regularizers):
            with t.observers.stopwatch.running():
                total = total + regularizer.loss()
        accelerator.backward(total)
        if accelerator.sync_gradients:
            if clip is not None:
                accelerator.clip_grad_norm_(t.models.wrapped.parameters(), clip)
            t.optim.scheduler.step_update(step)
        t.optim.wrapped.step()
        t.optim.wrapped.zero_grad()
    return loss.detach()
