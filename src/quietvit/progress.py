"""Show how far a loop is: a bar on a terminal, a line now and then in a file.

The loops, and whether they show their progress, are the callers' business.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")

AFTER = 3.0
"""A bar appears if its loop takes longer than this, in seconds."""
EVERY = 30.0
"""Seconds between two lines, where standard error is a file."""


class Meter:
    """Shows the progress of one loop on standard error. ``close`` it at the end.

    On a terminal and in a notebook it is a bar, which disappears at the end. In a file it is a line
    such as ``calibrating: 12 of 64, 40 s left``. Many short loops in a row share the time between
    two lines.
    """

    _open: ClassVar[int] = 0
    _said: ClassVar[float] = float("-inf")
    """Time of the last line, or of the start of the first loop after a break."""
    _closed: ClassVar[float] = float("-inf")

    def __init__(self, label: str, total: int | None, shown: bool = True) -> None:
        self._label, self._total, self._shown = label, total, shown and sys.stderr is not None
        self._start = time.monotonic()
        self._first: int | None = None
        self._bar: tuple[Any, Any] | None = None
        if not Meter._open and self._start - Meter._closed > EVERY:
            Meter._said = self._start
        Meter._open += 1

    def update(self, done: int, note: str = "") -> None:
        """Show that ``done`` steps are finished. ``note`` is shown behind, such as the loss."""
        if not self._shown:
            return
        now = time.monotonic()
        if self._first is None:
            self._first = done
        spent, steps = now - self._start, done - self._first
        left = spent / steps * (self._total - done) if steps and self._total is not None else None
        if self._bar is not None:
            self._bar[0].update(self._bar[1], completed=done, note=note)
        elif spent > AFTER or spent + (left or 0.0) > AFTER:
            if sys.stderr.isatty() or _in_notebook():
                self._draw(done, note)
            elif now - Meter._said >= EVERY:
                Meter._said = now
                print(_line(self._label, done, self._total, left, note), file=sys.stderr)
                sys.stderr.flush()

    def close(self) -> None:
        """Remove the bar."""
        Meter._open -= 1
        Meter._closed = time.monotonic()
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None

    def _draw(self, done: int, note: str) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
        )
        bar.start()
        task = bar.add_task(self._label, total=self._total, completed=done, note=note)
        self._bar = bar, task


def tracked(
    items: Iterable[T], total: int | None, label: str, progress: bool = True
) -> Generator[T, None, None]:
    """Yield batches or steps, and show the progress with a ``Meter`` if ``progress``.

    Wrap it in ``contextlib.closing`` where the loop may end early.
    """
    if not progress:
        yield from items
        return
    meter = Meter(label, total)
    try:
        for done, item in enumerate(items):
            meter.update(done)
            yield item
    finally:
        meter.close()


def _line(label: str, done: int, total: int | None, left: float | None, note: str) -> str:
    parts = [f"{done} done" if total is None else f"{done} of {total}"]
    if left is not None:
        parts.append(f"{left:.0f} s left" if left < 120 else f"{left / 60:.0f} min left")
    return f"{label}: {', '.join([*parts, *([note] if note else [])])}"


def _in_notebook() -> bool:
    from rich.console import Console

    return Console(stderr=True).is_jupyter
