"""The state of a run as a checkpoint holds it: collected from all processes, given back to them.

The files are ``checkpoint``'s matter; when a checkpoint is written, ``loop``'s.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from quietvit.errors import QuietvitError
from quietvit.train.engine import gathered, is_sharded, load_whole, whole_model, whole_optimizer
from quietvit.train.order import generator_states, set_generator_states
from quietvit.train.regularizers import detached
from quietvit.train.setup import Parts

logger = logging.getLogger("quietvit")


def collect(parts: Parts) -> dict[str, Any]:
    """Return the state of the parts, of the same form in one process, under DDP and FSDP2.

    Every process must call; what the main process gets is whole.
    """
    p = parts
    scaler = p.accelerator.scaler
    generators: list[Any] = gathered(p.accelerator, generator_states(p.accelerator.device))
    with _quiet(p, not p.inner.state):
        optimizer = whole_optimizer(p.accelerator, p.plain, p.inner)
    return {
        "processes": p.accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "model": whole_model(p.accelerator, p.plain),
        "ema": None if p.ema is None else p.ema.module.state_dict(),
        "optimizer": optimizer,
        "scaler": None if scaler is None else scaler.state_dict(),
        "decays": {name: part.state_dict() for name, part in p.regularizers.items()},
        "generators": generators,
    }


def restore(parts: Parts, state: Mapping[str, Any]) -> None:
    """Load what ``collect`` gave, in every process.

    A warning tells of another number of threads or version of torch.

    Raises:
        QuietvitError: another number of processes, other regularizers or optimizer groups.
    """
    p = parts
    check_processes(p, state)
    _warn_if_inexact(p, state)
    if set(state["decays"]) != set(p.regularizers):
        raise QuietvitError(
            f"the checkpoint was written with the regularizers {sorted(state['decays'])} and this "
            f"run has {sorted(p.regularizers)}; resume with the same ones."
        )
    with _quiet(p, True):
        load_whole(p.accelerator, p.plain, p.inner, state["model"], state["optimizer"])
    if p.ema is not None:
        p.ema.module.load_state_dict(state["ema"])
    if p.accelerator.scaler is not None:
        p.accelerator.scaler.load_state_dict(state["scaler"])
    for name, part in p.regularizers.items():
        part.load_state_dict(state["decays"][name])
    set_generator_states(state["generators"][p.accelerator.process_index], p.accelerator.device)


def check_processes(parts: Parts, state: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another number of processes, saying how to go on."""
    saved, now = state["processes"], parts.accelerator.num_processes
    if saved == now:
        return
    config = parts.config
    batch, rest = divmod(config.batch_size * saved, now)
    instead = "" if rest else f" (batch_size {batch} keeps the effective batch)"
    raise QuietvitError(
        f"the checkpoint was written by {saved} processes and this run has {now}; resume with "
        f"{saved} (torchrun --nproc-per-node, accelerate launch --num_processes). With {now}, the "
        "order of the images cannot go on as it was: start anew in another output folder, with "
        f"model.weights if you want the weights so far{instead}."
    )


def check_same_checkpoint(parts: Parts, step: int | None) -> None:
    """Refuse to go on where the processes do not read the same checkpoint. All must call."""
    steps = gathered(parts.accelerator, step)
    if len(set(steps)) > 1:
        raise QuietvitError(
            f"the processes found different checkpoints in {parts.config.output} (at the steps "
            f"{steps}); the output folder must lie on a file system that all machines share."
        )


def raise_together(parts: Parts, error: str | None) -> None:
    """Raise in every process what went wrong in one, so that none waits for it. All must call."""
    errors = [found for found in gathered(parts.accelerator, error) if found is not None]
    if errors:
        raise QuietvitError(errors[0])


def _warn_if_inexact(parts: Parts, state: Mapping[str, Any]) -> None:
    """Say on the main process what makes the resumed run differ in the last bits of its weights.

    Threads count on the CPU alone. Checkpoints of earlier versions do not hold these facts.
    """
    if not parts.accelerator.is_main_process:
        return
    differs = (
        "it goes on, but its weights may differ in the last bits from those of an uninterrupted run"
    )
    before, now = state.get("threads"), torch.get_num_threads()
    if before not in (None, now) and parts.accelerator.device.type == "cpu":
        logger.warning(
            "the checkpoint was written with threads=%d and this run has threads=%d: %s. Resume "
            "with --set threads=%d (or OMP_NUM_THREADS=%d) to have them the same.",
            before, now, differs, before, before,
        )  # fmt: skip
    version, own = state.get("torch"), str(torch.__version__)
    if version not in (None, own):
        logger.warning(
            "the checkpoint was written with torch %s and this run has torch %s: %s. Resume with "
            "torch %s to have them the same.", version, own, differs, version,
        )  # fmt: skip


def _quiet(parts: Parts, needed: bool) -> Any:
    # torch makes room for a sharded optimizer's state by stepping it at rate 0.
    if not (needed and is_sharded(parts.accelerator)):
        return nullcontext()
    return detached(parts.regularizers, parts.inner, parts.stopwatch)
