"""First table: fine-tune DeiT-Tiny on CIFAR-10 under ten kinds of decay, then quantize by RTN.

Resumable: ``train`` leaves one checkpoint a run, ``evaluate`` appends one CSV row a run, and either
skips what is there. Needs QUIETVIT_TEST_DATA (or --data) with the DeiT-Tiny weights and the
CIFAR-10 tables; see docs/development.md. One run takes about 7 minutes on one CPU core.

    python benchmarks/finetune_cifar.py train
    python benchmarks/finetune_cifar.py evaluate
    python benchmarks/finetune_cifar.py summary
"""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import load_file, save
from torch import Tensor, nn

import quietvit
from quietvit.data import create_model, data_config, load_dataset
from quietvit.files import write_atomic

CD = {"mlp": 1.0, "value_output": 1.0}
NORM = {"norm_linear": 1.0}


def _scaled(kinds: dict[str, float], strength: float) -> dict[str, float]:
    return {kind: strength * share for kind, share in kinds.items()}


SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "strong-weight-decay": {"weight_decay": 3.0, "decay_all": True},
    "norm-gains-3": {"gains": 3.0},
    "cd-energy-1": {"cd": _scaled(CD, 1.0)},
    "cd-energy-3": {"cd": _scaled(CD, 3.0)},
    "cd-energy-1+norm": {"cd": _scaled(CD | NORM, 1.0)},
    "cd-energy-3+norm": {"cd": _scaled(CD | NORM, 3.0)},
    "cd-norm-3": {"cd": _scaled(NORM, 3.0)},
    "cd-peak-3": {"cd": _scaled(CD, 3.0), "penalty": "peak"},
    "strong-weight-decay+cd-energy-1+norm": {
        "weight_decay": 3.0,
        "decay_all": True,
        "cd": _scaled(CD | NORM, 1.0),
    },
}
BITS = ((8, 8), (6, 6), (4, 8), (4, 4))
RANGES = ("minmax", "omse")
MODEL, SIZE, CLASSES = "deit_tiny_patch16_224", 96, 10
TRAIN_IMAGES, TEST_IMAGES, CALIBRATION_IMAGES = 8000, 3000, 32
EPOCHS, BATCH, RATE = 3, 64, 3e-4

app = typer.Typer(add_completion=False, help=__doc__)
DataOption = Annotated[
    Path, typer.Option(envvar="QUIETVIT_TEST_DATA", help="Folder with the data.")
]
RunsOption = Annotated[Path, typer.Option(help="Where checkpoints go.")]
SeedsOption = Annotated[str, typer.Option(help="Seeds, separated by commas.")]
ThreadsOption = Annotated[int, typer.Option(help="CPU threads.")]
OutOption = Annotated[Path, typer.Option(help="The table.")]


def new_model(data: Path) -> nn.Module:
    weights = data / "deit_tiny_patch16_224.safetensors"
    return create_model(MODEL, num_classes=CLASSES, weights=weights, img_size=SIZE)


def images(table: Path, count: int, cache: Path, size: int = SIZE) -> tuple[Tensor, Tensor]:
    """The first ``count`` images of a table, bicubic at ``size``, as uint8 (N, 3, size, size)."""
    file = cache / f"{table.stem}-{count}-{size}.safetensors"
    if not file.exists():
        from torchvision.transforms.functional import pil_to_tensor

        dataset = load_dataset(f"table:{table}", split="train")
        pictures, labels = [], []
        for i in range(count):
            picture, label = dataset[i]
            pictures.append(pil_to_tensor(picture.resize((size, size), 3)))
            labels.append(label)
        write_atomic(file, save({"x": torch.stack(pictures), "y": torch.tensor(labels)}))
    stored = load_file(file)
    return stored["x"], stored["y"]


def normalized(x: Tensor, model: nn.Module) -> Tensor:
    config = data_config(model)
    mean, std = (
        torch.tensor(config[key], device=x.device).view(3, 1, 1) for key in ("mean", "std")
    )
    return (x.float() / 255 - mean) / std


