"""Too little memory for a pass, told with what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from quietvit.errors import QuietvitError
from quietvit.train.config import TrainConfig

_ON_CPU = "DefaultCPUAllocator"


@contextmanager
def enough_memory(config: TrainConfig) -> Iterator[None]:
    """Turn running out of memory, on a GPU or by an allocation on the CPU, into a QuietvitError."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or _ON_CPU in str(error)):
            raise
        batch, accumulation = config.batch_size, config.accumulation
        smaller = (
            "" if batch % 2 else f" (batch_size {batch // 2} and accumulation {2 * accumulation})"
        )
        sharded = (
            "" if config.parallel == "fsdp2" else ", or parallel to 'fsdp2' in several processes"
        )
        raise QuietvitError(
            f"passes of batch_size {batch} take more memory than there is "
            f"({str(error).splitlines()[0]}). Lower batch_size and raise accumulation by the same "
            f"factor, which keeps the steps{smaller}; or set precision to 'bf16'{sharded}."
        ) from error
