"""Stop all processes together, after the current step, on SIGTERM or Ctrl-C (SIGINT).

``loop`` decides what is saved then.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
# Ctrl-C reaches all processes of a terminal, and torchrun sends the signal to its own once more.
_ECHO_SECONDS = 3.0


class StopRequestedError(Exception):
    """A signal asked the run to stop during an evaluation. All processes raise it together."""


class Termination:
    """Remembers SIGTERM or Ctrl-C until the step is finished and tells all processes.

    Several processes stop one step later, so that no step waits for the exchange. A second Ctrl-C
    raises KeyboardInterrupt at once. Python catches signals in the main thread only; in other
    threads they keep their effect. A signal that was ignored before (nohup) stays ignored.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._process = os.getpid()
        self._asked: dict[int, float] = {}
        self._news: torch.Tensor | None = None
        self._by: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in _NAMES:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._ask)

    def due(self) -> bool:
        """Return whether to stop here, the same in every process. Every process must call."""
        flags = [int(number in self._asked) for number in _NAMES]
        if self._accelerator.num_processes > 1:
            before, own = self._news, torch.tensor(flags, device=self._accelerator.device)
            self._news = self._accelerator.reduce(own, reduction="sum")
            flags = [0] * len(flags) if before is None else before.tolist()
        for number, flag in zip(_NAMES, flags, strict=True):
            if flag and self._by is None:
                self._by = number
        return any(flags)

    def end(self, told: str) -> NoReturn:
        """End the run as the signal asks, after ``due`` or ``pending``.

        SIGTERM exits with code 143, as in shells. Ctrl-C raises KeyboardInterrupt(``told``).
        """
        self._asked.clear()
        if self._by is signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt(told)

    @property
    def by(self) -> str:
        """The signal that asked to stop: ``SIGTERM`` or ``Ctrl-C``."""
        assert self._by is not None
        return _NAMES[self._by]

    def pending(self) -> bool:
        """Whether this process was asked to stop and has not stopped yet."""
        if self._by is None:
            self._by = next((number for number in _NAMES if number in self._asked), None)
        return bool(self._asked)

    def close(self) -> None:
        """Restore the earlier signal handlers."""
        for number, before in self._before.items():
            signal.signal(number, before or signal.SIG_DFL)
        self._before = {}

    def _ask(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a loader's worker, forked a moment ago
            return
        first, now = self._asked.get(number), time.monotonic()
        if first is None:
            self._asked[number] = now
            if number == signal.SIGINT and self._accelerator.is_main_process:
                _say("Ctrl-C: finishing the step and writing a checkpoint. Press it again to ")
                _say("stop at once, without a checkpoint.\n")
            return
        echo = self._accelerator.num_processes > 1 and now - first < _ECHO_SECONDS
        if number == signal.SIGINT and not echo:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt


def _say(text: str) -> None:
    """Write to standard error from a signal handler, which must not use buffered streams."""
    with suppress(OSError):
        os.write(2, text.encode())


class Stoppable:
    """The batches of a loader. Raises StopRequestedError before a batch if a stop is due."""

    def __init__(self, loader: Any, termination: Termination) -> None:
        self._loader, self._termination = loader, termination

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            refuse_if_due(self._termination)
            yield batch


def refuse_if_due(termination: Termination) -> None:
    """Raise StopRequestedError if a stop is due. Every process must call."""
    if termination.due():
        raise StopRequestedError


def ignore_in_worker(worker: int) -> None:
    """Make a loader's worker ignore Ctrl-C and the first SIGTERM, because the step needs it.

    The second SIGTERM ends it. At exit, multiprocessing sends SIGTERM to the remaining workers and
    would wait forever for one that ignores it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def end_workers(loader: Any) -> None:
    """End the workers of a loader now, even if the traceback of an error still refers to them.

    At the end of the program torch cannot shut them down cleanly: it would wait for workers that
    survive the first SIGTERM.
    """
    for wrapped in (loader, getattr(loader, "base_dataloader", None)):
        workers = getattr(wrapped, "_iterator", None)
        if wrapped is not None and workers is not None:
            workers._shutdown_workers()
            wrapped._iterator = None
