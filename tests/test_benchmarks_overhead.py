"""The table of benchmarks/overhead.py: rows are kept, and amortized as their steps are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import typer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import overhead


def row(variant: str, ratio: float) -> dict[str, Any]:
    numbers = {"plain_ms": 1000.0, "ratio_low": ratio, "ratio_high": ratio, "floor": ratio / 100}
    blank = dict.fromkeys(overhead.COLUMNS, "")
    case = {"model": "m", "batch": 8, "device": "cpu", "variant": variant, "ratio": ratio}
    return blank | numbers | case


def test_rows_are_kept_and_amortized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table.csv"
    overhead.append(out, [row("cd", 1.04)])
    overhead.append(out, [row("s2d", 1.01), row("s2d-svd", 2.01)])
    assert [r["variant"] for r in overhead.read(out)] == ["cd", "s2d", "s2d-svd"]
    overhead.summary(out)
    cells = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    shown = {row[5]: row[6] for row in cells}
    assert shown["cd, every=4 (from the rows above)"] == "1.0100"
    assert shown["s2d, refresh=100 (from the rows above)"] == "1.0200"
    assert shown["s2d between refreshes"] == "1.0100"


@pytest.mark.parametrize("key", ["precision", "machine"])
def test_what_was_measured_in_one_way_is_not_mixed_with_another(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.csv"
    slow, fast = {key: "this"}, {key: "that"}
    overhead.append(out, [row("cd", 1.04) | slow, row("cd", 1.08) | fast])
    overhead.summary(out)
    shown = [line for line in capsys.readouterr().out.splitlines() if "every=4" in line]
    assert ["this" in line and "1.0100" in line for line in shown] == [True, False]
    assert ["that" in line and "1.0200" in line for line in shown] == [False, True]


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
    for often, seldom, every in overhead.AMORTIZED.values():
        assert seldom in overhead.VARIANTS
        assert often is None or often in overhead.VARIANTS
        assert every > 1
