"""Turn out-of-memory errors into errors that name the settings to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import torch

from quietvit.errors import QuietvitError
from quietvit.train.config import TrainConfig


class Stage(Enum):
    """What runs: the set-up, a training step, or an evaluation."""

    BUILD = "build"
    STEP = "step"
    EVALUATION = "evaluation"


@contextmanager
def enough_memory(config: TrainConfig, stage: Stage) -> Iterator[None]:
    """Raise a QuietvitError with remedies if a GPU or the CPU runs out of memory inside."""
    try:
        yield
    except RuntimeError as error:
        if not is_want_of_memory(error):
            raise
        what, remedies = _told(config, stage)
        raise QuietvitError(
            f"{what} takes more memory than there is ({str(error).splitlines()[0]}): "
            f"{', or '.join(remedies)}."
        ) from error


def is_want_of_memory(error: Exception) -> bool:
    """Whether ``error`` means that a GPU or the CPU ran out of memory."""
    text = str(error)
    if "DataLoader worker" in text:
        return False
    told = ("DefaultCPUAllocator", "CUDA error: out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(part in text for part in told)


def _told(config: TrainConfig, stage: Stage) -> tuple[str, list[str]]:
    """Return what needs too much memory, and the remedies for this configuration."""
    batch = config.batch_size
    sharded = []
    if config.parallel == "fsdp2":
        sharded = ["start more processes, which share the model"]
    elif config.ema is None:
        sharded = ["shard the model over several processes with parallel='fsdp2'"]
    if stage is Stage.BUILD:
        return f"{config.model.name} with its optimizer", ["take a smaller model", *sharded]
    half, odd = divmod(batch, 2)
    smaller = ["lower batch_size and raise accumulation by the same factor, which keeps the steps"]
    if not odd and not (config.mix.active and half % 2):
        smaller[0] += f" ({half} and {2 * config.accumulation})"
    smaller = smaller if batch > 1 else []
    if stage is Stage.EVALUATION:
        return f"the evaluation, {2 * batch} images at a time in float32,", [*smaller, *sharded]
    precise = ["set precision to 'bf16'"] if config.precision == "no" else []
    return f"a pass with batch_size {batch}", [*smaller, *precise, *sharded, "a smaller model"]
