"""Builds everything a run needs out of its configuration: data, model, optimizer, decay, engine.

Nothing is trained here; ``loop`` takes it from there.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from quietvit.data import (
    ImageDataset,
    create_model,
    data_config,
    load_dataset,
    subset,
    training_transform,
)
from quietvit.errors import QuietvitError
from quietvit.train.config import TrainConfig
from quietvit.train.metrics import Stopwatch
from quietvit.train.order import EpochBatches, SeededImages

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Run:
    """The parts of a run. ``plain`` is the model inside ``model``, which the engine wraps."""

    config: TrainConfig
    accelerator: Accelerator
    train: ImageDataset
    test: ImageDataset
    batches: EpochBatches
    loader: Any
    plain: nn.Module
    model: nn.Module
    evaluated: nn.Module
    inner: torch.optim.Optimizer
    optimizer: Any
    scheduler: Any
    decays: dict[str, Any]
    stopwatch: Stopwatch
    ema: Any
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None
    criterion: nn.Module
    steps_per_epoch: int
    total_steps: int
    effective_batch: int


def build(config: TrainConfig) -> Run:
    """Build a run; randomness starts from ``config.seed``, with and without decay alike.

    Raises:
        QuietvitError: bad data, model, weights or decay settings, or a precision the machine lacks.
    """
    from accelerate.utils import set_seed

    accelerator = _accelerator(config)
    train, test = open_data(config)
    train = subset(train, config.data.train_images)
    processes = accelerator.num_processes
    effective = config.batch_size * config.accumulation * processes
    steps_per_epoch = len(train) // effective
    if steps_per_epoch == 0:
        raise QuietvitError(
            f"one step takes {effective} images (batch_size {config.batch_size} x accumulation "
            f"{config.accumulation} x {processes} processes), but {train.name} has {len(train)} "
            "for training; lower batch_size."
        )
    set_seed(config.seed)
    plain = create_model(
        config.model.name,
        train.num_classes,
        config.model.weights,
        preprocessing=config.model.preprocessing,
        **config.model.kwargs,
    ).to(accelerator.device)
    evaluated = copy.deepcopy(plain).requires_grad_(False)
    ema = _average(config, plain)
    inner = _optimizer(config, plain)
    stopwatch = Stopwatch()
    stopwatch.start_with(inner)
    decays = _decays(config, plain, inner)
    stopwatch.stop_with(inner)
    count = steps_per_epoch * config.accumulation * processes
    batches = EpochBatches(len(train), config.batch_size, count, config.seed)
    loader = DataLoader(
        SeededImages(train, training_transform(plain, config.data.augmentation), config.seed),
        batch_sampler=batches,
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
        generator=torch.Generator(),
    )
    model, optimizer, prepared = accelerator.prepare(plain, inner, loader)
    set_seed(config.seed, device_specific=True)
    return Run(
        config=config,
        accelerator=accelerator,
        train=train,
        test=test,
        batches=batches,
        loader=prepared,
        plain=plain,
        model=model,
        evaluated=evaluated,
        inner=inner,
        optimizer=optimizer,
        scheduler=_scheduler(config, inner, steps_per_epoch),
        decays=decays,
        stopwatch=stopwatch,
        ema=ema,
        mix=_mix(config, train.num_classes),
        criterion=nn.CrossEntropyLoss(
            label_smoothing=0.0 if config.mix.active else config.label_smoothing
        ),
        steps_per_epoch=steps_per_epoch,
        total_steps=steps_per_epoch * config.epochs,
        effective_batch=effective,
    )


def open_data(config: TrainConfig) -> tuple[ImageDataset, ImageDataset]:
    """Open all training images, and the test images that the run is judged by.

    Raises:
        QuietvitError: a missing path or column, a label out of range, fewer images than asked for.
    """
    train = load_dataset(config.data.dataset, "train", num_classes=config.data.num_classes)
    test = load_dataset(config.data.dataset, "test", num_classes=train.num_classes)
    return train, subset(test, config.data.test_images)


def _accelerator(config: TrainConfig) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    if "RANK" not in os.environ:
        # accelerate keeps one state per process and refuses a second run with other settings.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    accelerator = Accelerator(
        mixed_precision=config.precision,
        gradient_accumulation_steps=config.accumulation,
        cpu=config.device == "cpu",
    )
    if config.precision == "fp16" and accelerator.device.type == "cpu":
        raise QuietvitError(
            "precision 'fp16' scales its loss on a GPU only, and this run is on the CPU; set "
            "precision to 'bf16' or 'no'."
        )
    return accelerator


def _optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    from timm import optim

    chosen = config.optimizer
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: Any = [{"params": trainable, "weight_decay": chosen.weight_decay}]
    if not chosen.decay_norms_and_biases:
        kept: Any = getattr(model, "no_weight_decay", set)()
        groups = optim.param_groups_weight_decay(  # type: ignore[attr-defined]
            model, weight_decay=chosen.weight_decay, no_weight_decay_list=kept
        )
    return torch.optim.AdamW(groups, lr=chosen.lr, betas=chosen.betas, eps=chosen.eps)


def _scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Any:
    from timm.scheduler.cosine_lr import CosineLRScheduler

    warmup = round(config.schedule.warmup_epochs * steps_per_epoch)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, steps_per_epoch * config.epochs - warmup),
        lr_min=config.schedule.min_lr,
        warmup_t=warmup,
        warmup_lr_init=min(config.schedule.warmup_lr, config.optimizer.lr),
        warmup_prefix=True,
        t_in_epochs=False,
    )


def _decays(
    config: TrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Build and attach the decoupled updates, in the order they act in: cd, norm_gains."""
    decays: dict[str, Any] = {}
    size = data_config(model)["input_size"]
    device = next(model.parameters()).device
    example = torch.randn(1, *size, generator=torch.Generator().manual_seed(0)).to(device)
    cd, gains = config.decay.cd, config.decay.norm_gains
    if cd is not None and cd.active:
        from quietvit.decay import ColinearityDecay

        decays["cd"] = ColinearityDecay(
            model,
            example,
            strength=cd.strength,
            penalty=cd.penalty,
            every=cd.every,
            kinds=cd.kinds,
        ).attach(optimizer)
    if gains is not None and gains.active:
        from quietvit.decay import NormGainDecay

        decay = NormGainDecay(model, example, strength=gains.strength)
        decays["norm_gains"] = decay.attach(optimizer)
    return decays


def _average(config: TrainConfig, model: nn.Module) -> Any:
    from timm.utils.model_ema import ModelEmaV3

    if config.ema is None:
        return None
    return ModelEmaV3(model, decay=config.ema.decay, use_warmup=config.ema.warmup)


def _mix(
    config: TrainConfig, num_classes: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    from timm.data.mixup import Mixup

    if not config.mix.active:
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
