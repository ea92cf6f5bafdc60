"""The guide's command lines for several machines, here two of one process each on one CPU."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quietvit.train import TrainResult, train
from test_train_distributed import CD, SHARED, assert_close, fork, job
from test_train_loop import config, lines

TORCHRUN = (
    *("torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"),
    *("--rdzv-endpoint", "127.0.0.1:{port}", "--rdzv-id", "mine"),
)
ACCELERATE = (
    *("accelerate.commands.launch", "--multi_gpu", "--num_machines", "2", "--num_processes", "2"),
    *("--machine_rank", "{rank}", "--main_process_ip", "127.0.0.1", "--main_process_port"),
    *("{port}", "--mixed_precision", "no", "--dynamo_backend", "no"),
)


def on_two_machines(launcher: tuple[str, ...], run: list[str], folder: Path) -> list[str]:
    """Start the same on both, wait for both, and return the lines they print."""
    port = free_port()
    processes = []
    for rank in range(2):
        command = [part.format(rank=rank, port=port) for part in launcher]
        with (folder / f"{rank}.log").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", *command, *run],
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    finish(processes, folder)
    return said(folder).splitlines()


def finish(processes: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Wait for all; where one fails or hangs, end all with their workers and show what was said."""
    end = time.monotonic() + 300
    try:
        while any(process.poll() is None for process in processes):
            assert not any(process.returncode for process in processes), said(folder)
            assert time.monotonic() < end, said(folder)
            time.sleep(0.1)
        assert not any(process.returncode for process in processes), said(folder)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def said(folder: Path) -> str:
    return "\n".join(log.read_text() for log in sorted(folder.glob("*.log")))


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


CHANGES: dict[str, Any] = {**SHARED, "epochs": 1, "decay": CD}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, which steps through the whole batch."""
    output = tmp_path_factory.mktemp("alone") / "one"
    train(config(output, accumulation=4, **CHANGES), progress=False)
    return output


def assert_same_run(both: Path, alone: Path) -> None:
    found, expected = TrainResult.read(both), TrainResult.read(alone)
    assert found.steps == expected.steps == 3
    assert found.top1 == expected.top1
    assert_close(load_file(found.weights), load_file(expected.weights))
    losses = [[line["loss"] for line in lines(each) if "loss" in line] for each in (both, alone)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(losses[0]) == 3


@pytest.mark.slow
def test_two_machines_train_as_one_process_with_the_whole_batch(
    alone: Path, tmp_path: Path
) -> None:
    both = tmp_path / "both"
    device = "cpu" if torch.accelerator.is_available() else "auto"  # "auto" is that of the recipes
    shared = config(both, accumulation=2, device=device, **CHANGES)
    (tmp_path / "both.json").write_text(shared.model_dump_json())
    run = ["-m", "quietvit.cli", "train", "--recipe", f"{both}.json", "--output", str(both)]
    on_two_machines(TORCHRUN, run, tmp_path)
    assert_same_run(both, alone)


@pytest.mark.slow
def test_the_environment_of_accelerate_launch_gives_the_same_run(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its two processes tell their environment. The run is then forked into it."""
    script = tmp_path / "told.py"
    script.write_text("import os, json; print('told', json.dumps(dict(os.environ)), flush=True)")
    told = on_two_machines(ACCELERATE, [str(script)], tmp_path)
    found = [json.loads(line.removeprefix("told ")) for line in told if line.startswith("told ")]
    shared = {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    placed = [{key: each[key] for key in ("RANK", *shared)} for each in found]
    assert sorted(placed, key=itemgetter("RANK")) == [{"RANK": rank, **shared} for rank in "01"]
    own = {key: value for key, value in found[0].items() if os.environ.get(key) != value}
    assert own["ACCELERATE_MIXED_PRECISION"] == "no"
    for key, value in own.items():
        monkeypatch.setenv(key, value)  # ``fork`` then sets ranks and address of its own
    both = tmp_path / "both"
    fork(tmp_path, job(both, accumulation=2, **CHANGES))
    assert_same_run(both, alone)
