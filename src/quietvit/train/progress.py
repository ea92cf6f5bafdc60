"""What surrounds the steps of a run on its machine: the bar that is shown, torch's threads.

What is computed in the steps is in ``loop``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use so many threads inside, as many as before where None."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bar_of(shown: bool) -> Progress:
    """Return a bar on standard error; its tasks have a field ``loss``."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
        console=Console(stderr=True),
        disable=not shown,
    )
