"""Bits chosen for each operand against uniform bits at the same budget: DeiT-Tiny, ImageNet.

``quietvit.advice.bit_costs`` measures or estimates what each operand costs at 4, 6 and 8 bits,
once, on calibration images without labels. Its ``choose`` then chooses. The budgets are the average
bits of the uniform settings. Each row is top-1 on the first images of imagenet_dev_1000. A row that
exists is not run again. Needs QUIETVIT_TEST_DATA (or --data).

    python benchmarks/mixed_bits.py run
    python benchmarks/mixed_bits.py plot docs/mixed_bits.png
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import quietvit
from csv_rows import append, read
from quietvit.advice.bits import CHOICES, bit_costs
from quietvit.advice.sizes import average_bits, stored_bytes
from quietvit.data import (
    calibration_images,
    create_model,
    evaluate,
    evaluation_transform,
    load_dataset,
)
from quietvit.quantization import Method
from quietvit.quantization.settings import parse_method

MODEL = "deit_tiny_patch16_224"
OUT = Path("results/mixed_bits.csv")
UNIFORM = ("W4A4+attention-maps-8", "W5A5", "W6A6")
CHOSEN = {"measured": False, "estimated": True}
FIELDS = ("method", "setting", "average_bits", "mib", "top1", "images", "chosen")

app = typer.Typer(add_completion=False, help=__doc__)
OutOption = Annotated[Path, typer.Option(help="The table.")]


def settings(
    model: nn.Module, name: str, images: Any, calibration: Any, done: set[str]
) -> Iterator[tuple[str, Method, str]]:
    """Yield (setting, method, what was chosen) of each row that is missing."""
    trace = quietvit.trace(model, images[:1])
    budgets = []
    for bits in UNIFORM:
        method = parse_method(name, bits)
        budgets.append(average_bits(trace, method))
        if bits not in done:
            yield bits, method, ""
    for how, estimate in CHOSEN.items():
        missing = [budget for budget in budgets if f"{how} {budget:.2f}" not in done]
        if not missing:
            continue
        costs = bit_costs(
            model,
            name,
            images,
            choices=CHOICES,
            calibration=calibration,
            estimate=estimate,
            trace=trace,
            progress=False,
        )
        for budget in missing:
            choice = costs.choose(average=budget)
            counts = Counter(choice.overrides.values())
            chosen = " ".join(f"{number}x{bits}" for bits, number in sorted(counts.items()))
            yield f"{how} {budget:.2f}", choice.method, chosen


@app.command()
def run(
    data: Annotated[Path, typer.Option(envvar="QUIETVIT_TEST_DATA", help="Folder with the data.")],
    out: OutOption = OUT,
    method: Annotated[str, typer.Option(help="Method.")] = "rtn-omse",
    count: Annotated[int, typer.Option(help="Evaluation images.")] = 200,
    probes: Annotated[int, typer.Option(help="Images for the costs.")] = 8,
) -> None:
    """Measure what has no row yet, and append one row each."""
    model = create_model(MODEL, weights=data / f"{MODEL}.safetensors").eval()
    transform = evaluation_transform(model)
    table = load_dataset(f"table:{data / 'imagenet_dev_1000'}.parquet")
    calibration = load_dataset(f"table:{data / 'imagenette_calibration_1024'}.parquet")
    drawn = calibration_images(calibration, 32, transform, 0)
    batches = []
    for start in range(0, count, 8):
        pairs = [table[number] for number in range(start, min(start + 8, count))]
        images = torch.stack([transform(image) for image, _ in pairs])
        batches.append((images, torch.tensor([label for _, label in pairs])))
    done = {row["setting"] for row in read(out) if row["method"] == method}
    for setting, config, chosen in settings(model, method, drawn[:probes], drawn, done):
        quantized = quietvit.quantize(model, config, drawn, progress=False)
        bits = average_bits(quantized.trace, config)
        mib = stored_bytes(quantized) / 2**20
        top1 = evaluate(quantized, batches)
        new = [method, setting, f"{bits:.3f}", f"{mib:.2f}", f"{top1:.2f}", count, chosen]
        append(out, FIELDS, new)
        print(*new, flush=True)


@app.command()
def plot(path: Path, out: OutOption = OUT) -> None:
    """Draw top-1 over the average bits."""
    from quietvit.measure.plots import COLOURS, new_figure, save

    rows = read(out)
    figure = new_figure(5.5, 3.6)
    axes = figure.subplots()
    for how, label, colour, marker in (
        ("measured", "chosen, costs measured", COLOURS[0], "o-"),
        ("estimated", "chosen, costs estimated", COLOURS[2], "^--"),
        ("W", "the same everywhere", COLOURS[1], "s:"),
    ):
        part = [row for row in rows if row["setting"].startswith(how)]
        points = sorted((float(row["average_bits"]), float(row["top1"])) for row in part)
        axes.plot(*zip(*points, strict=True), marker, color=colour, label=label)
        for row in part if how == "W" else ():
            axes.annotate(
                row["setting"],
                (float(row["average_bits"]), float(row["top1"])),
                xytext=(4, -10),
                textcoords="offset points",
                fontsize=7,
            )
    axes.set_xlabel("bits of operands, averaged over multiply-accumulates")
    axes.set_ylabel(f"top-1, % of {rows[0]['images']} images")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3, linewidth=0.6)
    save(figure, path)


if __name__ == "__main__":
    app()
