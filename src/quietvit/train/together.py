"""Actions and errors that all processes of a run share, so that none waits for a stopped one.

Every process must call each function, in the same order.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from quietvit.classes import facts_of_names, metadata_of
from quietvit.errors import QuietvitError
from quietvit.files import held, write_atomic
from quietvit.quantization import QuantizedModel
from quietvit.train.checkpoint import set_aside_after
from quietvit.train.engine import gathered, is_sharded, whole_model
from quietvit.train.folder import refuse_used, written
from quietvit.train.result import CHECKPOINTS, weights_of
from quietvit.train.training import Training

logger = logging.getLogger("quietvit")

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def alone(training: Training, begun: bool, force: bool, discard: bool, then: Any) -> Iterator[None]:
    """Lock the output folder inside, so that no other run writes into it.

    ``then`` is the result of ``written`` from before this run read the folder.

    Raises:
        QuietvitError: another run holds the folder, or has written to it since then.
    """
    output, problem = training.config.output, None
    with ExitStack() as stack:
        if training.accelerator.is_main_process:
            try:
                stack.enter_context(held(output))
                if not begun:
                    refuse_used(output, force, discard)
                elif written(output) != then:
                    problem = f"another process wrote into {output} in the meantime; resume again."
            except QuietvitError as error:
                problem = str(error)
        raise_together(training, problem)
        yield


def raise_together(training: Training, error: str | None) -> None:
    """Raise QuietvitError in every process if ``error`` is not None in one of them."""
    errors = [message for message in gathered(training.accelerator, error) if message is not None]
    if errors:
        raise QuietvitError(errors[0])


def check_same_checkpoint(training: Training, step: int | None) -> None:
    """Refuse to continue unless all processes read a checkpoint of the same step."""
    steps = gathered(training.accelerator, step)
    if len(set(steps)) > 1:
        raise QuietvitError(
            f"the processes found different checkpoints in {training.config.output} (at the steps "
            f"{steps}); the output folder must lie on a file system that all machines share."
        )


def set_damaged_aside(training: Training, step: int) -> None:
    """Set damaged checkpoints after ``step`` aside in the main process. A failure stops all."""
    problem, config = None, training.config
    if training.accelerator.is_main_process:
        try:
            set_aside_after(config.output / CHECKPOINTS, step, config.checkpoint.keep)
        except (OSError, QuietvitError) as error:
            problem = str(error)
    raise_together(training, problem)


def weights_alike(training: Training, step: int) -> bool:
    """Return whether all processes hold the same weights, and warn if not.

    With DDP each process updates its own copy. Kernels that give different bits on different GPUs
    make the copies drift apart. Sharded weights have only one copy.
    """
    if is_sharded(training.accelerator):
        return True
    sums = gathered(training.accelerator, sum_of_bits(training.models.plain.parameters()))
    if len(set(sums)) == 1:
        return True
    if training.accelerator.is_main_process:
        logger.warning(
            "at step %d the processes do not hold the same weights any more; the weights of the "
            "first are saved. Use GPUs of one kind, or set decay.cd.sharded=true, which computes "
            "the decay of each pair in one process for all.",
            step,
        )
    return False


def sum_of_bits(tensors: Iterable[Tensor]) -> int:
    """Sum the bits of all values as integers: the same in any order and on any device."""
    sums = [
        tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
        for tensor in tensors
    ]
    return int(torch.stack(sums).sum())


def write_weights(training: Training) -> None:
    """Write the final weights: those of the moving average if there is one.

    A quantized model is saved as ``QuantizedModel.save`` does.
    """
    problem, ema = None, training.models.average
    plain = training.models.plain if ema is None else ema.module
    path = weights_of(training.config)
    quantized = isinstance(plain, QuantizedModel)
    state = {} if quantized else whole_model(training.accelerator, plain)
    if training.accelerator.is_main_process:
        try:
            if isinstance(plain, QuantizedModel):
                plain.save(path, force=True)
            else:
                _write_tensors(path, state, training.models.core)
        except QuietvitError as error:
            problem = str(error)
    raise_together(training, problem)


def _write_tensors(path: Path, state: Mapping[str, Tensor], model: nn.Module) -> None:
    weights = {
        key: value.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        for key, value in state.items()
    }
    write_atomic(path, save(weights, metadata_of(facts_of_names(model))))
