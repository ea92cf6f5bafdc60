"""The state of a run as a checkpoint holds it: collected from all processes, given back to them.

And what all processes do together before they go on from one. The files are ``checkpoint``'s
matter; when a checkpoint is written, ``loop``'s.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from quietvit.data import ImageDataset
from quietvit.decay.plan import widest
from quietvit.errors import QuietvitError
from quietvit.files import held
from quietvit.train.checkpoint import set_aside_after
from quietvit.train.engine import gathered, is_sharded, load_whole, whole_model, whole_optimizer
from quietvit.train.folder import CHECKPOINTS, refuse_used
from quietvit.train.order import generator_states, set_generator_states
from quietvit.train.parts import Parts
from quietvit.train.regularizers import detached

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
        **shares(p),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "model": whole_model(p.accelerator, p.plain),
        "ema": None if p.ema is None else p.ema.module.state_dict(),
        "optimizer": optimizer,
        "scaler": None if scaler is None else scaler.state_dict(),
        "decays": {name: part.state_dict() for name, part in p.regularizers.items()},
        "generators": generators,
    }


def restore(parts: Parts, state: Mapping[str, Any]) -> float:
    """Load what ``collect`` gave, in every process. Returns batches of now in one of before.

    A warning tells of another number of threads or processes, or version of torch.

    Raises:
        QuietvitError: steps of another number of images, other regularizers or optimizer groups.
    """
    p = parts
    batches = check_steps(p, state)
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
    if p.accelerator.scaler is not None and state["scaler"] is not None:
        p.accelerator.scaler.load_state_dict(state["scaler"])
    for name, part in p.regularizers.items():
        part.load_state_dict(state["decays"][name])
    rank, generators = p.accelerator.process_index, state["generators"]
    if len(generators) == p.accelerator.num_processes:
        set_generator_states(generators[rank], p.accelerator.device)
    else:  # of as many processes there is no state to go on from
        from accelerate.utils import set_seed

        set_seed(p.config.seed + state["step"], device_specific=True)
    return batches


def shares(parts: Parts) -> dict[str, int]:
    """How the images of a step are shared out."""
    return {
        "processes": parts.accelerator.num_processes,
        "accumulation": parts.config.accumulation,
        "batch_size": parts.config.batch_size,
    }


def check_steps(parts: Parts, state: Mapping[str, Any]) -> float:
    """Refuse a checkpoint of steps of other images, saying how to go on.

    A step takes ``accumulation x processes`` batches that follow each other in one order, so all
    three numbers may change as long as their product does not. Returns how many batches now make
    one of before.
    """
    now = shares(parts)
    before = {key: state.get(key, now[key]) for key in now}  # earlier versions: processes alone
    if math.prod(before.values()) == math.prod(now.values()):
        if before != now and parts.accelerator.is_main_process:
            logger.warning(
                "the steps of %s are shared out as %s now: the images of each are the same, what "
                "is drawn at random (dropout, mixup) is not.", _shown(before), _shown(now),
            )  # fmt: skip
        return before["batch_size"] / now["batch_size"]
    each, rest = divmod(before["accumulation"] * before["processes"], now["processes"])
    other = "" if rest else f", or batch_size {before['batch_size']} and accumulation {each} here"
    raise QuietvitError(
        f"the checkpoint was written with {_shown(before)}, and this run has {_shown(now)}: its "
        f"steps would be of other images. Resume with those{other} (the product must stay), or "
        "start anew in another output folder, from the weights so far (model.weights: "
        "model.safetensors in the checkpoint's folder)."
    )


def _shown(share: Mapping[str, int]) -> str:
    return ", ".join(f"{key} {value}" for key, value in share.items())


def dealt(parts: Parts, saved: Sequence[Any]) -> list[Any]:
    """Of values that each process saved, those that this one goes on with; none is left out."""
    return list(saved[parts.accelerator.process_index :: parts.accelerator.num_processes])


@contextmanager
def alone(parts: Parts, begun: bool, force: bool) -> Iterator[None]:
    """Hold the output folder, so that no other run writes into it. All processes must call.

    Raises:
        QuietvitError: another run has it, or has begun one there since this one looked.
    """
    output, problem = parts.config.output, None
    with ExitStack() as stack:
        if parts.accelerator.is_main_process:
            try:
                stack.enter_context(held(output))
                if not begun:
                    refuse_used(output, force)
            except QuietvitError as error:
                problem = str(error)
        raise_together(parts, problem)
        yield


def set_damaged_aside(parts: Parts, step: int) -> None:
    """Set damaged checkpoints after ``step`` aside, by the main process; a failure stops all."""
    problem, config = None, parts.config
    if parts.accelerator.is_main_process:
        try:
            set_aside_after(config.output / CHECKPOINTS, step, config.checkpoint.keep)
        except (OSError, QuietvitError) as error:
            problem = str(error)
    raise_together(parts, problem)


def check_same_data(before: Mapping[str, Any] | None, now: Mapping[str, Any], name: str) -> None:
    """Refuse to go on with other training images than before (``data_facts``).

    Checkpoints of earlier versions do not tell: ``before`` is then None.
    """
    if before is not None and dict(before) != dict(now):
        raise QuietvitError(
            f"the run was begun with {before['images']} training images of {before['classes']} "
            f"classes, and {name} has {now['images']} of {now['classes']}"
            + (", labelled otherwise" if before["images"] == now["images"] else "")
            + "; resume with the same images (they may lie elsewhere, see data.dataset), or start "
            "anew in another output folder."
        )


def data_facts(train: ImageDataset) -> dict[str, Any]:
    """What tells one set of training images from another: their number, classes and labels."""
    labels = hashlib.sha256(train.labels.tobytes()).hexdigest()
    return {"images": len(train), "classes": train.num_classes, "labels": labels}


def weights_alike(parts: Parts, step: int) -> bool:
    """Whether all processes hold the same weights; where not, a warning says so. All must call.

    Each keeps and changes a copy of its own, so kernels that do not give the same bits on each GPU
    would let them drift apart unseen. What is kept in parts cannot.
    """
    if is_sharded(parts.accelerator):
        return True
    sums = [p.detach().sum(dtype=widest(p.device)) for p in parts.plain.parameters()]
    found = gathered(parts.accelerator, float(torch.stack(sums).sum()))
    if len(set(found)) == 1:
        return True
    if parts.accelerator.is_main_process:
        logger.warning(
            "at step %d the processes do not hold the same weights any more (their sums: %s); what "
            "is saved is those of the first. Are the GPUs of one kind? decay.cd.sharded=true "
            "computes the decay of each pair in one process for all.",
            step, ", ".join(f"{value:.17g}" for value in found[:4]),
        )  # fmt: skip
    return False


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
