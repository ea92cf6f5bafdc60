"""How PTQ4ViT weights errors, on DeiT-Tiny at W4A4: three criteria, three calibration seeds.

- ``curvature``: the random direction that this library takes (``curvature_root``).
- ``kl``: the gradient of KL(softmax(z0) || softmax(z)) at z = z0, as in the authors' code. It is
  zero but for rounding errors. Their scaling to norm one turns these into weights.
- ``none``: plain squared error.

Each runs with 2 rounds of 50 candidates, as we ran the authors' code on these weights. Each also
runs with the published 3 rounds of 100. Seed ``first`` is the first 32 images, on which that code
reached 40.5. A restart continues where the last run stopped. Needs what ``ptq_deit_tiny.py`` needs.

    python benchmarks/ptq4vit_criterion.py run
    python benchmarks/ptq4vit_criterion.py summary
"""

from __future__ import annotations

import csv
import os
import statistics
import time
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from torch import Tensor

import quietvit
from csv_rows import read
from ptq_deit_tiny import CACHE, Stored, batches, draw, prepare
from quietvit.data import create_model, evaluate
from quietvit.quantization.fitting import products
from quietvit.quantization.methods.ptq4vit import PTQ4ViT

OUT = Path("results/ptq4vit_criterion.csv")
COLUMNS = ("criterion", "rounds", "candidates", "seed", "images", "top1", "cpu_seconds", "torch")
SEARCHES = ("2x50", "3x100")
CRITERIA = ("curvature", "kl", "none", "all-rows")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
OutOption = Annotated[Path, typer.Option(help="The table.")]


def kl_root(result: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The gradient of KL at the float model's own logits, computed as the authors' code does."""
    leaf = result.detach().requires_grad_()
    target = result.detach().softmax(-1)
    loss = torch.nn.functional.kl_div(leaf.log_softmax(-1), target, reduction="batchmean")
    return result, torch.autograd.grad(loss, leaf)[0]


def measure(row: dict[str, Any], where: Any, images: int) -> dict[str, Any]:
    method = PTQ4ViT(
        weight_bits=4,
        activation_bits=4,
        rounds=row["rounds"],
        candidates=row["candidates"],
        hessian=row["criterion"] != "none",
        rows=None if row["criterion"] == "all-rows" else 2048,
    )
    model = create_model(where.model, weights=where.weights).eval()
    stored = Stored(where.calibration)
    if row["seed"] == "first":
        chosen = stored.read(range(method.images))
    else:
        chosen = draw(stored, method.images, int(row["seed"]))
    root = kl_root if row["criterion"] == "kl" else products.curvature_root
    start = time.process_time()
    with mock.patch.object(products, "curvature_root", root):
        quantized = quietvit.quantize(model, method, chosen, progress=False)
    seconds = round(time.process_time() - start, 1)
    top1 = round(evaluate(quantized, batches(where, images)), 2)
    return {"top1": top1, "cpu_seconds": seconds, "torch": torch.__version__}


@app.command()
def run(
    data: Annotated[Path, typer.Option(envvar="QUIETVIT_TEST_DATA", help="Folder with the data.")],
    out: OutOption = OUT,
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "first,0,1,2",
    searches: Annotated[str, typer.Option(help="Rounds x candidates.")] = ",".join(SEARCHES),
    criteria: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(CRITERIA),
    images: Annotated[int, typer.Option(help="Evaluation images.")] = 1000,
    cache: Annotated[Path, typer.Option(help="Folder for the images as tensors.")] = CACHE,
) -> None:
    """Measure what has no row yet and append one row each."""
    keys = COLUMNS[:5]
    done = {tuple(row[key] for key in keys) for row in read(out)}
    where = prepare(data, cache)
    for seed in seeds.split(","):
        for search in searches.split(","):
            rounds, candidates = map(int, search.split("x"))
            for criterion in criteria.split(","):
                values = (criterion, rounds, candidates, seed, images)
                if tuple(map(str, values)) in done:
                    continue
                row = dict(zip(keys, values, strict=True))
                row |= measure(row, where, images)
                with out.open("a", newline="") as handle:
                    writer = csv.DictWriter(handle, COLUMNS)
                    if not handle.tell():
                        writer.writeheader()
                    writer.writerow(row)
                    os.fsync(handle.fileno())
                print(row, flush=True)


@app.command()
def summary(out: OutOption = OUT) -> None:
    """Print Markdown: median (smallest–largest) over calibration seeds."""
    cells: dict[tuple[str, str], list[float]] = {}
    for row in read(out):
        search = f"{row['rounds']} rounds, {row['candidates']} candidates"
        cells.setdefault((row["criterion"], search), []).append(float(row["top1"]))
    print("| criterion | search | W4A4 top-1 | seeds |\n| --- | --- | --- | --- |")
    for (criterion, search), found in sorted(cells.items()):
        middle = statistics.median(found)
        shown = f"{middle:.1f} ({min(found):.1f}–{max(found):.1f})"
        print(f"| {criterion} | {search} | {shown} | {len(found)} |")


if __name__ == "__main__":
    app()
