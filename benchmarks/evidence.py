"""Does Colinearity Decay (CD) keep its promise? A study that can answer no.

Each family of settings gets four tries on every workload, with seed 0. The try that is best on
held-out images continues with three seeds (mean of the figures in ``evidence_run.CHOOSING``). It is
then judged on test images, in float and by every pipeline. From scratch, the learning rate is
chosen first, for AdamW in float. A run that diverges counts as a try. Blocks of runs follow the
order of ``evidence_plan.BLOCKS``, the most informative first. Each run gives one CSV row, and a
restart continues where the last one stopped.

The criterion was fixed beforehand. CD *helps* on a workload if two things hold. The 95 % interval
of its gain is above 0, and float is not lower by more than 0.3. The gain is over tuned AdamW, mean
over pipelines and paired by seed.

    python benchmarks/evidence.py run --minutes 60
    python benchmarks/evidence.py run --workloads scratch --families 'adamw,cd*'
    python benchmarks/evidence.py run --workloads scratch --families adamw,cd --seeds 6
    python benchmarks/evidence.py plan
    python benchmarks/evidence.py summary
    python benchmarks/evidence.py report
    python benchmarks/evidence.py run --scale gpu --jobs 3 --out $OUT/evidence.csv   # with a GPU

Needs QUIETVIT_TEST_DATA (or --data), see docs/development.md. Each run is a process of its own.
"""

from __future__ import annotations

import csv
import fcntl
import fnmatch
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer

import evidence_report
from csv_rows import read as read_rows
from evidence_data import SCALES, Workload, read
from evidence_plan import (
    COLUMNS,
    FAMILIES,
    FIGURES,
    FINAL_SEEDS,
    Job,
    Row,
    next_jobs,
)
from evidence_run import DivergedError, in_bfloat16, measure, train

OUT = Path("results/evidence.csv")
CACHE = Path("runs/evidence")
PAGE = Path("docs/evidence.md")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
OutOption = Annotated[Path, typer.Option(help="The table.")]
ScaleOption = Annotated[str, typer.Option(help="cpu, gpu, or tiny for a quick try.")]
WorkloadsOption = Annotated[str, typer.Option(help="Names or wildcards, comma-separated.")]
FamiliesOption = Annotated[str, typer.Option(help="Names or wildcards, comma-separated.")]
SeedsOption = Annotated[int, typer.Option(help="Finals of each family: seeds 1 to this number.")]


def append(out: Path, row: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", newline="") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        writer = csv.DictWriter(handle, COLUMNS, lineterminator="\n")
        if not handle.tell():
            writer.writeheader()
        writer.writerow(row)
        handle.flush()
        os.fsync(handle.fileno())


def run_one(job: Job, data: Path, cache: Path) -> dict[str, Any]:
    """The row of one job."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workload = SCALES[job.scale][job.workload]
    start = time.perf_counter()
    row: dict[str, Any] = asdict(job)
    try:
        split = read(workload, data, cache, device)
        model, facts = train(workload, json.loads(job.setting), int(job.seed), split, data, cache)
        row |= facts | measure(model, workload, split, job.stage)
    except DivergedError as error:
        print("DIVERGED", *job.key, error, file=sys.stderr, flush=True)
        row |= dict.fromkeys(FIGURES, math.nan)
    gpu = device.type == "cuda"
    return row | {
        "seconds": round(time.perf_counter() - start, 1),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "precision": "bfloat16 autocast" if in_bfloat16(workload, device) else "float32",
        "commit": commit(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "machine": f"{platform.machine()} {os.cpu_count()} cores",
    }


def commit() -> str:
    """The commit of this checkout, with a + if it has changes; empty outside git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "."], capture_output=True)
    return found.stdout.strip() + ("+" if changed.returncode == 1 else "")


@app.command(hidden=True)
def one(given: str) -> None:
    """Run one job, given as JSON; print its row as JSON."""
    asked = json.loads(given)
    torch.set_num_threads(asked["threads"])
    row = run_one(Job(**asked["job"]), Path(asked["data"]), Path(asked["cache"]))
    print(json.dumps(row))


