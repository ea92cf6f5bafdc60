"""The loop over iterations and batches: order, progress, time limit, Ctrl-C.

``psaq`` and ``dgh`` make the steps.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from quietvit.errors import QuietvitError

logger = logging.getLogger("quietvit")


class Optimization(Protocol):
    """Batches of images that are being optimized."""

    batches: list[Tensor]

    def step(self, index: int, share: float) -> float:
        """Make one step of a batch; return its loss. ``share``: of the run that is done, 0 to 1."""

    def finished(self) -> list[Tensor]:
        """Return the images of each batch as they are, in natural units (``PixelScale``)."""


@dataclass(frozen=True)
class Outcome:
    """What a loop did. ``iterations``: completed ones; ``stopped``: why it ended early, or None."""

    iterations: int
    stopped: str | None


def optimize(
    work: Optimization,
    iterations: int,
    random: torch.Generator,
    *,
    minutes: float | None = None,
    progress: bool = True,
) -> Outcome:
    """Step every batch once in each iteration, in random order.

    Args:
        minutes: end after this time. The schedule of a generator is shortened to fit.
        progress: show a bar with the time left on standard error.

    Ctrl-C ends the loop early and is not raised.

    Raises:
        QuietvitError: a loss is NaN or infinite.
    """
    bar = Progress(
        TextColumn("generating images"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]}"),
        console=Console(stderr=True),
        transient=True,
        disable=not progress,
    )
    start, done = time.monotonic(), 0
    limit = math.inf if minutes is None else 60 * minutes
    try:
        with bar:
            task = bar.add_task("", total=iterations, loss="")
            while done < iterations:
                losses = []
                for index in torch.randperm(len(work.batches), generator=random).tolist():
                    spent = time.monotonic() - start
                    if spent >= limit:
                        return _early(done, iterations, f"after {minutes:g} minutes")
                    loss = work.step(index, max(done / iterations, spent / limit))
                    if not math.isfinite(loss):
                        raise QuietvitError(
                            f"the loss of iteration {done + 1} is {loss}, so no images can be "
                            "used. Lower the learning rate (lr) or the weights of the terms. If it "
                            "happens at once, look for NaN with quietvit.diagnose(model, images)."
                        )
                    losses.append(loss)
                done += 1
                bar.update(task, completed=done, loss=f"{sum(losses) / len(losses):.4g}")
    except KeyboardInterrupt:
        return _early(done, iterations, "by Ctrl-C")
    return Outcome(done, None)


def _early(done: int, iterations: int, why: str) -> Outcome:
    logger.warning(
        "generating images ended %s, with %d of %d iterations done. The images are used as they "
        "are.",
        why, done, iterations,
    )  # fmt: skip
    return Outcome(done, why)


def in_batches(images: Tensor, most: int) -> list[Tensor]:
    """Split images into batches of nearly one size, at most ``most`` each; each needs gradients."""
    parts = images.tensor_split(-(-len(images) // most))
    return [part.clone().requires_grad_() for part in parts]
