"""What may change of a run that is resumed, what may not, and that nobody else writes into it."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from quietvit.data import create_model, load_dataset
from quietvit.errors import QuietvitError
from quietvit.files import LOCK
from quietvit.train import loop, together
from quietvit.train.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from quietvit.train.memory import Stage, enough_memory
from quietvit.train.order import SeededImages
from quietvit.train.setup import task_of
from test_train_loop import EVERYTHING, MODEL, assert_same, config, interrupt, lines, run

QUIET = {**MODEL, "kwargs": {**MODEL["kwargs"], "drop_rate": 0.0, "drop_path_rate": 0.0}}


def logged(output):
    return [json.loads(text) for text in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_on_at_a_lower_rate_and_says_so(tmp_path, monkeypatch, caplog):
    """The remedies of a run that diverged are taken by a resumed one."""
    caplog.set_level(logging.WARNING, "quietvit")
    output = tmp_path / "run"
    interrupt(output, monkeypatch, 5, optimizer={"lr": 1e-2})
    changes = {"optimizer": {"lr": 1e-3, "clip_grad": 1.0}, "schedule": {"min_lr": 1e-4}}
    run(output, resume=True, **changes, precision="bf16")
    told = "optimizer.lr was 0.01 and is 0.001"
    assert "from step 5 on: " in caplog.text
    assert told in caplog.text
    rates = [line["lr"] for line in logged(output) if "lr" in line]
    high = run(tmp_path / "high", optimizer={"lr": 1e-2}).output
    low = run(tmp_path / "low", **changes).output
    expected = [[line["lr"] for line in logged(other) if "lr" in line] for other in (high, low)]
    assert rates == [*expected[0][:4], *expected[1][4:]]
    changed = [line for line in logged(output) if "changed" in line]
    assert [line["step"] for line in changed] == [4]
    for key in ("optimizer.lr", "optimizer.clip_grad", "schedule.min_lr", "precision"):
        assert key in changed[0]["changed"]
    assert json.loads((output / "config.json").read_text())["optimizer"]["lr"] == 1e-3


def test_a_new_run_starts_from_the_weights_in_a_checkpoint(tmp_path, monkeypatch):
    interrupt(tmp_path / "run", monkeypatch, 5, ema={"decay": 0.9})
    last = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    plain, average = last / "model.safetensors", last / "ema.safetensors"
    model = {**MODEL, "weights": str(plain)}
    assert run(tmp_path / "new", model=model, epochs=1).steps == 7
    built = create_model(MODEL["name"], 10, plain, **MODEL["kwargs"])
    torch.testing.assert_close(built.state_dict(), load_file(plain))
    assert not torch.equal(load_file(average)["head.weight"], load_file(plain)["head.weight"])


def table(path, labels):
    def png(index):
        out = io.BytesIO()
        pixels = np.random.default_rng(index).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(out, "PNG")
        return out.getvalue()

    path.parent.mkdir(exist_ok=True)
    rows = [{"image": {"bytes": png(i)}, "label": label} for i, label in enumerate(labels)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return {"data": {"dataset": f"table:{path},{path}"}}


def test_the_data_may_move_and_not_change(tmp_path, monkeypatch):
    labels = [index % 3 for index in range(24)]
    here, there = (table(tmp_path / name / "t.parquet", labels) for name in ("here", "there"))
    whole = run(tmp_path / "whole", **here)
    interrupt(tmp_path / "run", monkeypatch, 5, **here)
    for other in ([*labels[:-3], 1, 0, 2], labels[:-1], [*labels[:-1], 3]):
        changed = table(tmp_path / "other" / "t.parquet", other)
        with pytest.raises(QuietvitError, match=r"begun with 24 training images of 3 classes, and"):
            run(tmp_path / "run", resume=True, **changed)
    moved = run(tmp_path / "run", resume=True, **there)
    assert_weights(moved, whole)
    assert (
        json.loads((tmp_path / "run" / "config.json").read_text())["data"]
        == json.loads(config(tmp_path, **there).model_dump_json())["data"]
    )


def assert_weights(result, expected):
    one, other = load_file(result.weights), load_file(expected.weights)
    assert all(torch.equal(one[key], other[key]) for key in other)


SHARED = {
    "model": QUIET,
    "optimizer": {"lr": 3e-3, "eps": 1e-4},
    "decay": {"cd": {"strength": 3.0}},
    "log_every": 3,
    "checkpoint": {"every": 4, "keep": 2},
}


@pytest.mark.parametrize(
    ("before", "after"), [((8, 1), (4, 2)), ((4, 2), (8, 1)), ((2, 4), (4, 2))]
)
def test_a_step_may_be_shared_out_in_another_way(tmp_path, monkeypatch, caplog, before, after):
    """Stopped in an epoch, between two lines of the log: images and losses are those of the run."""
    caplog.set_level(logging.WARNING, "quietvit")
    first, second = ({"batch_size": b, "accumulation": a, **SHARED} for b, a in (before, after))
    whole = run(tmp_path / "whole", **first)
    interrupt(tmp_path / "run", monkeypatch, 5, **first)
    result = run(tmp_path / "run", resume=True, **second)
    assert "resuming at step 4 of 14" in caplog.text
    now = f"and this run has processes 1, accumulation {after[1]}, batch_size {after[0]}: each step"
    assert now in caplog.text
    mine, theirs = (load_file(found.weights) for found in (result, whole))
    for key in theirs:
        assert torch.allclose(mine[key], theirs[key], rtol=0, atol=1e-5), key
    losses = [[x["loss"] for x in lines(f.output) if "loss" in x] for f in (result, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(losses[0]) == 5


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"accumulation": 2}, "batch_size 8 and accumulation 1 here"),
        ({"batch_size": 4}, "batch_size 8 and accumulation 1 here"),
    ],
)
def test_steps_of_other_images_are_refused(tmp_path, monkeypatch, changes, remedy):
    interrupt(tmp_path / "run", monkeypatch, 3)
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(QuietvitError, match="steps would have other images") as caught:
        run(tmp_path / "run", resume=True, **changes)
    assert (tmp_path / "run" / "config.json").read_text() == before, (
        "what is refused changes nothing"
    )
    assert "written with processes 1, accumulation 1, batch_size 8" in str(caught.value)
    assert remedy in str(caught.value)
    assert run(tmp_path / "run", resume=True).steps == 14
    assert not [line for line in logged(tmp_path / "run") if "changed" in line]


def as_of_earlier_versions(output, **changes):
    """Rewrite the checkpoints as those were written that did not tell what they are of."""
    for path in list_checkpoints(output / "checkpoints"):
        state = load_checkpoint(path.parent)
        left = {key: value for key, value in state.items() if key not in ("config", "data")}
        save_checkpoint(path.parent, state["step"], {**left, **changes}, keep=9)


def test_a_run_of_an_earlier_version_goes_on_and_refuses_what_it_did(tmp_path, monkeypatch):
    labels = [index % 3 for index in range(24)]
    here, there = (table(tmp_path / name / "t.parquet", labels) for name in ("here", "there"))
    whole = run(tmp_path / "whole", **here)
    output = tmp_path / "run"
    interrupt(output, monkeypatch, 3, **here)
    as_of_earlier_versions(output)
    for changed in (
        there,
        {**here, "batch_size": 4},
        {**here, "batch_size": 4, "accumulation": 2},
        {**here, "optimizer": {"lr": 1e-4}},
    ):
        with pytest.raises(QuietvitError, match=r" was .* and is .*allowed no changes; resume"):
            run(output, resume=True, **changed)
    assert_weights(run(output, resume=True, **here), whole)


def test_of_an_earlier_version_processes_may_not_change(tmp_path, monkeypatch):
    interrupt(tmp_path / "run", monkeypatch, 3)
    as_of_earlier_versions(tmp_path / "run", processes=2)
    with pytest.raises(QuietvitError, match=r"processes was 2 and is 1, but the checkpoint is"):
        run(tmp_path / "run", resume=True)


def test_what_changed_is_told_of_the_checkpoint_that_the_run_goes_on_from(tmp_path, monkeypatch):
    """Also where a later one, which knew of it, is damaged, and not twice where it is not."""
    output, lower = tmp_path / "run", {"optimizer": {"lr": 1e-4}}
    interrupt(output, monkeypatch, 5)
    for _ in range(2):
        interrupt(output, monkeypatch, 5, resume=True, **lower)
    assert [line["step"] for line in logged(output) if "changed" in line] == [4]
    interrupt(output, monkeypatch, 7, resume=True, checkpoint={"every": 2, "keep": 9}, **lower)
    for path in list_checkpoints(output / "checkpoints")[1:]:
        (path / "state.json").write_text("{")
    run(output, resume=True, **lower)
    told = [line for line in logged(output) if "changed" in line]
    assert [line["step"] for line in told] == [2]
    assert told[0]["changed"] == "optimizer.lr was 0.001 and is 0.0001"


def test_a_key_that_came_later_is_no_change(tmp_path, monkeypatch):
    interrupt(tmp_path / "run", monkeypatch, 3)
    state = load_checkpoint(tmp_path / "run" / "checkpoints")
    del state["config"]["parallel"], state["config"]["decay"]["watch_every"]
    del state["config"]["label_smoothing"]
    save_checkpoint(tmp_path / "run" / "checkpoints", 2, state, keep=1)
    run(tmp_path / "run", resume=True)
    assert not [line for line in logged(tmp_path / "run") if "changed" in line]


def test_a_finished_run_takes_no_changes(tmp_path):
    run(tmp_path / "run", epochs=1)
    with pytest.raises(QuietvitError, match=r"finished already, and optimizer\.lr was 0\.001"):
        run(tmp_path / "run", epochs=1, resume=True, optimizer={"lr": 0.1})
    assert run(tmp_path / "run", epochs=1, resume=True, num_workers=1).steps == 7


def test_a_run_that_went_on_meanwhile_is_not_set_back(tmp_path, monkeypatch):
    """Two go on with one run, as a job that is requeued before it ended does."""
    build = loop.build
    interrupt(tmp_path / "run", monkeypatch, 5)

    def slow(*given):
        monkeypatch.setattr(loop, "build", build)
        run(tmp_path / "run", resume=True)
        return build(*given)

    monkeypatch.setattr(loop, "build", slow)
    with pytest.raises(QuietvitError, match="another process wrote into"):
        run(tmp_path / "run", resume=True)
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(names) == ["step-00000012", "step-00000014"]


def test_images_that_are_packed_otherwise_come_in_another_order(tmp_path):
    place = table(tmp_path / "d" / "t.parquet", [0, 1, 2] * 8)["data"]
    train = load_dataset(place["dataset"], "train")
    one, windowed = (
        config(tmp_path, data={**place, **more}) for more in ({}, {"shuffle_window": 2})
    )
    of_one, of_windowed = task_of(one), task_of(windowed)
    facts = [of_one.facts(train), of_windowed.facts(train)]
    train.groups = np.arange(24) // 3
    assert of_one.facts(train) == facts[0]
    assert of_windowed.facts(train) != facts[1]


HOLDER = """
import sys, time
from pathlib import Path
from quietvit.files import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder():
    """Another process that holds a folder until it is killed."""
    processes = []

    def hold(folder):
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-c", HOLDER, str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_another_run_writes_into_is_left_alone(tmp_path, monkeypatch, holder, resume):
    output = tmp_path / "run"
    if resume:
        interrupt(output, monkeypatch, 3)
    process = holder(output)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with pytest.raises(QuietvitError, match=r"another process is writing into .*torchrun"):
        run(output, resume=resume)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    process.kill()
    process.wait()
    assert (output / LOCK).exists(), "a killed run leaves its lock file, and holds nothing by it"
    assert run(output, resume=resume).steps == 14
    assert not (output / LOCK).exists()


