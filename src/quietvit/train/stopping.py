"""SIGTERM, which cluster managers send before they take a machine away: told to all processes.

What is saved then is the loop's matter.
"""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

EXIT_CODE = 128 + signal.SIGTERM


class Termination:
    """Remembers SIGTERM until the step is finished; between processes all learn of it together.

    In several processes it takes one step more, so that no step waits for the news. Signals can
    only be caught in the main thread; elsewhere SIGTERM ends the process as ever.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._asked = False
        self._news: torch.Tensor | None = None
        self._before: Any = None
        self._caught = threading.current_thread() is threading.main_thread()
        if self._caught:
            self._before = signal.signal(signal.SIGTERM, self._ask)

    def due(self) -> bool:
        """Return whether to stop here, the same in every process. To be asked once a step."""
        if self._accelerator.num_processes == 1:
            return self._asked
        news, asked = self._news, torch.tensor([int(self._asked)], device=self._accelerator.device)
        self._news = self._accelerator.reduce(asked, reduction="sum")
        return news is not None and int(news) > 0

    def close(self) -> None:
        """Give the signal back to whom it belonged."""
        if self._caught:
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True


def ignore_in_worker(worker: int) -> None:
    """Keep a loader's process alive under the first SIGTERM, so that the step can be finished.

    The second one ends it: multiprocessing terminates the workers it could not reach otherwise, at
    the end of the program, and would wait for ever for one that ignores it.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def end_workers(loader: Any) -> None:
    """End the processes of a loader now, also where the traceback of an error still holds them.

    Left to the end of the program, torch no longer ends them in good order: it waits for those that
    outlive the first SIGTERM.
    """
    for part in (loader, getattr(loader, "base_dataloader", None)):
        workers = getattr(part, "_iterator", None)
        if part is not None and workers is not None:
            workers._shutdown_workers()
            part._iterator = None
