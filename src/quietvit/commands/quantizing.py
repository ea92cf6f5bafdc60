"""The commands that quantize: ``quantize``, ``evaluate``, ``methods``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quietvit.console import (
    Bits,
    Calibration,
    Classes,
    Device,
    Images,
    Keep,
    MethodCount,
    MethodName,
    MethodOptions,
    Model,
    Seed,
    Size,
    Weights,
    build_model,
    draw_images,
    epilog,
    moved_to,
    open_data,
)
from quietvit.errors import QuietvitError
from quietvit.width import show

if TYPE_CHECKING:
    from torch import nn

    from quietvit.data import ImageDataset
    from quietvit.quantization import Method

app = typer.Typer(rich_markup_mode="rich")
_PANEL = "Quantize"


@app.command(
    rich_help_panel=_PANEL,
    epilog=epilog(
        "quietvit quantize deit_tiny_patch16_224 --weights w.safetensors "
        "--calibration calib.parquet --bits W4A8 --method rtn-omse -o tiny.qvit",
        "quietvit quantize runs/mine --calibration calib.parquet --bits W4A4 "
        "--keep post_softmax=8 -o mine.qvit",
        "quietvit evaluate tiny.qvit --images val.parquet",
    ),
)
def quantize(
    model: Model,
    calibration: Calibration,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write (name.qvit).")],
    weights: Weights = None,
    classes: Classes = None,
    size: Size = None,
    bits: Bits = "W8A8",
    method: MethodName = "rtn-minmax",
    options: MethodOptions = None,
    keep: Keep = None,
    count: MethodCount = None,
    seed: Seed = 0,
    images: Annotated[
        str | None,
        typer.Option("--images", metavar="DATA", help="Evaluate the result on these, too."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace it.")] = False,
) -> None:
    """Quantize a model by a method, with a few calibration images."""
    from quietvit.quantization import quantize as run
    from quietvit.quantization.settings import parse_method
    from quietvit.quantization.storage import FORMAT

    chosen = parse_method(method, bits, options or (), keep or ())
    FORMAT.refuse(output, force)
    if images is not None:
        open_data(images, "test")
    built = build_model(model, weights, classes, size)
    dataset = open_data(calibration, "train", labels=False)
    drawn = draw_images(built, dataset, _count_of(chosen, dataset, count), seed)
    result = run(built, chosen, drawn)
    written = result.save(output, force=force)
    typer.echo(str(result.coverage))
    typer.echo(f"Written: {written}")
    if images is not None:
        _evaluate(result, built, images, 64, "cpu")


@app.command(
    rich_help_panel=_PANEL,
    epilog=epilog(
        "quietvit evaluate deit_tiny_patch16_224 --weights w.safetensors --images val.parquet",
        "quietvit evaluate runs/digits --images embedded:digits",
        "quietvit evaluate tiny.qvit --images val.parquet",
    ),
)
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|FILE",
            help="Name of a timm model, folder of a training run, or a saved .qvit.",
        ),
    ],
    images: Images,
    weights: Weights = None,
    classes: Classes = None,
    size: Size = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    device: Device = "cpu",
) -> None:
    """Measure top-1 of a float model or a quantized file."""
    if model.endswith(".qvit") or (Path(model) / "quantization.json").is_file():
        from quietvit.quantization import load

        quantized = load(model)
        _evaluate(quantized, quantized.model, images, batch, device)
        return
    built = build_model(model, weights, classes, size)
    _evaluate(built, built, images, batch, device)


def _count_of(method: Method, dataset: ImageDataset, count: int | None) -> int:
    """As many images as asked for; else as the method takes, or all where there are fewer."""
    if count is None and len(dataset) < method.images:
        typer.echo(
            f"note: {method.name} takes {method.images} images, {dataset.name} has {len(dataset)}.",
            err=True,
        )
    return count if count is not None else min(method.images, len(dataset))


def _evaluate(
    model: nn.Module, configured: nn.Module, images: str, batch: int, device: str
) -> None:
    from quietvit.data import evaluate as run
    from quietvit.data import evaluation_loader, evaluation_transform

    dataset = open_data(images, "test")
    loader = evaluation_loader(dataset, evaluation_transform(configured), batch)
    top1 = run(moved_to(model, device), loader, device, progress=sys.stderr.isatty())
    typer.echo(f"top-1 {top1:.2f} % on {len(dataset)} images of {dataset.name}")


@app.command(rich_help_panel=_PANEL, epilog=epilog("quietvit methods 'rtn*'"))
def methods(
    pattern: Annotated[str, typer.Argument(help="Wildcard of names.")] = "*",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """List the quantization methods: what each needs, costs and claims."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from quietvit.quantization.listing import COLUMNS, method_rows, methods_markdown

    rows = method_rows(pattern)
    if not rows:
        raise QuietvitError(f"no method matches {pattern!r}; 'quietvit methods' lists them all.")
    if markdown:
        typer.echo(methods_markdown(pattern))
        return
    table = Table(*COLUMNS, box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(row[key] for key in COLUMNS))
    sources = [
        f"{row['method']}: {row['source']}. Published with: {row['published']}." for row in rows
    ]
    show(table, *sources)
