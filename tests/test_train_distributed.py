"""Several processes on the CPU (gloo): started by torchrun where the start matters, else forked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from huggingface_cases import classifier, saved
from processes import run_in_processes
from quietvit.data import (
    evaluate,
    evaluation_loader,
    evaluation_transform,
    load_dataset,
    subset,
)
from quietvit.errors import QuietvitError
from quietvit.train import TrainResult, engine
from quietvit.train.checkpoint import list_checkpoints, load_checkpoint
from test_train_loop import MODEL, config, interrupt, lines, run
from train_processes import in_two

QUIET = {**MODEL, "kwargs": {**MODEL["kwargs"], "drop_rate": 0.0, "drop_path_rate": 0.0}}
SHARED = {
    "batch_size": 4,
    "model": QUIET,
    "optimizer": {"lr": 3e-3, "eps": 1e-4, "clip_grad": 1.0},
    "data": {"dataset": "embedded:digits", "train_images": 48, "test_images": 20},
    "checkpoint": {"every": 2, "keep": 4},
}
OLD = tuple(map(int, version("accelerate").split(".")[:2])) < (1, 7)
FSDP2 = pytest.param("fsdp2", marks=pytest.mark.skipif(OLD, reason="accelerate without FSDP2"))
CD = {"cd": {"strength": 5.0}, "watch_every": 2}

SCRIPT = """
import sys
from train_processes import run_jobs

run_jobs(sys.argv[1])
"""


def job(output, resume=False, stop_at=-1, **changes):
    """A run, as ``run_jobs`` takes it."""
    content = json.loads(config(output, **changes).model_dump_json())
    return {"config": content, "resume": resume, "stop_at": stop_at}


def listed(tmp_path, jobs):
    path = tmp_path / "jobs.json"
    path.write_text(json.dumps(jobs))
    return path


def start(tmp_path, *jobs):
    """Two processes, as torchrun starts them."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [*command, str(script), str(listed(tmp_path, jobs))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def fork(tmp_path, *jobs):
    """The same in two processes that are forked, in the environment that torchrun gives."""
    log = tmp_path / "log"
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    try:
        run_in_processes(in_two, str(listed(tmp_path, jobs)), str(log), store.port)
    except Exception as error:
        raise AssertionError(log.read_text()) from error
    return log.read_text()


def ranks(output, count=2):
    return [load_file(f"{output}.rank{rank}") for rank in range(count)]


def held(output, count=2):
    """What each process has of the whole model beside its own."""
    return [json.loads(Path(f"{output}.rank{rank}.json").read_text()) for rank in range(count)]


def assert_equal(one, other):
    assert list(one) == list(other)
    assert all(torch.equal(one[key], other[key]) for key in one)


def assert_close(one, other, atol=1e-5):
    assert one.keys() == other.keys()
    for key in one:
        assert torch.allclose(one[key], other[key], rtol=0, atol=atol), key


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", FSDP2])
def test_runs_of_two_processes_resume_exactly_with_the_weights_alike(tmp_path, parallel):
    changes = {**SHARED, "decay": CD, "model": MODEL, "parallel": parallel}
    whole, cut, one = tmp_path / "whole", tmp_path / "cut", tmp_path / "one"
    told = fork(
        tmp_path,
        job(whole, **changes),
        job(cut, stop_at=7, **changes),
        job(cut, resume=True, **changes),
    )
    assert told.count("stopped") == 2
    assert "resuming at step 6 of 12" in told
    assert_equal(*ranks(cut))
    assert_equal(*ranks(whole))
    assert_equal(ranks(cut)[0], ranks(whole)[0])
    assert lines(cut) == lines(whole)
    run(one, **{**changes, "parallel": "ddp"})
    mine, theirs = (load_checkpoint(output / "checkpoints") for output in (cut, one))
    assert shapes(mine["model"]) == shapes(theirs["model"])
    assert shapes(mine["optimizer"]) == shapes(theirs["optimizer"])


