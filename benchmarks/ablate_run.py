"""One run of ``ablate.py``: train a ViT on CIFAR-10 under some regularizers, quantize, measure.

Which runs there are, and their table, is in ``ablate``.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

import quietvit
from finetune_cifar import images, normalized, outliers, parameter_groups, top1
from quietvit.data import create_model
from quietvit.decay import StrengthSchedule
from quietvit.decay.products import product_dtype
from quietvit.errors import QuietvitError
from quietvit.files import write_atomic

CLASSES, CALIBRATION = 10, 32
BITS = ("W8A8", "W6A6", "W4A4")
Setting = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What is trained, on how much. ``held_out`` training images choose among the tries.

    ``patch``, ``width`` and ``depth`` are of the model from scratch, which has three heads.
    ``probed``: the new head starts as the ridge regression of the classes on what the backbone
    gives, which a short fine-tune would otherwise spend its steps on. ``float32``: in that
    precision everywhere, else in bfloat16 autocast where the device is faster in it.
    """

    size: int
    train: int
    held_out: int
    test: int
    epochs: int
    batch: int
    lr: float
    warmup: float
    pretrained: bool
    patch: int = 4
    width: int = 192
    depth: int = 12
    probed: bool = False
    float32: bool = False


# Reduced for a processor that is fast in bfloat16 ("cpu"), once more for one that is not ("small");
# "gpu" has the full ones.
CPU_TASKS = {
    "finetune": Task(96, 4000, 1000, 1000, 2, 64, 3e-4, 0.05, True),
    "scratch": Task(32, 8000, 1000, 1000, 12, 64, 1e-3, 0.1, False),
}
TASKS = {
    "small": {
        "finetune": Task(96, 2000, 800, 800, 2, 32, 3e-4, 0.05, True, probed=True, float32=True),
        "scratch": Task(
            *(32, 3000, 800, 800, 20, 32, 1e-3, 0.1, False),
            patch=8,
            width=96,
            depth=6,
            float32=True,
        ),
    },
    "cpu": CPU_TASKS,
    "gpu": {
        "finetune": replace(
            CPU_TASKS["finetune"], train=45000, held_out=5000, test=10000, epochs=5
        ),
        "scratch": replace(
            CPU_TASKS["scratch"], train=45000, held_out=5000, test=10000, epochs=60, batch=256
        ),
    },
}


class DivergedError(Exception):
    """A loss, weights or activations are no numbers."""


def own_scale() -> str:
    """The largest scale that this machine does not take days for."""
    if torch.cuda.is_available():
        return "gpu"
    return "cpu" if product_dtype("auto", torch.zeros(1)) is not None else "small"


def in_bfloat16(task: Task, device: torch.device) -> bool:
    """Whether the task's models and decays compute in bfloat16 there."""
    return not task.float32 and product_dtype("auto", torch.empty(0, device=device)) is not None


def build(task: Task, data: Path) -> nn.Module:
    """DeiT-Tiny with ImageNet weights, or a ViT for 32 px (of 5.4 million parameters at full)."""
    name = "deit_tiny_patch16_224"
    if task.pretrained:
        weights = data / f"{name}.safetensors"
        return create_model(name, num_classes=CLASSES, weights=weights, img_size=task.size)
    model: nn.Module = timm.create_model(
        name,
        num_classes=CLASSES,
        img_size=task.size,
        patch_size=task.patch,
        embed_dim=task.width,
        depth=task.depth,
        num_heads=3,
        drop_path_rate=0.05,
    )
    return model


@dataclass(frozen=True)
class Split:
    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def read(task: Task, data: Path, cache: Path, device: torch.device) -> Split:
    x, y = images(data / "cifar10_train.parquet", task.train + task.held_out, cache, task.size)
    x, y = x.to(device), y.to(device)
    test = images(data / "cifar10_test.parquet", task.test, cache, task.size)
    cut = task.train
    return Split((x[:cut], y[:cut]), (x[cut:], y[cut:]), (test[0].to(device), test[1].to(device)))


def attach(
    model: nn.Module,
    setting: Setting,
    optimizer: torch.optim.Optimizer,
    shown: Tensor,
    steps: int,
    products: str = "auto",
) -> list[Any]:
    """Every regularizer of a setting, attached; the last entries may have a loss (TWEO)."""
    example, found = shown[:1], []
    if "cd" in setting:
        chosen = {"products": products} | setting["cd"]
        if chosen.pop("fold", False):
            kinds = [kind for kind, value in chosen["strength"].items() if value]
            chosen["pairs"] = quietvit.find_pairs(model, example, kinds=kinds, fold_gains=True)
        if "schedule" in chosen:
            share = chosen.pop("schedule")
            chosen["schedule"] = StrengthSchedule(start=round(share["start"] * steps))
        found.append(quietvit.ColinearityDecay(model, example, **chosen))
    if "gains" in setting:
        found.append(quietvit.NormGainDecay(model, example, strength=setting["gains"]))
    if "weight" in setting:
        found.append(quietvit.PairWeightDecay(model, example, **setting["weight"]))
    if "s2d" in setting:
        found.append(quietvit.SpectralDecay(model, example, images=shown, **setting["s2d"]))
    if "kure" in setting:
        found.append(quietvit.KurtosisRegularization(model, example, **setting["kure"]))
    if "tweo" in setting:
        found.append(quietvit.TWEO(model, example, **setting["tweo"]))
    return [each.attach(optimizer) for each in found]


