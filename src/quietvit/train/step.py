"""One forward and backward pass, and the optimizer's step after as many as are accumulated.

What surrounds the steps of a run (epochs, logs, checkpoints) is in ``loop``.
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
    """Run one batch. Returns the task's loss, a scalar, detached.

    ``step`` sets the learning rate. ``training.loss`` keeps the loss before anything can raise
    because of it. ``training.accelerator.sync_gradients`` says whether the optimizer stepped. What
    regularizers add to the loss is in the gradients and not in the loss returned.
    """
    t, clip = training, training.config.optimizer.clip_grad
    accelerator = t.accelerator

    def forward(*args: Any, **kwargs: Any) -> Any:
        # accelerate puts autocast around a whole model, but not around a sharded one.
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
