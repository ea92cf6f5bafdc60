"""The script behind ``results/ptq_deit_tiny.csv``, on a tiny random model and random images."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from quietvit.data import ImageDataset, calibration_images
from quietvit.errors import QuietvitError

FOLDER = Path(__file__).parents[1] / "benchmarks"
INTEGER = "rtn-minmax,rtn-percentile,rtn-omse"
TINY = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("ptq_deit_tiny")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def rows_of(script) -> ModuleType:
    return sys.modules["ptq_table"]


@pytest.fixture
def data(script, tmp_path):
    random = np.random.default_rng(0)
    for name, count in (("evaluation", 20), ("calibration", 40)):
        images = random.standard_normal((count, 3, 32, 32), dtype=np.float32)
        np.save(tmp_path / f"{name}.npy", images)
    np.save(tmp_path / "labels.npy", random.integers(0, 5, 20))
    return script.Data(
        evaluation=str(tmp_path / "evaluation.npy"),
        labels=str(tmp_path / "labels.npy"),
        calibration=str(tmp_path / "calibration.npy"),
        kwargs={**TINY, "num_classes": 5},
    )


def fake(job) -> dict[str, object]:
    """What ``spawn`` returns, told by the job alone."""
    if job.bits == "float":
        return {"top1": 80.0, "baseline_memory_mib": 300, "threads": 1}
    return {
        "top1": 70.0 + int(job.seed),
        "coverage": 1.0,
        "kernels": "deployable",
        "calibration_images": 32,
        "calibration_seconds": 2.5,
        "calibration_cpu_seconds": 2.0,
        "peak_memory_mib": 500,
        "baseline_memory_mib": 310,
        "threads": 1,
    }


def jobs(script, out: Path, settings: str = INTEGER, bits=("W4A4",), seeds=(0, 1, 2), images=20):
    return script.jobs_for(settings, bits, seeds, images, out)


def test_a_finished_table_leaves_nothing_to_do_and_a_part_leaves_the_rest(
    script, rows_of, tmp_path
):
    out = tmp_path / "table.csv"
    todo = jobs(script, out)
    assert len(todo) == 1 + 3 * 3
    assert todo[0].bits == "float"
    assert script.work_off(todo[:4], out, fake) == []
    assert [job.key for job in jobs(script, out)] == [job.key for job in todo[4:]]
    assert script.work_off(todo[4:], out, fake, parallel=2) == []
    assert jobs(script, out) == []
    rows = script.read(out)
    assert [job.key for job in todo[:4]] == [rows_of.key_of(row) for row in rows[:4]]
    assert len({rows_of.key_of(row) for row in rows}) == len(rows) == 10


def test_other_fields_are_another_row(script, tmp_path, monkeypatch):
    out = tmp_path / "table.csv"
    script.work_off(jobs(script, out, "rtn-omse", seeds=(0,)), out, fake)
    monkeypatch.setitem(script.SETTINGS, "rtn-omse", ("rtn", {"weight_range": "omse"}))
    (job,) = jobs(script, out, "rtn-omse", seeds=(0,))
    assert json.loads(job.fields) == {"weight_range": "omse"}
    script.work_off([job], out, fake)
    shown = script.table(script.read(out))
    assert shown.count("| rtn-omse `") == 2


def test_a_row_that_came_in_the_meantime_is_not_added_twice(script, tmp_path):
    out = tmp_path / "table.csv"
    todo = jobs(script, out, "rtn-omse", seeds=(0,))
    script.work_off(todo, out, fake)
    script.work_off(todo, out, fake)
    assert len(script.read(out)) == len(todo)


def test_the_drop_is_from_the_float_row_of_the_same_table(script, tmp_path):
    out = tmp_path / "table.csv"
    script.work_off(jobs(script, out, "rtn-omse", seeds=(2,)), out, fake)
    assert [float(row["drop"]) for row in script.read(out)] == [0.0, 8.0]


def test_fewer_images_go_to_another_file_and_are_never_mixed(script, tmp_path):
    out = tmp_path / "table.csv"
    assert script.table_for(out, script.IMAGES) == out
    assert script.table_for(out, 200) != out
    script.work_off(jobs(script, out, images=20), out, fake)
    with pytest.raises(QuietvitError, match="rows on 20 images, not 10"):
        jobs(script, out, images=10)


def test_a_table_of_other_columns_is_refused(script, tmp_path):
    out = tmp_path / "table.csv"
    out.write_text("bits,range\nW8A8,omse\n")
    with pytest.raises(QuietvitError, match="other columns"):
        jobs(script, out)


def test_a_failing_method_is_named_and_the_others_go_on(script, tmp_path, capsys):
    out = tmp_path / "table.csv"

    def work(job):
        if job.setting == "rtn-minmax":
            raise QuietvitError("head: nothing but NaN")
        return fake(job)

    failed = script.work_off(jobs(script, out, seeds=(0,)), out, work)
    assert [job.setting for job in failed] == ["rtn-minmax"]
    assert "FAILED rtn-minmax W4A4 0" in (said := capsys.readouterr().err)
    assert "nothing but NaN" in said
    done = {row["setting"] for row in script.read(out)}
    assert done == {"float", "rtn-percentile", "rtn-omse"}
    assert [job.setting for job in jobs(script, out, seeds=(0,))] == ["rtn-minmax"]


def test_the_command_ends_with_one_after_a_failure(script, tmp_path, data, monkeypatch):
    def spawn(job, where, threads):
        if job.setting == "rtn-omse":
            raise QuietvitError("no")
        return fake(job)

    monkeypatch.setattr(script, "spawn", spawn)
    monkeypatch.setattr(script, "prepare", lambda *_: data)
    arguments = ["run", "--data", str(tmp_path), "--out", str(tmp_path / "t.csv"), "--seeds", "0"]
    good = CliRunner().invoke(
        script.app, [*arguments, "--settings", "rtn-minmax", "--bits", "W4A4"]
    )
    assert good.exit_code == 0, good.output
    bad = CliRunner().invoke(script.app, [*arguments, "--settings", INTEGER, "--bits", "W4A4"])
    assert bad.exit_code == 1
    assert len(script.read(tmp_path / "t.csv")) == 3
    shown = CliRunner().invoke(script.app, ["summary", "--out", str(tmp_path / "t.csv")])
    assert "rtn-percentile" in shown.output


def test_no_setting_of_that_name(script, tmp_path):
    with pytest.raises(Exception, match="matches none"):
        jobs(script, tmp_path / "table.csv", "rnt*")


@pytest.mark.slow
def test_a_process_of_its_own_measures_what_this_one_does(script, data):
    (job,) = script.jobs_for("rtn-omse", ("W8A8",), (1,), 20, Path("none.csv"))[1:]
    ballast = np.ones(1 << 30, dtype=np.uint8)
    there = script.spawn(job, data, threads=1)
    torch.set_num_threads(1)
    here = script.measure(job, data)
    for same in ("coverage", "kernels", "calibration_images"):
        assert there[same] == here[same]
    assert there["coverage"] == 1.0
    assert there["kernels"] == "deployable"
    assert there["peak_memory_mib"] >= there["baseline_memory_mib"] > 50
    assert there["peak_memory_mib"] < script.peak_mib() - ballast.nbytes / (1 << 21)
    with pytest.raises(QuietvitError, match="unknown quantization method 'rnt'"):
        script.spawn(replace(job, method="rnt"), data, threads=1)


def test_the_images_drawn_are_those_of_the_library(script, data):
    stored = script.Stored(data.calibration)
    dataset = ImageDataset(
        [0] * stored.shape[0], lambda i: Image.new("RGB", (1, 1), (i, 0, 0)), str
    )
    expected = calibration_images(
        dataset, 7, lambda image: stored.read([image.getpixel((0, 0))[0]])[0], seed=2
    )
    assert torch.equal(script.draw(stored, 7, 2), expected)
    assert torch.equal(stored.read([3])[0], torch.from_numpy(np.load(data.calibration))[3])
    with pytest.raises(QuietvitError, match="41 calibration images"):
        script.draw(stored, 41, 0)


def test_stored_images_are_those_transformed(script, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    dataset = ImageDataset([2, 0, 1], lambda i: Image.fromarray(pixels[i]), str)

    def transform(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)

    path = tmp_path / "cache" / "images.npy"
    script.store(dataset, transform, path)
    stored = script.Stored(path)
    expected = torch.stack([transform(dataset[i][0]) for i in range(3)])
    assert torch.equal(stored.read(range(3)), expected)
    assert np.load(script.labels_of(path)).tolist() == [2, 0, 1]
    assert sorted(p.name for p in path.parent.iterdir()) == ["images.labels.npy", "images.npy"]


def test_summary_shows_median_and_spread(script, tmp_path):
    out = tmp_path / "table.csv"
    todo = jobs(script, out, "rtn-omse", bits=("W4A4", "W8A8"))
    script.work_off([job for job in todo if job.bits != "W8A8" or job.seed == "0"], out, fake)
    lines = script.table(script.read(out)).splitlines()
    assert lines[0].startswith("| setting | W8A8 | W4A4 |")
    assert lines[2].startswith("| rtn-omse | 70.0, 1 seed | 71.0 (70.0–72.0) | 32 | 2.0 | 500 |")
    assert lines[-1] == "float: 80.0"


def test_published_drops_stand_beside_those_here(script, rows_of, tmp_path):
    out = tmp_path / "table.csv"
    script.work_off(jobs(script, out, "repq-vit"), out, fake)
    lines = script.compared(script.read(out)).splitlines()
    (line,) = [row for row in lines if row.startswith("| repq-vit | W4A4 |") and "[public]" in row]
    assert line.startswith("| repq-vit | W4A4 | 9.0 | 14.78 | -5.8 |")
    assert any(row.startswith("| qdrop-240 | W4A4 |  | 7.26 |  |") for row in lines)
    assert {setting for setting, _ in rows_of.PUBLISHED} <= set(script.SETTINGS)


def test_the_committed_table_is_what_the_script_reads(script, rows_of):
    rows = script.read(FOLDER.parent / "results" / "ptq_deit_tiny.csv")
    assert {row["images"] for row in rows} == {str(script.IMAGES)}
    assert len({rows_of.key_of(row) for row in rows}) == len(rows)
