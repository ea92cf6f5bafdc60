"""Build a run from its configuration: data, model, optimizer, regularizers, accelerator.

Nothing is trained here; ``loop`` does that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from quietvit.data import data_config
from quietvit.decay.config import RunFacts
from quietvit.errors import QuietvitError
from quietvit.tasks import Batch, Task, task_named
from quietvit.tracing import evaluating
from quietvit.train.config import TrainConfig
from quietvit.train.engine import is_sharded, make_accelerator
from quietvit.train.finetune import freeze
from quietvit.train.memory import is_want_of_memory
from quietvit.train.metrics import Stopwatch
from quietvit.train.order import (
    EpochBatches,
    SeededImages,
    epoch_order,
)
from quietvit.train.prepare import effective_batch, prepared, rates_of_run
from quietvit.train.qat import quantized_model, refuse_unfit_sites, restored_model
from quietvit.train.stopping import ignore_in_worker
from quietvit.train.training import Observers, Run, Training
from quietvit.train.unused import freeze_unused

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("quietvit")


def build(config: TrainConfig, resumed: Mapping[str, Any] | None = None) -> Run:
    """Build a run. Its random numbers depend on ``config.seed`` and not on the decay.

    ``resumed`` is the checkpoint that the run continues from. Then the weights are random, because
    the file in ``config.model`` may be gone. The checkpoint replaces them, and nothing else depends
    on them.

    Raises:
        QuietvitError: data, model, weights or decay settings are bad, or the machine lacks the
            precision.
    """
    accelerator = make_accelerator(config)
    task = task_of(config)
    train, test = task.open_data()
    train = task.subset(train, config.data.train_images)
    if config.qat is not None and config.qat.images > len(train):
        raise _too_few(f"qat.images is {config.qat.images}", train)
    processes = accelerator.num_processes
    effective = effective_batch(config, processes)
    steps_per_epoch = len(train) // effective
    if steps_per_epoch == 0:
        raise QuietvitError(
            f"one step takes {effective} images (batch_size "
            f"{config.batch_size} x accumulation {config.accumulation} x {processes} processes), "
            f"but {train.name} has {len(train)} for training; lower batch_size."
        )
    if accelerator.is_main_process:
        _tell_rate(config, effective)
        for idle in config.data.augmentation.idle():
            logger.warning("data.augmentation.%s.", idle)

    def some_images(plain: nn.Module, count: int) -> Any:
        return drawn_images(task, train, plain, count)

    training = assemble(task, accelerator, train, some_images, steps_per_epoch, resumed)
    count = steps_per_epoch * config.accumulation * processes
    batches = EpochBatches(
        len(train),
        config.batch_size,
        count,
        config.seed,
        repeats=config.data.repeats,
        groups=train.groups,
        window=config.data.shuffle_window,
    )
    images = SeededImages(
        train,
        task.training_transform(training.models.core),
        config.seed,
        max_bad=config.data.max_bad_images,
    )
    loader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=ignore_in_worker,
        collate_fn=task.collate(),
        generator=torch.Generator(),
    )
    return Run(training, train, test, batches, images, accelerator.prepare(loader))


def task_of(config: TrainConfig) -> Task:
    """Return the task that a configuration names."""
    return task_named(config.task)(config)


def drawn_images(task: Task, train: Any, model: nn.Module, count: int) -> Any:
    """Return ``count`` transformed training images: (count, 3, H, W) for a classifier.

    They are drawn by ``config.seed`` without replacement, because folders and shards are sorted by
    class. An image that cannot be decoded is replaced by another one, as in training.

    Raises:
        QuietvitError: there are fewer images, or more bad ones than ``data.max_bad_images``.
    """
    config = task.config
    if count > len(train):
        raise _too_few(f"a regularizer needs {count} images (S2D: decay.s2d.images)", train)
    readable = SeededImages(train, _unchanged, config.seed, max_bad=config.data.max_bad_images)
    order = epoch_order(len(train), config.seed, 0)[:count]
    samples = [readable[0, int(index)] for index in order]
    inputs, _ = next(iter(task.evaluation_loader(model, samples, count, 0)))
    return inputs


def _too_few(need: str, train: Any) -> QuietvitError:
    return QuietvitError(
        f"{need}, but {train.name} has {len(train)} images for training; lower that number."
    )


def _unchanged(image: Any, target: Any) -> tuple[Any, Any]:
    return image, target


def assemble(
    task: Task,
    accelerator: Accelerator,
    train: Any | None,
    some_images: Callable[[nn.Module, int], Any],
    steps_per_epoch: int,
    resumed: Mapping[str, Any] | None = None,
) -> Training:
    """Build models, optimizer and regularizers, and prepare them with accelerate.

    With ``qat`` the model is quantized if it trains quantized from the start, or if ``resumed``
    holds a quantized one.

    Args:
        train: the training data; None in a dry run without data.
        some_images: ``some_images(model, n)`` returns n training images, see ``drawn_images``.
        resumed: see ``build``.
    """
    from accelerate.utils import send_to_device, set_seed

    config = task.config
    if accelerator.is_main_process:
        _tell_whole(config, accelerator)
    set_seed(config.seed)
    plain = task.create_model(train, untrained=resumed is not None).to(accelerator.device)
    freeze(plain, config.model.freeze, config.model.freeze_blocks)
    one, two = (send_to_device(task.stand_in(plain, count), accelerator.device) for count in (1, 2))
    example = one[0]
    _refuse_unfit(task, plain, example)
    _freeze_unused(task, plain, (one, two), accelerator)
    bare = plain
    facts = RunFacts(
        lambda count: send_to_device(some_images(bare, count), accelerator.device),
        steps_per_epoch,
        steps_per_epoch * config.epochs,
        partial(rates_of_run, config, accelerator.num_processes, steps_per_epoch),
    )
    if config.qat is not None:
        refuse_unfit_sites(config.qat, plain, example, partial(task.call, batch=two))
        quantization = None if resumed is None else resumed.get("quantization")
        if quantization is not None:
            plain = restored_model(config.qat, plain, quantization)
        elif resumed is None and config.qat.start_epoch == 0:
            plain = quantized_model(config.qat, plain, facts.images(config.qat.images))
    stopwatch = Stopwatch()
    models, optim, watch = prepared(config, accelerator, plain, example, facts, stopwatch)
    if resumed is None:  # kept for the error of a run that diverges before its first checkpoint
        watch.amplification(0)
    set_seed(config.seed, device_specific=True)
    return Training(
        config=config,
        accelerator=accelerator,
        task=task,
        models=models,
        optim=optim,
        observers=Observers(stopwatch, watch),
        facts=facts,
        steps_per_epoch=steps_per_epoch,
        effective_batch=effective_batch(config, accelerator.num_processes),
    )


@torch.no_grad()
def _refuse_unfit(task: Task, model: nn.Module, inputs: Any) -> None:
    """Raise QuietvitError if the model cannot run on one image, or the task refuses the output."""
    try:
        with evaluating(model):
            output = model(inputs)
    except (TypeError, AssertionError, ValueError, RuntimeError, LookupError) as error:
        if is_want_of_memory(error):
            raise
        size = "x".join(map(str, data_config(model)["input_size"][-2:]))
        raise QuietvitError(
            f"{task.built} cannot process an image of three channels and {size} pixels: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}. Change "
            "model.kwargs."
        ) from error
    task.refuse_unfit(model, output)


def _freeze_unused(
    task: Task, model: nn.Module, batches: tuple[Batch, Batch], accelerator: Accelerator
) -> None:
    names = freeze_unused(model, batches, lambda *args: task.tensors(task.call(*args)))
    if names and accelerator.is_main_process:
        logger.warning(
            "%d parameters take no part in the forward pass and are frozen: %s.",
            len(names),
            ", ".join(names),
        )


def _tell_rate(config: TrainConfig, effective: int) -> None:
    chosen = config.optimizer
    if chosen.lr_batch not in (None, effective):
        logger.warning(
            "the learning rate is %g: optimizer.lr = %g is for steps of %d images "
            "(optimizer.lr_batch), and steps have %d here.",
            config.rates(effective).lr,
            chosen.lr,
            chosen.lr_batch,
            effective,
        )


def _tell_whole(config: TrainConfig, accelerator: Accelerator) -> None:
    if config.parallel == "fsdp2" and not is_sharded(accelerator):
        logger.warning(
            "parallel is 'fsdp2', but there is one process, so the model is not sharded and needs "
            "the memory of 'ddp'. Start several processes (torchrun), or set parallel to 'ddp'."
        )
