"""Evaluate the weights of a run on its test images, of which each process takes a share.

With FSDP2 no process ever holds the whole model: the weights of a block are gathered before it
runs and freed after it. ``loop`` decides when to evaluate.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from quietvit.tensors import all_gathered
from quietvit.tracing import evaluating
from quietvit.tracing.block_modules import lies_within
from quietvit.tracing.scales import read_entry
from quietvit.train.engine import gathered, is_sharded
from quietvit.train.qat import core_of
from quietvit.train.stopping import Stoppable, Termination, ignore_in_worker, refuse_if_due

if TYPE_CHECKING:
    from quietvit.train.training import Training


def scores(
    training: Training,
    test: Any,
    termination: Termination,
    *,
    average: bool = True,
    progress: bool = False,
) -> dict[str, float]:
    """Return the task's figures on the test images, with its metric. Every process must call.

    The weights are those of the moving average if there is one and ``average`` is True, else the
    last weights. The computation is in float32, whatever the precision of the training steps.

    Raises:
        StopRequestedError: ``termination`` is due. This is checked before each batch.
    """
    accelerator, size = training.accelerator, 2 * training.config.batch_size
    rank, processes = accelerator.process_index, accelerator.num_processes
    places = range(rank, len(test), processes)
    share: Any = Subset(test, places) if processes > 1 else test
    task, own = training.task, None
    with judged(training, average) as model:
        if len(share):
            loader = task.evaluation_loader(
                core_of(model), share, size, training.config.num_workers
            )
            loader.worker_init_fn = ignore_in_worker
            batches: Any = Stoppable(loader, termination)
            own = task.judge(model, batches, accelerator.device, progress)
        largest_share = math.ceil(len(test) / processes)
        for _ in range(math.ceil(largest_share / size) - math.ceil(len(share) / size)):
            refuse_if_due(termination)
            if is_sharded(accelerator):
                _run_along(training, model)
    return task.figures([result for result in gathered(accelerator, own) if result is not None])


@contextmanager
def judged(training: Training, average: bool = True) -> Iterator[nn.Module]:
    """Yield the model to evaluate: an unwrapped copy with the current weights.

    If the model is sharded, all processes must enter together and run it equally often inside.
    """
    t = training
    if is_sharded(t.accelerator):
        with filled(t.models.evaluated, t.models.plain, t.observers.watch.blocks):
            yield t.models.evaluated
        return
    source = t.models.average.module if average and t.models.average is not None else t.models.plain
    t.models.evaluated.load_state_dict(source.state_dict())
    yield t.models.evaluated


def without_memory(model: nn.Module) -> nn.Module:
    """Return a copy of the model whose parameters use no memory (device ``meta``)."""
    shapes: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for p in model.parameters()
    }
    return copy.deepcopy(model, shapes)


@contextmanager
def filled(copied: nn.Module, model: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Make ``copied``, from ``without_memory``, compute with the weights of ``model`` inside.

    The weights of a block exist while the block runs. Weights outside ``blocks`` exist all the
    time inside. If ``model`` is sharded, every block gathers its weights from all processes.
    """
    names: dict[str, list[str]] = {block: [] for block in ("", *blocks)}
    for name, _ in model.named_parameters(remove_duplicate=False):
        names[next((block for block in blocks if lies_within(name, block)), "")].append(name)

    def fill(block: str) -> None:
        parts = {name: read_entry(model, name) for name in names[block]}
        for name, whole in all_gathered(parts).items():
            _put(copied, name, whole)

    def empty(block: str) -> None:
        for name in names[block]:
            _put(copied, name, torch.empty_like(read_entry(copied, name), device="meta"))

    handles: list[Any] = []
    try:
        for block in blocks:
            module = copied.get_submodule(block)
            handles += [
                module.register_forward_pre_hook(lambda *_, block=block: fill(block)),
                module.register_forward_hook(lambda *_, block=block: empty(block)),
            ]
        for name, buffer in model.named_buffers(remove_duplicate=False):
            read_entry(copied, name).copy_(buffer)
        fill("")
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block in names:
            empty(block)


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    module, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module), attribute, nn.Parameter(value, requires_grad=False))


@torch.no_grad()
def _run_along(training: Training, model: nn.Module) -> None:
    """Run one pass on noise: the other processes have one more batch and gather weights with us."""
    from accelerate.utils import send_to_device

    inputs, _ = training.task.stand_in(model, 1)
    with evaluating(model):
        model(send_to_device(inputs, training.accelerator.device))
