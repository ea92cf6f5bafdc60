"""Losses and weights that are no numbers: noticed without waiting for the device, told with why.

What a loss is computed from is in ``step``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quietvit.decay.plan import widest
from quietvit.errors import QuietvitError
from quietvit.train.checkpoint import newest_whole
from quietvit.train.engine import gathered
from quietvit.train.folder import CHECKPOINTS
from quietvit.train.parts import Parts
from quietvit.train.resume import dealt


class Losses:
    """The losses of this process since they were last logged, and what is told where they end.

    Every process must call each method, in the same order.
    """

    def __init__(self, parts: Parts) -> None:
        self.p, device = parts, parts.accelerator.device
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
        total = self.p.accelerator.reduce(self._sum, reduction="mean")
        mean = float(total) / max(1, self._count)
        if not math.isfinite(mean):
            bad = [found for found in gathered(self.p.accelerator, int(self._bad_step)) if found]
            first = min(bad, default=step)
            seen = f" (seen at step {step})" if step > first else ""
            raise self._diverged(f"the loss became {mean} at step {first}{seen}", step)
        return mean

    def clear(self) -> None:
        """Begin to count anew."""
        self._sum.zero_()
        self._count = 0

    def refuse_unless_sound(self, step: int) -> None:
        """Refuse to go on with a loss or with weights that are no numbers."""
        self.mean(step)
        own = [getattr(p, "to_local", lambda p=p: p)() for p in self.p.plain.parameters()]
        bad = sum((~part.isfinite()).sum() for part in own)
        if int(self.p.accelerator.reduce(torch.as_tensor(bad), reduction="sum")):
            raise self._diverged(f"weights became NaN or infinite at step {step}", step)

    def state(self) -> tuple[list[float], int]:
        """The sum of each process and their common number of batches, for a checkpoint."""
        return gathered(self.p.accelerator, float(self._sum)), self._count

    def restore(self, state: Any, batches: float) -> None:
        """Load ``state``; one batch of before is ``batches`` of now (``resume.restore``)."""
        sums, count = state
        self._count = round(count * batches * len(sums) / self.p.accelerator.num_processes)
        self._sum.fill_(sum(dealt(self.p, sums)) * batches)

    def told(self, error: QuietvitError, step: int) -> QuietvitError:
        """What a step raised, with the step and what is known of the time before."""
        return QuietvitError(f"at step {step}: {error}{self._last_finite()} {self._last_saved()}")

    def _diverged(self, what: str, step: int) -> QuietvitError:
        before = self._last_finite()
        seen = self.p.watch.amplification(step)
        pair = "" if seen is None else f" The largest amplification is {seen}."
        config = self.p.config
        return QuietvitError(
            f"{what}.{pair}{before} {self._last_saved()} Lower optimizer.lr (now "
            f"{config.optimizer.lr:g}, here at most {config.rates(self.p.effective_batch).lr:g}), "
            "set optimizer.clip_grad, or train with precision 'no': a run that is resumed "
            "(--resume) takes these changes."
        )

    def _last_finite(self) -> str:
        last = self.p.watch.last
        if last is None:
            return ""
        return f" The largest amplification was last finite at step {last.step}: {last}."

    def _last_saved(self) -> str:
        path = newest_whole(self.p.config.output / CHECKPOINTS)
        return "There is no checkpoint." if path is None else f"The last checkpoint is {path}."
