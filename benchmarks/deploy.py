"""DeiT-Tiny in integers in real runtimes: quietvit beside other tools, all with the same weights.

Compared are float32, quietvit's W8A8 and W4A8 (``export``), onnxruntime's ``quantize_static``,
NNCF's ``quantize`` and torchao's static int8. All are calibrated on the same images. Measured are:

- top-1 on 1000 ImageNet images, which are easier than the validation set: differences count;
- how many of them get the same class as from float;
- latency at batch 1 and 8 against float32 in the same runtime;
- the share of multiply-accumulates that ran in integers (see ``deploy_graph.py``);
- bytes on disk.

Latency is measured in one process, with one call of each model in turn. The ratio is the median of
the ratios of consecutive calls, with quartiles. A float row is timed against itself, which shows
the noise. Sessions of onnxruntime are ``default`` or ``exact``. ``exact`` sets
session.x64quantprecision=1. It is right on processors without VNNI, the instruction for 8-bit
products, where a default session saturates. On other processors it costs speed.

Each run and kind of machine gives one CSV row, in a process of its own. A restart continues where
the last run stopped. Needs QUIETVIT_TEST_DATA (or --data) and the extras onnx, openvino and
torchao. Rows whose packages are missing are skipped with a message. NNCF needs an environment of
its own, which may borrow everything else from this one:

    python benchmarks/deploy.py run
    nncf-venv/bin/python benchmarks/deploy.py run --only 'nncf*'
    python benchmarks/deploy.py summary
"""

from __future__ import annotations

import csv
import fcntl
import fnmatch
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn

from deploy_graph import Macs, onnxruntime_macs, openvino_macs, torch_macs
from deploy_tools import MODELS, Made, Run, bytes_of, opened
from ptq_deit_tiny import ALLOCATOR, CACHE, Data, Stored, batches, draw, prepare
from quietvit.data import create_model
from quietvit.deployment import processor
from quietvit.deployment.for_openvino.runtime import OpenVINO
from quietvit.deployment.speed import measure as timed
from quietvit.errors import QuietvitError
from quietvit.tracing import trace

IMAGES, BATCHES = 1000, (1, 8)
OUT, WORK = Path("results/deploy.csv"), Path("runs/deploy")
KEY = ("model", "runtime", "session", "calibration", "seed", "images")
LATENCY = tuple(
    f"b{size}_{name}"
    for size in BATCHES
    for name in ("ms", "float_ms", "ratio", "low", "high", "repeats")
)
COLUMNS = (
    *KEY,
    *("tool", "setting", "top1", "agreement", *LATENCY),
    *("integer_share", "float_share", "unread_share", "operators", "mb"),
    *("versions", "machine", "threads"),
)
PACKAGES = ("quietvit", "torch", "timm", "onnx", "onnxruntime", "openvino", "nncf", "torchao")
Row = dict[str, str]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
OutOption = Annotated[Path, typer.Option(help="The table.")]


@dataclass(frozen=True)
class Job:
    """A planned row: a model of ``MODELS`` in a runtime. ``seed`` draws the calibration images."""

    model: str
    runtime: str
    session: str = ""
    seed: int = 0
    images: int = IMAGES

    @property
    def key(self) -> tuple[str, ...]:
        calibration = MODELS[self.model].calibration
        values = (self.model, self.runtime, self.session, calibration, self.seed, self.images)
        return tuple(map(str, values))

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.model, self.runtime, self.session) if part)


RUNS: tuple[tuple[str, str, str], ...] = (
    ("float", "onnxruntime", "default"),
    ("ours-minmax", "onnxruntime", "exact"),
    ("ours-minmax", "onnxruntime", "default"),
    ("static", "onnxruntime", "exact"),
    ("static", "onnxruntime", "default"),
    ("static-products", "onnxruntime", "exact"),
    ("static-products", "onnxruntime", "default"),
    ("float", "openvino", ""),
    ("ours-minmax", "openvino", ""),
    ("nncf", "openvino", ""),
    ("float-torch", "torch", ""),
    ("float-torch", "torch.compile", ""),
    ("torchao-pt2e", "torch.compile", ""),
    ("ours-omse", "onnxruntime", "exact"),
    ("ours-smoothquant", "onnxruntime", "exact"),
    ("ours-smoothquant", "openvino", ""),
    ("ours-omse", "openvino", ""),
    ("nncf-300", "openvino", ""),
    ("static-reduced", "onnxruntime", "default"),
    ("static-constant", "onnxruntime", "exact"),
    ("ours-gptq4", "onnxruntime", "exact"),
    ("ours-gptq4", "onnxruntime", "default"),
    ("ours-omse", "onnxruntime", "default"),
    ("ours-smoothquant", "onnxruntime", "default"),
    ("torchao", "torch", ""),
)


