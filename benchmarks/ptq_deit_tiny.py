"""Every post-training method on DeiT-Tiny, ImageNet: W8A8, W6A6 and W4A4, three calibration seeds.

There are 1000 evaluation images. They are easier than the validation set: differences count, not
absolute values. The method declares the number of calibration images. A process of its own
calibrates each row, so that its peak memory is its own, and then evaluates it. A row that exists is
not run again. Delete it to repeat it. Needs QUIETVIT_TEST_DATA (or --data), see
docs/development.md. Needs 1.2 GB under --cache for the images as tensors, decoded once.

    python benchmarks/ptq_deit_tiny.py run
    python benchmarks/ptq_deit_tiny.py run --settings 'rtn*,repq-vit' --bits W4A4 --seeds 0 --jobs 2
    python benchmarks/ptq_deit_tiny.py summary
    python benchmarks/ptq_deit_tiny.py summary --published
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import PIL
import torch
import torchvision
import typer
from torch import Tensor

import quietvit
from ptq_table import Job, append, compared, finished, read, table
from quietvit.data import ImageDataset, create_model, evaluate, evaluation_transform, load_dataset
from quietvit.errors import QuietvitError
from quietvit.quantization.floating import ELEMENT_OF
from quietvit.quantization.method import get_method

MODEL = "deit_tiny_patch16_224"
BITS = ("W8A8", "W6A6", "W4A4")
SEEDS = (0, 1, 2)


IMAGES = 1000
OUT = Path("results/ptq_deit_tiny.csv")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "quietvit-benchmarks"


def _rtn(estimator: str) -> tuple[str, dict[str, Any]]:
    return "rtn", {"weight_range": estimator, "activation_range": estimator}


# Published: 20000 iterations of batch 32, hours on a processor.
REDUCED = {"base": "repq-vit", "iterations": 240, "batch_size": 8, "dtype": "bfloat16"}
# Name of the setting -> name of the method, and what differs from the method's defaults.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn-minmax": _rtn("minmax"),
    "rtn-percentile": _rtn("percentile"),
    "rtn-omse": _rtn("omse"),
    "smoothquant": ("smoothquant", {}),
    "fq-vit": ("fq-vit", {}),
    "fq-vit-attention8": ("fq-vit", {"attention_bits": 8}),
    "ptq4vit": ("ptq4vit", {}),
    "repq-vit": ("repq-vit", {}),
    "dopq-vit": ("dopq-vit", {}),
    "adalog": ("adalog", {}),
    "gptq": ("gptq", {"base": "repq-vit"}),
    "erq": ("erq", {}),
    "hptq": ("hptq", {}),
    "qwt": ("qwt", {"base": "repq-vit"}),
    "brecq-240": ("brecq", REDUCED),
    "qdrop-240": ("qdrop", REDUCED),
    "qdrop-240-on-dopq-vit": ("qdrop", REDUCED | {"base": "dopq-vit"}),
    **{
        f"{method}-{name}": (method, {"number_format": name})
        for method in ("rtn", "smoothquant")
        for name in ELEMENT_OF
    },
}
BATCH = 8
# Freed blocks are kept: at 16 images a batch, fresh pages for activations cost a fifth of the time.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 26),
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
OutOption = Annotated[Path, typer.Option(help="The table.")]


@dataclass(frozen=True)
class Data:
    """Where the child finds model and images. Paths are text, because it travels as JSON."""

    evaluation: str
    labels: str
    calibration: str
    model: str = MODEL
    weights: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


class Stored:
    """Images (N, 3, H, W), float32, in a .npy file; read by number to save memory."""

    def __init__(self, path: str | Path) -> None:
        array = np.load(path, mmap_mode="r")
        self.path, self.shape, self.offset = Path(path), array.shape, array.offset

    def read(self, numbers: Sequence[int]) -> Tensor:
        images = torch.empty(len(numbers), *self.shape[1:])
        with self.path.open("rb") as handle:
            for image, number in zip(images, numbers, strict=True):
                handle.seek(self.offset + int(number) * image.nbytes)
                handle.readinto(image.numpy())  # type: ignore[attr-defined]
        return images


def store(images: ImageDataset, transform: Callable[[Any], Tensor], path: Path) -> None:
    """Write all transformed images and their labels to .npy files, unless they exist."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (len(images), *transform(images[0][0]).shape)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
    for number in range(len(images)):
        array[number] = transform(images[number][0]).numpy()
    array.flush()
    np.save(labels_of(path), images.labels)
    partial.replace(path)