def parameter_groups(model: nn.Module, setting: dict[str, Any]) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases only where the setting says so."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = setting.get("weight_decay", 0.05)
    if setting.get("decay_all"):
        return [{"params": parameters, "weight_decay": decay}]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def finetune(
    name: str, seed: int, data: Path, cache: Path, limit: int | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    setting = SETTINGS[name]
    torch.manual_seed(seed)
    model = new_model(data)
    x, y = images(data / "cifar10_train.parquet", TRAIN_IMAGES, cache)
    optimizer = torch.optim.AdamW(parameter_groups(model, setting), lr=RATE)
    example = torch.zeros(1, 3, SIZE, SIZE)
    if "cd" in setting:
        penalty = setting.get("penalty", "energy")
        quietvit.ColinearityDecay(model, example, strength=setting["cd"], penalty=penalty).attach(
            optimizer
        )
    if "gains" in setting:
        quietvit.NormGainDecay(model, example, strength=setting["gains"]).attach(optimizer)
    steps = EPOCHS * (len(x) // BATCH)
    warmup = steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: min((t + 1) / warmup, 0.5 * (1 + math.cos(math.pi * t / steps))),
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    done, start, loss = 0, time.perf_counter(), torch.zeros(())
    for _ in range(EPOCHS):
        order = torch.randperm(len(x), generator=generator)
        for picked in order[: len(x) // BATCH * BATCH].view(-1, BATCH):
            batch = normalized(x[picked], model)
            flip = torch.rand(BATCH, generator=generator) < 0.5
            batch[flip] = batch[flip].flip(-1)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(batch)
            loss = F.cross_entropy(logits.float(), y[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            if limit is not None and done >= limit:
                break
    seconds = time.perf_counter() - start
    return model.eval(), {
        "train_seconds": round(seconds, 1),
        "last_loss": round(float(loss.detach()), 4),
    }


@app.command()
def train(
    data: DataOption,
    runs: RunsOption = Path("runs/finetune_cifar"),
    seeds: SeedsOption = "0,1",
    only: Annotated[str, typer.Option(help="Settings, separated by commas.")] = "",
    threads: ThreadsOption = 1,
) -> None:
    """Train every setting under every seed; skip what is there."""
    torch.set_num_threads(threads)
    chosen = only.split(",") if only else list(SETTINGS)
    for seed in map(int, seeds.split(",")):
        for name in chosen:
            file = runs / f"{name}-{seed}.safetensors"
            if file.exists():
                continue
            model, facts = finetune(name, seed, data, runs)
            write_atomic(file, save(model.state_dict(), {"facts": json.dumps(facts)}))
            print(name, seed, facts, flush=True)


@app.command()
def evaluate(
    data: DataOption,
    runs: RunsOption = Path("runs/finetune_cifar"),
    out: OutOption = Path("results/finetune_cifar.csv"),
    threads: ThreadsOption = 1,
    newest_first: Annotated[
        bool, typer.Option("--newest-first", help="For a second process beside the first.")
    ] = False,
) -> None:
    """Quantize and evaluate every checkpoint that has no row yet; append one row each."""
    torch.set_num_threads(threads)
    x_test, y_test = images(data / "cifar10_test.parquet", TEST_IMAGES, runs)
    x_train, _ = images(data / "cifar10_train.parquet", TRAIN_IMAGES, runs)
    files = sorted(runs.glob("*-?.safetensors"), key=lambda f: f.stat().st_mtime)
    for file in reversed(files) if newest_first else files:
        name, _, seed = file.stem.rpartition("-")
        rows = list(csv.DictReader(out.open())) if out.exists() else []
        if name not in SETTINGS or (name, seed) in {(r["setting"], r["seed"]) for r in rows}:
            continue
        model = new_model(data)
        model.load_state_dict(load_file(file))
        model.eval()
        calibration = normalized(x_train[:CALIBRATION_IMAGES], model)
        row: dict[str, Any] = {"setting": name, "seed": seed}
        row["float"] = top1(model, x_test, y_test, model)
        for weight_bits, activation_bits in BITS:
            for estimator in RANGES:
                method = quietvit.RTN(
                    weight_bits=weight_bits,
                    activation_bits=activation_bits,
                    weight_range=estimator,
                    activation_range=estimator,
                )
                quantized = quietvit.quantize(model, method, calibration, progress=False)
                column = f"W{weight_bits}A{activation_bits}-{estimator}"
                row[column] = top1(quantized, x_test, y_test, model)
        row |= outliers(model, normalized(x_test[:64], model))
        row |= {"torch": torch.__version__, "timm": timm.__version__}
        row["machine"] = f"{platform.machine()} {os.cpu_count()} cores, bfloat16 autocast"
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = not out.exists()
        with out.open("a", newline="") as handle:
            writer = csv.DictWriter(handle, list(row))
            if fresh:
                writer.writeheader()
            writer.writerow(row)
        print({k: v for k, v in row.items() if k not in ("torch", "timm", "machine")}, flush=True)


@torch.no_grad()
def top1(model: nn.Module, x: Tensor, y: Tensor, like: nn.Module) -> float:
    hits = 0
    for start in range(0, len(x), 100):
        logits = model(normalized(x[start : start + 100], like))
        hits += int((logits.argmax(1) == y[start : start + 100]).sum())
    return round(100 * hits / len(x), 2)


@torch.no_grad()
def outliers(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Largest |activation| of the residual stream, and largest max / rms behind norms and GELU."""
    from quietvit.tracing import intercept

    traced = quietvit.trace(model, x[:1])
    peak = {"residual": 0.0, "post_norm": 0.0, "post_gelu": 0.0}

    def handler(site: Any, operands: tuple[Tensor, ...], run: Any) -> Tensor:
        output: Tensor = run(*operands)
        if site.kind == "add":
            peak["residual"] = max(peak["residual"], float(output.abs().max()))
        elif site.role in peak:
            ratio = float(operands[0].abs().max() / operands[0].square().mean().sqrt())
            peak[site.role] = max(peak[site.role], ratio)
        return output

    with intercept(traced, handler, kinds={"linear", "conv", "matmul", "einsum", "add"}):
        model(x)
    return {
        "residual_max": round(peak["residual"], 2),
        "post_norm_max_over_rms": round(peak["post_norm"], 2),
        "post_gelu_max_over_rms": round(peak["post_gelu"], 2),
    }


@app.command()
def summary(out: OutOption = Path("results/finetune_cifar.csv")) -> None:
    """Print the table as Markdown: mean over seeds, and half the range over seeds."""
    groups = defaultdict(list)
    rows = list(csv.DictReader(out.open()))
    for row in rows:
        groups[row["setting"]].append(row)
    columns = [key for key in rows[0] if key not in ("setting", "seed", "torch", "timm", "machine")]
    print("| setting | seeds | " + " | ".join(columns) + " |")
    print("|---|---|" + "---|" * len(columns))
    for name in [name for name in SETTINGS if name in groups]:
        cells = []
        for column in columns:
            values = [float(row[column]) for row in groups[name]]
            spread = (max(values) - min(values)) / 2
            cells.append(f"{statistics.mean(values):.1f} ± {spread:.1f}")
        print(f"| {name} | {len(groups[name])} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    app()