def made_in(work: Path, job: Job, data: Data, floating: nn.Module, path: Path) -> Path | nn.Module:
    """The model of a job: a module, or its file, which is created if it does not exist."""
    model = MODELS[job.model]
    if not path.exists():
        shape = tuple(Stored(data.evaluation).shape[1:])
        MODELS["float"].make(floating, shape, path)
    if job.model == "float":
        return path
    images = draw(Stored(data.calibration), model.calibration, job.seed)
    made = Made(floating, path, images)
    torch.manual_seed(job.seed)
    if not model.suffix:
        module: nn.Module = model.make(made, **model.fields)
        return module
    own = work / f"{job.model}-{model.calibration}-{job.seed}{model.suffix}"
    if not own.exists():
        partial = own.with_name(f"partial-{own.name}")
        model.make(made, partial, **model.fields)
        for suffix in (".bin", model.suffix):
            if partial.with_suffix(suffix).exists():
                partial.with_suffix(suffix).replace(own.with_suffix(suffix))
    return own


def classes(run: Run, data: Data, images: int) -> tuple[np.ndarray, float]:
    """The class of every evaluation image, and top-1 in percent."""
    found, right = [], 0
    for x, labels in batches(data, images):
        found.append(run(x.numpy()).argmax(-1))
        right += int((found[-1] == labels.numpy()).sum())
    return np.concatenate(found), 100 * right / images


def reference(work: Path, path: Path, data: Data, images: int, threads: int) -> np.ndarray:
    """The classes of float32 in onnxruntime, computed once."""
    kept = work / f"float-classes-{images}.npy"
    if not kept.exists():
        np.save(kept, classes(opened(path, "onnxruntime", "default", threads), data, images)[0])
    return np.asarray(np.load(kept))


def macs_of(run: Run, source: Path | nn.Module, job: Job, images: np.ndarray) -> Macs:
    if isinstance(run, OpenVINO):
        return openvino_macs(run.compiled, images)
    if isinstance(source, Path):
        return onnxruntime_macs(source, images[:1], job.session == "exact")
    return torch_macs(run, images)