def labels_of(path: Path) -> Path:
    return path.with_suffix(".labels.npy")


def prepare(data: Path, cache: Path) -> Data:
    """Decode and transform the images of both tables once, and return where they are.

    The name of a file holds what it was made from: table, transform, versions.
    """
    transform = evaluation_transform(create_model(MODEL))
    made_by = f"{transform} {torchvision.__version__} {PIL.__version__}"
    paths = []
    for name in ("imagenet_dev_1000", "imagenette_calibration_1024"):
        table_path = data / f"{name}.parquet"
        images = load_dataset(f"table:{table_path}", split="train")
        facts = table_path.stat()
        made_from = f"{table_path.resolve()} {facts.st_size} {facts.st_mtime_ns} {made_by}"
        digest = hashlib.sha256(made_from.encode()).hexdigest()[:12]
        paths.append(cache / f"{name}-{digest}.npy")
        store(images, transform, paths[-1])
    return Data(
        evaluation=str(paths[0]),
        labels=str(labels_of(paths[0])),
        calibration=str(paths[1]),
        weights=str(data / f"{MODEL}.safetensors"),
    )


def draw(stored: Stored, count: int, seed: int) -> Tensor:
    """The images that ``quietvit.data.calibration_images`` draws."""
    if count > stored.shape[0]:
        raise QuietvitError(f"{count} calibration images needed, {stored.path} has {stored.shape}")
    return stored.read(np.random.default_rng(seed).permutation(stored.shape[0])[:count].tolist())


def batches(data: Data, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first ``limit`` evaluation images with their labels."""
    stored, labels = Stored(data.evaluation), torch.from_numpy(np.load(data.labels))
    for start in range(0, limit, BATCH):
        numbers = range(start, min(start + BATCH, limit))
        yield stored.read(numbers), labels[start : numbers.stop]


def peak_mib() -> float:
    """Peak resident memory of this process, MiB.

    It is VmHWM if /proc exists: ``ru_maxrss`` starts at the size of the process that started this
    one.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024
    except (OSError, IndexError):
        unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(job: Job, data: Data) -> dict[str, Any]:
    """Calibrate, read clocks and peak, then evaluate. Call it in its own process: ``spawn``."""
    model = create_model(data.model, weights=data.weights, **data.kwargs).eval()
    if job.bits == "float":
        baseline = round(peak_mib())
        top1 = evaluate(model, batches(data, job.images))
        return {"top1": round(top1, 2), "baseline_memory_mib": baseline}
    weight_bits, _, activation_bits = job.bits.removeprefix("W").partition("A")
    method = get_method(job.method)(
        weight_bits=int(weight_bits), activation_bits=int(activation_bits), **json.loads(job.fields)
    )
    chosen = draw(Stored(data.calibration), method.images, int(job.seed))
    torch.manual_seed(int(job.seed))
    baseline, wall, cpu = peak_mib(), time.perf_counter(), time.process_time()
    quantized = quietvit.quantize(model, method, chosen, progress=False)
    return {
        "calibration_seconds": round(time.perf_counter() - wall, 1),
        "calibration_cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_memory_mib": round(peak_mib()),
        "baseline_memory_mib": round(baseline),
        "calibration_images": method.images,
        "coverage": round(quantized.coverage.fraction, 4),
        "kernels": "deployable" if quantized.deployable else "simulated",
        "top1": round(evaluate(quantized, batches(data, job.images)), 2),
    }


@app.command(hidden=True)
def one(task: str) -> None:
    """Measure one row, given as JSON; print it as JSON."""
    given = json.loads(task)
    torch.set_num_threads(given["threads"])
    try:
        print(json.dumps(measure(Job(**given["job"]), Data(**given["data"]))))
    except QuietvitError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None


def spawn(job: Job, data: Data, threads: int) -> dict[str, Any]:
    """Run ``measure`` in a fresh process. Raises QuietvitError with its output if it fails."""
    task = json.dumps({"job": asdict(job), "data": asdict(data), "threads": threads})
    environment = os.environ | ALLOCATOR | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "one", task]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if child.returncode < 0:
        raise QuietvitError(f"ended by {signal.Signals(-child.returncode).name}")
    if child.returncode:
        raise QuietvitError(child.stderr.strip()[-2000:] or f"exit code {child.returncode}")
    return json.loads(child.stdout.strip().splitlines()[-1]) | {"threads": threads}


