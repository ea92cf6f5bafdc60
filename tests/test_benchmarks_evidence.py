"""The study of evidence: what runs next, what is measured, what a crash leaves, what counts."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import csv_rows
import evidence
import evidence_data
import evidence_plan
import evidence_report
import evidence_run
import quietvit.decay.energy
import quietvit.decay.products
import quietvit.files
from quietvit import QuietvitError

SCRATCH = evidence_data.SCALES["tiny"]["scratch"]
CD = {"cd": {"strength": {"mlp": 1.0, "query_key": 1.0}}}


def planned(
    rows: list[dict[str, str]], workload: str = "scratch", scale: str = "tiny"
) -> list[evidence_plan.Job]:
    return list(evidence_plan.next_jobs(rows, scale, [workload], ["cd"]))


def row(job: evidence_plan.Job, value: float) -> dict[str, str]:
    return dict.fromkeys(evidence_plan.COLUMNS, str(value)) | vars(job)


def test_a_rate_then_tries_then_finals_of_the_best() -> None:
    rates = planned([])
    assert [(job.stage, json.loads(job.setting)) for job in rates] == [
        ("rate", {"lr": 1e-3}),
        ("rate", {"lr": 2e-3}),
    ]
    rows = [row(rates[0], math.nan), row(rates[1], 40)]
    assert planned(rows[:1]) == rates[1:]
    tries = planned(rows)
    assert [job.stage for job in tries] == ["try"] * 4
    assert {json.loads(job.setting)["lr"] for job in tries} == {2e-3}
    for values, best in (((40, 41, 43, 42), 2), ((40, math.nan, 39, 38), 0)):
        done = [*rows, *(row(job, each) for job, each in zip(tries, values, strict=True))]
        assert planned(done[:-1]) == tries[-1:]
        finals = planned(done)
        assert [job.seed for job in finals] == ["1", "2", "3"]
        assert {job.setting for job in finals} == {tries[best].setting}
        assert planned([*done, row(finals[1], 1)]) == [finals[0], finals[2]]
        more = evidence_plan.next_jobs(done, "tiny", ["scratch"], ["cd"], range(1, 7))
        assert [job.seed for job in more if job.stage == "final"] == list("123456")


def test_finals_are_repeated_at_the_rates_above_the_best() -> None:
    rates = planned([])
    rows = [row(rates[0], 41), row(rates[1], 40)]
    rows += [row(job, 40 + (place == 1)) for place, job in enumerate(planned(rows))]
    last = planned(rows)
    assert [(job.seed, job.stage, json.loads(job.setting)["lr"]) for job in last] == [
        (seed, *which) for which in (("final", 1e-3), ("above", 2e-3)) for seed in "123"
    ]
    table = evidence_report.rates_table([*rows, *(row(job, 30) for job in last)]).splitlines()
    assert [line.split(" | ")[1:5] for line in table[2:]] == [
        ["cd", f"strength 0.3, lr {rate}", "3", "30.0 ± 0.0"] for rate in (0.001, 0.002)
    ]


def test_a_family_with_one_setting_has_finals_without_tries() -> None:
    jobs = list(evidence_plan.next_jobs([], "tiny", ["deit"], ["usual"]))
    assert [(job.stage, job.seed, job.setting) for job in jobs] == [
        ("final", seed, '{"weight_decay": 0.05}') for seed in "123"
    ]


def test_a_ladder_goes_on_while_its_last_try_is_the_best() -> None:
    rows = [row(job, 1) for job in planned([])]
    values = iter((40, 41, 42, 43, 44, 45))
    while (jobs := planned(rows)) and jobs[0].stage == "try":
        rows += [row(job, next(values)) for job in jobs]
    tried = [json.loads(each["setting"])["cd"]["strength"]["mlp"] for each in rows[2:]]
    assert tried == [0.1, 0.3, 1.0, 3.0, 9.0, 27.0]
    assert {json.loads(job.setting)["cd"]["strength"]["mlp"] for job in jobs} == {27.0}
    assert evidence_plan.further({"a": 1.0, "b": True}, {"a": 3.0, "b": True}) == {
        "a": 9.0,
        "b": True,
    }
    assert evidence_plan.further({"a": 1.0}, {"b": 3.0}) is None


def test_a_family_of_which_every_try_diverged_has_no_finals() -> None:
    rows = [row(job, 1) for job in planned([])]
    assert planned([*rows, *(row(job, math.nan) for job in planned(rows))]) == []


@pytest.mark.parametrize("scale", evidence_data.SCALES)
def test_every_family_has_four_tries_and_no_try_is_in_two(scale: str) -> None:
    tuned = [name for name in evidence_plan.FAMILIES if name not in evidence_plan.FIXED]
    for workload in evidence_data.SCALES[scale].values():
        tries = [evidence_plan.tries_of(family, workload) for family in tuned]
        assert {len(each) for each in tries} == {4}
        shown = [evidence_plan.shown(each) for four in tries for each in four]
        assert len(set(shown)) == len(shown)


def test_lengths_try_the_same_products_of_strength_and_rates() -> None:
    totals = []
    for name in ("deit-short", "deit", "deit-long"):
        workload = evidence_data.SCALES["cpu"][name]
        rates = evidence_run.summed(workload) * workload.rates[0]
        strengths = [
            each["cd"]["strength"]["mlp"] for each in evidence_plan.tries_of("cd+norm", workload)
        ]
        totals.append([strength * rates for strength in strengths])
    for each in totals:
        assert each == pytest.approx([0.02, 0.04, 0.08, 0.16], rel=0.05)


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.Generator().manual_seed(0)
    found = [
        (Image.fromarray(torch.randint(0, 256, (8, 8, 3), generator=noise).byte().numpy()), n % 10)
        for n in range(80)
    ]
    monkeypatch.setattr(evidence_data, "load_dataset", lambda *_, **__: found)


@pytest.mark.usefixtures("pictures")
def test_runs_fill_their_columns_and_the_page_is_made_of_them(tmp_path: Path) -> None:
    def job(family: str, setting: dict[str, Any], stage: str) -> evidence_plan.Job:
        shown = evidence_plan.shown(setting)
        return evidence_plan.Job("scratch", "tiny", family, shown, "1", stage)

    out = tmp_path / "table.csv"
    tried = {"muon": 1.0, "gains": 1.0, "tweo": {"strength": 0.01}}
    s2d = {"lr": 1e-3, "s2d": {"strength": 5e-3}}
    for each in (job("muon", tried, "try"), job("adamw", s2d, "final")):
        evidence.append(out, evidence.run_one(each, tmp_path, tmp_path))
    first, final = csv_rows.read(out)
    assert all(first[f"val_{name}"] for name in ("float", *evidence_run.CHOOSING))
    empty = {name for name in evidence_plan.COLUMNS if not final[name]}
    assert empty == {name for name in evidence_plan.COLUMNS if name.startswith("val_")}
    assert {"residual", "post_norm", "query"} <= json.loads(final["max_over_rms"]).keys()
    assert json.loads(final["root_cause"])["pair"]
    for seed in ("2", "3"):
        evidence.append(out, final | {"seed": seed})
    evidence.append(out, final | {"setting": "{}", "seed": "4"})  # of a setting given up
    for seed, more in (("1", 1.0), ("2", 2.0), ("3", 3.0)):
        higher = {name: float(final[name]) + more for name in ("float", *evidence_run.ALL)}
        own = {"family": "cd", "setting": evidence_plan.shown(CD), "seed": seed}
        evidence.append(out, final | higher | own)
    page = tmp_path / "evidence.md"
    evidence.report(out, page)
    assert "| scratch (tiny) | cd | no | +2.0 ± 2.5 | +2.0 ± 2.5 | 3 |" in page.read_text()
    assert "- `cd` on `scratch` (tiny) shows no clear gain: +2.0 ± 2.5 points." in page.read_text()
    assert page.with_suffix(".png").stat().st_size > 1000
    for family, more in (("cd", 2.0), ("adamw", 0.0)):
        for seed in "456":
            figures = {name: float(final[name]) + more for name in ("float", *evidence_run.ALL)}
            setting = CD if family == "cd" else json.loads(final["setting"])
            own = {"family": family, "setting": evidence_plan.shown(setting), "seed": seed}
            evidence.append(out, final | figures | own)
    evidence.report(out, page)
    assert "| **helps** | +2.0 ± 0.7 | +2.0 ± 0.7 | 6 | +2.0 ± 0.0 |" in page.read_text()
    evidence.summary(out)


def test_what_helps_means() -> None:
    def rows(*values: float, of_float: float = 50.0) -> dict[str, dict[str, str]]:
        shown = [dict.fromkeys(evidence_run.ALL, str(value)) for value in values]
        return {str(n): {**each, "float": str(of_float)} for n, each in enumerate(shown)}

    baseline = rows(40.0, 41.0, 42.0)
    gained = evidence_report.gain(rows(41.0, 43.0, 45.0), baseline, "pipelines")
    assert gained is not None
    assert (gained.mean, gained.seeds) == (2.0, 3)
    assert gained.half == pytest.approx(4.302653 / math.sqrt(3))
    for values, of_float, wanted in (
        ((41.0, 43.0, 45.0), 50.0, "no"),
        ((42.0, 43.1, 44.0), 50.0, "**helps**"),
        ((42.0, 43.1, 44.0), 49.7, "**helps**"),
        ((42.0, 43.1, 44.0), 49.6, "no: float -0.4"),
        ((39.0, 40.0, 41.1), 51.0, "no"),
        ((45.0,), 50.0, "too few runs"),
    ):
        assert evidence_report.verdict(rows(*values, of_float=of_float), baseline) == wanted


def test_a_run_that_crashes_does_not_end_the_study(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def spawn(job: evidence_plan.Job, where: dict[str, Any]) -> dict[str, Any]:
        if job.stage == "rate" and "0.001" in job.setting:
            raise RuntimeError("Killed")
        return dict(row(job, 1.0))

    monkeypatch.setattr(evidence, "spawn", spawn)
    out = tmp_path / "table.csv"
    given = {"data": tmp_path, "out": out, "scale": "tiny", "families": "cd", "cache": tmp_path}
    with pytest.raises(typer.Exit):
        evidence.run(workloads="scratch", **given)
    assert [each["stage"] for each in csv_rows.read(out)] == ["rate"]
    monkeypatch.setattr(evidence, "spawn", lambda job, where: dict(row(job, 1.0)))
    evidence.run(workloads="scratch", **given)
    assert len(csv_rows.read(out)) == 2 + 4 + 3 * 2  # the best rate, and the one above
    with pytest.raises(typer.BadParameter, match="matches none of"):
        evidence.run(workloads="scrach", **given)


@pytest.mark.parametrize("setting", [{}, CD])
def test_training_that_meets_nan_diverges_and_leaves_a_row_of_nan(
    setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nothing = (torch.full((64, 3, 32, 32), float("nan")), torch.zeros(64, dtype=torch.long))
    split = evidence_data.Split(nothing, nothing, nothing)
    monkeypatch.setattr(evidence, "read", lambda *_: split)
    job = evidence_plan.Job("scratch", "tiny", "cd", evidence_plan.shown(setting), "0", "try")
    found = evidence.run_one(job, tmp_path, tmp_path)
    assert math.isnan(found["val_float"])
    assert evidence_plan.score({key: str(value) for key, value in found.items()}) == -math.inf


def test_a_wrong_setting_is_no_divergence(tmp_path: Path) -> None:
    images = (torch.zeros(64, 3, 32, 32), torch.zeros(64, dtype=torch.long))
    split = evidence_data.Split(images, images, images)
    with pytest.raises(QuietvitError, match="strength"):
        evidence_run.train(SCRATCH, {"cd": {"strength": -1.0}}, 0, split, tmp_path, tmp_path)


@pytest.mark.parametrize("float32", [True, False])
def test_float32_is_kept_on_every_processor(
    float32: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rows of one scale are held against each other, from whatever machine they come."""
    for module in (quietvit.decay.products, evidence_run):
        monkeypatch.setattr(module, "has_fast_bfloat16", lambda device: True)
    low = dict[str, list[bool]](model=[], update=[])
    both = quietvit.decay.energy.both_products

    def watched(A: Any, B: Any, dtype: Any = None, **more: Any) -> Any:
        low["update"].append(dtype is not None)
        return both(A, B, dtype, **more)

    def normalized(batch: Any, model: Any) -> Any:
        low["model"].append(torch.is_autocast_enabled("cpu"))
        return batch

    monkeypatch.setattr(quietvit.decay.energy, "both_products", watched)
    monkeypatch.setattr(evidence_run, "normalized", normalized)
    workload = replace(SCRATCH, steps=1, float32=float32)
    images = (torch.zeros(64, 3, 32, 32), torch.zeros(64, dtype=torch.long))
    split = evidence_data.Split(images, images, images)
    evidence_run.train(workload, {"cd": {"strength": 1.0}}, 0, split, tmp_path, tmp_path)
    assert low["model"][-1] is not float32
    assert any(low["update"]) is not float32


def test_two_runs_that_begin_together_make_the_images_side_by_side(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One writes its file while the other puts its own in place: neither fails or spoils it."""
    pictures = [(Image.new("RGB", (4, 4), (label, 0, 0)), label) for label in range(3)]
    monkeypatch.setattr(evidence_data, "load_dataset", lambda *_, **__: pictures)
    flush, found = quietvit.files.flush, list[Any]()

    def images() -> None:
        found.append(evidence_data.images(Path("t.parquet"), 3, tmp_path, 8))

    def flushed(path: Path) -> None:
        flush(path)
        if not found:
            monkeypatch.setattr(quietvit.files, "flush", flush)
            images()

    monkeypatch.setattr(quietvit.files, "flush", flushed)
    images()
    assert len(found) == 2
    for x, y in found:
        assert y.tolist() == [0, 1, 2]
        assert x[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert len(list(tmp_path.iterdir())) == 1
