"""``compare_methods``: rows agree with ``quantize`` and ``evaluate``, a killed run continues."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import quietvit
from quietvit.advice import ladder
from quietvit.compare import compare_methods
from quietvit.errors import QuietvitError
from test_cli import MODEL, SIZE, png, refused, run, table

assert table  # the fixture of test_cli

BATCHES = [(torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1, 2])) for _ in range(2)]
CALIBRATION = torch.randn(4, 3, 32, 32)
DESCRIBED = {"model": "tiny", "images": "noise", "calibration": "noise"}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(MODEL, img_size=32, num_classes=3).eval()


def compared(model: nn.Module, output: Path, **changes: Any) -> Any:
    given: dict[str, Any] = {
        **{"methods": ["rtn-percentile"], "bits": ["W8A8", "W4A4"], "labelled": True},
        **{"described": DESCRIBED, "say": lambda text: None, "progress": False},
    }
    return compare_methods(model, BATCHES, CALIBRATION, output, **given | changes)


def test_a_stopped_comparison_continues_and_grows(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real = ladder.quantize

    def stopping(model: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(f"{config.name} {config.label}")
        return real(model, config, *args, **kwargs)

    monkeypatch.setattr(ladder, "quantize", stopping)
    stop, out = 1, tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compared(model, out)
    assert "Not finished" in (out / "report.html").read_text()
    stop = -1
    found = compared(model, out).results
    assert done == ["rtn W8A8", "rtn W4A4"]  # each once
    assert [row.name.strip() for row in found.rows] == [
        "float",
        "rtn-percentile W8A8",
        "rtn-percentile W4A4",
    ]
    more = compared(model, out, methods=["rtn-minmax", "rtn-percentile"]).results
    assert len(done) == 4
    assert [row.method for row in more.rows[1:]] == ["rtn-minmax"] * 2 + ["rtn-percentile"] * 2
    assert [row for row in more.rows if row.method != "rtn-minmax"] == list(found.rows)
    last = compared(model, out).results
    assert len(done) == 4
    assert last.provenance == []
    assert "generated" not in (out / "methods.csv").read_text() + (out / "report.html").read_text()

    images = torch.cat([x for x, _ in BATCHES])
    own = quietvit.quantize(
        model, quietvit.RTN(weight_bits=4, activation_bits=4, activation_range="percentile"),
        CALIBRATION, progress=False,
    )  # fmt: skip
    row = next(row for row in found.rows if row.bits == "W4A4")
    assert row.top1 == pytest.approx(quietvit.evaluate(own, BATCHES))
    assert found.floating.top1 == pytest.approx(quietvit.evaluate(model, BATCHES))
    with torch.no_grad():
        same = (own(images).argmax(-1) == model(images).argmax(-1)).double().mean()
    assert row.kept == pytest.approx(100 * float(same))
    assert row.quantized == pytest.approx(100 * own.coverage.fraction)

    rows = list(csv.DictReader((out / "methods.csv").open()))
    assert [float(line["top1"]) for line in rows] == [row.top1 for row in last.rows]
    page = (out / "report.html").read_text()
    assert "Not finished" not in page
    assert page.count("<figure>") == 2  # one for each choice of bits
    assert re.search(r"W4A4: rtn-\w+ is the best of 2 methods: top-1", page)

    torch.manual_seed(1)
    other = timm.create_model(MODEL, img_size=32, num_classes=3).eval()
    with pytest.raises(QuietvitError, match=r"another comparison: weights was .*--force"):
        compared(other, out)
    (out / "comparison.json").write_text("{")
    with pytest.raises(QuietvitError, match="damaged"):
        compared(model, out)


def test_what_cannot_be_measured_is_said(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(QuietvitError, match="not empty"):
        compared(model, tmp_path)
    with pytest.raises(QuietvitError, match="generator"):
        compare_methods(
            model, iter(BATCHES), CALIBRATION, tmp_path / "a", methods=["rtn"], bits=["W8A8"],
            labelled=True, described=DESCRIBED,
        )  # fmt: skip
    wrong = [(x, y + 5) for x, y in BATCHES]
    with pytest.raises(QuietvitError, match="labels from 5 to 7, but the model has 3"):
        compare_methods(
            model, wrong, CALIBRATION, tmp_path / "b", methods=["rtn"], bits=["W8A8"],
            labelled=True, described=DESCRIBED, progress=False,
        )  # fmt: skip


def test_the_command_prints_table_and_json(table: Path, tmp_path: Path) -> None:
    given = [
        "compare-methods", MODEL, *SIZE, "--classes", 2, "--images", table, "--calibration",
        "synthetic:2:pink", "--methods", "rtn-percentile,rtn-minmax", "--bits", "W8A8",
    ]  # fmt: skip
    out = tmp_path / "out"
    done = run(*given, "-o", out, "--format", "json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [row["method"] for row in found["rows"]] == ["float", "rtn-percentile", "rtn-minmax"]
    assert json.loads((out / "comparison.json").read_text()) == found
    made = [row["origin"] and row["origin"]["method"] for row in found["rows"]]
    assert made == [None, "pink", "pink"]
    assert found["origin"] is None
    told = "alibration images generated without data: pink, seed 0"
    assert told in (out / "report.html").read_text()
    assert "pink, seed 0" in (out / "methods.csv").read_text().splitlines()[1 + 1]
    assert "weights was" in refused(run(*given, "-o", out))  # other random weights
    folder = tmp_path / "flat"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(40 * number))
    given[given.index(table)] = folder
    done = run(*given, "-o", tmp_path / "unlabelled")
    assert done.exit_code == 0, done.output
    assert "class kept" in done.stdout
    assert told in done.stdout
    assert "top-1" not in done.stdout
