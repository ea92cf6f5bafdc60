"""Builds everything a run needs out of its configuration: data, model, optimizer, decay, engine.

Nothing is trained here; ``loop`` takes it from there.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from quietvit.data import (
    ImageDataset,
    create_model,
    data_config,
    evaluation_transform,
    load_dataset,
    name_classes,
    subset,
    training_transform,
)
from quietvit.data.matching import matched
from quietvit.errors import QuietvitError
from quietvit.tracing import evaluating
from quietvit.train.config import OptimizerConfig, Rates, TrainConfig
from quietvit.train.engine import check_groups, is_sharded, make_accelerator, shard_by
from quietvit.train.evaluation import hollow
from quietvit.train.finetune import freeze, parameter_groups
from quietvit.train.memory import is_want_of_memory
from quietvit.train.metrics import Stopwatch
from quietvit.train.order import EpochBatches, SeededImages, epoch_order
from quietvit.train.parts import Parts, Run
from quietvit.train.regularizers import attach, build_regularizers
from quietvit.train.step import heads
from quietvit.train.stopping import ignore_in_worker
from quietvit.train.unused import freeze_unused
from quietvit.train.watch import Watch

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("quietvit")


def build(config: TrainConfig, resumed: bool = False) -> Run:
    """Build a run; randomness starts from ``config.seed``, with and without decay alike.

    A ``resumed`` run starts from random weights and not from those of ``config.model``, which may
    be gone: a checkpoint is loaded next, and nothing but the weights depends on them.

    Raises:
        QuietvitError: bad data, model, weights or decay settings, or a precision the machine lacks.
    """
    accelerator = make_accelerator(config)
    train, test = open_data(config)
    train = subset(train, config.data.train_images)
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

    def some_images(plain: nn.Module, count: int) -> Tensor:
        return drawn_images(config, train, plain, count)

    parts = assemble(config, accelerator, train.num_classes, some_images, steps_per_epoch, resumed)
    for model in (parts.plain, parts.evaluated):
        name_classes(model, train.class_names)
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
    transform = training_transform(parts.plain, config.data.augmentation)
    images = SeededImages(train, transform, config.seed, max_bad=config.data.max_bad_images)
    loader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
        pin_memory=parts.accelerator.device.type == "cuda",
        worker_init_fn=ignore_in_worker,
        generator=torch.Generator(),
    )
    return Run(parts, train, test, batches, images, accelerator.prepare(loader))


def drawn_images(config: TrainConfig, train: ImageDataset, model: nn.Module, count: int) -> Tensor:
    """Return ``count`` training images (count, 3, H, W) as the model takes them.

    They are drawn by ``config.seed``, none twice, for folders and shards are sorted by class. One
    that cannot be decoded is replaced as it is in training, by any other.

    Raises:
        QuietvitError: fewer images than asked for, or more bad ones than ``data.max_bad_images``.
    """
    if count > len(train):
        raise QuietvitError(
            f"decay.s2d.images is {count}, but {train.name} has {len(train)} images for training; "
            "lower it."
        )
    images = SeededImages(
        train, evaluation_transform(model), config.seed, max_bad=config.data.max_bad_images
    )
    order = epoch_order(len(train), config.seed, 0)[:count]
    return torch.stack([images[0, int(index)][0] for index in order])


def effective_batch(config: TrainConfig, processes: int) -> int:
    """Return the number of images of an optimizer step."""
    return config.batch_size * config.accumulation * processes


def assemble(
    config: TrainConfig,
    accelerator: Accelerator,
    num_classes: int | None,
    some_images: Callable[[nn.Module, int], Tensor],
    steps_per_epoch: int,
    resumed: bool = False,
) -> Parts:
    """Build model, optimizer, regularizers and engine; ``num_classes`` None is the model's own.

    ``some_images(model, n)`` gives training images (n, 3, H, W) as the model takes them.
    ``resumed``: see ``build``.
    """
    from accelerate.utils import set_seed

    if accelerator.is_main_process:
        _tell_whole(config, accelerator)
    set_seed(config.seed)
    plain = _model(config, num_classes, resumed).to(accelerator.device)
    evaluated = hollow(plain) if is_sharded(accelerator) else copy.deepcopy(plain)
    ema = _average(config, plain)
    freeze(plain, config.model.freeze, config.model.freeze_blocks)
    effective = effective_batch(config, accelerator.num_processes)
    rates = config.rates(effective)
    example = example_of(plain)
    _check_classifies(config, plain, example, num_classes)
    _freeze_unused(plain, example, accelerator)
    inner = _optimizer(config.optimizer, plain, rates.lr)
    stopwatch = Stopwatch()
    regularizers = build_regularizers(
        config.decay,
        plain,
        example,
        lambda count: some_images(plain, count).to(accelerator.device),
        steps_per_epoch,
        steps_per_epoch * config.epochs,
    )
    watch = Watch(plain, example)
    if not resumed:  # for a run that diverges before its first checkpoint
        watch.amplification(0)
    shard_by(accelerator, plain, watch.blocks)
    model, optimizer = accelerator.prepare(plain, inner)
    attach(regularizers, inner, stopwatch)
    set_seed(config.seed, device_specific=True)
    return Parts(
        config=config,
        accelerator=accelerator,
        num_classes=num_classes,
        plain=plain,
        model=model,
        compiled=torch.compile(model) if config.compile else model,
        evaluated=evaluated.requires_grad_(False),
        inner=inner,
        optimizer=optimizer,
        scheduler=_scheduler(config, rates, inner, steps_per_epoch),
        regularizers=regularizers,
        stopwatch=stopwatch,
        watch=watch,
        ema=ema,
        mix=_mix(config, num_classes),
        criterion=_criterion(config),
        steps_per_epoch=steps_per_epoch,
        effective_batch=effective,
    )


def example_of(model: nn.Module) -> Tensor:
    """Return one image of noise (1, 3, H, W), the same each time, to trace a model by."""
    size = data_config(model)["input_size"]
    noise = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    return noise.to(next(model.parameters()).device)


def open_data(config: TrainConfig) -> tuple[ImageDataset, ImageDataset]:
    """Open all training images, and the test images that the run is judged by.

    The classes of the test images are found by their names, where both sets have names.

    Raises:
        QuietvitError: a missing path or column, a label out of range, fewer images than asked for,
            test images of a class that the training images do not have.
    """
    train = load_dataset(config.data.dataset, "train", num_classes=config.data.num_classes)
    test = load_dataset(config.data.dataset, "test", num_classes=train.num_classes)
    test = matched(test, train.class_names, train.num_classes, "the training set")
    return train, subset(test, config.data.test_images)


@torch.no_grad()
def _check_classifies(
    config: TrainConfig, model: nn.Module, example: Tensor, num_classes: int | None
) -> None:
    """Refuse a model that does not turn one image into logits: ``model.kwargs`` may make such.

    Raises:
        QuietvitError: what it was built with, the size of the image, and what came of it.
    """
    given = ", ".join(f"{key}={value!r}" for key, value in config.model.kwargs.items())
    built = f"{config.model.name} with {given or 'its defaults'}"
    size = "x".join(map(str, example.shape[-2:]))
    try:
        with evaluating(model):
            found = heads(model(example))
    except (TypeError, AssertionError, ValueError, RuntimeError, LookupError) as error:
        if is_want_of_memory(error):
            raise
        raise QuietvitError(
            f"{built} cannot compute an image of three channels and {size} pixels: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}. Change "
            "model.kwargs."
        ) from error
    for head in found:
        flat = isinstance(head, Tensor) and head.ndim == 2
        if not flat or (num_classes is not None and head.shape[1] != num_classes):
            shape = tuple(head.shape) if isinstance(head, Tensor) else type(head).__name__
            raise QuietvitError(
                f"{built} gives {shape} for one image, not logits of shape (1, "
                f"{num_classes or 'classes'}), so it cannot be trained as a classifier. Change "
                "model.kwargs."
            )


def _freeze_unused(model: nn.Module, example: Tensor, accelerator: Accelerator) -> None:
    names = freeze_unused(model, example)
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
            "(optimizer.lr_batch), and they have %d here.",
            config.rates(effective).lr,
            chosen.lr,
            chosen.lr_batch,
            effective,
        )


def _tell_whole(config: TrainConfig, accelerator: Accelerator) -> None:
    if config.parallel == "fsdp2" and not is_sharded(accelerator):
        logger.warning(
            "parallel is 'fsdp2', but there is one process: the model is kept whole, and takes the "
            "memory of 'ddp'. Start several processes (torchrun), or set parallel to 'ddp'."
        )


def _model(config: TrainConfig, num_classes: int | None, untrained: bool) -> nn.Module:
    chosen = config.model
    return create_model(
        chosen.name,
        num_classes,
        None if untrained else chosen.weights,
        preprocessing=chosen.preprocessing,
        untrained=untrained,
        **chosen.kwargs,
    )


def _optimizer(chosen: OptimizerConfig, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    groups = parameter_groups(model, chosen)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=chosen.betas, eps=chosen.eps)
    check_groups(model, optimizer)
    return optimizer


def _scheduler(
    config: TrainConfig, rates: Rates, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> Any:
    from timm.scheduler.cosine_lr import CosineLRScheduler

    warmup = round(config.schedule.warmup_epochs * steps_per_epoch)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, steps_per_epoch * config.epochs - warmup),
        lr_min=rates.min_lr,
        warmup_t=warmup,
        warmup_lr_init=min(rates.warmup_lr, rates.lr),
        warmup_prefix=True,
        t_in_epochs=False,
    )


def _average(config: TrainConfig, model: nn.Module) -> Any:
    from timm.utils.model_ema import ModelEmaV3

    if config.ema is None:
        return None
    return ModelEmaV3(model, decay=config.ema.decay, use_warmup=config.ema.warmup)


def _criterion(config: TrainConfig) -> nn.Module:
    smoothing = 0.0 if config.mix.active else config.label_smoothing  # else mixing smooths
    return nn.CrossEntropyLoss(label_smoothing=smoothing)


def _mix(
    config: TrainConfig, num_classes: int | None
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    from timm.data.mixup import Mixup

    if num_classes is None or not config.mix.active:
        return None
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = Mixup(
        mixup_alpha=config.mix.mixup,
        cutmix_alpha=config.mix.cutmix,
        prob=config.mix.probability,
        switch_prob=config.mix.switch_probability,
        label_smoothing=config.label_smoothing,
        num_classes=num_classes,
    )
    return mix
