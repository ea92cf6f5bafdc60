"""How good the label-free forecast of ``quietvit.advise`` is, on DeiT-Tiny and EfficientNet-Lite0.

``run`` quantizes each row of ptq_deit_tiny.csv again with its own calibration images. BRECQ and
QDrop take float32 on processors where bfloat16 is slow, and their top-1 is measured again.
``efficientnet`` quantizes EfficientNet-Lite0 and measures its top-1 on the same 1000 images. Then
the first of these images, without their labels, measure how often the class stays that of the float
model, the KL divergence and the forecast of the drop. A row that exists is not run again. Needs
QUIETVIT_TEST_DATA (or --data); ``efficientnet`` also needs the weights that
``hptq_efficientnet.py weights`` writes.

    python benchmarks/advice.py run
    python benchmarks/advice.py run --settings 'adalog,ptq4vit' --seeds 0
    python benchmarks/advice.py efficientnet
    python benchmarks/advice.py summary
"""

from __future__ import annotations

import fnmatch
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from scipy.stats import spearmanr
from torch import nn

import quietvit
from csv_rows import append, read
from hptq_efficientnet import CACHE, RUNS
from hptq_efficientnet import MODEL as LITE
from ptq_deit_tiny import BATCH, SETTINGS
from ptq_deit_tiny import MODEL as DEIT
from ptq_deit_tiny import OUT as TABLE
from quietvit.advice.effects import FloatOutputs
from quietvit.data import (
    calibration_images,
    create_model,
    evaluate,
    evaluation_loader,
    evaluation_transform,
    load_dataset,
)
from quietvit.quantization.method import get_method
from quietvit.tensors import has_fast_bfloat16

OUT = Path("results/advice_forecast.csv")
CHEAP = "rtn-*,smoothquant,fq-vit,repq-vit,dopq-vit,gptq,erq"
LITE_BITS = ("W8A8", "W6A6", "W4A8", "W6A4", "W4A4")
NAMES = {DEIT: "DeiT-Tiny", LITE: "EfficientNet-Lite0"}
FIELDS = (
    *("model", "setting", "bits", "seed", "images", "top1", "drop"),
    *("agreement", "kl", "error", "forecast_drop"),
)

app = typer.Typer(add_completion=False, help=__doc__)
DataOption = Annotated[Path, typer.Option(envvar="QUIETVIT_TEST_DATA", help="Folder of the data.")]
OutOption = Annotated[Path, typer.Option(help="The table.")]
CountOption = Annotated[int, typer.Option(help="Images without labels.")]


def key(row: dict[str, Any]) -> tuple[str, ...]:
    return row["setting"], row["bits"], row["seed"]


def chosen(rows: Sequence[dict[str, Any]], settings: str, seeds: str) -> list[dict[str, Any]]:
    patterns = settings.split(",")
    return [
        row
        for row in rows
        if row["setting"] != "float"
        and any(fnmatch.fnmatchcase(row["setting"], pattern) for pattern in patterns)
        and row["seed"] in seeds.split(",")
    ]


@app.command()
def run(
    data: DataOption,
    out: OutOption = OUT,
    settings: Annotated[str, typer.Option(help="Names or wildcards, comma-separated.")] = CHEAP,
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2",
    count: CountOption = 100,
) -> None:
    """Measure the rows of DeiT-Tiny that have no row yet, and append one row each."""
    model = create_model(DEIT, weights=data / f"{DEIT}.safetensors").eval()
    forecast = Forecast(model, data, count)
    loader = evaluation_loader(forecast.table, forecast.transform, batch_size=BATCH)
    done = {key(row) for row in read(out) if row["model"] == DEIT}
    for row in chosen(read(TABLE), settings, seeds):
        if key(row) in done:
            continue
        name, fields = SETTINGS[row["setting"]]
        slow = fields.get("dtype") == "bfloat16" and not has_fast_bfloat16(torch.device("cpu"))
        if slow:
            fields = fields | {"dtype": "float32"}
        quantized = forecast.quantize(name, row["bits"], int(row["seed"]), fields)
        top1, drop = row["top1"], row["drop"]
        if slow:
            own = evaluate(quantized, loader)
            top1, drop = f"{own:.1f}", f"{float(top1) + float(drop) - own:.1f}"
        new = [DEIT, *key(row), count, top1, drop, *forecast.told(quantized)]
        append(out, FIELDS, new)
        print(*new, flush=True)


