"""How far two correct computations of one quantized model differ, through rounding alone.

The model is DeiT-Tiny with ImageNet weights under round to nearest. The simulated model is compared
with

- itself on images multiplied by 1 + 1e-6 of a normal number,
- itself computed in float64,
- its exported file in onnxruntime, whose codes and sums of products are equal on given inputs,
- the float model.

The figures are the relative L2 distance of the logits and the share of images with the same class.
Needs QUIETVIT_TEST_DATA (or --data), see docs/development.md.

    python benchmarks/rounding.py run --images 128
    python benchmarks/rounding.py summary
"""

from __future__ import annotations

import copy
import csv
import os
import platform
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import quietvit
from quietvit.data import (
    calibration_images,
    create_model,
    evaluation_loader,
    evaluation_transform,
    load_dataset,
    subset,
)
from quietvit.deployment import open_runtime

COLUMNS = ("bits", "pair", "images", "distance", "same_class", "seed", "torch", "machine")
OUT = Path("results/rounding.csv")
DISTURBANCE = 1e-6

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
OutOption = Annotated[Path, typer.Option(help="The table.")]


@app.command()
def run(
    data: Annotated[Path, typer.Option(envvar="QUIETVIT_TEST_DATA", help="Folder with the data.")],
    out: OutOption = OUT,
    images: Annotated[int, typer.Option(help="Images compared.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of calibration and disturbance.")] = 0,
) -> None:
    """Measure, and write the table again."""
    torch.set_num_threads(1)
    weights = data / "deit_tiny_patch16_224.safetensors"
    model = create_model("deit_tiny_patch16_224", weights=weights).eval()
    transform = evaluation_transform(model)
    shown = load_dataset(f"table:{data / 'imagenette_calibration_1024.parquet'}", None)
    calibration = calibration_images(shown, 32, transform, seed)
    tested = subset(load_dataset(f"table:{data / 'imagenet_dev_1000.parquet'}", None), images)
    x = torch.cat([batch for batch, _ in evaluation_loader(tested, transform, 32)])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    rows = []
    for bits in (8, 6):
        method = quietvit.RTN(weight_bits=bits, activation_bits=bits)
        own = quietvit.quantize(model, method, calibration, progress=False)
        simulated = logits(own, x)
        others = {
            "itself, images moved by 1e-6": logits(own, x * (1 + DISTURBANCE * noise)),
            "itself in float64": logits(copy.deepcopy(own).double(), x.double()).float(),
            "its file in onnxruntime": exported(own, x),
            "the float model": logits(model, x),
        }
        for pair, other in others.items():
            distance = float((other - simulated).norm() / simulated.norm())
            same = float((other.argmax(-1) == simulated.argmax(-1)).double().mean())
            machine = f"{platform.machine()} {os.cpu_count()} cores"
            figures = f"{distance:.4f}", f"{100 * same:.1f}"
            rows.append(
                (f"W{bits}A{bits}", pair, images, *figures, seed, torch.__version__, machine)
            )
            print(*rows[-1], flush=True)
    with out.open("w", newline="") as handle:
        csv.writer(handle).writerows([COLUMNS, *rows])


@torch.no_grad()
def logits(model: torch.nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(32)])


def exported(own: quietvit.quantization.QuantizedModel, x: Tensor) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        path = quietvit.export(own, Path(folder) / "model.onnx").path
        runtime = open_runtime(path, threads=1)
        return torch.cat([torch.from_numpy(runtime(part.numpy())) for part in x.split(32)])


@app.command()
def summary(out: OutOption = OUT) -> None:
    """Print the table as Markdown."""
    with out.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    print("| bits | the simulated model against | distance of logits | same class, % |")
    print("|---|---|---|---|")
    for row in rows:
        print(f"| {row['bits']} | {row['pair']} | {row['distance']} | {row['same_class']} |")


if __name__ == "__main__":
    app()
