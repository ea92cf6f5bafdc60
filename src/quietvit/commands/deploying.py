"""The commands on exported files: ``export``, ``check``, ``predict``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quietvit.complaints import complain
from quietvit.console import build_model, epilog, open_data
from quietvit.errors import QuietvitError

if TYPE_CHECKING:
    from quietvit.quantization import QuantizedModel

app = typer.Typer(rich_markup_mode="rich")
_PANEL = "Deploy"
Exported = Annotated[
    Path, typer.Argument(metavar="FILE", help="An exported model.onnx or model.xml.")
]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 is the runtime's own choice.")]
FloatModel = Annotated[
    str | None,
    typer.Option(
        "--model", help="hf:FOLDER or a training run it was made from, if timm has no name for it."
    ),
]
Runtime = Annotated[
    str | None,
    typer.Option(help="onnxruntime or openvino.", show_default="what the suffix says"),
]


@app.command(
    rich_help_panel=_PANEL,
    epilog=epilog("quietvit export tiny.qvit --to onnx", "quietvit export tiny.qvit --to openvino"),
)
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A saved .qvit.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write.", show_default="beside the .qvit"),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="onnx, openvino or torchao.",
            show_default="what the suffix of the output says, else onnx",
        ),
    ] = None,
    as_: Annotated[
        str | None,
        typer.Option(
            "--as", help="uniform: replace codes without integer kernels by uniform ones."
        ),
    ] = None,
    opset: Annotated[int, typer.Option(help="ONNX opset, 20 or 21.")] = 21,
    labels: Annotated[
        Path | None, typer.Option("--labels", help="Text file with the name of a class a line.")
    ] = None,
    model: FloatModel = None,
    force: Annotated[bool, typer.Option("--force", help="Replace it.")] = False,
) -> None:
    """Write a quantized model as a file that a runtime computes in integers."""
    from quietvit.deployment import export as run

    if to is None and output is None:
        to = "onnx"
    suffix = {"onnx": ".onnx", "openvino": ".xml", "torchao": ".torchao"}.get(to or "onnx")
    if suffix is None:
        raise QuietvitError(f"--to {to} is not known; choose onnx, openvino or torchao.")
    path = file.with_suffix(suffix) if output is None else output
    found = run(
        _load(file, model),
        path,
        to=to,
        as_=as_,
        opset=opset,
        labels=None if labels is None else _lines(labels),
        force=force,
    )
    for replaced in found.replaced:
        typer.echo(f"replaced: {replaced}")
    for note in found.facts.notes:
        if note not in map(str, found.replaced):
            typer.echo(f"note: {note}")
    typer.echo(f"Written: {found.path} ({found.size / 1e6:.2f} MB)")


@app.command(
    rich_help_panel=_PANEL,
    epilog=epilog(
        "quietvit check tiny.onnx --against tiny.qvit --images val.parquet --json check.json"
    ),
)
def check(
    file: Exported,
    against: Annotated[
        Path, typer.Option("--against", help="The .qvit that it was exported from.")
    ],
    images: Annotated[
        str,
        typer.Option("--images", metavar="DATA", help="Images; labels add top-1."),
    ],
    model: FloatModel = None,
    count: Annotated[
        int | None,
        typer.Option("--count", min=1, help="Number of images.", show_default="all of them"),
    ] = None,
    runtime: Runtime = None,
    threads: Threads = 0,
    seconds: Annotated[
        float, typer.Option(min=0, help="How long each batch size is timed; 0: not at all.")
    ] = 10.0,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write everything to this file, too.")
    ] = None,
) -> None:
    """Prove what an exported file computes in integers, that it is the same, and how fast.

    Exit code 1 where the file does not keep what it claims.
    """
    from quietvit.data import evaluation_loader, evaluation_transform
    from quietvit.data.images import NoLabelsError, subset
    from quietvit.deployment import check as run
    from quietvit.files import refuse_unwritable

    if json is not None:
        refuse_unwritable(json)
    quantized = _load(against, model)
    try:
        whole = open_data(images, "test")
    except NoLabelsError:
        whole = open_data(images, "test", labels=False)
        typer.echo("note: the images have no labels, so top-1 is not compared.", err=True)
    dataset = subset(whole, count)
    loader = evaluation_loader(dataset, evaluation_transform(quantized.model), 32)
    batches = loader if dataset.labelled else (x for x, _ in loader)
    found = run(file, quantized, batches, runtime=runtime, threads=threads, seconds=seconds)
    written = None if json is None else found.to_json(json)
    typer.echo(str(found))
    if written is not None:
        typer.echo(f"Written: {written}")
    if not found.ok:
        raise typer.Exit(1)


@app.command(
    rich_help_panel=_PANEL,
    epilog=epilog("quietvit predict tiny.onnx photo.jpg", "quietvit predict tiny.onnx photos/"),
)
def predict(
    file: Exported,
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE...", help="Image files, folders (the images right in them), or patterns."
        ),
    ],
    top: Annotated[int, typer.Option(min=1, help="How many classes.")] = 5,
    runtime: Runtime = None,
    threads: Threads = 0,
) -> None:
    """Print the most probable classes of images, with the preprocessing in the file.

    An image that cannot be read is reported, the others go on; the exit code is 1 then.
    """
    from quietvit.data.folder import image_files
    from quietvit.deployment import open_runtime
    from quietvit.deployment import predict as run
    from quietvit.deployment.predicting import read_image

    loaded = open_runtime(file, runtime, threads)
    failed = 0
    for text in images:
        try:
            names, passed = image_files(text)
        except QuietvitError as error:
            complain("error", str(error))
            failed += 1
            continue
        passed.tell(text, len(names))
        for name in names:
            try:
                image = read_image(name)
            except QuietvitError as error:
                complain("error", str(error))
                failed += 1
                continue
            typer.echo(name)
            for found in run(loaded, image, top):
                typer.echo(f"  {100 * found.probability:6.2f} %  {found.label}")
    if failed:
        raise typer.Exit(1)


def _load(file: Path, model: str | None) -> QuantizedModel:
    from quietvit.quantization import load

    return load(file, None if model is None else build_model(model, None, None, None))


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise QuietvitError(f"the labels {path} cannot be read: {error}.") from error
