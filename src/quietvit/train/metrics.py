"""Numbers of a run as it goes: one JSON object a line in metrics.jsonl, and TensorBoard.

The time spent in regularizers is measured here too. Nothing is computed about the model.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from quietvit.errors import QuietvitError
from quietvit.files import write_atomic

logger = logging.getLogger("quietvit")

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"

_PENDING = 64


class Metrics:
    """Appends to ``output/metrics.jsonl``; lines after ``step`` (of a run cut off) are dropped.

    The line of ``metric``, or of a change, at ``step`` itself is dropped too: it came after the
    checkpoint and comes again.
    Raises QuietvitError where the disk is full or the files cannot be written.
    """

    def __init__(self, output: Path, step: int, tensorboard: bool, metric: str = "top1") -> None:
        self._after_checkpoint = (metric, "changed")
        self.path = output / METRICS
        self._curves = output / TENSORBOARD
        write_atomic(self.path, "".join(f"{json.dumps(line)}\n" for line in self._until(step)))
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge = step + 1 if step else None
            with _telling(self._curves, step):
                self._writer = SummaryWriter(str(self._curves), purge_step=purge)  # type: ignore[no-untyped-call]

    def write(self, step: int, **values: float | str) -> None:
        """Add one line, and one point to each TensorBoard curve of numbers.

        Raises QuietvitError where the disk is full or one of the files cannot be written.
        """
        with _telling(self.path, step), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        with _telling(self._curves, step):
            for name, value in values.items():
                if self._writer is not None and name != "epoch" and not isinstance(value, str):
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """End the curves. What goes wrong is logged: it must not hide why the run ends."""
        if self._writer is None:
            return
        try:
            self._writer.close()
        except Exception as error:
            logger.warning(
                "the curves in %s could not be finished (%s); what was logged is in %s too.",
                self._curves, error, self.path,
            )  # fmt: skip

    def _until(self, step: int) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = []
        for text in self.path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            again = any(key in line for key in self._after_checkpoint)
            if line["step"] <= step - again:
                lines.append(line)
        return lines


@contextmanager
def _telling(path: Path, step: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise QuietvitError(
            f"{path} could not be written at step {step} ({error.strerror or error}); free some "
            "space and resume: the checkpoints written so far are whole."
        ) from error


class Stopwatch:
    """Time of the regularizers: their hooks on an optimizer, and while ``running``.

    On a GPU by events, of which at most ``_PENDING`` spans are held: a new one adds up the oldest,
    which the GPU has left behind long before.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds
        self._began = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._handles: list[Any] = []

    @contextmanager
    def around_hooks(self, optimizer: Optimizer) -> Iterator[None]:
        """Time the hooks, before and after a step, that are registered inside."""
        for register in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook):
            self._handles.append(register(lambda *_: self._start()))
        yield
        for register in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook):
            self._handles.append(register(lambda *_: self._stop()))

    def unhook(self) -> None:
        """Time no hooks any more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time what is inside, too."""
        self._start()
        yield
        self._stop()

    def reset(self, seconds: float) -> None:
        """Go on from ``seconds``."""
        self._seconds = seconds
        self._events.clear()

    @property
    def seconds(self) -> float:
        """Time so far; waits for the accelerator."""
        self._add_up(keep=0)
        return self._seconds

    def _add_up(self, keep: int) -> None:
        while len(self._events) > keep:
            first, last = self._events.popleft()
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1000

    def _start(self) -> None:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self._add_up(keep=_PENDING - 1)
            self._events.append((_event(), _event()))
            self._events[-1][0].record()
        else:
            self._began = time.perf_counter()

    def _stop(self) -> None:
        if self._events:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._began


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
