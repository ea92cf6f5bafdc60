"""Write the metrics of a run to metrics.jsonl (one JSON object a line) and to TensorBoard.

``Stopwatch`` measures the time spent in regularizers. ``loop`` decides what is logged.
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
    """Appends lines to ``output/metrics.jsonl``. Drops the lines after ``step`` when created.

    Lines at ``step`` itself with ``metric`` or a changed setting are dropped too: they were written
    after the checkpoint and will be written again.
    Raises QuietvitError if the disk is full or the files cannot be written.
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

        Raises QuietvitError if the disk is full or a file cannot be written.
        """
        with _telling(self.path, step), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        with _telling(self._curves, step):
            for name, value in values.items():
                if self._writer is not None and name != "epoch" and not isinstance(value, str):
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Close TensorBoard. Only log a failure, so that it does not hide why the run ends."""
        if self._writer is None:
            return
        try:
            self._writer.close()
        except Exception as error:
            logger.warning(
                "the curves in %s could not be finished (%s); %s has the same values.",
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
    """Measures the time of the regularizers: their optimizer hooks, and blocks in ``running``.

    On a GPU it uses CUDA events and keeps at most ``_PENDING`` pairs. A new pair evaluates the
    oldest one, which the GPU finished long ago, so nothing waits.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds
        self._began = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._handles: list[Any] = []

    @contextmanager
    def around_hooks(self, optimizer: Optimizer) -> Iterator[None]:
        """Time the step hooks registered inside: they run between a start and a stop hook."""
        for register in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook):
            self._handles.append(register(lambda *_: self._start()))
        yield
        for register in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook):
            self._handles.append(register(lambda *_: self._stop()))

    def unhook(self) -> None:
        """Stop timing hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Add the time of the block."""
        self._start()
        yield
        self._stop()

    def reset(self, seconds: float) -> None:
        """Set the time so far to ``seconds``."""
        self._seconds = seconds
        self._events.clear()

    @property
    def seconds(self) -> float:
        """The time so far. Waits for the GPU."""
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
