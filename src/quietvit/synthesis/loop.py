"""The loop over iterations and batches: order, progress bar, time limit and Ctrl-C.

``psaq`` and ``dgh`` implement the steps.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quietvit.errors import QuietvitError
from quietvit.progress import Meter

logger = logging.getLogger("quietvit")


class Optimization(Protocol):
    """Batches of images, and the steps that optimize them."""

    batches: list[Tensor]

    def step(self, index: int, share: float) -> float:
        """Step batch ``index`` and return its loss. ``share``: completed part of the run, 0..1."""

    def finished(self) -> list[Tensor]:
        """Return the current images of each batch, in natural units (``PixelScale``)."""


@dataclass(frozen=True)
class Outcome:
    """Number of completed ``iterations``, and why the loop ``stopped`` early, or None."""

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
    """Step every batch once per iteration, in random order. Ctrl-C ends the loop without raising.

    Args:
        minutes: stop after this time. ``share`` accounts for it, so schedules complete.
        progress: show a progress bar on standard error.

    Raises:
        QuietvitError: a loss is NaN or infinite.
    """
    meter = Meter("generating images", iterations, progress)
    start, done = time.monotonic(), 0
    limit = math.inf if minutes is None else 60 * minutes
    try:
        with closing(meter):
            while done < iterations:
                losses = []
                for index in torch.randperm(len(work.batches), generator=random).tolist():
                    spent = time.monotonic() - start
                    if spent >= limit:
                        return _early(done, iterations, f"after {minutes:g} minutes")
                    loss = work.step(index, max(done / iterations, spent / limit))
                    if not math.isfinite(loss):
                        raise QuietvitError(
                            f"the loss of iteration {done + 1} is {loss}, so the images are "
                            "unusable. Lower the learning rate (lr) or the weights of the terms. "
                            "If it fails at once, look for NaN: quietvit.diagnose(model, images)."
                        )
                    losses.append(loss)
                done += 1
                meter.update(done, f"loss {sum(losses) / len(losses):.4g}")
    except KeyboardInterrupt:
        return _early(done, iterations, "by Ctrl-C")
    return Outcome(done, None)


def _early(done: int, iterations: int, why: str) -> Outcome:
    logger.warning(
        "generating images ended %s, with %d of %d iterations done. The current images are used.",
        why, done, iterations,
    )  # fmt: skip
    return Outcome(done, why)


def in_batches(images: Tensor, most: int) -> list[Tensor]:
    """Split images into leaf tensors of nearly equal size, at most ``most`` images each."""
    parts = images.tensor_split(-(-len(images) // most))
    return [part.clone().requires_grad_() for part in parts]
