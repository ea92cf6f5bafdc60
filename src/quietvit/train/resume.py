"""Collect the state of a run from all processes, and restore it in all of them.

``checkpoint`` writes and reads the files. ``loop`` decides when to save.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from quietvit.classes import KEY
from quietvit.errors import QuietvitError
from quietvit.train.engine import gathered, is_sharded, load_whole, whole_model, whole_optimizer
from quietvit.train.folder import as_now, changes, flat
from quietvit.train.order import generator_states, set_generator_states
from quietvit.train.qat import state_of
from quietvit.train.regularizers import detached
from quietvit.train.together import raise_together
from quietvit.train.training import Training

logger = logging.getLogger("quietvit")


def collect(training: Training) -> dict[str, Any]:
    """Return the training state, in the same form for one process, DDP and FSDP2.

    Every process must call. Only the main process gets the full state.
    """
    t = training
    scaler = t.accelerator.scaler
    generators: list[Any] = gathered(t.accelerator, generator_states(t.accelerator.device))
    with _quiet(t, not t.optim.inner.state):
        optimizer = whole_optimizer(t.accelerator, t.models.plain, t.optim.inner)
    return {
        "processes": t.accelerator.num_processes,
        "config": flat(t.config),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "model": whole_model(t.accelerator, t.models.core),
        "quantization": state_of(t.models.plain),
        "ema": None if t.models.average is None else t.models.average.module.state_dict(),
        "optimizer": optimizer,
        "scaler": None if scaler is None else scaler.state_dict(),
        "decays": {name: decay.state_dict() for name, decay in t.optim.regularizers.items()},
        "generators": generators,
    }


def restore(training: Training, state: Mapping[str, Any]) -> float:
    """Load what ``collect`` returned. Return how many batches now make one batch then.

    Every process must call. A warning reports another number of threads or processes, or another
    torch version. Checkpoints of earlier versions hold no settings; ``differences`` checks them.

    Raises:
        QuietvitError: the images of a step, the regularizers or the optimizer groups differ.
    """
    t = training
    batches = check_steps(t, state["processes"], state.get("config", flat(t.config)))
    _warn_if_inexact(t, state)
    if set(state["decays"]) != set(t.optim.regularizers):
        raise QuietvitError(
            f"the checkpoint was written with the regularizers {sorted(state['decays'])}, but "
            f"this run has {sorted(t.optim.regularizers)}; resume with the same ones."
        )
    with _quiet(t, True):
        load_whole(t.accelerator, t.models.core, t.optim.inner, state["model"], state["optimizer"])
    if t.models.average is not None:
        t.models.average.module.load_state_dict(state["ema"])
    if t.accelerator.scaler is not None and state["scaler"] is not None:
        t.accelerator.scaler.load_state_dict(state["scaler"])
    sections = t.config.decay.sections()
    for name, decay in t.optim.regularizers.items():
        sections[name].restore(decay, state["decays"][name])
    rank, generators = t.accelerator.process_index, state["generators"]
    if len(generators) == t.accelerator.num_processes:
        set_generator_states(generators[rank], t.accelerator.device)
    else:  # there is one saved state per process, so another number of processes cannot use them
        from accelerate.utils import set_seed

        set_seed(t.config.seed + state["step"], device_specific=True)
    return batches


def check_steps(training: Training, processes: int, before: Mapping[str, Any]) -> float:
    """Refuse a checkpoint whose steps have other images. Return batches now per batch then.

    A step takes ``accumulation x processes`` consecutive batches of one order. The product
    batch_size x accumulation x processes must stay: 64 x 1 x 4 = 32 x 4 x 2 gives 64 / 32 = 2.
    """
    config = training.config
    keys = ("accumulation", "batch_size")
    then = {"processes": processes, **{key: before[key] for key in keys}}
    now = {"processes": training.accelerator.num_processes}
    now |= {key: getattr(config, key) for key in keys}
    if math.prod(then.values()) == math.prod(now.values()):
        if then != now and training.accelerator.is_main_process:
            logger.warning(
                "the checkpoint was written with %s, and this run has %s: each step has the same "
                "images, but other random numbers (dropout, mixup).", _shown(then), _shown(now),
            )  # fmt: skip
        return float(before["batch_size"] / config.batch_size)
    needed, rest = divmod(then["accumulation"] * processes, now["processes"])
    other = "" if rest else f", or batch_size {then['batch_size']} and accumulation {needed} here"
    raise QuietvitError(
        f"the checkpoint was written with {_shown(then)}, but this run has {_shown(now)}, so its "
        f"steps would have other images. Resume with the old values{other} (the product must "
        "stay). Or start a new run in another output folder from the current weights "
        "(model.weights: model.safetensors in the checkpoint's folder)."
    )


def _shown(share: Mapping[str, int]) -> str:
    return ", ".join(f"{key} {value}" for key, value in share.items())


def dealt(training: Training, saved: Sequence[Any]) -> list[Any]:
    """Return this process's share of the saved values. Each goes to exactly one process."""
    return list(saved[training.accelerator.process_index :: training.accelerator.num_processes])


