"""A dry run: measure the time and memory of a configuration in a few training steps on noise.

Nothing is written and no training image is read. ``loop`` makes the real run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quietvit.errors import QuietvitError
from quietvit.tasks import Batch, Task
from quietvit.train.config import DecayConfig, TrainConfig
from quietvit.train.engine import gathered, make_accelerator
from quietvit.train.evaluation import judged
from quietvit.train.memory import Stage, enough_memory
from quietvit.train.metrics import Stopwatch
from quietvit.train.prepare import effective_batch
from quietvit.train.qat import core_of
from quietvit.train.regularizers import attach, detach
from quietvit.train.setup import assemble, task_of
from quietvit.train.step import forward_backward
from quietvit.train.training import Training

_WARM_UP, _MEASURED = 2, 4
_FEWEST = 2
"""Images of the smallest pass, because mixup needs an even number."""
_PATIENCE = 5.0
"""If a pass takes more seconds than this, a single step with fewer images is measured."""
_STAND_IN = 1000


@dataclass(frozen=True)
class Estimate:
    """The predicted time and memory of a run.

    ``images`` and the steps are None if the data cannot be opened; ``missing`` then says why.
    ``lr`` is the maximum learning rate. ``memory`` is the peak in bytes of this process: of the
    CUDA allocator, or of the whole process on a CPU. It belongs to ``measured_images`` a pass and
    is not scaled, because the part that grows with the images is unknown. ``step_seconds`` is the
    time of an optimizer step without data loading, scaled to ``batch_size`` images a pass.
    ``regularizer_share`` is the percentage of it spent in regularizers, without TWEO's backward
    pass and the refreshes of S2D (every ``refresh`` applied steps).
    """

    processes: int
    effective_batch: int
    lr: float
    images: int | None
    missing: str
    steps_per_epoch: int | None
    total_steps: int | None
    parameters: int
    trainable: int
    device: str
    memory: int
    step_seconds: float
    measured_steps: int
    measured_images: int
    batch_size: int
    regularizer_share: float

    @property
    def seconds(self) -> float | None:
        """Time of all steps, without data loading, evaluation and checkpoints."""
        return None if self.total_steps is None else self.total_steps * self.step_seconds

    def __str__(self) -> str:
        known = self.images is not None
        peak = "allocated" if self.device != "cpu" else "of the process, all in"
        how, fewer = f"mean of {self.measured_steps}", ""
        if self.measured_images < self.batch_size:
            fewer = f", at {self.measured_images} images a pass; {self.batch_size} take more"
            how = f"scaled from {self.measured_images} images a pass to {self.batch_size}"
        rows = [
            ("training images", f"{self.images}" if known else self.missing),
            ("processes", f"{self.processes}, on {self.device}"),
            ("effective batch", f"{self.effective_batch}"),
            ("learning rate", f"{self.lr:g}"),
            ("steps per epoch", f"{self.steps_per_epoch}" if known else "unknown"),
            ("steps in all", f"{self.total_steps}" if known else "unknown"),
            ("parameters", f"{self.parameters:,}, {self.trainable:,} train"),
            ("peak memory", f"{self.memory / 2**20:.0f} MiB {peak}, a process{fewer}"),
            ("time of a step", f"{self.step_seconds:.4g} s, {how}"),
            ("of it regularizers", f"{self.regularizer_share:.1f} %"),
            ("time in all", _told(self.seconds)),
        ]
        text = "\n".join(f"{name:<20}{value}" for name, value in rows)
        return f"{text}\nTimes without reading images, evaluation, logs and checkpoints."


def estimate(config: TrainConfig) -> Estimate:
    """Build model, optimizer and regularizers, run a few steps on noise, and measure them.

    Two steps warm up, then four are measured. If a pass would take over five seconds, the number of
    images is halved as needed (at least two). Then one step is measured and scaled to the batch.
    All regularizers act at each measured step, at full strength and learning rate. The time of one
    with ``every`` = n is divided by n.

    Raises:
        QuietvitError: ``train`` would refuse the model, weights or settings, or the device has too
            little memory for a batch.
    """
    accelerator = make_accelerator(config)
    steady = config.model_copy(update={"decay": _without_schedules(config.decay)})
    if config.qat is not None:
        at_once = config.qat.model_copy(update={"start_epoch": 0})
        steady = steady.model_copy(update={"qat": at_once})
    task = task_of(steady)
    train, missing = _training_set(task)
    images = None if train is None else len(train)
    effective = effective_batch(config, accelerator.num_processes)
    steps = None if images is None else images // effective
    if steps == 0:
        raise QuietvitError(
            f"one step takes {effective} images, but there are only {images} for training; lower "
            "batch_size or accumulation."
        )

    def noise(model: nn.Module, count: int) -> Any:
        return task.stand_in(model, count)[0]

    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    with enough_memory(config, Stage.BUILD):
        training = assemble(task, accelerator, train, noise, steps or _STAND_IN)
        count, steps_measured = _affordable(training)
    parameters = list(training.models.evaluated.parameters())
    trainable = sum(p.numel() for p in training.models.plain.parameters() if p.requires_grad)
    with enough_memory(config, Stage.STEP):
        seconds, own = _measured(training, count, steps_measured)
    return Estimate(
        processes=accelerator.num_processes,
        effective_batch=effective,
        lr=config.rates(effective).lr,
        images=images,
        missing=missing,
        steps_per_epoch=steps,
        total_steps=None if steps is None else steps * config.epochs,
        parameters=sum(p.numel() for p in parameters),
        trainable=trainable,
        device=_device(accelerator.device),
        memory=_peak(accelerator.device),
        step_seconds=seconds / steps_measured,
        measured_steps=steps_measured,
        measured_images=count,
        batch_size=config.batch_size,
        regularizer_share=100 * own / seconds,
    )


def _training_set(task: Task) -> tuple[Any | None, str]:
    """Return (training images, ""), or (None, reason) if they cannot be opened."""
    try:
        train, _ = task.open_data()
        return task.subset(train, task.config.data.train_images), ""
    except QuietvitError as error:
        absent = isinstance(error.__cause__, FileNotFoundError)
        return None, f"{'not there: ' * absent}{error}"


def _affordable(training: Training) -> tuple[int, int]:
    """Return (images a pass, steps) to measure in a few seconds. Every process must call."""
    accelerator, config = training.accelerator, training.config
    count = min(_FEWEST, config.batch_size)
    inputs, _ = _stand_in(training, count)
    seconds: list[float] = []
    with torch.no_grad(), accelerator.autocast(), judged(training) as model:
        for _ in range(2):  # the first pass is slower than the others
            began = _now(accelerator.device)
            model.eval()(inputs)
            seconds.append(_now(accelerator.device) - began)
    # A backward pass takes about twice as long as a forward pass.
    per_image = 3 * min(seconds) / count
    fits = config.batch_size
    while fits > count and fits * per_image > _PATIENCE:
        fits //= 2
    fits = fits if fits == config.batch_size else max(count, fits - fits % 2)  # even, for mixup
    fits = min(gathered(accelerator, fits))
    return fits, _MEASURED if fits == config.batch_size else 1


def _measured(training: Training, count: int, steps: int) -> tuple[float, float]:
    """Return the seconds of ``steps`` optimizer steps, and those of the regularizers in them.

    The passes have ``count`` images. Only the time outside the regularizers is scaled to the batch.
    """
    accelerator, config = training.accelerator, training.config
    # Measure after the warm-up of the learning rate: a regularizer that must limit its step at the
    # full rate takes longer.
    warm = round(config.schedule.warmup_epochs * training.steps_per_epoch)
    training.models.wrapped.train()
    with _timed_apart(training) as watches:
        if count == config.batch_size:
            for step in range(_WARM_UP):
                _step(training, count, warm + step)
        else:
            # A compiled model is recompiled for another number of images.
            few = count if config.compile else min(_FEWEST, count)
            _step_of_one_pass(training, few, warm)
        before = {name: watch.seconds for name, watch in watches.items()}
        began = _now(accelerator.device)
        for step in range(steps):
            _step(training, count, warm + _WARM_UP + step)
        seconds = _now(accelerator.device) - began
        own = {name: watch.seconds - before[name] for name, watch in watches.items()}
    share = {name: own[name] / _every(training.optim.regularizers.get(name)) for name in own}
    passes = (seconds - sum(own.values())) * config.batch_size / count
    return passes + sum(share.values()), sum(share.values())


def _step(training: Training, count: int, step: int) -> None:
    """Run one optimizer step at which every regularizer acts."""
    _make_due(training.optim.regularizers)
    for _ in range(training.accelerator.gradient_accumulation_steps):
        forward_backward(training, _stand_in(training, count), step)
    if training.models.average is not None:
        training.models.average.update(training.models.plain, step + 1)


def _step_of_one_pass(training: Training, count: int, step: int) -> None:
    """Run one optimizer step without accumulation."""
    accelerator = training.accelerator
    accelerator.gradient_accumulation_steps = 1
    _step(training, count, step)
    accelerator.gradient_accumulation_steps = training.config.accumulation
    accelerator.step = 0  # accelerate counts passes to know when to step the optimizer


@contextmanager
def _timed_apart(training: Training) -> Iterator[dict[str, Stopwatch]]:
    """Give each regularizer its own stopwatch inside. The key "" times the terms of the loss."""
    watches = {name: Stopwatch() for name in training.optim.regularizers}
    detach(training.optim.regularizers, training.observers.stopwatch)
    try:
        for name, regularizer in training.optim.regularizers.items():
            attach({name: regularizer}, training.optim.inner, watches[name])
        yield {**watches, "": training.observers.stopwatch}
    finally:
        for name, regularizer in training.optim.regularizers.items():
            detach({name: regularizer}, watches[name])


def _every(regularizer: Any) -> int:
    return getattr(regularizer, "every", 1)


def _make_due(regularizers: Mapping[str, Any]) -> None:
    """Move the counter of each regularizer so that it acts at the next step."""
    for regularizer in regularizers.values():
        every = _every(regularizer)
        regularizer.steps += every - 1 - regularizer.steps % every


def _stand_in(training: Training, count: int) -> Batch:
    """Return a new batch of noise on the device. Mixup and detectors change a batch in place."""
    from accelerate.utils import send_to_device

    batch = training.task.stand_in(core_of(training.models.evaluated), count)
    moved: Batch = send_to_device(batch, training.accelerator.device)
    return moved


def _without_schedules(decay: DecayConfig) -> DecayConfig:
    sections: dict[str, Any] = {}
    for name, section in decay.sections().items():
        sections[name] = section.model_copy(update={"schedule": None})
    return decay.model_copy(update=sections)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _told(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
