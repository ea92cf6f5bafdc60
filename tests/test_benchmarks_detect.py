"""The study of detectors: a run is trained once, and each setting gives its rows once."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from detection_cases import BACKBONE, SETTINGS, annotated, coco
from quietvit.data import create_model

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import detect


def test_the_ap_of_each_part_is_a_table_that_is_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faster_coco_eval")
    boxes = [annotated(i, i, [10, 10, 30, 20], 3 + 4 * (i % 2)) for i in range(1, 5)]
    data = coco(tmp_path, boxes, pictures=4).rename(tmp_path / "train.json")
    (tmp_path / "test.json").write_text(data.read_text())
    backbone = create_model(BACKBONE["name"], 0, img_size=64, **BACKBONE["kwargs"])
    save_file(backbone.state_dict(), tmp_path / "w.safetensors")
    settings = {"batch_size": 2, "num_workers": 0, "device": "cpu"}
    settings |= {f"model.kwargs.{key}": value for key, value in BACKBONE["kwargs"].items()}
    for key, value in SETTINGS.items():
        parts = {f"{key}.{k}": v for k, v in value.items()} if key == "options" else {key: value}
        settings |= {f"task_settings.{name}": part for name, part in parts.items()}
    command = ["detect.py", "--data", tmp_path, "--weights", tmp_path / "w.safetensors"]
    command += [
        "--arms",
        "adamw lr 1e-3",
        "--seeds",
        "0",
        "--epochs",
        "2",
        "--calibration",
        "2",
        "--parts",
    ]
    command += [
        "--precision",
        "no",
        "--methods",
        "rtn-minmax",
        "--bits",
        "W4A4",
        "--runs",
        tmp_path / "runs",
    ]
    command += ["--results", tmp_path / "parts.csv"]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    detect.main()
    with (tmp_path / "parts.csv").open() as file:
        rows = list(csv.DictReader(file))
    parts = ["backbone", "neck", "rpn", "box_head"]
    told = [(row["part"], row["quantized"]) for row in rows]
    assert told[:2] == [("all", "nothing"), ("all", "all")]
    assert told[2:] == [(part, what) for part in parts for what in ("only", "without")]
    assert float(rows[0]["error"]) == 0 < float(rows[1]["error"])
    assert sum(int(row["macs"]) for row in rows[2::2]) == int(rows[0]["macs"])
    written = (tmp_path / "parts.csv").read_text()
    detect.main()
    assert (tmp_path / "parts.csv").read_text() == written