def train(
    task: Task,
    setting: Setting,
    seed: int,
    split: Split,
    data: Path,
    limit: int | None = None,
    cache: Path | None = None,
) -> tuple[nn.Module, dict[str, float]]:
    """The trained model in eval mode, the seconds it took and its last loss; else DivergedError."""
    device = split.train[0].device
    torch.manual_seed(seed)
    model = build(task, data).to(device)
    x, y = split.train
    if task.probed:
        put_probe(model, x, y, cache)
    optimizer = torch.optim.AdamW(parameter_groups(model, setting), lr=task.lr)
    steps = task.epochs * (len(x) // task.batch)
    low = in_bfloat16(task, device)
    products = "auto" if low else "float32"
    shown = normalized(x[:16], model)
    regularizers = attach(model, setting, optimizer, shown, steps, products)
    penalties = [each for each in regularizers if hasattr(each, "loss")]
    warmup = max(1, round(task.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warmup, 0.5 * (1 + math.cos(math.pi * t / steps)))
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    start, loss = time.perf_counter(), torch.zeros(())
    for picked in islice(batches(len(x), task, generator), limit):
        picked = picked.to(device)
        batch = varied(x[picked], task.size // 8, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            logits = model(normalized(batch, model))
        loss = F.cross_entropy(logits.float(), y[picked])
        for penalty in penalties:
            loss = loss + penalty.loss()
        optimizer.zero_grad()
        loss.backward()
        try:
            optimizer.step()
        except QuietvitError as error:  # of a regularizer that looks at weights
            raise DivergedError(str(error)) from error
        schedule.step()
    seconds, last = time.perf_counter() - start, float(loss.detach())
    if not math.isfinite(last) or not all(p.isfinite().all() for p in model.parameters()):
        raise DivergedError(f"the last loss is {last}, or a weight is no number")
    for each in regularizers:
        each.detach()
    return model.eval(), {"train_seconds": round(seconds, 1), "last_loss": last}


def batches(images: int, task: Task, generator: torch.Generator) -> Iterator[Tensor]:
    """Which images make each batch, epoch by epoch, each in an order of its own."""
    for _ in range(task.epochs):
        order = torch.randperm(images, generator=generator)
        yield from order[: images // task.batch * task.batch].view(-1, task.batch)


def put_probe(model: nn.Module, x: Tensor, y: Tensor, cache: Path | None) -> None:
    """``probe`` in the head: the same for every run of a task, so kept in ``cache``."""
    file = None
    if cache is not None:
        seen = hashlib.sha256(x.cpu().numpy().tobytes())
        seen.update(next(model.parameters()).detach().cpu().numpy().tobytes())
        file = cache / f"head-{seen.hexdigest()[:16]}.safetensors"
    if file is not None and file.exists():
        found = load(file.read_bytes())
    else:
        weight, bias = probe(model, x, y)
        found = {"weight": weight, "bias": bias}
        if file is not None:
            write_atomic(file, save(found))
    model.head.load_state_dict(found)


@torch.no_grad()
def probe(model: nn.Module, x: Tensor, y: Tensor, ridge: float = 0.1) -> tuple[Tensor, Tensor]:
    """Weight and bias of the ridge regression of the classes on the features.

    ``ridge`` is in units of the mean squared feature sum. Logits are scaled to a standard deviation
    of 2, so that the loss begins where a trained head's would.
    """
    body = model.forward_head
    features = torch.cat(
        [
            body(model.forward_features(normalized(part, model)), pre_logits=True)
            for part in x.split(100)
        ]
    )
    mean = features.mean(0)
    centred = features - mean
    wanted = F.one_hot(y, CLASSES).float() - 1 / CLASSES
    gram = centred.T @ centred
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, centred.T @ wanted).T
    weight *= 2 / (centred @ weight.T).std()
    return weight.contiguous(), -weight @ mean


def varied(x: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Flipped half of the time each, and all moved by one random shift, edges padded."""
    flip = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(flip.to(x.device).view(-1, 1, 1, 1), x.flip(-1), x)
    top, left = torch.randint(0, 2 * shift + 1, (2,), generator=generator).tolist()
    wide = F.pad(x.float(), (shift,) * 4, mode="replicate")
    return wide[:, :, top : top + x.shape[-2], left : left + x.shape[-1]]


def measure(model: nn.Module, split: Split, final: bool = True) -> dict[str, float]:
    """Top-1 of the float and of each quantized model, and how large its activations are.

    A try on held-out images (``val``), only the two figures at 4 bits by which it is chosen; a
    final on test images, at all bits.
    """
    calibration = normalized(split.train[0][:CALIBRATION], model)
    shown, before = (split.test, "") if final else (split.held_out, "val_")
    row = {f"{before}float": top1(model, *shown, model)}
    for bits in BITS if final else ("W4A4",):
        weight, activation = int(bits[1]), int(bits[3])
        for name, method in methods(weight, activation).items():
            if final or name != "minmax":
                try:
                    quantized = quietvit.quantize(model, method, calibration, progress=False)
                except QuietvitError as error:  # activations that overflow
                    raise DivergedError(str(error)) from error
                row[f"{before}{bits}-{name}"] = top1(quantized, *shown, model)
    return row | outliers(model, normalized(split.test[0][:64], model))


def methods(weight: int, activation: int) -> dict[str, Any]:
    bits = {"weight_bits": weight, "activation_bits": activation}
    return {
        "minmax": quietvit.RTN(**bits, weight_range="minmax", activation_range="minmax"),
        "omse": quietvit.RTN(**bits, weight_range="omse", activation_range="omse"),
        "repq": quietvit.RepQViT(**bits),
    }
