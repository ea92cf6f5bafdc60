"""Calibration images without data: real, generated and noise, on DeiT-Tiny and EfficientNet-Lite0.

Each row is one model, source of images, number of images, seed and quantization. Top-1 is on the
first images of the table of 1000, one of each class; they are easier than the validation set.
``agreement``: percentage of images with the class of the float model. ``error``: norm of the
difference of the logits from the float model's, as a share of the norm of the float logits. The
CPU seconds are those of the generation, and ``precision`` is that of its matrix products: bfloat16
where the processor is faster with it. Rows of different precision are different rows. A row that
exists is not run again. Generated images are kept under --cache. ``memory`` measures the peak while
images are generated, with random weights. Needs QUIETVIT_TEST_DATA (or --data), and for
EfficientNet-Lite0 the weights that ``hptq_efficientnet.py weights`` writes.

    python benchmarks/synthesis.py run
    python benchmarks/synthesis.py run --only 'deit*, psaq, rtn*' --seeds 0 --images 200
    python benchmarks/synthesis.py run --only 'deit*, psaq, repq-vit W4A4' --counts 8,64
    python benchmarks/synthesis.py summary
    python benchmarks/synthesis.py memory --model vit_base_patch16_224 --precision float32
"""

from __future__ import annotations

import csv
import fnmatch
import os
import platform
import resource
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import timm
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from csv_rows import read
from quietvit.data import (
    calibration_images,
    create_model,
    evaluation_loader,
    evaluation_transform,
    load_dataset,
)
from quietvit.synthesis.settings import Precision
from quietvit.synthesis.watching import precision_on

DEIT, LITE = "deit_tiny_patch16_224", "tf_efficientnet_lite0"
OUT, CACHE = Path("results/synthesis.csv"), Path("runs/synthesis")
# Source -> how its images are generated; real images are drawn from the calibration table.
# The iterations are those that a slow processor allows. 64 patches take 0.7 of the time of all 196.
FAST = "iterations=60,patches=64,batch_size=16"
SOURCES: dict[str, dict[str, str]] = {
    DEIT: {
        "real": "",
        "noise": "noise",
        "pink": "pink",
        "psaq": f"psaq:{FAST}",
        "psaq, class": f"psaq:{FAST},classes=1,stretching=0",
        "psaq, class only": f"psaq:{FAST},classes=1,stretching=0,entropy=0",
        "psaq, 15 iterations": "psaq:iterations=15,patches=64,batch_size=16",
        "psaq, 30 iterations": "psaq:iterations=30,patches=64,batch_size=16",
        "psaq, 120 iterations": "psaq:iterations=120,patches=64,batch_size=16",
        "psaq, 240 iterations": "psaq:iterations=240,patches=64,batch_size=16",
        "psaq, all patches": "psaq:iterations=60,batch_size=16",
        "psaq, published": "psaq:classes=1,stretching=0",
    },
    LITE: {
        "real": "",
        "noise": "noise",
        "pink": "pink",
        "dgh": "dgh:iterations=30,batch_size=16",
        "dgh, 100 iterations": "dgh:iterations=100,batch_size=16",
        "dgh, 300 iterations": "dgh:iterations=300,batch_size=16",
    },
}
# Quantization: (method, bits).
SETTINGS: dict[str, list[tuple[str, str]]] = {
    DEIT: [("rtn", "W8A8"), ("repq-vit", "W4A4"), ("repq-vit", "W6A6"), ("repq-vit+gptq", "W4A4")],
    LITE: [("hptq", "W8A8"), ("hptq", "W6A6")],
}
KEYS = ("model", "source", "count", "seed", "method", "bits", "images", "precision")
COLUMNS = (*KEYS, "top1", "drop", "agreement", "error", "cpu_seconds", "generator")
FACTS = ("torch", "timm", "machine")

app = typer.Typer(add_completion=False, help=__doc__)
DataOption = Annotated[Path, typer.Option(envvar="QUIETVIT_TEST_DATA", help="Folder of the data.")]
CacheOption = Annotated[Path, typer.Option(help="Folder of the generated images.")]
OutOption = Annotated[Path, typer.Option(help="The table.")]


