"""The commands ``sensitivity`` and ``advise``. ``quietvit.advice`` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    listed,
    open_boxes,
    open_data,
)
from quietvit.errors import QuietvitError
from quietvit.width import show

if TYPE_CHECKING:
    from torch import nn

    from quietvit.quantization import Method

app = typer.Typer(rich_markup_mode="rich")
_PANEL = "Look at a model"
CALIBRATION = 32
"""Images that calibrate with --by part, and give the errors."""


@app.command(
    rich_help_panel=_PANEL,
    epilog=epilog(
        "quietvit sensitivity deit_tiny_patch16_224 --weights w.safetensors --images val.parquet "
        "--bits W4A4 --method rtn-omse",
        "quietvit sensitivity runs/mine --images /my/images --bits W4A4 --estimate -o sensitivity",
        "quietvit sensitivity runs/cells --images coco:train.json,test.json --bits W4A4 --by part",
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
    by: Annotated[
        str,
        typer.Option(help="site, or part: the parts of a detector, in AP if boxes are given."),
    ] = "site",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for sensitivity.json and the plot."),
    ] = None,
    force: Force = False,
) -> None:
    """Measure the cost of quantizing each site and role. No labels are needed.

    With --by part, measure the parts of a detector. Images with boxes (coco:, voc:, objects:) give
    the AP of --count images; the training images calibrate if there are any.

    Ctrl-C prints and writes the results so far.
    """
    from quietvit.advice import sensitivity as run
    from quietvit.detection.parts import with_parts
    from quietvit.files import refuse_nonempty
    from quietvit.quantization.settings import parse_method

    chosen = parse_method(method, bits, options or (), keep or ())
    if by not in ("site", "part") or (by == "part" and estimate):
        raise QuietvitError(
            f"--by {by} does not fit; give site or part, and leave --estimate out with part."
        )
    if output is not None:
        refuse_nonempty(output, force)
    built = build_model(model, weights, classes, size)
    if by == "part":
        _by_part(built, chosen, images, count, seed, output)
        return
    drawn = draw_images(built, open_data(images, "test", labels=False), count, seed)
    found = run(built, with_parts(chosen, built, drawn[:1]), drawn, estimate=estimate)
    written = []
    if output is not None:
        written = [found.to_json(output / "sensitivity.json"), *found.plot(output)]
    show(found)
    if written:
        typer.echo("Written: " + ", ".join(map(str, written)))
    if not found.complete:
        raise typer.Exit(130)


def _by_part(
    built: nn.Module, method: Method, images: str, count: int, seed: int, output: Path | None
) -> None:
    from quietvit.classes import names_of
    from quietvit.detection import ap_by_part, detection_loader, is_detection_spec, subset

    loader = None
    if is_detection_spec(images):
        loader = detection_loader(subset(open_boxes(images, "test", names_of(built)), count, seed))
    known = open_data(images, "train", labels=False)
    drawn = draw_images(built, known, min(CALIBRATION, len(known)), seed)
    found = ap_by_part(built, method, drawn, loader)
    written = None if output is None else found.to_json(output / "parts.json")
    show(found)
    if written is not None:
        typer.echo(f"Written: {written}")
    if not found.complete:
        raise typer.Exit(130)


@app.command(
    rich_help_panel=_PANEL,
    epilog=epilog(
        "quietvit advise deit_tiny_patch16_224 --weights w.safetensors --images val.parquet "
        "--minutes 20",
        "quietvit advise runs/mine --images /my/images --bits W8A8,W4A8 --methods rtn-omse,erq",
    ),
)
def advise(
    model: Model,
    images: AnyImages,
    weights: Weights = None,
    classes: Classes = None,
    size: Size = None,
    minutes: Annotated[float, typer.Option(help="Time limit.")] = 10.0,
    methods: Annotated[
        str | None,
        typer.Option(help="Methods to try, comma-separated.", show_default="five, cheap first"),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            help="Bits to try, comma-separated.", show_default="W8A8 to W4A4 with 8-bit maps"
        ),
    ] = None,
    count: Annotated[
        int, typer.Option("--count", help="Number of images: up to 32 calibrate, the rest measure.")
    ] = 160,
    seed: Seed = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write, such as advice.json.")
    ] = None,
) -> None:
    """Try methods and bits, and recommend next steps. No labels are needed.

    Ctrl-C prints and writes the results so far.
    """
    from quietvit.advice import advise as run
    from quietvit.advice.ladder import BITS, METHODS
    from quietvit.files import refuse_unwritable
    from quietvit.quantization.settings import setting_names

    names = METHODS if methods is None else listed(methods)
    widths = BITS if bits is None else listed(bits)
    setting_names(widths, names)
    if output is not None:
        refuse_unwritable(output)
    built = build_model(model, weights, classes, size)
    dataset = open_data(images, "test", labels=False)
    drawn = draw_images(built, dataset, min(count, len(dataset)), seed)
    found = run(built, drawn, minutes=minutes, methods=names, bits=widths)
    written = None if output is None else found.to_json(output)
    show(found)
    if written is not None:
        typer.echo(f"Written: {written}")
    if not found.complete:
        raise typer.Exit(130)
