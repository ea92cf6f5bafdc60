"""The guide's command lines for several machines, here two of one process each on one CPU."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from quietvit.train import TrainResult, train
from test_train_distributed import CD, SHARED, assert_close
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


def started(launcher: tuple[str, ...], output: Path, **changes: Any) -> subprocess.Popen[bytes]:
    """A run by the launcher, its configuration a recipe beside the output folder."""
    recipe = output.with_suffix(".json")
    recipe.write_text(config(output, **changes).model_dump_json())
    run = ["-m", "quietvit.cli", "train", "--recipe", str(recipe), "--output", str(output)]
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, *run],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=output.with_suffix(f".{len(list(output.parent.iterdir()))}.log").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


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


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_machines_train_as_one_process_with_the_whole_batch(
    launcher: tuple[str, ...], alone: Path, tmp_path: Path
) -> None:
    both = tmp_path / "both"
    port = free_port()
    commands = [[part.format(rank=rank, port=port) for part in launcher] for rank in range(2)]
    launched = [started(tuple(each), both, accumulation=2, **CHANGES) for each in commands]
    finish(launched, tmp_path)
    found, expected = TrainResult.read(both), TrainResult.read(alone)
    assert found.steps == expected.steps == 3
    assert found.top1 == expected.top1
    assert_close(load_file(found.weights), load_file(expected.weights))
    losses = [[line["loss"] for line in lines(each) if "loss" in line] for each in (both, alone)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(losses[0]) == 3
