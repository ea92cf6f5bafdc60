"""One run of ``evidence.py``: train a ViT with a setting, quantize it by every pipeline, measure.

Workloads are in ``evidence_data``. The list of runs and their table are in ``evidence``.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quietvit
from evidence_data import Split, Workload, build, normalized, put_probe, varied
from quietvit.advice.switches import Switches
from quietvit.errors import QuietvitError
from quietvit.measure.sqnr import sqnr
from quietvit.tensors import has_fast_bfloat16

CALIBRATION, LOOKED_AT, SENSITIVE = 32, 64, 200
Setting = dict[str, Any]
MAPS = "attention-maps-8"


def rtn(weight: int, activation: int, estimator: str, maps: bool = False) -> quietvit.RTN:
    """Round to nearest. ``maps``: attention maps at 8 bits."""
    more = {"overrides": MAPS} if maps else {}
    return quietvit.RTN(
        weight_bits=weight,
        activation_bits=activation,
        weight_range=estimator,
        activation_range=estimator,
        **more,
    )


_REPQ = quietvit.RepQViT(weight_bits=4, activation_bits=4)
# What "every pipeline" means in the claim. "m8" are attention maps at 8 bits.
PIPELINES: dict[str, Any] = {
    **{
        f"{name}-{estimator}": rtn(int(name[1]), int(name[3]), estimator)
        for name in ("W8A8", "W6A6", "W4A8")
        for estimator in ("minmax", "omse")
    },
    "W4A4m8-minmax": rtn(4, 4, "minmax", maps=True),
    "W4A4m8-omse": rtn(4, 4, "omse", maps=True),
    "W4A4-repq": _REPQ,
    "W4A4-repq+gptq": quietvit.GPTQ(base=_REPQ),
}
STRICT = {"W4A4-minmax": rtn(4, 4, "minmax"), "W4A4-omse": rtn(4, 4, "omse")}
LOW = {
    "W3A3m8-minmax": rtn(3, 3, "minmax", maps=True),
    "W3A3m8-omse": rtn(3, 3, "omse", maps=True),
    "W3A3m8-repq": quietvit.RepQViT(weight_bits=3, activation_bits=3, overrides=MAPS),
}
ALL = PIPELINES | STRICT | LOW
CHOOSING = ("W4A4m8-omse", "W4A4-repq", "W3A3m8-omse")
"""What tries are chosen by, on held-out images; the last only where W3A3 is run."""


class DivergedError(Exception):
    """A loss, weights or activations are NaN or inf."""


def in_bfloat16(workload: Workload, device: torch.device) -> bool:
    """Whether the models and decays of the workload compute in bfloat16 on this device."""
    if workload.float32:
        return False
    return has_fast_bfloat16(device)


def parameter_groups(model: nn.Module, setting: Setting) -> list[dict[str, Any]]:
    """Matrices decay. Norms and biases decay only if the setting says so."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = setting.get("weight_decay", 0.05)
    if setting.get("decay_all"):
        return [{"params": parameters, "weight_decay": decay}]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def optimizers(model: nn.Module, setting: Setting, lr: float) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest.

    ``setting["muon"]``: Muon's learning rate over AdamW's. Its updates are scaled to AdamW's size.
    """
    if "muon" not in setting:
        return [torch.optim.AdamW(parameter_groups(model, setting), lr=lr)]
    inner = {id(p) for p in model.blocks.parameters() if p.ndim == 2}
    matrices = [p for p in model.parameters() if id(p) in inner]
    decay = setting.get("weight_decay", 0.05)
    muon = torch.optim.Muon(
        matrices, lr=setting["muon"] * lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
    )
    rest = [
        {**group, "params": [p for p in group["params"] if id(p) not in inner]}
        for group in parameter_groups(model, setting)
    ]
    return [torch.optim.AdamW(rest, lr=lr), muon]


def attach(
    model: nn.Module, setting: Setting, optimizer: torch.optim.Optimizer, x: Tensor, products: str
) -> list[Any]:
    """Attach every regularizer of a setting. TWEO has a loss."""
    example, found = x[:1], []
    if "cd" in setting:
        chosen = {"products": products} | setting["cd"]
        found.append(quietvit.ColinearityDecay(model, example, **chosen))
    if "gains" in setting:
        found.append(quietvit.NormGainDecay(model, example, strength=setting["gains"]))
    if "s2d" in setting:
        found.append(quietvit.SpectralDecay(model, example, images=x, **setting["s2d"]))
    if "tweo" in setting:
        found.append(quietvit.TWEO(model, example, **setting["tweo"]))
    return [each.attach(optimizer) for each in found]


def factor(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then cosine: the learning rate of a step as a share of the largest."""
    first = max(1, round(warmup * steps))
    return min((step + 1) / first, 0.5 * (1 + math.cos(math.pi * step / steps)))


def summed(workload: Workload) -> float:
    """Sum of the schedule's factors. Times the rate, it is the sum of learning rates."""
    return sum(factor(step, workload.steps, workload.warmup) for step in range(workload.steps))


