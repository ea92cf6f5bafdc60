"""The benchmark of generated images: its plan is valid, and it does not repeat a finished row."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from quietvit.quantization.settings import parse_method
from quietvit.synthesis.settings import parse_request

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("synthesis")
    sys.path.remove(str(FOLDER))


def test_every_planned_row_can_be_made(script):
    assert script.SOURCES.keys() == script.SETTINGS.keys()
    for sources in script.SOURCES.values():
        for written in filter(None, sources.values()):
            assert parse_request(f"synthetic:32:{written}").count == 32
    for settings in script.SETTINGS.values():
        for method, bits in settings:
            assert parse_method(method, bits).label == bits


def test_kept_images_are_measured_once_and_summarized(script, tmp_path, monkeypatch):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    images = torch.randn(4, 3, 2, 2)
    monkeypatch.setitem(script.SOURCES, "tiny", {"pink": "pink"})
    monkeypatch.setitem(script.SETTINGS, "tiny", [("rtn", "W8A8")])
    monkeypatch.setattr(script, "create_model", lambda *_, **__: model)
    answers = model(images).argmax(1)
    monkeypatch.setattr(script, "evaluation", lambda *_: ([images], answers))
    seconds = torch.tensor(2.5)
    save_file({"images": images, "seconds": seconds}, tmp_path / "tiny-pink-32-0.safetensors")
    out = tmp_path / "out.csv"
    given = ["run", "--data", tmp_path, "--cache", tmp_path, "--out", out, "--only", "tiny, *"]
    for _ in range(2):
        done = CliRunner().invoke(script.app, [*map(str, given), "--seeds", "0", "--images", "4"])
        assert done.exit_code == 0, done.output
    (row,) = script.read(out)
    assert row["precision"] == ""  # nothing was optimized
    assert (float(row["top1"]), float(row["agreement"]), row["cpu_seconds"]) == (100, 100, "2.5")
    assert 0 < float(row["error"]) < 0.1
    more = [*map(str, given), "--seeds", "0", "--images", "4", "--counts", "32,16"]
    save_file({"images": images, "seconds": seconds}, tmp_path / "tiny-pink-16-0.safetensors")
    assert CliRunner().invoke(script.app, more).exit_code == 0
    assert [row["count"] for row in script.read(out)] == ["32", "16"]
    shown = CliRunner().invoke(script.app, ["summary", "--out", str(out)]).output
    assert "| tiny | 32 pink | rtn W8A8, 4 images | 100.0 | 100.0 |" in shown


def test_each_precision_has_its_own_row_and_images(script, tmp_path, monkeypatch):
    config = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 32, 32)}
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **small).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, **config}
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        answers = model(images).argmax(1)
    monkeypatch.setitem(script.SOURCES, "tiny", {"real": "", "psaq": "psaq:iterations=1"})
    monkeypatch.setitem(script.SETTINGS, "tiny", [("rtn", "W8A8")])
    monkeypatch.setattr(script, "create_model", lambda *_, **__: model)
    monkeypatch.setattr(script, "evaluation", lambda *_: ([images], answers))
    monkeypatch.setattr(script, "load_dataset", lambda *_, **__: None)
    monkeypatch.setattr(script, "calibration_images", lambda *_: images)
    out = tmp_path / "out.csv"
    given = ["--cache", tmp_path, "--out", out, "--only", "tiny, *", "--data", tmp_path]
    given += ["--images", 4, "--counts", 2]
    for precision, seeds in (("float32", "0"), ("bfloat16", "0"), ("float32", "0,1")):
        made = ["--precision", precision, "--seeds", seeds]
        done = CliRunner().invoke(script.app, ["run", *map(str, [*given, *made])])
        assert done.exit_code == 0, done.output
    rows = [(row["source"], row["seed"], row["precision"]) for row in script.read(out)]
    assert rows == [
        ("real", "0", ""),
        ("psaq", "0", "float32"),
        ("psaq", "0", "bfloat16"),
        ("real", "1", ""),
        ("psaq", "1", "float32"),
    ]
    kept = sorted(path.name for path in tmp_path.glob("tiny-*.safetensors"))
    assert len(kept) == 3
    assert "precision-bfloat16" in kept[0]
    shown = CliRunner().invoke(script.app, ["summary", "--out", str(out)]).output
    assert "| 2 psaq (bfloat16) |" in shown
    assert "| 2 real |" in shown


def test_the_peak_of_memory_is_printed(script, monkeypatch):
    sizes = iter((2**30, 3 * 2**30))
    monkeypatch.setattr(script, "peak_bytes", lambda: next(sizes))
    given = ["memory", "--model", "test_vit", "--count", "2", "--precision", "float32"]
    done = CliRunner().invoke(script.app, given)
    assert done.exit_code == 0, done.output
    assert "2 images in batches of 8, 1 iterations, float32" in done.output
    assert "2.00 GiB above 1.00 GiB" in done.output


def test_the_published_table_has_the_columns_of_the_script(script):
    path = FOLDER.parent / "results" / "synthesis.csv"
    rows = script.read(path)
    assert list(rows[0]) == [*script.COLUMNS, *script.FACTS]
    optimized = [row["generator"].partition(":")[0] in ("psaq", "dgh") for row in rows]
    assert [row["precision"] != "" for row in rows] == optimized
