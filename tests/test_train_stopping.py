"""SIGTERM and Ctrl-C while a run goes on, and the folder of a run when the command comes again."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from quietvit import cli, console
from quietvit.errors import QuietvitError
from quietvit.tasks import classification
from quietvit.train import loop, stopping
from quietvit.train.checkpoint import list_checkpoints
from test_train_loop import EVERYTHING, assert_same, config, interrupt, lines, run

BOTH = pytest.mark.parametrize(
    ("number", "name", "raised"),
    [(signal.SIGTERM, "SIGTERM", SystemExit), (signal.SIGINT, "Ctrl-C", KeyboardInterrupt)],
    ids=["sigterm", "ctrl-c"],
)


def signalled(module, name, number, at=1):
    """A patch of a function that sends this process a signal at its n-th call, before it runs."""
    original, calls = getattr(module, name), []

    def sending(*args, **given):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return original(*args, **given)

    return module, name, sending


def stopped(output, monkeypatch, raised, *patch, **changes):
    """Stop a run by a patch; returns what was raised."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patched:
        patched.setattr(*patch)
        with pytest.raises(raised) as caught:
            run(output, **changes)
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    return caught.value


@BOTH
@pytest.mark.parametrize(
    ("where", "at", "step"),
    [
        ((loop, "forward_backward"), 9, 5),  # two batches are a step
        ((loop, "save_checkpoint"), 1, 4),
        ((classification, "count_right"), 1, 7),  # between two epochs
        ((classification, "count_right"), 2, 14),  # after the last
    ],
    ids=["step", "checkpoint", "evaluation", "last evaluation"],
)
def test_the_step_is_finished_a_checkpoint_written_and_the_run_resumes_exactly(
    tmp_path, monkeypatch, caplog, capfd, number, name, raised, where, at, step
):
    changes = {**EVERYTHING, "evaluate_every": 1, "checkpoint": {"every": 4}}
    expected = run(tmp_path / "whole", **changes)
    caplog.set_level(logging.WARNING, "quietvit")
    error = stopped(
        tmp_path / "run", monkeypatch, raised, *signalled(*where, number, at), **changes
    )
    path = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert path.name == f"step-{step:08d}"
    told = f"{name}: stopped after step {step} of 14; the checkpoint {path} is written."
    assert told in caplog.text
    if raised is SystemExit:
        assert error.code == 143
    else:
        assert str(error).startswith(told)
        assert "Press it again to stop at once" in capfd.readouterr().err
    assert_same(run(tmp_path / "run", resume=True, **changes), expected)