@app.command()
def efficientnet(
    data: DataOption,
    cache: Annotated[Path, typer.Option(help="Folder of the weights.")] = CACHE,
    out: OutOption = OUT,
    count: CountOption = 100,
) -> None:
    """Measure the rows of EfficientNet-Lite0 that have no row yet, and append one row each."""
    model = create_model(LITE, weights=cache / f"{LITE}.safetensors").eval()
    forecast = Forecast(model, data, count)
    loader = evaluation_loader(forecast.table, forecast.transform, batch_size=BATCH)
    full = None
    done = {key(row) for row in read(out) if row["model"] == LITE}
    for setting, bits in itertools.product(("rtn-minmax", "rtn-omse", "hptq"), LITE_BITS):
        if (setting, bits, "0") in done:
            continue
        full = evaluate(model, loader) if full is None else full
        name, fields = RUNS[setting]
        quantized = forecast.quantize(name, bits, 0, fields)
        top1 = evaluate(quantized, loader)
        new = [LITE, setting, bits, 0, count, f"{top1:.1f}", f"{full - top1:.1f}"]
        new += forecast.told(quantized)
        append(out, FIELDS, new)
        print(*new, flush=True)


class Forecast:
    """A float model, its images without labels and its calibration images."""

    def __init__(self, model: nn.Module, data: Path, count: int) -> None:
        self.model, self.transform = model, evaluation_transform(model)
        self.table = load_dataset(f"table:{data / 'imagenet_dev_1000'}.parquet")
        images = torch.stack([self.transform(self.table[number][0]) for number in range(count)])
        self.calibration = load_dataset(f"table:{data / 'imagenette_calibration_1024'}.parquet")
        self.trace = quietvit.trace(model, images[:1])
        self.floats = FloatOutputs(model, self.trace, images.split(8))

    def quantize(self, name: str, bits: str, seed: int, fields: dict[str, Any]) -> nn.Module:
        weight, _, activation = bits.removeprefix("W").partition("A")
        method = get_method(name)(
            weight_bits=int(weight), activation_bits=int(activation), **fields
        )
        drawn = calibration_images(self.calibration, method.images, self.transform, seed)
        torch.manual_seed(seed)
        return quietvit.quantize(self.model, method, drawn, trace=self.trace, progress=False)

    def told(self, quantized: nn.Module) -> list[str]:
        """Agreement, KL divergence, relative error, and the forecast of the drop in points."""
        effect = self.floats.effect(quantized)
        found = [f"{1 - effect.changed:.4f}", f"{effect.kl:.6g}", f"{effect.error:.6g}"]
        return [*found, f"{100 * effect.drop:.2f}"]


@app.command()
def summary(out: OutOption = OUT) -> None:
    """Print rank correlations with top-1, and the mean absolute error of the forecast drop."""
    rows = read(out)
    print("| rows | number | agreement | KL | error of 1 - agreement | error of the forecast |")
    print("|---|---|---|---|---|---|")
    for model, bits in [*((DEIT, bits) for bits in ("", "W8A8", "W6A6", "W4A4")), (LITE, "")]:
        part = [row for row in rows if row["model"] == model and bits in ("", row["bits"])]
        if len(part) < 3:
            continue
        top1, drop, agreement, kl, forecast = (
            [float(row[name]) for row in part]
            for name in ("top1", "drop", "agreement", "kl", "forecast_drop")
        )
        ranks = spearmanr(agreement, top1).statistic, -spearmanr(kl, top1).statistic
        changed = [100 - 100 * a for a in agreement]
        errors = [
            statistics.mean(abs(a - b) for a, b in zip(guess, drop, strict=True))
            for guess in (changed, forecast)
        ]
        print(
            f"| {NAMES[model]}, {bits or 'all'} | {len(part)} | {ranks[0]:.2f} | {ranks[1]:.2f} | "
            f"{errors[0]:.1f} | {errors[1]:.1f} |"
        )


if __name__ == "__main__":
    app()
