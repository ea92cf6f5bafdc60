"""How good the label-free forecast of ``quietvit.advise`` is: DeiT-Tiny, rows of ptq_deit_tiny.csv.

Each row of that table is quantized again with its own calibration images. Then images without
labels measure how often the class stays that of the float model, the KL divergence and the forecast
of the drop. They are the first ones of the table on which top-1 was measured. A row that exists is
not run again. Needs QUIETVIT_TEST_DATA (or --data).

    python benchmarks/advice.py run
    python benchmarks/advice.py run --settings 'adalog,ptq4vit' --seeds 0
    python benchmarks/advice.py summary
"""

from __future__ import annotations

import fnmatch
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from scipy.stats import spearmanr

import quietvit
from csv_rows import append, read
from ptq_deit_tiny import MODEL, SETTINGS
from ptq_deit_tiny import OUT as TABLE
from quietvit.advice.effects import FloatOutputs
from quietvit.data import calibration_images, create_model, evaluation_transform, load_dataset
from quietvit.quantization.method import get_method

OUT = Path("results/advice_forecast.csv")
CHEAP = "rtn-*,smoothquant,fq-vit,repq-vit,dopq-vit,gptq,erq"
FIELDS = (
    *("setting", "bits", "seed", "images", "top1", "drop"),
    *("agreement", "kl", "error", "forecast_drop"),
)

app = typer.Typer(add_completion=False, help=__doc__)
OutOption = Annotated[Path, typer.Option(help="The table.")]


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
    data: Annotated[Path, typer.Option(envvar="QUIETVIT_TEST_DATA", help="Folder with the data.")],
    out: OutOption = OUT,
    settings: Annotated[str, typer.Option(help="Names or wildcards, comma-separated.")] = CHEAP,
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2",
    count: Annotated[int, typer.Option(help="Images without labels.")] = 100,
) -> None:
    """Measure what has no row yet, and append one row each."""
    model = create_model(MODEL, weights=data / f"{MODEL}.safetensors").eval()
    transform = evaluation_transform(model)
    table = load_dataset(f"table:{data / 'imagenet_dev_1000'}.parquet")
    images = torch.stack([transform(table[number][0]) for number in range(count)])
    calibration = load_dataset(f"table:{data / 'imagenette_calibration_1024'}.parquet")
    trace = quietvit.trace(model, images[:1])
    floats = FloatOutputs(model, trace, images.split(8))
    done = {key(row) for row in read(out)}
    for row in chosen(read(TABLE), settings, seeds):
        if key(row) in done:
            continue
        name, fields = SETTINGS[row["setting"]]
        weight, _, activation = row["bits"].removeprefix("W").partition("A")
        method = get_method(name)(
            weight_bits=int(weight), activation_bits=int(activation), **fields
        )
        seed = int(row["seed"])
        drawn = calibration_images(calibration, method.images, transform, seed)
        torch.manual_seed(seed)
        quantized = quietvit.quantize(model, method, drawn, trace=trace, progress=False)
        effect = floats.effect(quantized)
        new = [*key(row), count, row["top1"], row["drop"]]
        new += [f"{1 - effect.changed:.4f}", f"{effect.kl:.6g}", f"{effect.error:.6g}"]
        new.append(f"{100 * effect.drop:.2f}")
        append(out, FIELDS, new)
        print(*new, flush=True)


@app.command()
def summary(out: OutOption = OUT) -> None:
    """Print rank correlations with top-1, and the mean absolute error of the forecast drop."""
    rows = read(out)
    print("| rows | number | agreement | KL | error of 1 - agreement | error of the forecast |")
    print("|---|---|---|---|---|---|")
    for bits in ("", "W8A8", "W6A6", "W4A4"):
        part = [row for row in rows if bits in ("", row["bits"])]
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
            f"| {bits or 'all'} | {len(part)} | {ranks[0]:.2f} | {ranks[1]:.2f} | "
            f"{errors[0]:.1f} | {errors[1]:.1f} |"
        )


if __name__ == "__main__":
    app()