def spawn(job: Job, where: dict[str, Any]) -> dict[str, Any]:
    """Run a job in a process of its own, so that a crash ends only this job."""
    given = json.dumps({"job": asdict(job), **where})
    environment = os.environ | {"OMP_NUM_THREADS": str(where["threads"])}
    command = [sys.executable, __file__, "one", given]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(child.stderr.strip()[-2000:] or f"exit code {child.returncode}")
    if "DIVERGED" in child.stderr:
        print(child.stderr.strip()[-2000:], file=sys.stderr, flush=True)
    found: dict[str, Any] = json.loads(child.stdout.strip().splitlines()[-1])
    return found


@app.command()
def run(
    data: Annotated[Path, typer.Option(envvar="QUIETVIT_TEST_DATA", help="Folder with the data.")],
    out: OutOption = OUT,
    minutes: Annotated[float, typer.Option(help="No run starts that would end later.")] = 60.0,
    workloads: WorkloadsOption = "*",
    families: FamiliesOption = "*",
    scale: ScaleOption = "cpu",
    seeds: SeedsOption = FINAL_SEEDS[-1],
    jobs: Annotated[int, typer.Option(help="Runs at the same time.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads each.")] = 1,
    cache: Annotated[Path, typer.Option(help="Folder for images and heads as tensors.")] = CACHE,
) -> None:
    """Run what has no row yet, until the time is over."""
    names, chosen = matching(workloads, SCALES[scale]), matching(families, FAMILIES)
    where = {"data": str(data), "cache": str(cache), "threads": threads}
    end, failed = time.monotonic() + 60 * minutes, set[Job]()
    waiting: dict[Future[dict[str, Any]], Job] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            rows = read_rows(out)
            for job in next_jobs(rows, scale, names, chosen, range(1, seeds + 1)):
                if len(waiting) >= jobs:
                    break
                late = time.monotonic() + expected(rows, job) > end
                if not late and job not in failed and job not in waiting.values():
                    waiting[pool.submit(spawn, job, where)] = job
            if not waiting:
                break
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                job = waiting.pop(future)
                try:
                    row = future.result()
                    append(out, row)
                    print("done", *job.key, row["seconds"], flush=True)
                except (RuntimeError, ValueError) as error:
                    failed.add(job)
                    print("FAILED", *job.key, error, file=sys.stderr, flush=True)
    if failed:
        raise typer.Exit(1)


def matching(patterns: str, names: Sequence[str] | dict[str, Workload]) -> list[str]:
    split = patterns.split(",")
    found = [name for name in names if any(fnmatch.fnmatchcase(name, p) for p in split)]
    if not found:
        raise typer.BadParameter(f"{patterns!r} matches none of {', '.join(names)}")
    return found


def expected(rows: Sequence[Row], job: Job) -> float:
    """Median seconds of runs like this one so far; 0 before the first."""
    like = (job.workload, job.scale, job.stage)
    taken = [
        float(row["seconds"])
        for row in rows
        if (row["workload"], row["scale"], row["stage"]) == like
    ]
    return statistics.median(taken) if taken else 0.0


@app.command()
def plan(
    out: OutOption = OUT,
    workloads: WorkloadsOption = "*",
    families: FamiliesOption = "*",
    scale: ScaleOption = "cpu",
    seeds: SeedsOption = FINAL_SEEDS[-1],
) -> None:
    """Print what would run next."""
    names, chosen = matching(workloads, SCALES[scale]), matching(families, FAMILIES)
    rows = read_rows(out)
    todo = list(next_jobs(rows, scale, names, chosen, range(1, seeds + 1)))
    for job in todo[:40]:
        print(job.workload, job.family, job.setting, job.seed, job.stage)
    print(f"{len(rows)} runs are done, {len(todo)} can go now; finals follow their tries")


@app.command()
def summary(out: OutOption = OUT) -> None:
    """Print the tables and the tries of every workload as Markdown."""
    rows = read_rows(out)
    print(evidence_report.summary(rows), evidence_report.tries_table(rows), sep="\n\n")


@app.command()
def report(
    out: OutOption = OUT,
    page: Annotated[Path, typer.Option(help="The page; its figure lies beside it.")] = PAGE,
) -> None:
    """Write the page and its figure from the table."""
    evidence_report.report(read_rows(out), page)


if __name__ == "__main__":
    app()
