"""Detect NaN and inf in losses and weights without a device sync, and explain the likely cause.

``step`` computes the loss.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quietvit.errors import QuietvitError
from quietvit.tensors import widest
from quietvit.train.checkpoint import newest_whole, step_of, weights_of
from quietvit.train.engine import gathered
from quietvit.train.result import CHECKPOINTS
from quietvit.train.resume import dealt
from quietvit.train.training import Training
from quietvit.train.watch import Seen


class Losses:
    """The losses of this process since they were last logged.

    Every process must call every method in the same order.
    """

    def __init__(self, training: Training) -> None:
        self.t, device = training, training.accelerator.device
        self._count = 0
        self._sum = torch.zeros((), dtype=widest(device), device=device)
        # The first step with a NaN or inf loss, 0 if none. It stays on the device, because reading
        # it would wait for the device at every step.
        self._bad_step = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, loss: Tensor, step: int) -> None:
        """Add the loss of one batch of step ``step``."""
        self._sum += loss
        first = (self._bad_step == 0) & ~loss.isfinite()
        self._bad_step.masked_fill_(first, step)
        self._count += 1

    def mean(self, step: int) -> float:
        """Return the mean over all processes since the last ``clear``.

        Raises:
            QuietvitError: it is NaN or infinite; the first such step is named.
        """
        mean = self._mean()
        if not math.isfinite(mean):
            raise self._diverged(self._bad_loss(mean, step), step)
        return mean

    def clear(self) -> None:
        """Reset the sum and the count."""
        self._sum.zero_()
        self._count = 0

    def refuse_unless_sound(self, step: int) -> None:
        """Raise QuietvitError if the mean loss or a weight is NaN or infinite."""
        self.mean(step)
        own = [getattr(p, "to_local", lambda p=p: p)() for p in self.t.models.plain.parameters()]
        bad = sum((~loss.isfinite()).sum() for loss in own)
        if int(self.t.accelerator.reduce(torch.as_tensor(bad), reduction="sum")):
            raise self._diverged(f"weights became NaN or infinite at step {step}", step)

    def state(self) -> tuple[list[float], int]:
        """Return (sums of the processes, number of batches of each) for a checkpoint."""
        return gathered(self.t.accelerator, float(self._sum)), self._count

    def restore(self, state: Any, batches: float) -> None:
        """Load ``state``. One batch then is ``batches`` batches now (see ``resume.restore``)."""
        sums, count = state
        self._count = round(count * batches * len(sums) / self.t.accelerator.num_processes)
        self._sum.fill_(sum(dealt(self.t, sums)) * batches)

    def told(self, error: QuietvitError, step: int) -> QuietvitError:
        """Return the error to raise after ``error`` in ``step``, with the step and likely cause.

        A NaN or infinite loss takes precedence: it has spoilt all weights, and the error of a
        regularizer names only the first of them.
        """
        if self.t.loss is not None:
            self.add(self.t.loss, step)
        mean = self._mean()
        if not math.isfinite(mean):
            return self._diverged(self._bad_loss(mean, step), step)
        return QuietvitError(f"at step {step}: {error}{self._known(step)}")

    def _mean(self) -> float:
        total = self.t.accelerator.reduce(self._sum, reduction="mean")
        return float(total) / max(1, self._count)

    def _bad_loss(self, mean: float, step: int) -> str:
        bad = [at for at in gathered(self.t.accelerator, int(self._bad_step)) if at]
        first = min(bad, default=step)
        noticed = f" (seen at step {step})" if step > first else ""
        return f"the loss became {mean} at step {first}{noticed}"

    def _diverged(self, what: str, step: int) -> QuietvitError:
        config = self.t.config
        return QuietvitError(
            f"{what}.{self._known(step)} Lower optimizer.lr (now "
            f"{config.optimizer.lr:g}, here at most {config.rates(self.t.effective_batch).lr:g}), "
            "set optimizer.clip_grad, or set precision to 'no'. All three may change on resume "
            "(--resume)."
        )

    def _known(self, step: int) -> str:
        """Name the pair with the largest amplification and the last intact checkpoint."""
        main, folder = self.t.accelerator.is_main_process, self.t.config.output / CHECKPOINTS
        saved = gathered(self.t.accelerator, newest_whole(folder) if main else None)[0]
        worst = self.t.observers.watch.amplification(step)
        pair = "" if worst is None else f" The largest amplification is {worst}"
        before = self._before(saved) if worst is not None and worst.infinite else None
        if before is not None:
            of = " (that of the last checkpoint)" if saved and step_of(saved) == before.step else ""
            when = f"at step {before.step}{of}" if before.step else "before step 1"
            pair += f"; {when} it was {before}"
        where = f"The last checkpoint is {saved}."
        if saved is None:
            where = "There is no checkpoint: a resumed run starts from its beginning."
        return f"{pair}. {where}" if pair else f" {where}"

    def _before(self, saved: Path | None) -> Seen | None:
        """Return what the watch kept last, or the pair of the last checkpoint if that is later."""
        last, step = self.t.observers.watch.last, 0 if saved is None else step_of(saved)
        if saved is None or (last is not None and last.step >= step):
            return last
        main, watch = self.t.accelerator.is_main_process, self.t.observers.watch
        pair = watch.amplification_of(weights_of(saved), step) if main else None
        return gathered(self.t.accelerator, pair)[0] or last
