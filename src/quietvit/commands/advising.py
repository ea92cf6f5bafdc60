"""The commands ``sensitivity``, ``choose-bits`` and ``advise``. ``advice`` does the work."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quietvit import completion
from quietvit.answers import Form, Format, answer
from quietvit.commands.images import Minutes, Source
from quietvit.console import (
    AnyImages,
    Bits,
    Classes,
    Count,
    Device,
    Force,
    Keep,
    MethodName,
    MethodOptions,
    Model,
    Seed,
    Size,
    Weights,
    build_model,
    epilog,
    listed,
    open_boxes,
)
from quietvit.devices import checked_device
from quietvit.errors import QuietvitError

if TYPE_CHECKING:
    from torch import nn

    from quietvit.quantization import Method

app = typer.Typer(rich_markup_mode="rich")
_PANEL = "Look at a model"
_LEAST = 16
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
    device: Device = "cpu",
    form: Format = Form.TABLE,
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

    device = checked_device(device)
    source = Source(images)
    chosen = parse_method(method, bits, options or (), keep or ())
    if by not in ("site", "part") or (by == "part" and estimate):
        raise QuietvitError(
            f"--by {by} does not fit; give site or part, and leave --estimate out with part."
        )
    if output is not None:
        refuse_nonempty(output, force)
    built = build_model(model, weights, classes, size).to(device)
    if by == "part":
        _by_part(built, chosen, images, count, seed, output, form)
        return
    drawn = source.draw(built, source.count(count), seed)
    found = run(built, with_parts(chosen, built, drawn[:1]), drawn, estimate=estimate)
    written = []
    if output is not None:
        written = [found.to_json(output / "sensitivity.json"), *found.plot(output)]
    plain = found.to_dict()
    parts = [{"kind": kind} | part for kind in ("role", "site") for part in plain[f"{kind}s"]]
    answer(form, found, data=plain, rows=parts)
    _end(found.complete, *written)


def _by_part(
    built: nn.Module,
    method: Method,
    images: str,
    count: int,
    seed: int,
    output: Path | None,
    form: Form,
) -> None:
    from quietvit.classes import names_of
    from quietvit.detection import (
        ap_by_part,
        detection_loader,
        is_detection_spec,
        predicts_masks,
        subset,
    )

    loader = None
    if is_detection_spec(images):
        boxes = open_boxes(images, "test", names_of(built), predicts_masks(built))
        loader = detection_loader(subset(boxes, count, seed))
    source = Source(images, "train")
    drawn = source.draw(built, source.count(CALIBRATION), seed)
    found = ap_by_part(built, method, drawn, loader)
    written = [] if output is None else [found.to_json(output / "parts.json")]
    plain = found.to_dict()
    answer(form, found, data=plain, rows=plain["parts"])
    _end(found.complete, *written)


@app.command(
    rich_help_panel=_PANEL,
    epilog=epilog(
        "quietvit choose-bits deit_tiny_patch16_224 --weights w.safetensors --images val.parquet "
        "--average 6 -o bits.toml",
        "quietvit choose-bits runs/mine --images /my/images --bytes 3000000 --choices W4A8,W8A8 "
        "-o bits.toml",
        "quietvit quantize runs/mine --calibration /my/images --method rtn-omse --keep bits.toml "
        "-o mine.qvit",
    ),
)
def choose_bits(
    model: Model,
    images: AnyImages,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="File to write, for --keep: a name such as bits.toml."),
    ],
    average: Annotated[
        float | None,
        typer.Option(help="Budget: bits on average over all multiply-accumulates."),
    ] = None,
    weight_bytes: Annotated[
        float | None, typer.Option("--bytes", help="Budget: bytes of all weights.")
    ] = None,
    choices: Annotated[str, typer.Option(help="Bits to choose from, comma-separated.")] = (
        "W4A4,W4A8,W6A6,W8A8"
    ),
    weights: Weights = None,
    classes: Classes = None,
    size: Size = None,
    method: MethodName = "rtn-omse",
    options: MethodOptions = None,
    keep: Keep = None,
    count: Count = 32,
    seed: Seed = 0,
    exact: Annotated[
        bool, typer.Option("--exact", help="Measure the cost of each operand. It takes minutes.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output.")] = False,
    device: Device = "cpu",
    form: Format = Form.TABLE,
) -> None:
    """Choose the bits of each operand under a budget. No labels are needed.

    Sites with bits by --keep or --set keep them. Ctrl-C chooses among the bits measured so far.
    """
    from quietvit.advice import choose_bits as run
    from quietvit.files import refuse_unwritable
    from quietvit.quantization.overrides_file import refuse_other_suffix
    from quietvit.quantization.settings import parse_method

    device = checked_device(device)
    source = Source(images)
    if (average is None) == (weight_bytes is None):
        raise QuietvitError("give one budget: --average (bits) or --bytes (of all weights).")
    chosen = parse_method(method, None, options or (), keep or ())
    refuse_other_suffix(output)
    refuse_unwritable(output)
    if output.exists() and not force:
        raise QuietvitError(f"{output} exists already. Choose another name, or pass --force.")
    built = build_model(model, weights, classes, size).to(device)
    wanted = source.count(count)
    if wanted < _LEAST:
        raise QuietvitError(
            f"choosing bits needs at least {_LEAST} images, and there are {wanted}. Give more "
            "images (--count, --images). They need no labels."
        )
    drawn = source.draw(built, wanted, seed)
    found = run(
        built,
        chosen,
        drawn,
        average=average,
        weight_bytes=weight_bytes,
        choices=listed(choices),
        estimate=not exact,
    )
    written = found.to_toml(output)
    rows = [{"name": name, "bits": bits} for name, bits in found.overrides.items()]
    answer(form, str(found), data=found.to_dict(), rows=rows)
    typer.echo(f"Written: {written}")
    fields = "".join(f" -s {shlex.quote(option)}" for option in options or ())
    typer.echo(
        f"Use it: quietvit quantize --method {method}{fields} --keep {shlex.quote(str(written))}"
    )
    _end(found.complete)


@app.command(
    rich_help_panel=_PANEL,
    epilog=epilog(
        "quietvit advise deit_tiny_patch16_224 --weights w.safetensors --images val.parquet "
        "--minutes 20",
        "quietvit advise runs/mine --images /my/images --bits W8A8,W4A8 --methods rtn-omse,erq",
        "quietvit advise runs/mine --images /my/images --calibration synthetic:32:pink",
    ),
)
def advise(
    model: Model,
    images: AnyImages,
    weights: Weights = None,
    classes: Classes = None,
    size: Size = None,
    minutes: Annotated[
        float, typer.Option(help="Time limit. At most half of it generates images, if any.")
    ] = 10.0,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods to try, comma-separated.",
            show_default="five, cheap first",
            autocompletion=completion.methods,
        ),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            help="Bits to try, comma-separated.", show_default="W8A8 to W4A4 with 8-bit maps"
        ),
    ] = None,
    count: Annotated[
        int,
        typer.Option(
            "--count",
            help="Number of images. Without --calibration up to 32 calibrate, the rest measure.",
        ),
    ] = 160,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="DATA",
            help="32 other images for calibration. Without data: synthetic:COUNT or "
            "synthetic:COUNT:METHOD, such as synthetic:32:pink.",
            show_default="some of --images",
        ),
    ] = None,
    seed: Seed = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write, such as advice.json.")
    ] = None,
    device: Device = "cpu",
    form: Format = Form.TABLE,
) -> None:
    """Try methods and bits, and recommend next steps. No labels are needed.

    Without any image, give --images synthetic:64. The result then says so.

    Ctrl-C prints and writes the results so far.
    """
    from quietvit.advice import advise as run
    from quietvit.advice.advise import refuse_few
    from quietvit.advice.ladder import BITS, METHODS
    from quietvit.files import refuse_unwritable
    from quietvit.quantization.settings import setting_names

    device = checked_device(device)
    source = Source(images)
    other = None if calibration is None else Source(calibration, "train")
    generating = sum(each is not None and each.request is not None for each in (source, other))
    time = Minutes(minutes, generating)
    names = METHODS if methods is None else listed(methods)
    widths = BITS if bits is None else listed(bits)
    setting_names(widths, names)
    if output is not None:
        refuse_unwritable(output)
    built = build_model(model, weights, classes, size).to(device)
    wanted = source.count(count)
    refuse_few(wanted, calibrating=other is None)
    calibrating = None
    if other is not None:
        calibrating = other.draw(built, other.count(CALIBRATION), seed, time)
        seed += 1  # other images, if both are generated
    drawn = source.draw(built, wanted, seed, time)
    found = run(
        built, drawn, calibration=calibrating, minutes=time.left, methods=names, bits=widths
    )
    written = [] if output is None else [found.to_json(output)]
    plain = found.to_dict()
    answer(form, found, data=plain, rows=plain["rows"])
    _end(found.complete, *written)


def _end(complete: bool, *written: Path) -> None:
    """Name the written files. After Ctrl-C, exit with code 130."""
    if written:
        typer.echo("Written: " + ", ".join(map(str, written)))
    if not complete:
        raise typer.Exit(130)
