"""The cost of quantization-aware training: a training step against that of the float model.

All variants train the same model on the same random images with AdamW. Their steps alternate, so
that a slow moment of the machine hits all of them, and the median counts.

    python benchmarks/qat.py
    python benchmarks/qat.py --model vit_small_patch16_224 --batch 32 --device cuda
"""

from __future__ import annotations

import csv
import platform
import statistics
import time
from pathlib import Path
from typing import Annotated

import timm
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import quietvit

# Name -> method, bits, whether the steps are learned.
VARIANTS = {
    "rtn W4A4, fixed steps": ("rtn", "W4A4", False),
    "rtn W4A4, learned steps": ("rtn", "W4A4", True),
    "repq-vit W4A4, learned steps": ("repq-vit", "W4A4", True),
}


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> None:
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()


def seconds(device: torch.device) -> float:
    """A clock: processor time on a CPU, so that other programs do not count."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def main(
    model: Annotated[str, typer.Option(help="A timm model.")] = "deit_tiny_patch16_224",
    batch: Annotated[int, typer.Option(help="Images in a step.")] = 8,
    repeats: Annotated[int, typer.Option(help="Measured steps of each variant.")] = 9,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="The table.")] = Path("results/qat_step.csv"),
) -> None:
    """Measure, print and write one row per variant."""
    torch.manual_seed(0)
    where = torch.device(device)
    plain = timm.create_model(model).to(where)
    images = torch.randn(batch, 3, 224, 224, device=where)
    labels = torch.randint(0, 1000, (batch,), device=where)
    models: dict[str, nn.Module] = {"float": plain}
    for name, (method, bits, learned) in VARIANTS.items():
        quantized = quietvit.quantize(plain.eval(), method, images, bits=bits, progress=False)
        if learned:
            quietvit.learn_steps(quantized)
        models[name] = quantized
    optimizers = {n: torch.optim.AdamW(m.train().parameters(), lr=1e-5) for n, m in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 2):
        for name, one in models.items():
            began = seconds(where)
            step(one, optimizers[name], images, labels)
            if repeat >= 2:  # the first two warm up
                times[name].append(seconds(where) - began)
    base = statistics.median(times["float"])
    machine = torch.cuda.get_device_name() if where.type == "cuda" else platform.machine()
    rows = [
        {
            "model": model,
            "batch": batch,
            "variant": name,
            "seconds": round(statistics.median(found), 4),
            "of_float": round(statistics.median(found) / base, 3),
            "repeats": repeats,
            "torch": torch.__version__,
            "device": f"{machine}, {torch.get_num_threads()} threads",
        }
        for name, found in times.items()
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(f"{row['variant']:<32}{row['seconds']:>8.3f} s   x {row['of_float']:.2f}")


if __name__ == "__main__":
    typer.run(main)
