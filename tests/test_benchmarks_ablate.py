"""The ablation's bookkeeping: what runs next, which try wins, what a run that diverges leaves."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import ablate
import ablate_run
import finetune_cifar
import quietvit.decay.penalties
import quietvit.decay.products
import quietvit.files
from quietvit import QuietvitError

TASK, FAMILY = "scratch", "cd"
TRIES = [json.dumps(setting, sort_keys=True) for setting in ablate.families_of(TASK, "cpu")[FAMILY]]


def row(setting: str, value: float, seed: str = "0") -> dict[str, str]:
    figures = dict.fromkeys(ablate.FIGURES, str(value))
    stage = "search" if seed == "0" else "final"
    known = {"task": TASK, "scale": "cpu", "family": FAMILY, "seed": seed, "stage": stage}
    return {**dict.fromkeys(ablate.COLUMNS, "1"), **figures, **known, "setting": setting}


def planned(rows: list[dict[str, str]]) -> list[tuple[str, str, str]]:
    jobs = ablate.next_jobs(rows, [TASK], "cpu", [FAMILY])
    return [(job.setting, job.seed, job.stage) for job in jobs]


@pytest.mark.parametrize("scale", ["small", "cpu", "gpu"])
@pytest.mark.parametrize("task", ["finetune", "scratch"])
def test_every_family_has_the_same_number_of_tries_and_no_setting_is_in_two(
    task: str, scale: str
) -> None:
    families = ablate.families_of(task, scale)
    assert {len(tries) for tries in families.values()} == {4}
    shown = [json.dumps(s, sort_keys=True) for tries in families.values() for s in tries]
    assert len(set(shown)) == len(shown)


def test_the_best_try_goes_on_once_all_are_done() -> None:
    rows = [row(setting, value) for setting, value in zip(TRIES, (40, 60, 50), strict=False)]
    assert planned(rows) == [(TRIES[3], "0", "search")]
    rows.append(row(TRIES[3], 10))
    assert planned(rows) == [(TRIES[1], seed, "final") for seed in ("1", "2", "3")]
    assert planned([*rows, row(TRIES[1], 60, "2")]) == [
        (TRIES[1], seed, "final") for seed in ("1", "3")
    ]


@pytest.mark.parametrize("place", range(4))
def test_a_try_that_diverged_counts_and_loses(place: int) -> None:
    values = [40.0, 41.0, 42.0, 43.0]
    values[place] = math.nan
    rows = [row(setting, value) for setting, value in zip(TRIES, values, strict=True)]
    best = TRIES[3 if place != 3 else 2]
    assert planned(rows) == [(best, seed, "final") for seed in ("1", "2", "3")]


SETTINGS = {"plain": {}, "cd": {"cd": {"strength": 1.0}}}


@pytest.mark.parametrize("name", SETTINGS)
def test_training_that_meets_nan_diverges(name: str, tmp_path: Path) -> None:
    task = replace(ablate.TASKS["small"]["scratch"], train=64, epochs=1, width=24, depth=1)
    x = torch.full((64, 3, 32, 32), float("nan"))
    images = (x, torch.zeros(64, dtype=torch.long))
    with pytest.raises(ablate.DivergedError):
        ablate.train(task, SETTINGS[name], 0, ablate.Split(images, images, images), tmp_path)


@pytest.mark.parametrize("scale", ["small", "cpu"])
def test_a_small_run_is_in_float32_on_every_processor(
    scale: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rows of one scale are held against each other, from whatever machine they come."""
    monkeypatch.setattr(quietvit.decay.products, "_is_fast", lambda device: True)
    low = dict[str, list[bool]](model=[], update=[])
    both = quietvit.decay.penalties.both_products

    def watched(A: Any, B: Any, dtype: Any = None, **more: Any) -> Any:
        low["update"].append(dtype is not None)
        return both(A, B, dtype, **more)

    def normalized(batch: Any, model: Any) -> Any:
        low["model"].append(torch.is_autocast_enabled("cpu"))
        return batch

    monkeypatch.setattr(quietvit.decay.penalties, "both_products", watched)
    monkeypatch.setattr(ablate_run, "normalized", normalized)
    full = replace(ablate.TASKS[scale]["scratch"], train=64, epochs=1, patch=16)
    task = replace(full, width=24, depth=1)
    images = (torch.zeros(64, 3, 32, 32), torch.zeros(64, dtype=torch.long))
    ablate.train(task, SETTINGS["cd"], 0, ablate.Split(images, images, images), tmp_path, limit=1)
    fast = scale != "small"
    assert low["model"][-1] is fast
    assert any(low["update"]) is fast
    assert ablate_run.in_bfloat16(task, torch.device("cpu")) is fast


def test_a_wrong_setting_is_no_divergence(tmp_path: Path) -> None:
    task = replace(ablate.TASKS["small"]["scratch"], train=64, epochs=1, width=24, depth=1)
    images = (torch.zeros(64, 3, 32, 32), torch.zeros(64, dtype=torch.long))
    split = ablate.Split(images, images, images)
    with pytest.raises(QuietvitError, match="strength"):
        ablate.train(task, {"cd": {"strength": -1.0}}, 0, split, tmp_path)


def test_a_run_that_diverges_gives_a_row_of_nan(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def train(*given: Any) -> Any:
        raise ablate.DivergedError("4 values are NaN or infinite")

    monkeypatch.setattr(ablate, "train", train)
    job = ablate.Job(TASK, "cpu", FAMILY, TRIES[0], "0", "search")
    task = ablate.TASKS["cpu"][TASK]
    found = ablate.measured(task, job, None, tmp_path, tmp_path, None)  # type: ignore[arg-type]
    assert set(found) == set(ablate.FIGURES)
    assert all(math.isnan(value) for value in found.values())
    out = tmp_path / "table.csv"
    rest = dict.fromkeys(("seconds", "device", "torch", "machine"), "1")
    ablate.append(out, vars(job) | found | rest)
    assert ablate.score(ablate.rows_of(out)[0]) == -math.inf


def test_two_runs_that_begin_together_make_the_images_side_by_side(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One writes its file while the other puts its own in place: neither fails or spoils it."""
    from PIL import Image

    pictures = [(Image.new("RGB", (4, 4), (label, 0, 0)), label) for label in range(3)]
    monkeypatch.setattr(finetune_cifar, "load_dataset", lambda *_, **__: pictures)
    flush, found = quietvit.files.flush, list[Any]()

    def images() -> None:
        found.append(finetune_cifar.images(Path("t.parquet"), 3, tmp_path, 8))

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
