"""Cost and gain of onnxruntime's integer convolutions: share, accuracy, error and time.

Each model and form of its file (RTN W8A8) gives one CSV row, in a process of its own. A restart
continues where the last run stopped. EfficientNet-Lite0 has its ImageNet weights, which
``hptq_efficientnet.py weights`` takes from a package index. It has 200 images: every fifth batch of
25 of the table. The hybrid has random weights, so only its share and the verdict of ``check`` have
a meaning. Needs QUIETVIT_TEST_DATA (or --data). A row takes minutes on one core and up to 3 GB.

    python benchmarks/hptq_efficientnet.py weights
    python benchmarks/integer_convolutions.py
"""

from __future__ import annotations

import csv
import itertools
import multiprocessing
import os
import platform
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import timm
import torch
import typer
from torch import Tensor, nn

import quietvit
from csv_rows import read
from hptq_efficientnet import CACHE, MODEL
from quietvit.data import (
    calibration_images,
    create_model,
    evaluation_loader,
    evaluation_transform,
    load_dataset,
)
from quietvit.deployment import exporting, open_runtime

FLOAT, DEFAULT, OUTPUTS = "convolutions float", "default", "conv_output_bits=8"
FORMS: dict[str, dict[str, Any]] = {FLOAT: {}, DEFAULT: {}, OUTPUTS: {"conv_output_bits": 8}}
SIZES = {MODEL: 224, "mobilevit_xxs": 128}
CALIBRATION, IMAGES, BATCH, FEW = 16, 200, 25, 50
SECONDS = 20.0

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def run(
    data: Annotated[Path, typer.Option(envvar="QUIETVIT_TEST_DATA", help="Folder of the data.")],
    cache: Annotated[Path, typer.Option(help="Folder of the weights.")] = CACHE,
    out: Annotated[Path, typer.Option(help="The table.")] = Path(
        "results/integer_convolutions.csv"
    ),
) -> None:
    """Measure every model and form that has no row yet."""
    finished = {(row["model"], row["form"]) for row in read(out)}
    for name, form in itertools.product(SIZES, FORMS):
        if (name, form) in finished:
            continue
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            row = pool.submit(measure, name, form, data, cache).result()
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = not out.exists()
        with out.open("a", newline="") as handle:
            writer = csv.DictWriter(handle, row)
            if fresh:
                writer.writeheader()
            writer.writerow(row)
        print(row, flush=True)


def measure(name: str, form: str, data: Path, cache: Path) -> dict[str, Any]:
    """Quantize, export, check, and compare with the float model; returns one row."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    trained, size = name == MODEL, SIZES[name]
    model = create_model(name, weights=cache / f"{name}.safetensors" if trained else None).eval()
    transform = evaluation_transform(create_model(name))
    table = load_dataset(f"table:{data / 'imagenette_calibration_1024.parquet'}", split="train")
    seen = sized(calibration_images(table, CALIBRATION, transform, seed=0), size)
    table = load_dataset(f"table:{data / 'imagenet_dev_1000.parquet'}", split="train")
    loader = evaluation_loader(table, transform, batch_size=BATCH)
    count, every = (IMAGES, 1000 // IMAGES) if trained else (BATCH, 1)
    batches = [
        (sized(x, size), y) for x, y in itertools.islice(loader, 0, every * count // BATCH, every)
    ]
    quantized = quietvit.quantize(model, quietvit.RTN(**FORMS[form]), seen, progress=False)
    with tempfile.TemporaryDirectory() as folder, written_as(form):
        artifact = quietvit.export(quantized, Path(folder) / "model.onnx")
        found = artifact.check(
            quantized, batches, threads=1, seconds=SECONDS if trained else 0, batches=(1,)
        )
        runtime = open_runtime(artifact.path, threads=1)
        few = torch.cat([x for x, _ in batches])[:FEW]
        logits = torch.cat([torch.from_numpy(runtime(part.numpy())) for part in few.split(BATCH)])
    assert found.classes is not None
    with torch.no_grad():
        exact = torch.cat([model(part) for part in few.split(BATCH)])
    speed = found.speeds[0] if found.speeds else None
    return {
        "model": name,
        "form": form,
        "image_size": size,
        "integer_share": round(100 * found.proof.integer_share, 2),
        "top1_float": top1(model, batches) if trained else "",
        "top1_simulated": round(found.classes.top1_simulated, 2) if trained else "",
        "top1_file": round(found.classes.top1, 2) if trained else "",
        "images": count,
        "agreement": round(found.classes.agreement, 2),
        "relative_error": round(float((logits - exact).norm() / exact.norm()), 4),
        "check": "passes" if found.ok else "; ".join(found.failures),
        "compared": sum(a.codes + a.sums for a in found.agreements),
        "ties": sum(a.ties for a in found.agreements),
        "integer_ms": round(speed.integer_ms, 1) if speed else "",
        "float_ms": round(speed.float_ms, 1) if speed else "",
        "ratio": round(speed.ratio, 3) if speed else "",
        "ratio_low": round(speed.ratio_low, 3) if speed else "",
        "ratio_high": round(speed.ratio_high, 3) if speed else "",
        "bytes": found.bytes,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "onnxruntime": version("onnxruntime"),
        "machine": f"{platform.machine()} {os.cpu_count()} cores, {found.machine}, 1 thread",
    }


def written_as(form: str) -> Any:
    """Write the form before integer convolutions. quietvit has no option for it: use a wrapper."""

    def in_float(*arguments: Any) -> Any:
        return plain(*arguments[:-1], form != FLOAT)

    plain = exporting.quantized_onnx
    return mock.patch.object(exporting, "quantized_onnx", in_float)


def sized(images: Tensor, size: int) -> Tensor:
    """Images (N, 3, size, size), scaled from the model's own size."""
    if images.shape[-1] == size:
        return images
    return nn.functional.interpolate(images, (size, size), mode="area")


def top1(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        right = sum(int((model(x).argmax(-1) == y).sum()) for x, y in batches)
    return round(100 * right / sum(len(y) for _, y in batches), 2)


if __name__ == "__main__":
    app()