def table_for(out: Path, images: int) -> Path:
    """The table for all images, or another one for fewer, so that they never mix."""
    return out if images == IMAGES else out.with_name(f"{out.stem}-{images}-images{out.suffix}")


def jobs_for(
    settings: str, bits: Sequence[str], seeds: Sequence[int], images: int, out: Path
) -> list[Job]:
    """Jobs of the chosen settings that have no row yet, the float model first."""
    patterns = settings.split(",")
    names = [n for n in SETTINGS if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
    if not names:
        raise typer.BadParameter(f"{settings!r} matches none of {', '.join(SETTINGS)}")
    jobs = [Job("float", "", "float", "", "{}", images)]
    for name in names:
        method, fields = SETTINGS[name]
        shown = json.dumps(fields, sort_keys=True)
        had = ELEMENT_OF.get(fields.get("number_format"))
        fit = [b for b in bits if had is None or set(map(int, b[1:].split("A"))) <= set(had)]
        jobs += [Job(name, method, b, str(s), shown, images) for b in fit for s in seeds]
    done = finished(out, images)
    return [job for job in jobs if job.key not in done]


def work_off(
    jobs: Sequence[Job], out: Path, work: Callable[[Job], dict[str, Any]], parallel: int = 1
) -> list[Job]:
    """Append the row of each job when it is ready; print errors, return the jobs that failed."""
    failed: list[Job] = []
    first = [job for job in jobs if job.bits == "float"]
    with ThreadPoolExecutor(parallel) as pool:
        for part in (first, [job for job in jobs if job.bits != "float"]):
            futures = {pool.submit(work, job): job for job in part}
            try:
                for future in as_completed(futures):
                    job = futures[future]
                    try:
                        append(out, job, future.result())
                    except QuietvitError as error:
                        failed.append(job)
                        print(f"FAILED {' '.join(job.key)}: {error}", file=sys.stderr, flush=True)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            if failed and part is first:
                break
    return failed


@app.command()
def run(
    data: Annotated[Path, typer.Option(envvar="QUIETVIT_TEST_DATA", help="Folder with the data.")],
    out: OutOption = OUT,
    settings: Annotated[str, typer.Option(help="Names or wildcards, comma-separated.")] = "*",
    bits: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(BITS),
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(map(str, SEEDS)),
    images: Annotated[
        int, typer.Option(help="Evaluation images; fewer go to another file.")
    ] = IMAGES,
    jobs: Annotated[int, typer.Option(help="Processes at the same time.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads each.")] = 1,
    cache: Annotated[Path, typer.Option(help="Folder for the images as tensors.")] = CACHE,
) -> None:
    """Measure what has no row yet and append one row each."""
    out = table_for(out, images)
    chosen_bits, chosen_seeds = bits.split(","), [int(seed) for seed in seeds.split(",")]
    try:
        todo = jobs_for(settings, chosen_bits, chosen_seeds, images, out)
        if not todo:
            return
        where = prepare(data, cache)
        failed = work_off(todo, out, lambda job: spawn(job, where, threads), jobs)
    except QuietvitError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    if failed:
        print(f"{len(failed)} of {len(todo)} rows failed", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def summary(
    out: OutOption = OUT,
    published: Annotated[bool, typer.Option(help="Compare the drops with published ones.")] = False,
) -> None:
    """Print the table as Markdown: median (smallest–largest) over calibration seeds."""
    rows = read(out)
    print(compared(rows) if published else table(rows))


if __name__ == "__main__":
    app()