def test_a_run_that_began_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    """Between the first look at the folder and the first byte, another run came and went."""
    build = loop.build

    def slow(*given):
        monkeypatch.setattr(loop, "build", build)
        run(tmp_path / "run", seed=1)
        return build(*given)

    monkeypatch.setattr(loop, "build", slow)
    with pytest.raises(QuietvitError, match="holds a finished run"):
        run(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["seed"] == 1


def test_weights_are_there_though_they_cannot_be_judged(tmp_path, monkeypatch):
    expected = run(tmp_path / "whole", **EVERYTHING)

    def refused(*_, **__):
        raise QuietvitError("the image at row 3 could not be decoded.")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "scores", refused)
        with pytest.raises(QuietvitError, match=r"row 3 .* trained weights are in .*model\.safe"):
            run(tmp_path / "run", **EVERYTHING)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(one[key], other[key]) for key in other)
    assert_same(run(tmp_path / "run", resume=True, **EVERYTHING), expected)


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."),
]


@pytest.mark.parametrize("error", FULL)
def test_too_little_memory_is_told_with_what_to_change(tmp_path, monkeypatch, error):
    def exhausted(*_, **__):
        raise error

    def told(name, **changes):
        with monkeypatch.context() as patch:
            patch.setattr(loop, name, exhausted)
            with pytest.raises(QuietvitError) as caught:
                run(tmp_path / "run", force=True, discard=True, **changes)
        assert str(error).splitlines()[0] in str(caught.value)
        return str(caught.value)

    assert "vit_tiny_patch16_224 with its optimizer takes more memory" in told("build")
    assert "16 images at a time in float32, takes more" in told("scores")
    assert "The trained weights are in" in told("scores")
    assert "bf16" not in told("scores")
    step = told("forward_backward")
    assert "a pass with batch_size 8 takes more memory" in step
    assert "keeps the steps (4 and 2)" in step
    assert "precision to 'bf16'" in step
    assert "'fsdp2'" in step
    assert run(tmp_path / "run", resume=True, batch_size=4, accumulation=2).steps == 14


