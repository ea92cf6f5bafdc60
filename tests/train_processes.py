"""What one of several training processes does: jobs, as ``test_train_distributed`` lists them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from quietvit.errors import QuietvitError
from quietvit.tensors import gathered
from quietvit.train import loop, parse_config, train
from quietvit.train.engine import whole_model


class StoppedError(Exception):
    pass


def in_two(rank, jobs, log, port):
    """Run jobs as one of two processes, with what torchrun tells them, output kept in ``log``."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({key: str(value) for key, value in own.items()})
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    run_jobs(jobs)


def run_jobs(path):
    """Train by each job's configuration, up to the step at which it shall stop.

    Each process leaves its weights beside the run, and how many numbers it holds of the whole.
    What is compiled is so without the compiler of C++, which would take minutes. With ``nan_at``
    the loss of the second process alone is NaN from that step on; each prints what it raises.
    """
    rank, compiled = os.environ["RANK"], torch.compile
    torch.compile = lambda *args, **given: compiled(*args, **{**given, "backend": "aot_eager"})
    after_step, finish = loop._Loop._after_step, loop._Loop.finish
    forward = loop.forward_backward
    for job in json.loads(Path(path).read_text()):

        def stopping(self, images, stop_at=job["stop_at"]):
            if self.step == stop_at:
                raise StoppedError
            return after_step(self, images)

        def finishing(self, progress):
            weights = self.t.models.plain.state_dict()
            path = f"{self.config.output}.rank{rank}"
            save_file({key: gathered(value).clone() for key, value in weights.items()}, path)
            result = finish(self, progress)
            copied = sum(p.numel() for p in self.t.models.evaluated.parameters() if not p.is_meta)
            kept = len(whole_model(self.accelerator, self.t.models.plain))
            own = {"copied": copied, "kept": kept, "weights": len(weights)}
            Path(f"{path}.json").write_text(json.dumps(own))
            return result

        def spoiling(parts, batch, at, job=job):
            spoilt = rank == "1" and at + 1 >= job.get("nan_at", math.inf)
            images, labels = batch
            return forward(parts, (images * float("nan") if spoilt else images, labels), at)

        loop._Loop._after_step, loop._Loop.finish = stopping, finishing
        loop.forward_backward = spoiling
        try:
            train(parse_config(job["config"]), resume=job["resume"], progress=False)
        except StoppedError:
            print("stopped", flush=True)
        except QuietvitError as error:
            if "nan_at" not in job:
                raise
            print(f"{error}\n", end="", flush=True)
