"""Which regularizer, penalty, pairs and strength make a ViT survive four bits: an ablation.

Two tasks: fine-tuning DeiT-Tiny, and a ViT of 5.4 million parameters from scratch, on CIFAR-10.
Every family of settings gets the same number of tries with seed 0; the try that is best on held-out
training images (mean of the two W4A4 figures that are not min-max) goes on with more seeds, and is
judged on test images. A run that diverges counts as a try, with figures of nan. The tasks are full
on a GPU, reduced on a processor with fast bfloat16, reduced once more and in float32 on any other
(``--scale``); families are worked off in the order of their tiers, as far as ``--minutes`` go.
Resumable: one CSV row a run. Needs QUIETVIT_TEST_DATA (or --data), see docs/development.md.

    python benchmarks/ablate.py run --minutes 60
    python benchmarks/ablate.py run --tasks scratch --families 'adamw,cd*' --jobs 2
    python benchmarks/ablate.py plan
    python benchmarks/ablate.py summary
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
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ablate_run import (
    TASKS,
    DivergedError,
    Setting,
    Split,
    Task,
    in_bfloat16,
    measure,
    own_scale,
    read,
    train,
)

OUT = Path("results/ablate.csv")
RUNS = Path("runs/ablate")
FINAL_SEEDS = (1, 2, 3)
DENSE, NORM = ("mlp", "value_output"), ("norm_linear",)
FIGURES = (
    *("val_float", "val_W4A4-omse", "val_W4A4-repq", "float"),
    *(f"{bits}-{name}" for bits in ("W8A8", "W6A6", "W4A4") for name in ("minmax", "omse", "repq")),
    *("residual_max", "post_norm_max_over_rms", "post_gelu_max_over_rms"),
    *("last_loss", "train_seconds"),
)
COLUMNS = (
    *("task", "scale", "family", "setting", "seed", "stage"),
    *FIGURES,
    *("seconds", "device", "torch", "machine"),
)


def _cd(strengths: Sequence[float], kinds: Sequence[str], **more: Any) -> list[Setting]:
    return [{"cd": {"strength": dict.fromkeys(kinds, strength), **more}} for strength in strengths]


def _each(key: str, strengths: Iterable[float], **more: Any) -> list[Setting]:
    return [{key: {"strength": strength, **more}} for strength in strengths]


def _with(settings: Sequence[Setting], **more: Any) -> list[Setting]:
    return [{**setting, **more} for setting in settings]


ALL = {"decay_all": True}
# What a decoupled decay does to a fine-tuned weight goes with strength times the sum of learning
# rates: longer training, lower ladder. From scratch decay and growth come to a balance.
LADDERS = {("gpu", "finetune"): (0.03, 0.1, 0.3, 1.0)}
LADDER = (0.3, 1.0, 3.0, 10.0)
# Of DeiT-Tiny's 48 layers one passes S2D's own threshold of 0.95 (``SpectralDecay.dominance``): one
# try has it, the others a threshold that about a third of the layers pass.
LOWER = {"threshold": 0.3}


def tiers_of(task: str, scale: str) -> tuple[dict[str, list[Setting]], ...]:
    """Tiers of families, in the order they are worked off; four tries each."""
    return _tiers(LADDERS.get((scale, task), LADDER))


def families_of(task: str, scale: str) -> dict[str, list[Setting]]:
    return {name: tries for tier in tiers_of(task, scale) for name, tries in tier.items()}


def _tiers(ladder: Sequence[float]) -> tuple[dict[str, list[Setting]], ...]:
    return (
        {
            "adamw": [{"weight_decay": decay} for decay in (0.05, *ladder[-3:])],
            "adamw-all": [{"weight_decay": decay, **ALL} for decay in ladder],
            "pair-weight": _each("weight", ladder, kinds=(*DENSE, *NORM)),
            "norm-gains": [{"gains": strength} for strength in ladder],
            "cd": _cd(ladder, DENSE),
            "cd+norm": _cd(ladder, (*DENSE, *NORM)),
            "tweo": _each("tweo", (0.001, 0.01, 0.1, 1.0)),
            "s2d": [*_each("s2d", (5e-4,)), *_each("s2d", (5e-4, 5e-3, 5e-2), **LOWER)],
            "kure": _each("kure", (0.01, 0.1, 1.0, 10.0)),
        },
        {
            "cd-norm": _cd(ladder, NORM),
            "cd+residual": _cd(ladder, (*DENSE, "residual")),
            "cd-fold": _cd(ladder, DENSE, fold=True),
            "cd+norm+tweo": _with(_cd(ladder, (*DENSE, *NORM)), tweo={"strength": 0.01}),
            "cd+norm+adamw-all": _with(_cd(ladder, (*DENSE, *NORM)), weight_decay=ladder[1], **ALL),
        },
        {
            "cd+norm-peak": _cd(ladder, (*DENSE, *NORM), penalty="peak"),
            "cd+norm-cosine": _cd(ladder, (*DENSE, *NORM), penalty="cosine"),
            "cd+norm-top": _cd(ladder, (*DENSE, *NORM), penalty="top"),
            "cd+norm-every10": _cd(ladder, (*DENSE, *NORM), every=10),
            "cd+norm-every50": _cd(ladder, (*DENSE, *NORM), every=50),
            "cd+norm-late": _cd(ladder, (*DENSE, *NORM), schedule={"start": 0.5}),
            "cd+gains": _with(_cd(ladder, DENSE), gains=ladder[1]),
            "s2d-decoupled": _each("s2d", (r / 10 for r in ladder), coupled=False, **LOWER),
            "kure-decoupled": _each("kure", (10 * r for r in ladder), coupled=False),
        },
    )


FAMILIES = tuple(families_of("scratch", "cpu"))

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
OutOption = Annotated[Path, typer.Option(help="The table.")]
FamiliesOption = Annotated[str, typer.Option(help="Names or wildcards, comma-separated.")]
Row = dict[str, str]


@dataclass(frozen=True)
class Job:
    """One run; ``setting`` is JSON, ``stage`` search or final."""

    task: str
    scale: str
    family: str
    setting: str
    seed: str
    stage: str

    @property
    def key(self) -> tuple[str, ...]:
        return self.task, self.scale, self.setting, self.seed


def rows_of(out: Path) -> list[Row]:
    if not out.exists():
        return []
    with out.open(newline="") as handle:
        return list(csv.DictReader(handle))


def key_of(row: Row) -> tuple[str, ...]:
    return row["task"], row["scale"], row["setting"], row["seed"]


def score(row: Row) -> float:
    """By which tries are chosen, on held-out images; one that diverged is below all others."""
    found = statistics.mean(float(row[f"val_W4A4-{name}"]) for name in ("omse", "repq"))
    return -math.inf if math.isnan(found) else found


def best_try(rows: Sequence[Row], task: str, scale: str, family: str) -> str | None:
    """The setting of a family that was best, None while a try is missing."""
    wanted = {_shown(setting) for setting in families_of(task, scale)[family]}
    found = {
        row["setting"]: score(row)
        for row in rows
        if (row["task"], row["scale"], row["seed"]) == (task, scale, "0")
        and row["setting"] in wanted
    }
    return max(found, key=found.__getitem__) if len(found) == len(wanted) else None


def next_jobs(
    rows: Sequence[Row], tasks: Sequence[str], scale: str, families: Sequence[str]
) -> Iterator[Job]:
    """What can run now, in order: of each tier the tries of all tasks, then its finals."""
    done = {key_of(row) for row in rows}
    for level, names in enumerate(_tiers(LADDER)):
        chosen = [name for name in names if name in families]
        for task in tasks:
            tier = tiers_of(task, scale)[level]
            for place in range(max((len(tier[name]) for name in chosen), default=0)):
                for name in chosen:
                    job = Job(task, scale, name, _shown(tier[name][place]), "0", "search")
                    if job.key not in done:
                        yield job
        for task in tasks:
            for seed in FINAL_SEEDS:
                for name in chosen:
                    best = best_try(rows, task, scale, name)
                    job = Job(task, scale, name, best or "", str(seed), "final")
                    if best is not None and job.key not in done:
                        yield job


def _shown(setting: Setting) -> str:
    return json.dumps(setting, sort_keys=True)


def append(out: Path, row: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", newline="") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        writer = csv.DictWriter(handle, COLUMNS)
        if not handle.tell():
            writer.writeheader()
        writer.writerow(row)
        handle.flush()
        os.fsync(handle.fileno())


@app.command(hidden=True)
def one(given: str) -> None:
    """Run one job, given as JSON; print its row as JSON."""
    asked = json.loads(given)
    job, data, cache = Job(**asked["job"]), Path(asked["data"]), Path(asked["cache"])
    torch.set_num_threads(asked["threads"])
    device = torch.device("cuda" if job.scale == "gpu" else "cpu")
    task = TASKS[job.scale][job.task]
    split = read(task, data, cache, device)
    start = time.perf_counter()
    row: dict[str, Any] = asdict(job) | measured(task, job, split, data, cache, asked["limit"])
    row["seconds"] = round(time.perf_counter() - start, 1)
    row["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    row["torch"] = torch.__version__
    precision = "bfloat16 autocast" if in_bfloat16(task, device) else "float32"
    row["machine"] = f"{platform.machine()} {os.cpu_count()} cores, {precision}"
    print(json.dumps(row))


def measured(
    task: Task, job: Job, split: Split, data: Path, cache: Path, limit: int | None
) -> dict[str, float]:
    """What one run gives; a try only what tries are chosen by; where it diverges nan for all."""
    try:
        model, facts = train(
            task, json.loads(job.setting), int(job.seed), split, data, limit, cache
        )
        found = measure(model, split, final=job.stage == "final")
        return facts | {"last_loss": round(facts["last_loss"], 4)} | found
    except DivergedError as error:
        print("DIVERGED", *job.key, error, file=sys.stderr, flush=True)
        return dict.fromkeys(FIGURES, math.nan)


def spawn(job: Job, where: dict[str, Any]) -> dict[str, Any]:
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
    tasks: Annotated[str, typer.Option(help="Comma-separated.")] = "finetune,scratch",
    families: FamiliesOption = "*",
    scale: Annotated[str, typer.Option(help="small, cpu, gpu or auto.")] = "auto",
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads each.")] = 1,
    cache: Annotated[Path, typer.Option(help="Folder for the images as tensors.")] = RUNS,
    limit: Annotated[int | None, typer.Option(help="Steps of training, to try it out.")] = None,
) -> None:
    """Work off what has no row yet, as far as the time goes."""
    scale = own_scale() if scale == "auto" else scale
    if limit is not None and out == OUT:
        raise typer.BadParameter("--limit is for trying out: give another --out")
    chosen = matching(families)
    where = {"data": str(data), "cache": str(cache), "threads": threads, "limit": limit}
    end, failed = time.monotonic() + 60 * minutes, set[Job]()
    waiting: dict[Future[dict[str, Any]], Job] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            rows = rows_of(out)
            for job in next_jobs(rows, tasks.split(","), scale, chosen):
                if len(waiting) >= jobs or time.monotonic() + expected(rows, job) > end:
                    break
                if job not in failed and job not in waiting.values():
                    waiting[pool.submit(spawn, job, where)] = job
            if not waiting:
                break
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                job = waiting.pop(future)
                try:
                    append(out, future.result())
                    print("done", *job.key, flush=True)
                except RuntimeError as error:
                    failed.add(job)
                    print("FAILED", *job.key, error, file=sys.stderr, flush=True)
    if failed:
        raise typer.Exit(1)


def matching(families: str) -> list[str]:
    patterns = families.split(",")
    found = [name for name in FAMILIES if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    if not found:
        raise typer.BadParameter(f"{families!r} matches none of {', '.join(FAMILIES)}")
    return found


def expected(rows: Sequence[Row], job: Job) -> float:
    """Seconds a run of this task took so far, median; 0 before the first."""
    taken = [
        float(row["seconds"])
        for row in rows
        if (row["task"], row["scale"]) == (job.task, job.scale)
    ]
    return statistics.median(taken) if taken else 0.0


@app.command()
def plan(
    out: OutOption = OUT,
    tasks: Annotated[str, typer.Option(help="Comma-separated.")] = "finetune,scratch",
    families: FamiliesOption = "*",
    scale: Annotated[str, typer.Option(help="small, cpu or gpu.")] = "cpu",
) -> None:
    """Print what would run next, and how many runs are left in all."""
    rows, chosen = rows_of(out), matching(families)
    todo = list(next_jobs(rows, tasks.split(","), scale, chosen))
    for job in todo[:20]:
        print(job.task, job.family, job.setting, job.seed, job.stage)
    finals = len(chosen) * len(tasks.split(",")) * len(FINAL_SEEDS)
    print(f"{len(todo)} runs can go now; {len(rows)} are done; finals in all {finals}")


@app.command()
def summary(
    out: OutOption = OUT,
    stage: Annotated[str, typer.Option(help="final or search.")] = "final",
) -> None:
    """Print Markdown: of finals mean and standard deviation over seeds, of tries each."""
    at_four = ("W4A4-minmax", "W4A4-omse", "W4A4-repq")
    shown = ("float", "W8A8-minmax", "W6A6-minmax", *at_four)
    if stage == "search":
        shown = tuple(f"val_{name}" for name in ("float", *at_four[1:]))
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows_of(out):
        if row["stage"] == stage:
            groups[row["task"], row["scale"], row["family"], row["setting"]].append(row)
    columns = (*shown, "residual_max")
    print("| task | family | setting | seeds | " + " | ".join(columns) + " |")
    print("| --- " * (4 + len(columns)) + "|")
    for (task, scale, family, setting), rows in groups.items():
        cells = [_cell([float(row[column]) for row in rows]) for column in columns]
        name = f"{task} ({scale})"
        print(f"| {name} | {family} | `{setting}` | {len(rows)} | " + " | ".join(cells) + " |")


def _cell(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


if __name__ == "__main__":
    app()
