"""The commands ``quantize``, ``evaluate`` and ``methods``. Other packages do the work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quietvit.classes import names_of
from quietvit.console import (
    Bits,
    Calibration,
    Classes,
    Device,
    FloatModel,
    Images,
    Keep,
    MethodCount,
    MethodName,
    MethodOptions,
    Minutes,
    Model,
    Runtime,
    SaveImages,
    Seed,
    Size,
    Threads,
    Weights,
    build_model,
    draw_images,
    epilog,
    load_quantized,
    moved_to,
    open_boxes,
    open_data,
    quantized_run,
)
from quietvit.errors import QuietvitError
from quietvit.width import show

if TYPE_CHECKING:
    from torch import Tensor, nn

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
) -> None:
    """Quantize a model with a method and a few calibration images, real or generated."""
    from quietvit.detection import is_detection_spec
    from quietvit.quantization import quantize as run
    from quietvit.quantization.settings import parse_method
    from quietvit.quantization.storage import FORMAT
    from quietvit.synthesis.settings import is_synthetic, parse_request

    synthetic = parse_request(calibration) if is_synthetic(calibration) else None
    _refuse_unused(synthetic, count, minutes, save_images, force)
    chosen = parse_method(method, bits, options or (), keep or ())
    FORMAT.refuse(output, force)
    if images is not None:
        open_data(images, "test", labels=not is_detection_spec(images))
    built = build_model(model, weights, classes, size)
    if synthetic is not None:
        wanted = synthetic.count or count or chosen.images
        drawn = _synthesized(built, synthetic, wanted, seed, minutes, save_images, force)
    else:
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
        "quietvit evaluate tiny.onnx --images val.parquet",
    ),
)
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|FILE",
            help="Name of a timm model, hf:FOLDER, folder of a training run, a saved .qvit, or a "
            "file from export.",
        ),
    ],
    images: Images,
    weights: Weights = None,
    classes: Classes = None,
    size: Size = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 64,
    device: Device = "cpu",
    float_model: FloatModel = None,
    runtime: Runtime = None,
    threads: Threads = 0,
) -> None:
    """Measure top-1 of a float model, a quantized model, or an exported file in its runtime.

    A detector is measured by COCO's box AP, on coco:FILE.json or voc:FOLDER. An exported file uses
    its own preprocessing.
    """
    kind = _kind_of(Path(model))
    if kind != "model" and (weights, classes, size) != (None, None, None):
        raise QuietvitError(
            f"{model} has its own weights, classes and size; leave out --weights, --classes and "
            "--size."
        )
    if kind != "qvit" and float_model is not None:
        raise QuietvitError(
            f"--model is only for a quantized model, which {model} is not; leave it out."
        )
    if kind != "exported" and (runtime, threads) != (None, 0):
        raise QuietvitError(
            f"--runtime and --threads are only for exported files, and {model} is not one; leave "
            "them out."
        )
    if kind == "exported":
        _evaluate_file(Path(model), images, batch, device, runtime, threads)
        return
    if kind == "qvit":
        quantized = load_quantized(model, float_model)
        _evaluate(quantized, quantized.model, images, batch, device)
        return
    built = build_model(model, weights, classes, size)
    _evaluate(built, built, images, batch, device)


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


def _synthesized(
    model: nn.Module,
    synthetic: Request,
    count: int,
    seed: int,
    minutes: float | None,
    save_images: Path | None,
    force: bool,
) -> Tensor:
    from quietvit.synthesis import save_images as write
    from quietvit.synthesis import synthesize

    made = synthesize(
        model,
        count,
        synthetic.method,
        seed=seed,
        minutes=minutes,
        progress=sys.stderr.isatty(),
    )
    if save_images is not None:
        typer.echo(f"Images: {write(made, model, save_images, force)}")
    return made


def _count_of(method: Method, dataset: Any, count: int | None) -> int:
    """Return ``count``, or by default the method's number of images, limited by the data set."""
    if count is None and len(dataset) < method.images:
        typer.echo(
            f"note: {method.name} uses {method.images} images, but {dataset.name} has only "
            f"{len(dataset)}.",
            err=True,
        )
    return count if count is not None else min(method.images, len(dataset))


def _kind_of(path: Path) -> str:
    """Return what ``evaluate`` got: a ``qvit``, an ``exported`` file, or a ``model`` name."""
    from quietvit.deployment.targets import target_of
    from quietvit.quantization.storage import FORMAT

    if path.suffix == FORMAT.suffix or FORMAT.holds(path) or quantized_run(path) is not None:
        return "qvit"
    return "model" if target_of(path) is None else "exported"


def _evaluate_file(
    path: Path, images: str, batch: int, device: str, runtime: str | None, threads: int
) -> None:
    from quietvit.deployment import open_runtime
    from quietvit.deployment.evaluation import FileDetector, FileModel, file_transform

    if device != "cpu":
        raise QuietvitError(
            f"exported files run only on the CPU; leave out --device {device}, or evaluate the "
            ".qvit on that device."
        )
    loaded = open_runtime(path, runtime, threads)
    if loaded.facts.detector is not None:
        _measure_boxes(FileDetector(loaded), loaded.facts.labels, images, batch, device)
    else:
        _measure(FileModel(loaded), file_transform(loaded), images, batch, device)
    typer.echo(f"in {loaded.name}")


def _evaluate(
    model: nn.Module, configured: nn.Module, images: str, batch: int, device: str
) -> None:
    from quietvit.data import evaluation_transform
    from quietvit.detection import is_detector

    if is_detector(configured):
        _measure_boxes(moved_to(model, device), names_of(configured), images, batch, device)
        return
    _measure(moved_to(model, device), evaluation_transform(configured), images, batch, device)


def _measure_boxes(
    model: nn.Module, names: Sequence[str] | None, images: str, batch: int, device: str
) -> None:
    from quietvit.detection import detection_loader, evaluate_detector

    dataset = open_boxes(images, "test", names)
    loader = detection_loader(dataset, batch)
    found = evaluate_detector(model, loader, device, progress=sys.stderr.isatty())
    typer.echo(f"box {found} on {len(dataset)} images of {dataset.name}")


def _measure(
    model: nn.Module, transform: Callable[[Any], Tensor], images: str, batch: int, device: str
) -> None:
    from quietvit.data import evaluate as run
    from quietvit.data import evaluation_loader

    dataset = open_data(images, "test")
    loader = evaluation_loader(dataset, transform, batch)
    top1 = run(model, loader, device, progress=sys.stderr.isatty())
    typer.echo(f"top-1 {top1:.2f} % on {len(dataset)} images of {dataset.name}")


@app.command(rich_help_panel=_PANEL, epilog=epilog("quietvit methods 'rtn*'"))
def methods(
    pattern: Annotated[str, typer.Argument(help="Wildcard for names.")] = "*",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """List the quantization methods with their needs, costs and claims."""
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
