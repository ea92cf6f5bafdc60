"""Round-to-nearest on DeiT-Tiny, ImageNet: float, W8A8, W6A6 and W4A4 by three range estimators.

Resumable: one CSV row for each bits, estimator and calibration seed. 32 calibration images, 1000
evaluation images (easier than the validation set: differences count, not absolute values). Needs
QUIETVIT_TEST_DATA (or --data); see docs/development.md. One row takes about a minute on one core.

    python benchmarks/ptq_deit_tiny.py run
    python benchmarks/ptq_deit_tiny.py summary
"""

from __future__ import annotations

import csv
import os
import platform
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer

import quietvit
from quietvit.data import (
    calibration_images,
    create_model,
    evaluate,
    evaluation_loader,
    evaluation_transform,
    load_dataset,
)

BITS = ((8, 8), (6, 6), (4, 4))
RANGES = ("minmax", "percentile", "omse")
SEEDS = (0, 1, 2)
COLUMNS = ("bits", "range", "seed", "top1", "drop", "coverage", "calibration_seconds")
FACTS = ("torch", "timm", "machine")

app = typer.Typer(add_completion=False, help=__doc__)
OutOption = Annotated[Path, typer.Option(help="The table.")]


@app.command()
def run(
    data: Annotated[Path, typer.Option(envvar="QUIETVIT_TEST_DATA", help="Folder with the data.")],
    out: OutOption = Path("results/ptq_deit_tiny.csv"),
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Evaluate what has no row yet; append one row each."""
    torch.set_num_threads(threads)
    model = create_model(
        "deit_tiny_patch16_224", weights=data / "deit_tiny_patch16_224.safetensors"
    ).eval()
    transform = evaluation_transform(model)
    images = load_dataset(f"table:{data / 'imagenet_dev_1000.parquet'}", split="train")
    batches = list(evaluation_loader(images, transform, batch_size=50))
    calibration = load_dataset(
        f"table:{data / 'imagenette_calibration_1024.parquet'}", split="train"
    )
    done = read(out)
    reference = next((float(row["top1"]) for row in done if row["bits"] == "float"), None)
    if reference is None:
        reference = evaluate(model, batches)
        append(out, {"bits": "float", "range": "", "seed": "", "top1": reference, "drop": 0.0})
    finished = {(row["bits"], row["range"], row["seed"]) for row in done}
    for weight_bits, activation_bits in BITS:
        for estimator in RANGES:
            for seed in SEEDS:
                bits = f"W{weight_bits}A{activation_bits}"
                if (bits, estimator, str(seed)) in finished:
                    continue
                method = quietvit.RTN(
                    weight_bits=weight_bits,
                    activation_bits=activation_bits,
                    weight_range=estimator,
                    activation_range=estimator,
                )
                chosen = calibration_images(calibration, 32, transform, seed=seed)
                start = time.perf_counter()
                quantized = quietvit.quantize(model, method, chosen, progress=False)
                seconds = time.perf_counter() - start
                top1 = evaluate(quantized, batches)
                row = {
                    "bits": bits,
                    "range": estimator,
                    "seed": seed,
                    "top1": round(top1, 2),
                    "drop": round(reference - top1, 2),
                    "coverage": quantized.coverage.fraction,
                    "calibration_seconds": round(seconds, 1),
                }
                append(out, row)
                print(row, flush=True)


def read(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(out.open())) if out.exists() else []


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
        writer = csv.DictWriter(handle, [*COLUMNS, *FACTS])
        if fresh:
            writer.writeheader()
        writer.writerow(row | facts)


@app.command()
def summary(out: OutOption = Path("results/ptq_deit_tiny.csv")) -> None:
    """Print the table as Markdown: median over calibration seeds, smallest to largest."""
    groups = defaultdict(list)
    for row in read(out):
        groups[row["bits"], row["range"]].append(float(row["top1"]))
    print("| bits | " + " | ".join(RANGES) + " |")
    print("|---|" + "---|" * len(RANGES))
    for bits in [f"W{w}A{a}" for w, a in BITS]:
        cells = []
        for estimator in RANGES:
            values = groups.get((bits, estimator), [])
            shown = f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"
            cells.append(shown if values else "")
        print(f"| {bits} | " + " | ".join(cells) + " |")
    print(f"\nfloat: {groups['float', ''][0]:.1f}")


if __name__ == "__main__":
    app()
