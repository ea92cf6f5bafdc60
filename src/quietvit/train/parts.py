"""What a run is put together from, and what then goes through every room of training.

It is built in ``setup``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quietvit.train.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

    from quietvit.data import ImageDataset
    from quietvit.train.metrics import Stopwatch
    from quietvit.train.order import EpochBatches, SeededImages
    from quietvit.train.watch import Watch


@dataclass
class Parts:
    """What is trained, apart from data. ``plain`` is the model inside ``model`` (the engine's).

    ``evaluated`` is a copy to evaluate by (``evaluation``): its weights are old ones, or where
    ``plain`` is kept in parts none. ``loss`` is that of the last batch, also where what followed it
    in its step raised.
    """

    config: TrainConfig
    accelerator: Accelerator
    num_classes: int | None
    plain: nn.Module
    model: nn.Module
    compiled: Callable[..., Any]
    evaluated: nn.Module
    inner: torch.optim.Optimizer
    optimizer: Any
    scheduler: Any
    regularizers: dict[str, Any]
    stopwatch: Stopwatch
    watch: Watch
    ema: Any
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None
    criterion: nn.Module
    steps_per_epoch: int
    effective_batch: int
    loss: Tensor | None = None

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.config.epochs


@dataclass
class Run:
    """The parts of a run, with its data."""

    parts: Parts
    train: ImageDataset
    test: ImageDataset
    batches: EpochBatches
    images: SeededImages
    loader: Any