class Job(NamedTuple):
    """A planned row."""

    model: str
    source: str
    count: int
    seed: int
    method: str
    bits: str

    def key(self, images: int, precision: str) -> tuple[str, ...]:
        """The values of ``KEYS``. Only optimized images have a precision."""
        made = SOURCES[self.model][self.source].partition(":")[0] in ("psaq", "dgh")
        return (*map(str, self), str(images), precision if made else "")


@app.command()
def run(
    data: DataOption,
    out: OutOption = OUT,
    cache: CacheOption = CACHE,
    only: Annotated[
        str, typer.Option(help="'MODEL, SOURCE, METHOD BITS' matches one of these, split by |.")
    ] = "*",
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2",
    counts: Annotated[str, typer.Option(help="Calibration images, comma-separated.")] = "32",
    images: Annotated[int, typer.Option(help="Evaluation images.")] = 1000,
    lite: Annotated[Path, typer.Option(help="Weights of EfficientNet-Lite0.")] = Path(
        f"runs/weights/{LITE}.safetensors"
    ),
    precision: Annotated[Precision, typer.Option(help="Of generating images.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Measure what has no row yet and append one row each."""
    torch.set_num_threads(threads)
    precision = precision_on(torch.device("cpu"), precision)
    weights = {DEIT: data / f"{DEIT}.safetensors", LITE: lite}
    jobs = [
        Job(name, source, count, seed, method, bits)
        for name in SOURCES
        for count in map(int, counts.split(","))
        for seed in map(int, seeds.split(","))
        for source in SOURCES[name]
        for method, bits in SETTINGS[name]
    ]
    patterns = only.split("|")
    done = {tuple(row[key] for key in KEYS) for row in read(out)}
    for name in SOURCES:
        todo = [
            job
            for job in jobs
            if job.model == name
            and any(fnmatch.fnmatchcase(described(job), pattern) for pattern in patterns)
            and job.key(images, precision) not in done
        ]
        if todo:
            measure(todo, weights.get(name), data, cache, out, images, precision)


def described(job: Job) -> str:
    return f"{job.model}, {job.source}, {job.method} {job.bits}"


def measure(
    jobs: list[Job],
    weights: Path | None,
    data: Path,
    cache: Path,
    out: Path,
    images: int,
    precision: str,
) -> None:
    """Measure all jobs of one model."""
    import quietvit

    model = create_model(jobs[0].model, weights=weights).eval()
    batches, labels = evaluation(model, data, images)
    reference = predicted(model, batches)
    top1 = percentage(reference.argmax(1) == labels)
    for job in jobs:
        chosen, seconds = calibration(model, job, data, cache, precision)
        torch.manual_seed(job.seed)
        quantized = quietvit.quantize(model, job.method, chosen, bits=job.bits, progress=False)
        logits = predicted(quantized, batches)
        own = percentage(logits.argmax(1) == labels)
        row = job._asdict() | {
            "images": images,
            "precision": job.key(images, precision)[-1],
            "top1": round(own, 2),
            "drop": round(top1 - own, 2),
            "agreement": round(percentage(logits.argmax(1) == reference.argmax(1)), 2),
            "error": round(float((logits - reference).norm() / reference.norm()), 4),
            "cpu_seconds": round(seconds, 1),
            "generator": SOURCES[job.model][job.source],
        }
        append(out, row)
        print(row, flush=True)


def evaluation(model: nn.Module, data: Path, images: int) -> tuple[list[Tensor], Tensor]:
    table = load_dataset(f"table:{data / 'imagenet_dev_1000.parquet'}", split="train")
    loader = evaluation_loader(table, evaluation_transform(model), batch_size=50)
    batches, labels, seen = [], [], 0
    for batch, answers in loader:
        batches.append(batch)
        labels.append(answers)
        seen += len(batch)
        if seen >= images:
            break
    keep = images - (seen - len(batches[-1]))
    batches[-1], labels[-1] = batches[-1][:keep], labels[-1][:keep]
    return batches, torch.cat(labels)


@torch.no_grad()
def predicted(model: nn.Module, batches: list[Tensor]) -> Tensor:
    return torch.cat([model(batch) for batch in batches])


def percentage(hits: Tensor) -> float:
    return 100 * float(hits.float().mean())


def calibration(
    model: nn.Module, job: Job, data: Path, cache: Path, precision: str
) -> tuple[Tensor, float]:
    """Return the images of a job and the CPU seconds that generating them took."""
    from quietvit.synthesis import synthesize
    from quietvit.synthesis.settings import parse_request

    written = SOURCES[job.model][job.source]
    if not written:
        table = load_dataset(f"table:{data / 'imagenette_calibration_1024.parquet'}", split="train")
        return calibration_images(table, job.count, evaluation_transform(model), job.seed), 0.0
    if made := job.key(0, precision)[-1]:
        written += f"{',' if ':' in written else ':'}precision={made}"
    plain = "".join(c if c.isalnum() else "-" for c in written)
    kept = cache / f"{job.model}-{plain}-{job.count}-{job.seed}.safetensors"
    if kept.exists():
        found = load_file(kept)
        return found["images"], float(found["seconds"])
    method = parse_request(f"synthetic:{job.count}:{written}").method
    start = time.process_time()
    images = synthesize(model, job.count, method, seed=job.seed, progress=False)
    seconds = time.process_time() - start
    cache.mkdir(parents=True, exist_ok=True)
    save_file({"images": images.contiguous(), "seconds": torch.tensor(seconds)}, kept)
    return images, seconds


@app.command()
def memory(
    model: Annotated[
        str, typer.Option(help="A timm model with attention. Its weights are random.")
    ],
    count: Annotated[int, typer.Option(help="Images.")] = 32,
    batch_size: Annotated[int, typer.Option(help="Images in one pass.")] = 8,
    iterations: Annotated[int, typer.Option(help="All batches have one step in each.")] = 1,
    precision: Annotated[Precision, typer.Option(help="Of generating images.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Print the peak of the resident memory of this process while PSAQ generates images."""
    from quietvit.synthesis import PSAQ, synthesize

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    built = create_model(model).eval()
    before = peak_bytes()
    method = PSAQ(iterations=iterations, batch_size=batch_size, precision=precision)
    start = time.process_time()
    synthesize(built, count, method, progress=False)
    seconds = time.process_time() - start
    used = precision_on(torch.device("cpu"), precision)
    gib = [size / 2**30 for size in (before, peak_bytes() - before)]
    print(
        f"{model}: {count} images in batches of {batch_size}, {iterations} iterations, {used}, "
        f"{threads} threads: {gib[1]:.2f} GiB above {gib[0]:.2f} GiB before, {seconds:.0f} CPU "
        f"seconds, torch {torch.__version__}, {platform.machine()} {os.cpu_count()} cores"
    )


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def append(out: Path, row: dict[str, Any]) -> None:
    """Add one row, and a header to a new file."""
    facts = {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "machine": f"{platform.machine()} {os.cpu_count()} cores",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = not out.exists()
    with out.open("a", newline="") as handle:
        writer = csv.DictWriter(handle, [*COLUMNS, *FACTS], lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row | facts)


@app.command()
def summary(out: OutOption = OUT) -> None:
    """Print the table as Markdown: medians over seeds."""
    groups = defaultdict(list)
    for row in read(out):
        groups[tuple(row[key] for key in KEYS if key != "seed")].append(row)
    print("| model | source | method | top-1 | same class as float | logit error | CPU s | seeds |")
    print("|---|---|---|---|---|---|---|---|")
    for (model, source, count, method, bits, images, precision), rows in groups.items():

        def middle(column: str, rows: list[dict[str, str]] = rows) -> float:
            return statistics.median(float(row[column]) for row in rows)

        made = f" ({precision})" if precision else ""
        print(
            f"| {model} | {count} {source}{made} | {method} {bits}, {images} images | "
            f"{middle('top1'):.1f} | {middle('agreement'):.1f} | {middle('error'):.3f} | "
            f"{middle('cpu_seconds'):.0f} | {len(rows)} |"
        )


if __name__ == "__main__":
    app()