def test_no_remedy_is_told_that_would_be_refused(tmp_path):
    def told(**changes):
        with (
            pytest.raises(QuietvitError) as caught,
            enough_memory(config(tmp_path, **changes), Stage.STEP),
        ):
            raise FULL[0]
        return str(caught.value)

    assert "(3 and 2)" in told(batch_size=6)
    assert "(3 and 2)" not in told(batch_size=6, mix={"mixup": 0.8})
    assert "batch_size and raise" not in told(batch_size=1)
    assert "bf16" not in told(precision="bf16")
    assert "fsdp2" not in told(ema={"decay": 0.9})
    assert "more processes" in told(parallel="fsdp2")
    with pytest.raises(RuntimeError, match="worker"), enough_memory(config(tmp_path), Stage.STEP):
        raise RuntimeError(
            "Caught RuntimeError in DataLoader worker process 0. DefaultCPUAllocator"
        )


def test_another_fault_of_the_runtime_is_not_taken_for_memory(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(loop, "forward_backward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(tmp_path / "run")


def test_bad_images_and_the_speed_of_late_are_logged(tmp_path, monkeypatch):
    place = table(tmp_path / "d" / "t.parquet", [index % 3 for index in range(24)])["data"]
    training = load_dataset(place["dataset"], "train")
    inner = type(training).__getitem__
    bad = {2, 5}

    def reading(self, index):
        if len(self) == 24 and index in bad and self.name == training.name:
            raise QuietvitError(f"row {index} is damaged.")
        return inner(self, index)

    monkeypatch.setattr(type(training), "__getitem__", reading)
    clock = iter(range(10**6))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(clock)))
    with pytest.raises(QuietvitError, match="damaged"):
        run(tmp_path / "run", data={**place, "max_bad_images": 2}, checkpoint={"every": 0})
    found = [line for line in logged(tmp_path / "run") if "loss" in line]
    assert found[-1]["bad_images"] == 2, "images that are judged are never replaced"
    assert len({line["images_per_second"] for line in found[1:]}) == 1, "equal steps, equal speed"


