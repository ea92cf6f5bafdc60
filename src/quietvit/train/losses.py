"""Losses and weights that are no numbers: noticed without waiting for the device, told with why.

What a loss is computed from is in ``step``.
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
    """The losses of this process since they were last logged, and what is told where they end.

    Every process must call each method, in the same order.
    """

    def __init__(self, training: Training) -> None:
        self.t, device = training, training.accelerator.device
        self._count = 0
        self._sum = torch.zeros((), dtype=widest(device), device=device)
        # The first step whose loss was no number, kept on the device: looking would wait for it.
        self._bad_step = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, loss: Tensor, step: int) -> None:
        """Take the loss of one batch, of step ``step``."""
        self._sum += loss
        first = (self._bad_step == 0) & ~loss.isfinite()
        self._bad_step.masked_fill_(first, step)
        self._count += 1

    def mean(self, step: int) -> float:
        """Return the mean over all processes since the last ``clear``.

        Raises:
            QuietvitError: it is no number; the first such step is named.
        """
        mean = self._mean()
        if not math.isfinite(mean):
            raise self._diverged(self._bad_loss(mean, step), step)
        return mean

    def clear(self) -> None:
        """Begin to count anew."""
        self._sum.zero_()
        self._count = 0

    def refuse_unless_sound(self, step: int) -> None:
        """Refuse to go on with a loss or with weights that are no numbers."""
        self.mean(step)
        own = [getattr(p, "to_local", lambda p=p: p)() for p in self.t.models.plain.parameters()]
        bad = sum((~part.isfinite()).sum() for part in own)
        if int(self.t.accelerator.reduce(torch.as_tensor(bad), reduction="sum")):
            raise self._diverged(f"weights became NaN or infinite at step {step}", step)

    def state(self) -> tuple[list[float], int]:
        """The sum of each process and their common number of batches, for a checkpoint."""
        return gathered(self.t.accelerator, float(self._sum)), self._count

    def restore(self, state: Any, batches: float) -> None:
        """Load ``state``; one batch of before is ``batches`` of now (``resume.restore``)."""
        sums, count = state
        self._count = round(count * batches * len(sums) / self.t.accelerator.num_processes)
        self._sum.fill_(sum(dealt(self.t, sums)) * batches)

    def told(self, error: QuietvitError, step: int) -> QuietvitError:
        """What to raise for what a step raised: the loss where it is no number, else the error.

        With the step and what is known of the time before. A loss that is no number has spoilt the
        weights, so that what a regularizer says of them names but the first.
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
        bad = [found for found in gathered(self.t.accelerator, int(self._bad_step)) if found]
        first = min(bad, default=step)
        seen = f" (seen at step {step})" if step > first else ""
        return f"the loss became {mean} at step {first}{seen}"

    def _diverged(self, what: str, step: int) -> QuietvitError:
        config = self.t.config
        return QuietvitError(
            f"{what}.{self._known(step)} Lower optimizer.lr (now "
            f"{config.optimizer.lr:g}, here at most {config.rates(self.t.effective_batch).lr:g}), "
            "set optimizer.clip_grad, or train with precision 'no': a run that is resumed "
            "(--resume) takes these changes."
        )

    def _known(self, step: int) -> str:
        """The pair with the largest amplification, and the last whole checkpoint."""
        main, folder = self.t.accelerator.is_main_process, self.t.config.output / CHECKPOINTS
        saved = gathered(self.t.accelerator, newest_whole(folder) if main else None)[0]
        seen = self.t.observers.watch.amplification(step)
        pair = "" if seen is None else f" The largest amplification is {seen}"
        before = self._before(saved) if seen is not None and seen.infinite else None
        if before is not None:
            of = " (that of the last checkpoint)" if saved and step_of(saved) == before.step else ""
            when = f"at step {before.step}{of}" if before.step else "before step 1"
            pair += f"; {when} it was {before}"
        where = f"The last checkpoint is {saved}."
        if saved is None:
            where = "There is no checkpoint: a resumed run starts from its beginning."
        return f"{pair}. {where}" if pair else f" {where}"

    def _before(self, saved: Path | None) -> Seen | None:
        """What the watch saw last, or what the last checkpoint holds where that is of later."""
        last, step = self.t.observers.watch.last, 0 if saved is None else step_of(saved)
        if saved is None or (last is not None and last.step >= step):
            return last
        main, watch = self.t.accelerator.is_main_process, self.t.observers.watch
        found = watch.amplification_of(weights_of(saved), step) if main else None
        return gathered(self.t.accelerator, found)[0] or last