def train(
    workload: Workload, setting: Setting, seed: int, split: Split, data: Path, cache: Path
) -> tuple[nn.Module, dict[str, float]]:
    """The trained model in eval mode, its seconds and last loss. Raises DivergedError."""
    device = split.train[0].device
    torch.manual_seed(seed)
    model = build(workload, data, cache).to(device)
    x, y = split.train
    if workload.probed:
        put_probe(model, x, y, cache)
    made = optimizers(model, setting, setting.get("lr", workload.rates[0]))
    low = in_bfloat16(workload, device)
    shown = normalized(x[:16], model)
    regularizers = attach(model, setting, made[0], shown, "auto" if low else "float32")
    penalties = [each for each in regularizers if hasattr(each, "loss")]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            each, lambda t: factor(t, workload.steps, workload.warmup)
        )
        for each in made
    ]
    generator = torch.Generator().manual_seed(seed)
    model.train()
    start, loss = time.perf_counter(), torch.zeros(())
    for picked in islice(batches(len(x), workload.batch, generator), workload.steps):
        picked = picked.to(device)
        batch = varied(x[picked], workload.size // 8, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            logits = model(normalized(batch, model))
        loss = F.cross_entropy(logits.float(), y[picked])
        for penalty in penalties:
            loss = loss + penalty.loss()
        model.zero_grad()
        loss.backward()
        if workload.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), workload.clip)
        try:
            for each in made:
                each.step()
        except QuietvitError as error:  # of a regularizer that looks at weights
            raise DivergedError(str(error)) from error
        for schedule in schedules:
            schedule.step()
    seconds, last = time.perf_counter() - start, float(loss.detach())
    if not math.isfinite(last) or not all(p.isfinite().all() for p in model.parameters()):
        raise DivergedError(f"the last loss is {last}, or a weight is no number")
    for each in regularizers:
        each.detach()
    return model.eval(), {"train_seconds": round(seconds, 1), "last_loss": round(last, 4)}


def batches(images: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of the images of each batch, endlessly; each epoch has an order of its own."""
    while True:
        order = torch.randperm(images, generator=generator)
        yield from order[: images // batch * batch].view(-1, batch)


def measure(model: nn.Module, workload: Workload, split: Split, stage: str) -> dict[str, Any]:
    """The figures of one trained model.

    - Choice of a rate: float on held-out images.
    - Try: the figures that choose among tries, on held-out images.
    - Final: float and every pipeline on test images, and measures of the activations.
    """
    if stage not in ("final", "above"):
        row: dict[str, Any] = {"val_float": top1(model, *split.held_out, model)}
        names = CHOOSING[: 3 if workload.low_bits else 2] if stage == "try" else ()
        for name in names:
            quantized = _quantized(model, ALL[name], split)
            row[f"val_{name}"] = top1(quantized, *split.held_out, model)
        return row
    x, y = split.test
    row = {"float": top1(model, x, y, model)}
    x, y = x[: workload.quantized], y[: workload.quantized]
    row["float_same"] = top1(model, x, y, model)
    looked_at = normalized(x[:LOOKED_AT], model)
    for name, method in (ALL if workload.low_bits else PIPELINES | STRICT).items():
        quantized = _quantized(model, method, split)
        row[name] = top1(quantized, x, y, model)
        if name == "W4A4m8-omse":
            row["sqnr_db"] = json.dumps(noise_by_role(model, quantized, looked_at))
            row["sensitivity"] = json.dumps(sensitivity_by_role(model, method, split))
    return row | outliers(model, looked_at)


def _quantized(model: nn.Module, method: Any, split: Split) -> nn.Module:
    calibration = normalized(split.train[0][:CALIBRATION], model)
    try:
        return quietvit.quantize(model, method, calibration, progress=False)
    except QuietvitError as error:  # activations that overflow
        raise DivergedError(str(error)) from error


@torch.no_grad()
def top1(model: nn.Module, x: Tensor, y: Tensor, like: nn.Module, batch: int = 100) -> float:
    """Top-1 in percent. ``like``: the float model, whose normalization applies."""
    hits = 0
    for part, labels in zip(x.split(batch), y.split(batch), strict=True):
        hits += int((model(normalized(part, like)).argmax(1) == labels).sum())
    return round(100 * hits / len(x), 2)


def noise_by_role(model: nn.Module, quantized: nn.Module, x: Tensor) -> dict[str, float]:
    """Signal over a site's own quantization noise in dB, mean over the sites of each role."""
    sites = {site.name: site.role for site in quantized.trace.sites}
    found = defaultdict(list)
    for name, decibels in sqnr(model, quantized, x, local=True).items():
        if math.isfinite(decibels):
            found[sites[name]].append(decibels)
    return {role: round(sum(values) / len(values), 2) for role, values in found.items()}


def sensitivity_by_role(model: nn.Module, method: Any, split: Split) -> dict[str, float]:
    """Test images whose class changes if only the operands of a role are quantized, in percent."""
    calibration = normalized(split.train[0][:CALIBRATION], model)
    images = normalized(split.test[0][:SENSITIVE], model)
    try:
        found = Switches(model, method, images, calibration=calibration, progress=False)
        return {role: 100 * found.effect(slots).changed for role, slots in found.roles.items()}
    except QuietvitError as error:  # activations that overflow
        raise DivergedError(str(error)) from error


def outliers(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Largest residual, max / rms by role, worst pair, and cause of the worst channel."""
    found = quietvit.diagnose(model, x, top=1)
    ratios: dict[str, float] = defaultdict(float)
    residual = 0.0
    for site in found.sites:
        role = "residual" if site.role == "add" else site.role
        ratios[role] = max(ratios[role], round(site.max_over_rms, 2))
        if site.role == "add":
            residual = max(residual, site.max)
    worst, cause = found.worst_pairs[0], found.root_causes[:1]
    causes = [
        {
            "pair": each.pair,
            "channel": each.channel,
            "value": round(each.value, 2),
            "over_rms": round(abs(each.value) / each.output_rms, 2),
            "share": round(each.share, 3),
            "colinearity": round(each.colinearity, 3),
        }
        for each in cause
    ]
    return {
        "residual_max": round(residual, 2),
        "max_over_rms": json.dumps(ratios),
        "amplification": round(max(worst.amplification), 2),
        "worst_pair": worst.name,
        "root_cause": json.dumps(causes[0] if causes else {}),
    }
