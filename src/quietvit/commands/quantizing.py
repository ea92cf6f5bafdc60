"""The commands ``quantize`` and ``methods``. Other packages do the work."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quietvit.answers import Form, Format, answer
from quietvit.commands.evaluating import evaluated
from quietvit.commands.images import Minutes as Time
from quietvit.commands.images import Source
from quietvit.console import (
    Bits,
    Calibration,
    Classes,
    Device,
    Keep,
    MethodCount,
    MethodName,
    MethodOptions,
    Minutes,
    Model,
    SaveImages,
    Seed,
    Size,
    Weights,
    build_model,
    epilog,
    open_data,
)
from quietvit.devices import checked_device
from quietvit.errors import QuietvitError

if TYPE_CHECKING:
    from quietvit.quantization import Method
    from quietvit.synthesis.settings import Request

app = typer.Typer(rich_markup_mode="rich")
_PANEL = "Quantize"


@app.command(
    rich_help_panel=_PANEL,
    epilog=epilog(
        "quietvit quantize deit_tiny_patch16_224 --weights w.safetensors "
        "--calibration calib.parquet --bits W4A8 --method rtn-omse -o tiny.qvit",
        "quietvit quantize runs/mine --calibration calib.parquet --bits W4A4 "
        "--keep post_softmax=8 -o mine.qvit",
        "quietvit quantize deit_tiny_patch16_224 --weights w.safetensors "
        "--calibration synthetic:32 --save-images seen -o tiny.qvit",
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
    minutes: Minutes = None,
    save_images: SaveImages = None,
    images: Annotated[
        str | None,
        typer.Option("--images", metavar="DATA", help="Also evaluate the result on these images."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output.")] = False,
    device: Device = "cpu",
    form: Format = Form.TABLE,
) -> None:
    """Quantize a model with a method and a few calibration images, real or generated."""
    from quietvit.detection import is_detection_spec
    from quietvit.detection.parts import with_parts
    from quietvit.quantization import quantize as run
    from quietvit.quantization.settings import parse_method
    from quietvit.quantization.storage import FORMAT

    device = checked_device(device)
    source = Source(calibration, "train")
    _refuse_unused(source.request, count, minutes, save_images, force)
    limit = Time(minutes, sources=1)
    chosen = parse_method(method, bits, options or (), keep or ())
    FORMAT.refuse(output, force)
    if images is not None:
        open_data(images, "test", labels=not is_detection_spec(images))
    built = build_model(model, weights, classes, size).to(device)
    if source.request is None:
        wanted = _count_of(chosen, source.dataset, count)
    else:
        wanted = source.count(count or chosen.images)
    drawn = source.draw(built, wanted, seed, limit)
    if save_images is not None:
        from quietvit.synthesis import save_images as write

        typer.echo(f"Images: {write(drawn, built, save_images, force)}")
    start = time.perf_counter()
    result = run(built, with_parts(chosen, built, drawn[:1]), drawn)
    seconds = time.perf_counter() - start
    written = result.save(output, force=force)
    typer.echo(str(result.coverage))
    typer.echo(f"Written: {written}")
    measured = None if images is None else evaluated(result, built, images, 64, device)
    coverage = result.coverage.to_dict()
    facts = {
        "path": str(written),
        "method": chosen.name,
        "bits": chosen.label,
        "policy": chosen.policy(),
        "deployable": result.deployable,
        "calibration_images": len(drawn),
        "seconds": seconds,
    }
    shares = {key: coverage[key] for key in ("quantized_macs", "total_macs", "fraction")}
    answer(
        form,
        *([] if measured is None else [str(measured)]),
        data={
            **facts,
            "coverage": coverage,
            "notes": list(result.notes),
            "origin": result.origin,
            "evaluation": None if measured is None else measured.to_dict(),
        },
        rows=[facts | shares | ({} if measured is None else measured.scores)],
    )


def _refuse_unused(
    synthetic: Request | None,
    count: int | None,
    minutes: float | None,
    save_images: Path | None,
    force: bool,
) -> None:
    """Raise QuietvitError for options that do not go together, before the long work."""
    from quietvit.files import refuse_nonempty

    if synthetic is None and (minutes, save_images) != (None, None):
        raise QuietvitError(
            "--minutes and --save-images are only for generated images; leave them out, or give "
            "--calibration synthetic:32."
        )
    if synthetic is not None and count is not None and synthetic.count is not None:
        raise QuietvitError(
            f"--calibration asks for {synthetic.count} images and --count for {count}; leave one "
            "of them out."
        )
    if save_images is not None:
        refuse_nonempty(save_images, force)


def _count_of(method: Method, dataset: Any, count: int | None) -> int:
    """Return ``count``, or by default the method's number of images, limited by the data set."""
    if count is None and len(dataset) < method.images:
        typer.echo(
            f"note: {method.name} uses {method.images} images, but {dataset.name} has only "
            f"{len(dataset)}.",
            err=True,
        )
    return count if count is not None else min(method.images, len(dataset))


@app.command(rich_help_panel=_PANEL, epilog=epilog("quietvit methods 'rtn*'"))
def methods(
    pattern: Annotated[str, typer.Argument(help="Wildcard for names.")] = "*",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    form: Format = Form.TABLE,
) -> None:
    """List the quantization methods with their needs, costs and claims."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from quietvit.quantization.listing import COLUMNS, method_rows, methods_markdown

    rows = method_rows(pattern)
    if not rows:
        raise QuietvitError(f"no method matches {pattern!r}; 'quietvit methods' lists them all.")
    if markdown:
        if form is not Form.TABLE:
            raise QuietvitError(f"--markdown and --format {form} exclude each other; give one.")
        typer.echo(methods_markdown(pattern))
        return
    table = Table(*COLUMNS, box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(str(row[key]) for key in COLUMNS))
    sources = [
        f"{row['method']}: {row['source']}. Published with: {row['published']}." for row in rows
    ]
    answer(form, table, *sources, data={"methods": rows}, rows=rows)
