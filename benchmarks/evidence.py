"""Does Colinearity Decay keep its promise? A study that can say no.

Families of settings get four tries each on every workload, with seed 0; the try that is best on
held-out images (mean of the figures in ``evidence_run.CHOOSING``) goes on with three seeds and is
judged on test images, in float and by every pipeline. From scratch the learning rate is chosen
first, for AdamW in float. A run that diverges counts as a try. Work goes block by block
(``BLOCKS``), what answers first comes first. Resumable: one CSV row a run. Fixed beforehand: CD
*helps* on a workload where its gain over tuned AdamW, mean over pipelines and paired by seed, has
a 95 % interval above 0, and float is not lower by more than 0.3.

    python benchmarks/evidence.py run --minutes 60
    python benchmarks/evidence.py run --workloads scratch --families 'adamw,cd*'
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
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer

import evidence_report
from evidence_data import SCALES, Workload, read
from evidence_run import (
    ALL,
    CHOOSING,
    DivergedError,
    Setting,
    in_bfloat16,
    measure,
    summed,
    train,
)

OUT = Path("results/evidence.csv")
CACHE = Path("runs/evidence")
PAGE = Path("docs/evidence.md")
FINAL_SEEDS = (1, 2, 3)
FIGURES = (
    *("val_float", *(f"val_{name}" for name in CHOOSING)),
    *("float", "float_same", *ALL),
    *("residual_max", "max_over_rms", "sqnr_db", "amplification", "worst_pair", "root_cause"),
    *("train_seconds", "last_loss"),
)
COLUMNS = (
    *("workload", "scale", "family", "setting", "seed", "stage"),
    *FIGURES,
    *("seconds", "device", "precision", "commit", "torch", "timm", "machine"),
)
DENSE = ("mlp", "value_output")
RATE, TRY, FINAL = "rate", "try", "final"

Block = tuple[tuple[str, ...], tuple[str, ...]]
# Workloads and families, in the order in which they are worked off: of each block all rates, all
# tries, all finals. Lengths (short, long) answer which strength.
BLOCKS: tuple[Block, ...] = (
    (("deit",), ("adamw", "cd+norm")),
    (("deit",), ("cd", "cd+qk")),
    (("scratch",), ("adamw", "cd")),
    (("deit",), ("adamw-all", "norm-gains", "muon", "tweo", "s2d")),
    (("deit-short", "deit-long"), ("cd+norm", "adamw")),
    (("scratch",), ("cd+norm", "cd+qk", "muon", "adamw-all", "norm-gains", "tweo", "s2d")),
    (("vits14",), ("adamw", "cd", "cd+norm", "cd+qk", "adamw-all", "muon")),
)
FAMILIES = tuple(dict.fromkeys(family for _, families in BLOCKS for family in families))


def _cd(strengths: Sequence[float], *kinds: str) -> list[Setting]:
    return [{"cd": {"strength": dict.fromkeys((*DENSE, *kinds), s)}} for s in strengths]


def tries_of(family: str, workload: Workload) -> list[Setting]:
    """The four tries of a family on a workload, without the learning rate.

    Fine-tuning: strength times sum of learning rates are what results/ablate.csv and
    results/finetune_cifar.csv found best, about 0.06, and around that. From scratch decay and
    growth come to a balance: strengths themselves, around those of the earlier runs.
    """
    total = summed(workload) * workload.rates[0] if workload.finetunes else 1.0

    def ladder(*values: float) -> list[float]:
        return [float(f"{value / total:.2g}") for value in values]

    if workload.finetunes:
        whole, gentle = ladder(0.04, 0.08, 0.16, 0.32), ladder(0.02, 0.04, 0.08, 0.16)
        matrices = [0.05, *ladder(0.02, 0.06, 0.18)]
    else:
        whole, gentle = [0.1, 0.3, 1.0, 3.0], [0.03, 0.1, 0.3, 1.0]
        matrices = [0.05, 0.2, 0.5, 1.0]
    every: dict[str, list[Setting]] = {
        "adamw": [{"weight_decay": decay} for decay in matrices],
        "adamw-all": [{"weight_decay": decay, "decay_all": True} for decay in whole],
        "norm-gains": [{"gains": strength} for strength in whole],
        "tweo": [{"tweo": {"strength": strength}} for strength in (0.003, 0.01, 0.03, 0.1)],
        # DeiT-Tiny has one layer above S2D's own threshold: the other tries have one that acts.
        "s2d": [
            {"s2d": {"strength": 5e-4}},
            *({"s2d": {"strength": s, "threshold": 0.3}} for s in (5e-3, 5e-2, 0.2)),
        ],
        "muon": [{"muon": 0.3}, {"muon": 1.0}, {"muon": 3.0}, {"muon": 1.0, "weight_decay": 0.5}],
        "cd": _cd(whole),
        "cd+norm": _cd(gentle, "norm_linear"),
        "cd+qk": _cd(whole, "query_key"),
    }
    return every[family]


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
OutOption = Annotated[Path, typer.Option(help="The table.")]
ScaleOption = Annotated[str, typer.Option(help="cpu, gpu, or tiny to try it out.")]
WorkloadsOption = Annotated[str, typer.Option(help="Names or wildcards, comma-separated.")]
FamiliesOption = Annotated[str, typer.Option(help="Names or wildcards, comma-separated.")]
Row = dict[str, str]


@dataclass(frozen=True)
class Job:
    """One run; ``setting`` is JSON."""

    workload: str
    scale: str
    family: str
    setting: str
    seed: str
    stage: str

    @property
    def key(self) -> tuple[str, ...]:
        return self.workload, self.scale, self.setting, self.seed, self.stage


def rows_of(out: Path) -> list[Row]:
    if not out.exists():
        return []
    with out.open(newline="") as handle:
        return list(csv.DictReader(handle))


def key_of(row: Row) -> tuple[str, ...]:
    return row["workload"], row["scale"], row["setting"], row["seed"], row["stage"]


def shown(setting: Setting) -> str:
    return json.dumps(setting, sort_keys=True)


def score(row: Row) -> float:
    """By which a choice is made, on held-out images; one that diverged is below all others."""
    names = ["val_float"] if row["stage"] == RATE else [f"val_{name}" for name in CHOOSING]
    found = statistics.mean(float(row[name]) for name in names if row[name])
    return -math.inf if math.isnan(found) else found


def best(rows: Sequence[Row], jobs: Sequence[Job]) -> str | None:
    """The setting of the best of these jobs, None while one is missing or where all diverged."""
    by_key = {key_of(row): row for row in rows}
    found = {job.setting: score(by_key[job.key]) for job in jobs if job.key in by_key}
    if len(found) < len(jobs) or max(found.values()) == -math.inf:
        return None
    return max(found, key=found.__getitem__)


def rate_jobs(name: str, scale: str) -> list[Job]:
    """The choice of a learning rate, for AdamW; none where there is one rate."""
    rates = SCALES[scale][name].rates
    if len(rates) == 1:
        return []
    return [Job(name, scale, "adamw", shown({"lr": lr}), "0", RATE) for lr in rates]


def try_jobs(rows: Sequence[Row], name: str, scale: str, family: str) -> list[Job]:
    """The four tries of a family; none while the rate is not chosen."""
    rates, chosen = rate_jobs(name, scale), {}
    if rates:
        found = best(rows, rates)
        if found is None:
            return []
        chosen = json.loads(found)
    tries = tries_of(family, SCALES[scale][name])
    return [Job(name, scale, family, shown({**chosen, **each}), "0", TRY) for each in tries]


def final_jobs(rows: Sequence[Row], name: str, scale: str, family: str) -> list[Job]:
    """The best try with every seed; none while a try is missing."""
    tries = try_jobs(rows, name, scale, family)
    found = best(rows, tries) if tries else None
    if found is None:
        return []
    return [Job(name, scale, family, found, str(seed), FINAL) for seed in FINAL_SEEDS]


def next_jobs(
    rows: Sequence[Row], scale: str, workloads: Sequence[str], families: Sequence[str]
) -> Iterator[Job]:
    """What can run now, in order."""
    done = {key_of(row) for row in rows}
    for names, members in BLOCKS:
        jobs: list[Job] = []
        chosen = [family for family in members if family in families]
        for name in (name for name in names if name in workloads and chosen):
            jobs += rate_jobs(name, scale)
            tries = [try_jobs(rows, name, scale, family) for family in chosen]
            jobs += [job for place in zip(*filter(None, tries), strict=True) for job in place]
            finals = [final_jobs(rows, name, scale, family) for family in chosen]
            jobs += [job for seed in zip(*filter(None, finals), strict=True) for job in seed]
        yield from (job for job in jobs if job.key not in done)


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
    """The commit of this checkout, with a + where it was changed; empty outside git."""
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
    """Run a job in a process of its own, so that a crash ends no more than it."""
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
    minutes: Annotated[float, typer.Option(help="No run begins that would end later.")] = 60.0,
    workloads: WorkloadsOption = "*",
    families: FamiliesOption = "*",
    scale: ScaleOption = "cpu",
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads each.")] = 1,
    cache: Annotated[Path, typer.Option(help="Folder for images and heads as tensors.")] = CACHE,
) -> None:
    """Work off what has no row yet, as far as the time goes."""
    names, chosen = matching(workloads, SCALES[scale]), matching(families, FAMILIES)
    where = {"data": str(data), "cache": str(cache), "threads": threads}
    end, failed = time.monotonic() + 60 * minutes, set[Job]()
    waiting: dict[Future[dict[str, Any]], Job] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            rows = rows_of(out)
            for job in next_jobs(rows, scale, names, chosen):
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
    """Seconds a run like this one took so far, median; 0 before the first."""
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
) -> None:
    """Print what would run next."""
    names, chosen = matching(workloads, SCALES[scale]), matching(families, FAMILIES)
    rows = rows_of(out)
    todo = list(next_jobs(rows, scale, names, chosen))
    for job in todo[:40]:
        print(job.workload, job.family, job.setting, job.seed, job.stage)
    print(f"{len(rows)} runs are done, {len(todo)} can go now; finals follow their tries")


@app.command()
def summary(out: OutOption = OUT) -> None:
    """Print every workload's tables and the tries as Markdown."""
    rows = rows_of(out)
    print(evidence_report.summary(rows), evidence_report.tries_table(rows), sep="\n\n")


@app.command()
def report(
    out: OutOption = OUT,
    page: Annotated[Path, typer.Option(help="The page; its figure lies beside it.")] = PAGE,
) -> None:
    """Write the page and its figure from the table."""
    evidence_report.report(rows_of(out), page)


if __name__ == "__main__":
    app()
