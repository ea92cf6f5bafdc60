"""Progress: lines in a file, a bar without a trace on a terminal, nothing for short loops."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import closing

import pytest

from quietvit import progress
from quietvit.progress import Meter, tracked


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that only ``passing(seconds)`` moves, far from all earlier loops."""
    now = [1e6]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    for name in ("_said", "_closed"):
        monkeypatch.setattr(Meter, name, float("-inf"))
    return wait


def test_a_file_gets_a_line_every_half_minute(
    passing: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", out := io.StringIO())
    for _ in tracked(range(100), 100, "calibrating"):
        passing(1)
    assert out.getvalue().splitlines() == [
        f"calibrating: {done} of 100, {100 - done} s left" for done in (30, 60, 90)
    ]


def test_short_loops_in_a_row_share_the_time_between_lines(
    passing: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", out := io.StringIO())
    for part in range(10):
        for _ in tracked(range(7), None, f"part {part}"):
            passing(1)
    assert out.getvalue().splitlines() == [
        "part 4: 4 done", "part 8: 6 done"
    ]  # fmt: skip
    passing(1000)  # a break starts the time anew
    for _ in tracked(range(7), 7, "later"):
        passing(1)
    assert "later" not in out.getvalue()


def test_a_bar_leaves_nothing_on_a_terminal(
    passing: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for _ in tracked(range(2), 2, "short"):  # no bar at all
        pass
    monkeypatch.setattr(sys, "stderr", out := Terminal())
    with closing(Meter("training", 8)) as meter:
        for step in range(8):
            meter.update(step, "loss 0.5")
            passing(1)
    text = out.getvalue()
    assert "training" in text
    assert "loss 0.5" in text
    assert "s left" not in text
    assert text.count("\n") <= text.count("\x1b[1A")  # each new line is taken back


@pytest.mark.parametrize("stream", [io.StringIO, Terminal, lambda: None])
def test_short_hidden_and_closed_streams_show_nothing(
    stream: Callable[[], io.StringIO | None],
    passing: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stderr", out := stream())
    for _ in tracked(range(3), 3, "short"):
        passing(0.1)
    for _ in tracked(range(3), 3, "hidden", False):
        passing(100)
    if out is None:
        for _ in tracked(range(3), 3, "closed"):
            passing(100)
    else:
        assert out.getvalue() == ""
