"""Functions in several processes at once, forked from a server that has imported what they need.

Starting a process anew takes seconds of imports; a test that is not about the start itself need not
pay for them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

# What a run imports. scikit-learn, for its digits, takes as long as torch.
PRELOADED = (
    *("torch", "timm", "torch.distributed.fsdp", "torch._dynamo", "accelerate"),
    *("sklearn.datasets", "quietvit.cli", "quietvit.train.loop"),
)
LIMIT = 300


def run_in_processes(function: Callable[..., None], *args: Any, count: int = 2) -> None:
    """Call ``function(rank, *args)`` in each process, with one thread; raise what one raises.

    The environment is that of now, not of the server's start. Ended after ``LIMIT`` seconds.
    """
    _preload()
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


@contextmanager
def session(
    function: Callable[..., None], *args: Any, folder: Path, log: Path
) -> Iterator[multiprocessing.process.BaseProcess]:
    """Start ``function(*args)`` as a shell starts a command: in a process group of its own.

    The group is killed at the end, so that a failed test leaves nothing behind.

    Args:
        function: What is called.
        args: Its arguments.
        folder: The working folder.
        log: The file that gets its output and its errors.
    """
    _preload()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = multiprocessing.get_context("forkserver").Process(
        target=_in_session, args=(function, args, environment, str(folder), str(log))
    )
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _preload() -> None:
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOADED))


def _in_session(
    function: Callable[..., None],
    args: tuple[Any, ...],
    environment: dict[str, str],
    folder: str,
    log: str,
) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    _prepare(environment)
    function(*args)


def _prepared(
    rank: int, function: Callable[..., None], args: tuple[Any, ...], environment: dict[str, str]
) -> None:
    _prepare(environment)
    function(rank, *args)


def _prepare(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