def test_the_sum_of_bits_tells_the_last_bit_and_no_order():
    one = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    other = one.clone()
    other[3, 4] = torch.nextafter(one[3, 4], one.new_tensor(9.0))
    tensors = [one, one.bfloat16(), one.double(), torch.arange(3), torch.zeros(0)]
    assert together.sum_of_bits(tensors) == together.sum_of_bits(tensors[::-1])
    assert together.sum_of_bits([one.flip(0)]) == together.sum_of_bits([one.T])
    assert together.sum_of_bits([one]) != together.sum_of_bits([other])


def test_weights_that_drift_apart_are_told_once(tmp_path, monkeypatch, caplog):
    """As if there were a second process, whose weights are those of the first until step 4."""
    caplog.set_level(logging.WARNING, "quietvit")
    steps = iter(range(2, 15, 2))

    def both(_, value):
        return [value, value + (next(steps) >= 4)]

    alike = together.weights_alike

    def looking(parts, step):
        with monkeypatch.context() as inner:
            inner.setattr(together, "gathered", both)
            return alike(parts, step)

    monkeypatch.setattr(loop, "weights_alike", looking)
    run(tmp_path / "run")
    told = [text for text in caplog.messages if "do not hold the same weights" in text]
    assert len(told) == 1
    assert told[0].startswith("at step 4 ")
    assert "decay.cd.sharded=true" in told[0]


@pytest.mark.slow
def test_a_loaders_process_that_is_killed_is_told(tmp_path, monkeypatch):
    place = table(tmp_path / "d" / "t.parquet", [0, 1, 2] * 8)
    monkeypatch.setattr(SeededImages, "__getitem__", lambda *_: os.kill(os.getpid(), 9))
    with pytest.raises(QuietvitError, match=r"a process that loads images .*num_workers"):
        run(tmp_path / "run", **place, num_workers=1)
