"""The command ``sensitivity``. Other packages do the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quietvit.console import (
    AnyImages,
    Bits,
    Classes,
    Count,
    Force,
    Keep,
    MethodName,
    MethodOptions,
    Model,
    Seed,
    Size,
    Weights,
    build_model,
    draw_images,
    epilog,
    open_data,
)
from quietvit.width import show

app = typer.Typer(rich_markup_mode="rich")
_PANEL = "Look at a model"


@app.command(
    rich_help_panel=_PANEL,
    epilog=epilog(
        "quietvit sensitivity deit_tiny_patch16_224 --weights w.safetensors --images val.parquet "
        "--bits W4A4 --method rtn-omse",
        "quietvit sensitivity runs/mine --images /my/images --bits W4A4 --estimate -o sensitivity",
    ),
)
def sensitivity(
    model: Model,
    images: AnyImages,
    weights: Weights = None,
    classes: Classes = None,
    size: Size = None,
    bits: Bits = "W4A4",
    method: MethodName = "rtn-omse",
    options: MethodOptions = None,
    keep: Keep = None,
    count: Count = 32,
    seed: Seed = 0,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Estimate in two passes instead of measuring.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for sensitivity.json and the plot."),
    ] = None,
    force: Force = False,
) -> None:
    """Measure what each site and role costs when it is quantized. Needs no labels.

    Ctrl-C prints and writes what was measured so far.
    """
    from quietvit.advice import sensitivity as run
    from quietvit.files import refuse_nonempty
    from quietvit.quantization.settings import parse_method

    chosen = parse_method(method, bits, options or (), keep or ())
    if output is not None:
        refuse_nonempty(output, force)
    built = build_model(model, weights, classes, size)
    drawn = draw_images(built, open_data(images, "test", labels=False), count, seed)
    found = run(built, chosen, drawn, estimate=estimate)
    written = []
    if output is not None:
        written = [found.to_json(output / "sensitivity.json"), *found.plot(output)]
    show(found)
    if written:
        typer.echo("Written: " + ", ".join(map(str, written)))
    if not found.complete:
        raise typer.Exit(130)
