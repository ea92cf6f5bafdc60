"""The parts of a run: models, optimizer with regularizers, observers, and data.

``setup`` builds them. The other modules of ``train`` take what they need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quietvit.decay.config import RunFacts
from quietvit.tasks import Task
from quietvit.train.config import TrainConfig
from quietvit.train.qat import core_of

if TYPE_CHECKING:
    from accelerate import Accelerator

    from quietvit.train.metrics import Stopwatch
    from quietvit.train.order import EpochBatches, SeededImages
    from quietvit.train.watch import Watch


@dataclass
class Models:
    """One model in the forms that a run needs.

    ``plain`` is the model itself, ``wrapped`` is accelerate's wrapper, and ``compiled`` is what a
    step calls. ``evaluated`` is a copy for evaluation: it holds old weights between evaluations,
    and none if ``plain`` is sharded. ``average`` is timm's moving average or None.
    """

    plain: nn.Module
    wrapped: nn.Module
    compiled: Callable[..., Any]
    evaluated: nn.Module
    average: Any

    @property
    def core(self) -> nn.Module:
        """The model inside ``plain`` if that is quantized, else ``plain``."""
        return core_of(self.plain)


@dataclass
class Optimization:
    """torch's optimizer (``inner``), accelerate's wrapper, the schedule and the regularizers."""

    inner: torch.optim.Optimizer
    wrapped: Any
    scheduler: Any
    regularizers: dict[str, Any]


@dataclass
class Observers:
    """Objects that measure the run and change nothing."""

    stopwatch: Stopwatch
    watch: Watch


@dataclass
class Training:
    """Everything of a run except its data; ``facts`` are those that regularizers ask for.

    ``loss`` is that of the last batch, even if a later part of its step raised.
    """

    config: TrainConfig
    accelerator: Accelerator
    task: Task
    models: Models
    optim: Optimization
    observers: Observers
    facts: RunFacts
    steps_per_epoch: int
    effective_batch: int
    loss: Tensor | None = None

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.config.epochs


@dataclass
class Run:
    """A training with its data. ``train`` and ``test`` are data sets of the task."""

    training: Training
    train: Any
    test: Any
    batches: EpochBatches
    images: SeededImages
    loader: Any
