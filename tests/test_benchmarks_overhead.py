"""The table of benchmarks/overhead.py: rows are kept, and amortized as their steps are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import typer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import overhead
import overhead_bench


def row(variant: str, ratio: float) -> dict[str, Any]:
    numbers = {"plain_ms": 1000.0, "ratio_low": ratio, "ratio_high": ratio, "floor": ratio / 100}
    blank = dict.fromkeys(overhead.COLUMNS, "")
    case = {"model": "m", "batch": 8, "device": "cpu", "variant": variant, "ratio": ratio}
    return blank | numbers | case


def test_rows_are_kept_and_amortized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table.csv"
    overhead.append(out, [row("cd", 1.04), row("cd-top", 1.02), row("cd-top-svd", 2.02)])
    overhead.append(out, [row("s2d", 1.01), row("s2d-svd", 2.01)])
    found = [r["variant"] for r in overhead.read(out)]
    assert found == ["cd", "cd-top", "cd-top-svd", "s2d", "s2d-svd"]
    overhead.summary(out)
    cells = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    shown = {row[5]: row[6] for row in cells}
    assert shown["cd-top, refresh=100 (from the rows above)"] == "1.0300"
    assert shown["s2d, refresh=100 (from the rows above)"] == "1.0200"
    assert shown["s2d between refreshes"] == "1.0100"


@pytest.mark.parametrize("key", ["precision", "machine"])
def test_what_was_measured_in_one_way_is_not_mixed_with_another(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.csv"
    slow, fast = {key: "this"}, {key: "that"}
    for found, ratio in ((slow, 1.04), (fast, 1.08)):
        overhead.append(out, [row("s2d", 1.0) | found, row("s2d-svd", 100 * ratio - 99) | found])
    overhead.summary(out)
    shown = [line for line in capsys.readouterr().out.splitlines() if "refresh=100" in line]
    assert ["this" in line and "1.0400" in line for line in shown] == [True, False]
    assert ["that" in line and "1.0800" in line for line in shown] == [False, True]


@pytest.mark.parametrize("key", ["precision", "machine"])
def test_a_case_is_measured_again_on_another_machine_or_in_another_precision(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, asked = tmp_path / "table.csv", list[list[str]]()
    done = {"batch": 8, "precision": "one", "machine": "one"}
    overhead.append(out, [row("cd", 1.04) | done, row("kure", 1.01) | done])
    monkeypatch.setattr(overhead, "measure", lambda *given: asked.append(list(given[3])) or [])
    for found in ("one", "another"):
        monkeypatch.setattr(overhead, "precision", lambda _: "one")
        monkeypatch.setattr(overhead, "machine", lambda _: "one")
        monkeypatch.setattr(overhead, key, lambda _, found=found: found)
        overhead.run(1.0, out, "m", "8", "cd,kure,tweo", "cpu", 0)
    assert asked == [["tweo"], ["cd", "kure", "tweo"]]


def test_a_table_of_other_columns_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "table.csv"
    out.write_text("a,b\n1,2\n")
    with pytest.raises(typer.BadParameter, match="other columns"):
        overhead.read(out)


def test_every_variant_is_a_public_regularizer() -> None:
    import quietvit

    for kind, _ in overhead.VARIANTS.values():
        assert hasattr(quietvit, kind)
    for often, seldom, steps in overhead.AMORTIZED.values():
        assert seldom in overhead.VARIANTS
        assert often is None or often in overhead.VARIANTS
        assert steps > 1


def test_what_acts_every_few_steps_is_timed_where_it_acts_and_counts_by_its_share() -> None:
    class Seldom:
        every = 4

        def __init__(self) -> None:
            self.steps, self.acted = 0, 0

        def step(self, optimizer: Any) -> None:
            self.steps += 1
            self.acted += self.steps % self.every == 0

    class Clock:
        optimizer = None

        def seconds(self, work: Any) -> float:
            work()
            return 8.0

    seldom = Seldom()
    found = overhead_bench.hooks(Clock(), {"seldom": seldom}, 3)  # type: ignore[arg-type]
    assert found == {"seldom": [2.0, 2.0, 2.0]}
    assert seldom.acted == 4