def latencies(run: Run, floating: Run, images: np.ndarray, seconds: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for size in BATCHES:
        speed = timed(run, floating, np.ascontiguousarray(images[:size]), seconds)  # type: ignore[arg-type]
        found |= {
            f"b{size}_ms": round(speed.integer_ms, 1),
            f"b{size}_float_ms": round(speed.float_ms, 1),
            f"b{size}_ratio": round(speed.ratio, 3),
            f"b{size}_low": round(speed.ratio_low, 3),
            f"b{size}_high": round(speed.ratio_high, 3),
            f"b{size}_repeats": speed.repeats,
        }
    return found


def measure(job: Job, data: Data, work: Path, threads: int, seconds: float) -> dict[str, Any]:
    """Create the model if needed, open it beside float32, and measure everything of its row."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "float.onnx"
    floating = create_model(data.model, weights=data.weights, **data.kwargs).eval()
    images = Stored(data.evaluation).read(range(max(BATCHES))).numpy()
    total = sum(site.macs for site in trace(floating, torch.from_numpy(images[:1])).matmuls)
    source = made_in(work, job, data, floating, path)
    expected = reference(work, path, data, job.images, threads)
    other: Path | nn.Module = path if isinstance(source, Path) else floating
    with torch.no_grad():
        run = opened(source, job.runtime, job.session, threads)
        beside = opened(other, job.runtime, job.session, threads)
        row = latencies(run, beside, images, seconds)
        macs = macs_of(run, source, job, images)
        found, top1 = classes(run, data, job.images)
    return row | {
        "top1": round(top1, 2),
        "agreement": round(100 * float((found == expected).mean()), 2),
        "integer_share": round(macs.integer / total, 4),
        "float_share": round(macs.floating / total, 4),
        "unread_share": round(1 - (macs.integer + macs.floating) / total, 4),
        "operators": json.dumps(macs.operators),
        "mb": round(bytes_of(source) / 1e6, 2),
    }


def read(out: Path) -> list[Row]:
    """Rows of the table. Raises QuietvitError for a table with other columns."""
    if not out.exists():
        return []
    with out.open(newline="") as handle:
        reader = csv.DictReader(handle)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise QuietvitError(f"{out} has other columns; move it away or choose another --out.")
    return rows


def key_of(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in (*KEY, "machine"))


def machine() -> str:
    return f"{processor.described()}, {os.cpu_count()} cores"


def append(out: Path, job: Job, measured: dict[str, Any]) -> None:
    """Add the row, with a header if it is the first. Does nothing if the row exists by now."""
    out.parent.mkdir(parents=True, exist_ok=True)
    model = MODELS[job.model]
    facts = {"tool": model.tool, "setting": model.setting}
    row = measured | facts | dict(zip(KEY, job.key, strict=True))
    with out.open("ab") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        rows = read(out) if out.stat().st_size else []
        if (*job.key, row["machine"]) in map(key_of, rows):
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        if not rows:
            writer.writeheader()
        writer.writerow(row)
        handle.write(text.getvalue().encode())
    print(" ".join(f"{name}={row.get(name, '')}" for name in COLUMNS[:-4]), flush=True)


def versions() -> str:
    installed = [name for name in PACKAGES if importlib.util.find_spec(name)]
    return ", ".join(f"{name} {version(name)}" for name in installed)


def jobs_for(only: str, images: int, seed: int, out: Path) -> list[Job]:
    """Jobs of the chosen names that have no row yet for a machine like this one."""
    patterns = only.split(",")
    jobs = [Job(*run, seed=seed, images=images) for run in RUNS]
    chosen = [j for j in jobs if any(fnmatch.fnmatchcase(j.name, p) for p in patterns)]
    if not chosen:
        raise typer.BadParameter(f"{only!r} matches none of {', '.join(j.name for j in jobs)}")
    done = set(map(key_of, read(out)))
    return [job for job in chosen if (*job.key, machine()) not in done]


def missing(job: Job) -> list[str]:
    """Packages that a job needs and this environment does not have."""
    needs = {"onnxruntime", *MODELS[job.model].needs} | {job.runtime} & {"openvino"}
    return sorted(name for name in needs if importlib.util.find_spec(name) is None)


def work_off(jobs: Sequence[Job], out: Path, work: Callable[[Job], dict[str, Any]]) -> list[Job]:
    """Run each job and append its row; print the errors and return the jobs that failed."""
    failed = []
    for job in jobs:
        if lacking := missing(job):
            print(f"left out {job.name}: no {', '.join(lacking)} here", file=sys.stderr, flush=True)
            continue
        try:
            append(out, job, work(job))
        except QuietvitError as error:
            failed.append(job)
            print(f"FAILED {job.name}: {error}", file=sys.stderr, flush=True)
    return failed


@app.command(hidden=True)
def one(task: str) -> None:
    """Measure one row, given as JSON; print it as JSON."""
    given = json.loads(task)
    torch.set_num_threads(given["threads"])
    job, data, work = Job(**given["job"]), Data(**given["data"]), Path(given["work"])
    row = measure(job, data, work, given["threads"], given["seconds"])
    row |= {"versions": versions(), "machine": machine()}
    print(json.dumps(row | {"threads": given["threads"]}))


def spawn(job: Job, data: Data, work: Path, threads: int, seconds: float) -> dict[str, Any]:
    """Run ``measure`` in a fresh process. Raises QuietvitError with its output if it fails."""
    task = {"job": asdict(job), "data": asdict(data), "work": str(work)}
    text = json.dumps(task | {"threads": threads, "seconds": seconds})
    environment = os.environ | ALLOCATOR | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "one", text]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if child.returncode:
        raise QuietvitError(child.stderr.strip()[-2000:] or f"exit code {child.returncode}")
    found: dict[str, Any] = json.loads(child.stdout.strip().splitlines()[-1])
    return found


@app.command()
def run(
    data: Annotated[Path, typer.Option(envvar="QUIETVIT_TEST_DATA", help="Folder with the data.")],
    out: OutOption = OUT,
    only: Annotated[str, typer.Option(help="Names or wildcards, comma-separated.")] = "*",
    images: Annotated[int, typer.Option(help="Evaluation images.")] = IMAGES,
    seed: Annotated[int, typer.Option(help="Draws the calibration images.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    seconds: Annotated[float, typer.Option(help="How long a batch size is timed.")] = 20.0,
    work: Annotated[Path, typer.Option(help="Folder of the models.")] = WORK,
    cache: Annotated[Path, typer.Option(help="Folder of the images as tensors.")] = CACHE,
) -> None:
    """Measure what has no row yet and append one row each."""
    todo = jobs_for(only, images, seed, out)
    if not todo:
        return
    where = prepare(data, cache)
    failed = work_off(todo, out, lambda job: spawn(job, where, work.resolve(), threads, seconds))
    if failed:
        print(f"{len(failed)} of {len(todo)} rows failed", file=sys.stderr)
        raise typer.Exit(1)


def table(rows: Sequence[Row]) -> str:
    """Markdown table with one line per row; times are float over integer, with quartiles."""
    head = ["tool", "setting", "runtime", "calibration", "top-1", "float's class", "integers"]
    head += [f"batch {size}, float/this" for size in BATCHES] + ["ms at 8", "MB"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        session = f", {row['session']}" if row["session"] else ""
        cells = [row["tool"], row["setting"], row["runtime"] + session, row["calibration"]]
        few = "" if int(row["images"]) == IMAGES else f" of {row['images']}"
        cells += [f"{float(row['top1']):.1f}{few}", f"{float(row['agreement']):.1f} %"]
        cells.append(f"{100 * float(row['integer_share']):.1f} %")
        for size in BATCHES:
            ratio, low, high = (float(row[f"b{size}_{n}"]) for n in ("ratio", "low", "high"))
            cells.append(f"{ratio:.2f} ({low:.2f}–{high:.2f})")
        cells += [f"{float(row['b8_ms']):.0f}", row["mb"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@app.command()
def summary(out: OutOption = OUT) -> None:
    """Print the table as Markdown, one for each kind of machine."""
    order = {run: number for number, run in enumerate(sorted(RUNS, key=lambda run: run[1]))}
    rows = sorted(read(out), key=lambda r: order[r["model"], r["runtime"], r["session"]])
    for name in dict.fromkeys(row["machine"] for row in rows):
        print(f"{name}\n\n{table([row for row in rows if row['machine'] == name])}\n")


if __name__ == "__main__":
    app()
