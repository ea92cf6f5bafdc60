"""Functions in several processes at once, forked from a server that has imported what they need.

Starting a process anew takes seconds of imports; a test that is not about the start itself need not
pay for them.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

PRELOADED = ("torch", "timm", "torch.distributed.fsdp", "torch._dynamo", "quietvit.train")


def run_in_processes(function: Callable[..., None], *args: Any, count: int = 2) -> None:
    """Call ``function(rank, *args)`` in each process, with one thread; raise what one raises."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOADED))
    torch.multiprocessing.start_processes(
        _with_one_thread, (function, args), nprocs=count, start_method="forkserver"
    )


def _with_one_thread(rank: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    function(rank, *args)
