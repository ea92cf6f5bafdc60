"""The script behind ``results/deploy.csv``, on a tiny random model and random images."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from quietvit.data import create_model
from quietvit.errors import QuietvitError
from quietvit.tracing import trace

FOLDER = Path(__file__).parents[1] / "benchmarks"
TINY = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("deploy")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def graph(script):
    return sys.modules["deploy_graph"]


@pytest.fixture
def data(script, tmp_path):
    random = np.random.default_rng(0)
    for name, count in (("evaluation", 16), ("calibration", 40)):
        images = random.standard_normal((count, 3, 32, 32), dtype=np.float32)
        np.save(tmp_path / f"{name}.npy", images)
    np.save(tmp_path / "labels.npy", random.integers(0, 5, 16))
    return script.Data(
        evaluation=str(tmp_path / "evaluation.npy"),
        labels=str(tmp_path / "labels.npy"),
        calibration=str(tmp_path / "calibration.npy"),
        kwargs={**TINY, "num_classes": 5},
    )


HERE = "x86_64 with 8-bit dot products (VNNI or like), 2 cores"


@pytest.fixture(autouse=True)
def here(script, monkeypatch):
    monkeypatch.setattr(script, "machine", lambda: HERE)


def fake(job: Any, **other: Any) -> dict[str, Any]:
    """What ``spawn`` returns, told by nothing."""
    latency = {"ms": 10.0, "float_ms": 20.0, "ratio": 2.0, "low": 1.9, "high": 2.1, "repeats": 5}
    measured = {f"b{size}_{name}": value for size in (1, 8) for name, value in latency.items()}
    shares = {"integer_share": 0.99, "float_share": 0.01, "unread_share": 0.0}
    facts = {"top1": 78.5, "agreement": 99.1, "mb": 6.2, "operators": "{}", "threads": 1}
    return measured | shares | facts | {"versions": "", "machine": HERE} | other


def test_a_finished_table_leaves_nothing_to_do_and_a_part_leaves_the_rest(script, tmp_path):
    out = tmp_path / "table.csv"
    todo = script.jobs_for("*-onnxruntime-*", 1000, 0, out)
    assert len(todo) == sum(run[1] == "onnxruntime" for run in script.RUNS)
    script.append(out, todo[0], fake(todo[0]))
    script.append(out, todo[0], fake(todo[0]))
    assert len(script.read(out)) == 1
    assert script.jobs_for("*-onnxruntime-*", 1000, 0, out) == todo[1:]
    other = script.jobs_for("*-onnxruntime-*", 50, 0, out)
    assert [job.images for job in other] == [50] * len(todo)
    for job in todo[1:]:
        script.append(out, job, fake(job))
    assert script.jobs_for("*-onnxruntime-*", 1000, 0, out) == []
    lines = script.table(script.read(out)).splitlines()
    assert len(lines) == 2 + len(todo)
    assert lines[2].split(" | ")[5:9] == [
        "99.1 %",
        "99.0 %",
        "2.00 (1.90–2.10)",
        "2.00 (1.90–2.10)",
    ]


def test_a_row_of_another_kind_of_machine_is_measured_here_too_and_shown_apart(
    script, tmp_path, capsys
):
    out = tmp_path / "table.csv"
    job, *_ = script.jobs_for("float-onnxruntime-*", 1000, 0, out)
    script.append(out, job, fake(job, machine="x86_64 without VNNI, 2 cores"))
    assert script.jobs_for("float-onnxruntime-*", 1000, 0, out) == [job]
    script.append(out, job, fake(job, b1_ratio=3.0))
    assert script.jobs_for("float-onnxruntime-*", 1000, 0, out) == []
    script.summary(out)
    first, second = capsys.readouterr().out.split("x86_64 ")[-2:]
    assert first.startswith("without VNNI, 2 cores\n\n| tool |")
    assert "2.00 (" in first
    assert second.startswith(HERE.removeprefix("x86_64 ") + "\n\n| tool |")
    assert "3.00 (" in second


def test_a_row_that_fails_or_lacks_its_package_does_not_stop_the_rest(
    script, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("onnxruntime")
    out = tmp_path / "table.csv"
    jobs = [
        script.Job("float", "onnxruntime", "default"),
        script.Job("ours-minmax", "onnxruntime", "exact"),
        script.Job("static", "onnxruntime", "exact"),
    ]
    absent = replace(script.MODELS["ours-minmax"], needs=("no_such_package",))
    monkeypatch.setitem(script.MODELS, "ours-minmax", absent)

    def work(job):
        if job.model == "float":
            raise QuietvitError("broken")
        return fake(job)

    assert script.work_off(jobs, out, work) == jobs[:1]
    assert [row["model"] for row in script.read(out)] == ["static"]
    said = capsys.readouterr().err
    assert "FAILED float-onnxruntime-default: broken" in said
    assert "no no_such_package here" in said


def test_unknown_names_and_foreign_tables_are_refused(script, tmp_path):
    out = tmp_path / "table.csv"
    with pytest.raises(script.typer.BadParameter, match="matches none of float-onnxruntime"):
        script.jobs_for("tensorrt", 1000, 0, out)
    out.write_text("a,b\n1,2\n")
    with pytest.raises(QuietvitError, match="other columns"):
        script.read(out)


def test_every_run_is_of_a_known_model_once(script):
    assert {model for model, _, _ in script.RUNS} == set(script.MODELS)
    assert len(set(script.RUNS)) == len(script.RUNS)


def test_macs_of_shapes(graph):
    assert graph.product([2, 3, 5, 7], [2, 3, 5, 11]) == 2 * 3 * 5 * 7 * 11
    assert graph.product([7, 5], [5, 11]) == 5 * 7 * 11, "the left factor transposed"
    assert graph.convolution([8, 3, 4, 4], [2, 8, 5, 5]) == 2 * 8 * 5 * 5 * 3 * 4 * 4
    assert graph._torch_convolution([2, 3, 9, 9], [8, 3, 3, 3], [2, 2], [1, 1], [1, 1]) == (
        2 * 8 * 5 * 5 * 27
    )


def test_a_convolution_whose_weight_the_profile_leaves_out_is_found_in_the_graph(graph):
    node = SimpleNamespace(
        name="c", op_type="QLinearConv", input=["x", "s", "z", "w"], output=["y"]
    )
    weight = SimpleNamespace(name="w", dims=[8, 3, 4, 4])
    shapes = {
        "op_name": "QLinearConv",
        "input_type_shape": [{"uint8": [1, 20, 20, 3]}, {"float": []}],
        "output_type_shape": [{"uint8": [1, 5, 5, 8]}],
    }
    events = [{"cat": "Node", "name": "c_kernel_time", "args": shapes}]
    found = list(graph._onnxruntime(events, SimpleNamespace(node=[node], initializer=[weight])))
    assert found == [("QLinearConv", True, 8 * 25 * 48)]


def test_torchs_operators_are_weighed_whole(script, graph):
    model = create_model("deit_tiny_patch16_224", num_classes=5, **TINY).eval()
    images = torch.randn(4, 3, 32, 32)
    total = sum(site.macs for site in trace(model, images).matmuls)
    run = sys.modules["deploy_tools"].TorchModel(model, compiled=False)
    macs = graph.torch_macs(run, images.numpy())
    assert (macs.integer, macs.floating) == (0, total)


@pytest.mark.parametrize(
    ("model", "integer"), [("float", 0.0), ("ours-minmax", 1.0), ("static-products", 1.0)]
)
def test_one_row_from_beginning_to_end(script, data, tmp_path, model, integer):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    job = script.Job(model, "onnxruntime", "exact", images=16)
    row = script.measure(job, data, tmp_path / "work", threads=1, seconds=0.0)
    assert row["integer_share"] == pytest.approx(integer)
    assert row["integer_share"] + row["float_share"] == pytest.approx(1.0)
    assert row["agreement"] == 100.0 or model != "float"
    assert row["b1_repeats"] >= 5
    assert row["mb"] > 0
    script.append(tmp_path / "table.csv", job, row | {"machine": HERE})
    assert script.key_of(script.read(tmp_path / "table.csv")[0]) == (*job.key, HERE)
