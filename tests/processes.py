"""Functions in several processes at once, forked from a server that has imported what they need.

Starting a process anew takes seconds of imports; a test that is not about the start itself need not
pay for them.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import torch

# What a run imports. scikit-learn, for its digits, takes as long as torch.
PRELOADED = (
    *("torch", "timm", "torch.distributed.fsdp", "torch._dynamo", "accelerate"),
    *("sklearn.datasets", "quietvit.train.loop"),
)
LIMIT = 300


def run_in_processes(function: Callable[..., None], *args: Any, count: int = 2) -> None:
    """Call ``function(rank, *args)`` in each process, with one thread; raise what one raises.

    The environment is that of now, not of the server's start. Ended after ``LIMIT`` seconds.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOADED))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    context = torch.multiprocessing.start_processes(
        _prepared,
        (function, args, environment),
        nprocs=count,
        join=False,
        start_method="forkserver",
    )
    end = time.monotonic() + LIMIT
    try:
        while not context.join(timeout=max(0.1, end - time.monotonic())):
            assert time.monotonic() < end, f"{function.__name__} did not end in {LIMIT} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


def _prepared(
    rank: int, function: Callable[..., None], args: tuple[Any, ...], environment: dict[str, str]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(rank, *args)
