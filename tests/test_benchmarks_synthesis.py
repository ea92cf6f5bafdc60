"""The benchmark of generated images: its plan is valid, and it does not repeat a finished row."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
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
    assert (float(row["top1"]), float(row["agreement"]), row["cpu_seconds"]) == (100, 100, "2.5")
    assert 0 < float(row["error"]) < 0.1
    shown = CliRunner().invoke(script.app, ["summary", "--out", str(out)]).output
    assert "| tiny | 32 pink | rtn W8A8, 4 images | 100.0 | 100.0 |" in shown