def shapes(nested):
    if isinstance(nested, torch.Tensor):
        return nested.shape
    if isinstance(nested, dict):
        return {key: shapes(value) for key, value in nested.items() if key != "lr"}
    return [shapes(item) for item in nested] if isinstance(nested, list) else nested


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", FSDP2])
def test_two_processes_equal_one_with_the_same_effective_batch(tmp_path, parallel):
    decay = {
        **CD,
        "norm_gains": {"strength": 1.0},
        "weight": {"strength": 1.0},
        "s2d": {"images": 4, "refresh": 3, "threshold": 0.1, "strength": 0.01},
        "kure": {"strength": 0.1},
        "tweo": {"strength": 0.1, "threshold": 0.5},
    }
    # 17 images in batches of 8 are two passes in one process and one in the other.
    data = {**SHARED["data"], "test_images": 17}
    changes = {**SHARED, "decay": decay, "data": data, "evaluate_every": 1}
    one = run(tmp_path / "one", accumulation=4, **changes)
    two = tmp_path / "two"
    fork(tmp_path, job(two, accumulation=2, parallel=parallel, **changes))
    both = ranks(two)
    assert_equal(*both)
    assert_close(load_file(one.weights), both[0])
    assert_equal(load_file(two / "model.safetensors"), both[0])
    losses = [
        [line["loss"] for line in lines(output) if "loss" in line] for output in (one.output, two)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert json.loads((two / "result.json").read_text())["top1"] == one.top1
    evaluated = [
        [line["top1"] for line in lines(output) if "top1" in line] for output in (one.output, two)
    ]
    assert evaluated[0] == evaluated[1]
    assert len(evaluated[0]) == 2
    whole = [entry["copied"] > 0 for entry in held(two)], [entry["kept"] > 0 for entry in held(two)]
    assert whole == (([False, False], [True, False]) if parallel == "fsdp2" else ([True] * 2,) * 2)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", FSDP2])
def test_compiled_and_with_the_update_shared_out_it_is_the_same_training(tmp_path, parallel):
    """The model and the update compiled, the update divided among the processes."""
    plain = {**SHARED, "epochs": 1, "accumulation": 2}
    one = run(tmp_path / "one", **{**plain, "accumulation": 4, "decay": CD})
    decay = {"cd": {**CD["cd"], "sharded": True, "compile": True}, "watch_every": 2}
    two = tmp_path / "two"
    fork(tmp_path, job(two, **plain, compile=True, decay=decay, parallel=parallel))
    assert_equal(*ranks(two))
    assert_close(load_file(one.weights), ranks(two)[0])
    assert_equal(load_file(two / "model.safetensors"), ranks(two)[0])


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", FSDP2])
def test_a_model_with_a_parameter_that_is_never_used_trains_and_resumes(tmp_path, parallel):
    model = {
        "name": saved(tmp_path / "hf", classifier("Dinov2", 10)),
        "kwargs": {"image_size": 16},
        "preprocessing": {},
    }
    changes = {**SHARED, "model": model, "decay": CD, "parallel": parallel}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    told = fork(
        tmp_path,
        job(whole, **changes),
        job(cut, stop_at=7, **changes),
        job(cut, resume=True, **changes),
    )
    assert "resuming at step 6 of 12" in told
    assert told.count("take no part in the forward pass") == 3
    assert_equal(*ranks(cut))
    assert_equal(ranks(cut)[0], ranks(whole)[0])
    assert lines(cut) == lines(whole)
    one = run(tmp_path / "one", accumulation=2, **{**changes, "parallel": "ddp"})
    assert_close(load_file(one.weights), ranks(whole)[0])


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", FSDP2])
def test_a_process_without_test_images_takes_part_in_the_evaluation(tmp_path, parallel):
    data = {**SHARED["data"], "test_images": 1}
    changes = {**SHARED, "data": data, "epochs": 1, "precision": "bf16"}
    output = tmp_path / "two"
    fork(tmp_path, job(output, parallel=parallel, **changes))
    result = TrainResult.read(output)
    model = result.load_model()
    images = subset(load_dataset("embedded:digits", "test"), 1)
    loader = evaluation_loader(images, evaluation_transform(model))
    assert result.top1 == evaluate(model, loader)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", FSDP2])
def test_a_loss_that_is_nan_in_one_process_is_told_alike_by_all(tmp_path, parallel):
    output = tmp_path / "run"
    changes = {**SHARED, "parallel": parallel, "decay": {"cd": {"strength": 5.0}}}
    told = fork(tmp_path, job(output, **changes) | {"nan_at": 4})
    lines = [line for line in told.splitlines() if line.startswith("the loss became nan at step 4")]
    assert len(lines) == 2, told
    assert lines[0] == lines[1]
    assert "; at step 2 (that of the last checkpoint) it was " in lines[0]
    assert f"The last checkpoint is {output}/checkpoints/step-00000002." in lines[0]


def test_a_run_goes_on_in_another_number_of_processes(tmp_path):
    """Two, one, and two with the model in parts: the images of the steps stay, so do the losses."""
    changes = {**SHARED, "decay": CD, "checkpoint": {"every": 3, "keep": 4}, "log_every": 2}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    last = "ddp" if OLD else "fsdp2"
    fork(tmp_path, job(whole, **changes), job(cut, stop_at=4, **changes))
    with pytest.raises(QuietvitError, match=r"with processes 2, .* has processes 1, "):
        run(cut, resume=True, **changes)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(cut, patch, 8, resume=True, accumulation=2, **changes)
    told = fork(tmp_path, job(cut, resume=True, parallel=last, **changes))
    assert "accumulation 2, batch_size 4, and this run has processes 2" in told
    assert "resuming at step 6 of 12" in told
    noted = [json.loads(text) for text in (cut / "metrics.jsonl").read_text().splitlines()]
    noted = [line["changed"] for line in noted if "changed" in line]
    assert [text.count("processes was") for text in noted] == [1, 1]
    assert_equal(*ranks(cut))
    assert_close(ranks(cut)[0], ranks(whole)[0])
    losses = [[x["loss"] for x in lines(found) if "loss" in x] for found in (cut, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(losses[0]) == 6


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_all_processes(tmp_path, number):
    """A terminal sends Ctrl-C to all of them, and torchrun once more to those it started."""
    output = tmp_path / "run"
    changes = {**SHARED, "epochs": 4000, "checkpoint": {"every": 0}}
    process = start(tmp_path, job(output, **changes))
    path = output / "metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") > 3):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    told, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    name = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"
    assert f"{name}: stopped after step" in told
    assert len(list_checkpoints(output / "checkpoints")) == 1


def test_an_accelerate_without_fsdp2_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(engine, "version", lambda _: "1.6.0")
    with pytest.raises(QuietvitError, match=r"accelerate 1\.7 or later, but 1\.6\.0 is installed"):
        engine.make_accelerator(config(tmp_path, parallel="fsdp2"))


def test_processes_that_accelerate_does_not_join_are_told(tmp_path, monkeypatch):
    """Two processes that each train alone would write into one folder."""
    alone = engine.make_accelerator(config(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(QuietvitError, match="2 processes were started, but accelerate runs 1 on"):
        engine._check_as_asked(config(tmp_path), alone, sharded=False)
