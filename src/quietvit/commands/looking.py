"""The commands that look at a model: ``diagnose``, ``pairs``, ``trace``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quietvit.answers import Form, Format, answer
from quietvit.console import (
    AnyImages,
    Classes,
    Count,
    Device,
    Force,
    Model,
    Seed,
    Size,
    Weights,
    build_bare,
    build_model,
    draw_images,
    epilog,
    example_of,
    listed,
    open_data,
)
from quietvit.devices import checked_device

app = typer.Typer(rich_markup_mode="rich")
_PANEL = "Look at a model"


@app.command(
    rich_help_panel=_PANEL,
    epilog=epilog(
        "quietvit diagnose deit_tiny_patch16_224 --weights w.safetensors --images val.parquet",
        "quietvit diagnose runs/digits --images embedded:digits --output runs/digits-diagnosis",
    ),
)
def diagnose(
    model: Model,
    images: AnyImages,
    weights: Weights = None,
    classes: Classes = None,
    size: Size = None,
    count: Count = 32,
    seed: Seed = 0,
    sites_only: Annotated[
        bool, typer.Option("--sites-only", help="Skip the weights, for models without pairs.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for diagnosis.json and the plots."),
    ] = None,
    force: Force = False,
    device: Device = "cpu",
    form: Format = Form.TABLE,
) -> None:
    """Find outliers and the weights that cause them."""
    from quietvit.files import refuse_nonempty
    from quietvit.measure import diagnose as run

    device = checked_device(device)
    if output is not None:
        refuse_nonempty(output, force)
    built = build_model(model, weights, classes, size).to(device)
    dataset = open_data(images, "test", labels=False)
    drawn = draw_images(built, dataset, min(count, len(dataset)), seed)
    found = run(built, drawn, pairs=() if sites_only else None)
    written = []
    if output is not None:
        written = [found.to_json(output / "diagnosis.json"), *found.plot(output)]
    plain = found.to_dict()
    sites = [{k: v for k, v in site.items() if k != "channel_max"} for site in plain["sites"]]
    answer(form, found, data=plain, rows=sites)
    if written:
        typer.echo("Written: " + ", ".join(map(str, written)))


@app.command(rich_help_panel=_PANEL, epilog=epilog("quietvit pairs deit_tiny_patch16_224"))
def pairs(
    model: Model,
    kinds: Annotated[
        str | None,
        typer.Option(
            help="Kinds of pairs, comma-separated.",
            show_default="mlp,value_output,gated_mlp,norm_linear",
        ),
    ] = None,
    classes: Classes = None,
    size: Size = None,
    form: Format = Form.TABLE,
) -> None:
    """List the weight pairs that Colinearity Decay acts on."""
    from quietvit.pairs import DEFAULT_KINDS, find_pairs

    built = build_bare(model, classes, size)
    chosen = DEFAULT_KINDS if kinds is None else listed(kinds)
    found = find_pairs(built, example_of(built), kinds=chosen)
    plain = found.to_dict()
    answer(form, str(found), data=plain, rows=plain["pairs"])


@app.command(rich_help_panel=_PANEL, epilog=epilog("quietvit trace swin_tiny_patch4_window7_224"))
def trace(
    model: Model,
    classes: Classes = None,
    size: Size = None,
    matmuls: Annotated[
        bool, typer.Option("--matmuls", help="List only the matrix multiplications.")
    ] = False,
    form: Format = Form.TABLE,
) -> None:
    """List every matrix multiplication, norm, softmax and activation of a model."""
    from dataclasses import replace

    from quietvit.tracing import trace as run

    built = build_bare(model, classes, size)
    found = run(built, example_of(built))
    shown = replace(found, sites=found.matmuls) if matmuls else found
    plain = shown.to_dict()
    answer(form, str(shown), data=plain, rows=plain["sites"])
