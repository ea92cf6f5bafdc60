"""Build optimizer, schedule, moving average and regularizers, also when a run gets quantized.

``setup`` builds the run around them. ``qat`` makes the quantized model.
"""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quietvit.decay.config import RunFacts
from quietvit.quantization import QuantizedModel
from quietvit.train.config import OptimizerConfig, Rates, TrainConfig
from quietvit.train.engine import check_groups, is_sharded, shard_by
from quietvit.train.evaluation import without_memory
from quietvit.train.finetune import parameter_groups
from quietvit.train.metrics import Stopwatch
from quietvit.train.order import generator_states, set_generator_states
from quietvit.train.qat import core_of, quantized_model
from quietvit.train.regularizers import attach, build_regularizers, detach
from quietvit.train.training import Models, Optimization, Training
from quietvit.train.watch import Watch

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("quietvit")


def effective_batch(config: TrainConfig, processes: int) -> int:
    """Return the number of images in an optimizer step."""
    return config.batch_size * config.accumulation * processes


def prepared(
    config: TrainConfig,
    accelerator: Accelerator,
    plain: nn.Module,
    example: Any,
    facts: RunFacts,
    stopwatch: Stopwatch,
) -> tuple[Models, Optimization, Watch]:
    """Build optimizer, schedule, average and regularizers, and prepare them with accelerate."""
    core = core_of(plain)
    evaluated = without_memory(plain) if is_sharded(accelerator) else copy.deepcopy(plain)
    average = _average(config, plain)
    rates = config.rates(effective_batch(config, accelerator.num_processes))
    inner = _optimizer(config.optimizer, plain, rates.lr)
    regularizers = build_regularizers(config.decay, core, example, facts)
    watch = Watch(core, example, plain)
    shard_by(accelerator, plain, watch.blocks)
    wrapped, optimizer = accelerator.prepare(plain, inner)
    attach(regularizers, inner, stopwatch)
    compiled = torch.compile(wrapped) if config.compile else wrapped
    scheduler = _scheduler(config, rates, inner, facts.steps_per_epoch)
    return (
        Models(plain, wrapped, compiled, evaluated.requires_grad_(False), average),
        Optimization(inner, optimizer, scheduler, regularizers),
        watch,
    )


def quantize_in_place(training: Training) -> None:
    """Replace the model of a run that trained in float by a quantized copy.

    Adam's moments are kept for weights that the method does not change. Regularizers keep their
    step counts, and the strength that a total became. The moving average
    restarts. The random state of the run does not change.
    """
    from accelerate.utils import send_to_device

    t, chosen = training, training.config.qat
    assert chosen is not None
    states = generator_states(t.accelerator.device)
    plain = t.accelerator.unwrap_model(t.models.wrapped, keep_fp32_wrapper=False)
    old = t.optim
    quantized = quantized_model(chosen, plain, t.facts.images(chosen.images))
    detach(old.regularizers, t.observers.stopwatch)
    t.accelerator.free_memory()
    example = send_to_device(t.task.stand_in(plain, 1), t.accelerator.device)[0]
    parts = (t.config, t.accelerator, quantized, example, t.facts, t.observers.stopwatch)
    t.models, t.optim, t.observers.watch = prepared(*parts)
    for name, before in plain.named_parameters():
        now = quantized.model.get_parameter(name)
        if before in old.inner.state and torch.equal(before, now):
            t.optim.inner.state[now] = old.inner.state[before]
    sections = t.config.decay.sections()
    for name, regularizer in t.optim.regularizers.items():
        sections[name].restore(regularizer, old.regularizers[name].state_dict())
    set_generator_states(states, t.accelerator.device)
    if t.accelerator.is_main_process:
        logger.warning(
            "the run trains in %s from here on, with %s steps (qat.start_epoch = %d).",
            f"{chosen.bits} {chosen.method}",
            chosen.steps,
            chosen.start_epoch,
        )


def _optimizer(chosen: OptimizerConfig, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    groups = parameter_groups(core_of(model), chosen)
    if isinstance(model, QuantizedModel) and (steps := list(model.quantizers.parameters())):
        groups.append({"params": steps, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=chosen.betas, eps=chosen.eps)
    check_groups(model, optimizer)
    return optimizer


def _scheduler(
    config: TrainConfig, rates: Rates, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> Any:
    from timm.scheduler.cosine_lr import CosineLRScheduler
    from timm.scheduler.multistep_lr import MultiStepLRScheduler

    warmup = round(config.schedule.warmup_epochs * steps_per_epoch)
    if config.schedule.milestones:
        # timm counts the step that begins, and torch's MultiStepLR those that are finished.
        drops = [round(epoch * steps_per_epoch) + 1 for epoch in config.schedule.milestones]
        return MultiStepLRScheduler(
            optimizer,
            decay_t=drops,
            decay_rate=config.schedule.gamma,
            warmup_t=warmup,
            warmup_lr_init=min(rates.warmup_lr, rates.lr),
            warmup_prefix=False,
            t_in_epochs=False,
        )
    steps = max(1, steps_per_epoch * config.epochs - warmup)
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=max(2, steps),  # at 1, timm warns of a rate that never changes
        lr_min=rates.min_lr,
        warmup_t=warmup,
        warmup_lr_init=min(rates.warmup_lr, rates.lr),
        warmup_prefix=True,
        t_in_epochs=False,
    )
    scheduler.t_initial = steps
    return scheduler


def rates_of_run(config: TrainConfig, processes: int, steps_per_epoch: int) -> list[float]:
    """Return the learning rate of each step of the run, without ``lr_scale`` and layer decay."""
    rates = config.rates(effective_batch(config, processes))
    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rates.lr)
    scheduler = _scheduler(config, rates, stand_in, steps_per_epoch)
    found = []
    for step in range(steps_per_epoch * config.epochs):
        scheduler.step_update(step)
        found.append(float(stand_in.param_groups[0]["lr"]))
    return found


def _average(config: TrainConfig, model: nn.Module) -> Any:
    from timm.utils.model_ema import ModelEmaV3

    if config.ema is None:
        return None
    return ModelEmaV3(model, decay=config.ema.decay, use_warmup=config.ema.warmup)