def differences(
    training: Training, state: Mapping[str, Any], before: Mapping[str, Any]
) -> list[str]:
    """Describe how the settings differ from those that the checkpoint was written with.

    Checkpoints of earlier versions hold no settings. Then the settings must equal ``before``, those
    that the run began with.
    """
    then = as_now(state["config"], "the checkpoint") if "config" in state else before
    changed = changes(then, training.config)
    processes = training.accelerator.num_processes
    if state["processes"] != processes:
        changed.append(f"processes was {state['processes']} and is {processes}")
    if changed and "config" not in state:
        raise QuietvitError(
            f"{'; '.join(changed[:3])}, but the checkpoint is from a version that allowed no "
            "changes; resume with the same settings until a new checkpoint is written."
        )
    return changed


def check_same_data(training: Training, then: Any, now: Mapping[str, Any], name: str) -> None:
    """Refuse other training images than ``then`` (``Task.facts``). Every process must call.

    ``then`` is None for checkpoints of earlier versions.
    """
    problem = None
    counted = ("images", "classes", "labels", "groups")
    if then is not None and any(then.get(key) != now.get(key) for key in counted):
        otherwise = ", labelled or grouped otherwise" if then["images"] == now["images"] else ""
        problem = (
            f"the run was begun with {then['images']} training images of {then['classes']} "
            f"classes, and {name} has {now['images']} of {now['classes']}{otherwise}; resume "
            "with the same images (data.dataset may name another location), or start a new run "
            "in another output folder."
        )
    else:
        before = then or {}
        problem = _exchanged(before, now, name)
        if KEY not in before and now.get(KEY) is not None and training.accelerator.is_main_process:
            logger.warning(
                "the checkpoint is from a version that kept no class names, so those of %s cannot "
                "be checked. The next checkpoint will keep them.", name,
            )  # fmt: skip
    raise_together(training, problem)


def _exchanged(then: Mapping[str, Any], now: Mapping[str, Any], name: str) -> str | None:
    """Describe labels that mean other classes than ``then``, by class names and first images."""
    before, names = then.get(KEY), now.get(KEY)
    remedy = (
        "The run would continue with wrong labels. Restore the classes (folders), or start a new "
        "run in another output folder."
    )
    if before is not None and names is not None and list(before) != list(names):
        pairs = enumerate(zip(before, names, strict=True))
        changed = [f"{at} was {old!r} and is {new!r}" for at, (old, new) in pairs if old != new]
        more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
        return f"the classes of {name} have changed: class {'; '.join(changed[:3])}{more}. {remedy}"
    old_images, images = then.get("first_images") or [], now.get("first_images") or []
    for at, (old, new) in enumerate(zip(old_images, images, strict=False)):
        if new and new != old and new in old_images:
            called = [repr(names[i]) if names else i for i in (old_images.index(new), at)]
            return (
                f"the first image of class {called[0]} of {name} is now in class {called[1]}: the "
                f"images of classes were exchanged. {remedy}"
            )
    return None


def _warn_if_inexact(training: Training, state: Mapping[str, Any]) -> None:
    """Warn of another number of threads (on the CPU) or torch version than in the checkpoint."""
    if not training.accelerator.is_main_process:
        return
    differs = "its weights may differ in the last bits from those of an uninterrupted run"
    before, now = state.get("threads"), torch.get_num_threads()
    if before not in (None, now) and training.accelerator.device.type == "cpu":
        logger.warning(
            "the checkpoint was written with threads=%d and this run has threads=%d: %s. Resume "
            "with --set threads=%d (or OMP_NUM_THREADS=%d) for identical weights.",
            before, now, differs, before, before,
        )  # fmt: skip
    version, own = state.get("torch"), str(torch.__version__)
    if version not in (None, own):
        logger.warning(
            "the checkpoint was written with torch %s and this run has torch %s: %s. Resume with "
            "torch %s for identical weights.", version, own, differs, version,
        )  # fmt: skip


def _quiet(training: Training, needed: bool) -> Any:
    # torch allocates a sharded optimizer's state by a step at rate 0. No regularizer must act then.
    if not (needed and is_sharded(training.accelerator)):
        return nullcontext()
    return detached(training.optim.regularizers, training.optim.inner, training.observers.stopwatch)