def test_a_second_ctrl_c_ends_at_once_and_earlier_checkpoints_stay(tmp_path, monkeypatch):
    original, calls = loop.forward_backward, []

    def impatient(*args):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    error = stopped(
        tmp_path / "run", monkeypatch, KeyboardInterrupt, loop, "forward_backward", impatient
    )
    assert error.args == ()
    assert len(calls) == 4
    assert [p.name for p in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000002"]
    assert run(tmp_path / "run", resume=True).steps == 14


@BOTH
def test_a_signal_when_nothing_is_left_to_stop_ends_after_the_result(
    tmp_path, monkeypatch, caplog, number, name, raised
):
    caplog.set_level(logging.WARNING, "quietvit")
    stopped(tmp_path / "run", monkeypatch, raised, *signalled(loop, "TrainResult", number))
    assert f"{name}: the run was already finished" in caplog.text
    assert (tmp_path / "run" / "result.json").exists()


def test_before_the_first_step_nothing_is_caught_and_resume_begins_the_run(tmp_path, monkeypatch):
    patch = signalled(loop, "build", signal.SIGINT)
    error = stopped(tmp_path / "run", monkeypatch, KeyboardInterrupt, *patch)
    assert error.args == ()
    assert run(tmp_path / "run", resume=True).steps == 14


def test_an_ignored_signal_stays_ignored(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(*signalled(loop, "forward_backward", signal.SIGINT))
            assert run(tmp_path / "run", epochs=1).steps == 7
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_echo_of_a_launcher_is_no_second_ctrl_c(monkeypatch):
    class Several:
        num_processes, is_main_process = 2, False

    found = stopping.Termination(Several())
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    try:
        for later in (0.0, 0.5):
            now[0] += later
            os.kill(os.getpid(), signal.SIGINT)
        now[0] += 5
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        found.close()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_and_its_workers_end_in_order(tmp_path, number, code):
    """The signal goes to every process of the group, as a terminal sends Ctrl-C."""
    path, output = tmp_path / "config.json", tmp_path / "run"
    path.write_text(config(output, epochs=5000, num_workers=2).model_dump_json())
    process = subprocess.Popen(
        [sys.executable, "-m", "quietvit.cli", "train", "-r", str(path), "-o", str(output)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = output / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == code
    assert "stopped after step" in told
    assert "Traceback" not in told
    last = list_checkpoints(output / "checkpoints")[-1]
    assert f"the checkpoint {last} is written" in " ".join(told.split())
    assert last.name == f"step-{lines(output)[-1]['step']:08d}"


def kept(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_command_again_names_resume_and_force_alone_deletes_no_checkpoint(
    tmp_path, monkeypatch, caplog
):
    output = tmp_path / "run"
    interrupt(output, monkeypatch, 5)
    held = kept(output)
    with pytest.raises(QuietvitError, match=r"an unfinished run \(checkpoints: step-00000002, "
                       r"step-00000004, the last after step 4\)\. To continue it, pass resume "
                       r"\(--resume\)\. .*pass force and discard"):  # fmt: skip
        run(output)
    goes = r"deletes config\.json, classes\.json, metrics\.jsonl, checkpoints/step-00000002, "
    with pytest.raises(QuietvitError, match=rf"resume\) instead of force\. .*{goes}"):
        run(output, force=True)
    with pytest.raises(QuietvitError, match="unfinished"):
        run(output, discard=True)
    assert kept(output) == held
    caplog.set_level(logging.WARNING, "quietvit")
    assert run(output, force=True, discard=True, seed=1).steps == 14
    assert "a new run in" in caplog.text
    assert "checkpoints/step-00000004" in caplog.text


def test_a_run_without_a_checkpoint_takes_force_and_a_finished_one_is_named(
    tmp_path, monkeypatch, caplog
):
    output = tmp_path / "run"
    interrupt(output, monkeypatch, 1)
    with pytest.raises(QuietvitError, match=r"\(without a checkpoint\)\. .*resume.* pass force \("):
        run(output)
    first = run(output, force=True, epochs=1)
    with pytest.raises(QuietvitError, match=rf"a finished run \(top-1 {first.top1:.2f} % after 7"):
        run(output, epochs=1)
    caplog.set_level(logging.WARNING, "quietvit")
    run(output, force=True, epochs=1)
    assert f"deletes a finished run (top-1 {first.top1:.2f} % after 7 steps)" in caplog.text
    assert "model.safetensors, result.json" in caplog.text


def test_the_folder_of_another_model_is_not_emptied_by_force(tmp_path):
    """transformers names its files as a run does: config.json, model.safetensors."""
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "model.safetensors").write_text("weights")
    held = kept(tmp_path)
    for given in ({}, {"force": True}, {"resume": True}):
        with pytest.raises(QuietvitError):
            run(tmp_path, **given)
    assert kept(tmp_path) == held


@pytest.mark.parametrize("answer", ["n\n", "y\n"])
def test_on_a_terminal_force_asks(tmp_path, monkeypatch, answer):
    output = tmp_path / "run"
    interrupt(output, monkeypatch, 3)
    (tmp_path / "r.json").write_text(config(output, epochs=1).model_dump_json())
    asked = ["train", "-r", str(tmp_path / "r.json"), "-o", str(output), "--force"]
    refused = CliRunner().invoke(cli.app, asked)
    assert refused.exit_code == 2
    assert "--force --discard" in refused.stderr
    monkeypatch.setattr(console, "interactive", lambda: True)
    done = CliRunner().invoke(cli.app, asked, input=answer)
    assert "Delete all of this?" in done.stderr
    assert "checkpoints/step-00000002" in done.stderr
    assert done.exit_code == (0 if answer == "y\n" else 2)
    assert (output / "result.json").exists() == (answer == "y\n")
    assert json.loads((output / "config.json").read_text())["epochs"] == 2 - (answer == "y\n")
