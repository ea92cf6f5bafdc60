"""The commands ``export``, ``check`` and ``predict``. ``quietvit.deployment`` does the work."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quietvit import completion
from quietvit.answers import Form, Format, answer
from quietvit.complaints import complain
from quietvit.console import (
    FloatModel,
    Runtime,
    Threads,
    epilog,
    load_quantized,
    open_any,
    open_boxes,
    quantized_run,
)
from quietvit.errors import QuietvitError
from quietvit.files import json_text, refuse_unwritable, write_atomic

if TYPE_CHECKING:
    from quietvit.quantization import QuantizedModel

app = typer.Typer(rich_markup_mode="rich")
_PANEL = "Deploy"
Exported = Annotated[
    Path,
    typer.Argument(metavar="FILE", help="A file from export: model.onnx, .xml or .torchao."),
]


@app.command(
    rich_help_panel=_PANEL,
    epilog=epilog("quietvit export tiny.qvit --to onnx", "quietvit export tiny.qvit --to openvino"),
)
def export(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A saved .qvit, or the folder of a run that trained one."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write.", show_default="next to the .qvit"),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="Target: onnx, openvino, torchao, or your own.",
            show_default="by the suffix of --output, else onnx",
            autocompletion=completion.targets,
        ),
    ] = None,
    as_: Annotated[
        str | None,
        typer.Option(
            "--as",
            help="uniform: replace codes without an integer kernel by uniform ones. symmetric: "
            "also remove zero points.",
        ),
    ] = None,
    signed: Annotated[
        bool,
        typer.Option("--signed", help="Activations as int8 with zero point 0, for TensorRT."),
    ] = False,
    tensor: Annotated[
        str | None,
        typer.Option(
            "--output-tensor",
            help="The tensor to export, by name or index, if the model returns several.",
            show_default="logits, else pooler_output, else the only one",
        ),
    ] = None,
    opset: Annotated[int, typer.Option(help="ONNX opset, 20 or 21.")] = 21,
    labels: Annotated[
        Path | None,
        typer.Option("--labels", help="Text file with one class name per line."),
    ] = None,
    model: FloatModel = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    form: Format = Form.TABLE,
) -> None:
    """Write a quantized model as a file that a runtime computes in integers."""
    from quietvit.deployment import export as run
    from quietvit.deployment.paths import head_file
    from quietvit.deployment.targets import target_named
    from quietvit.detection.static_parts import HEADS

    if output is None:
        run_of = quantized_run(file)
        saved = file if run_of is None else run_of.weights
        output = saved.with_suffix(target_named(to or "onnx").suffix)
    found = run(
        load_quantized(file, model),
        output,
        to=to,
        as_=as_,
        opset=opset,
        signed=signed,
        output=tensor,
        labels=None if labels is None else _lines(labels),
        force=force,
    )
    replaced = [str(each) for each in found.replaced]
    notes = [note for note in found.facts.notes if note not in replaced]
    plain: dict[str, Any] = {
        "path": str(found.path),
        **{
            name: str(head_file(found.path, head)) if head in found.heads else None
            for head, name in HEADS.items()
        },
        "bytes": found.size,
        "output": str(found.facts.output),
        "replaced": replaced,
        "notes": notes,
    }
    paths = ", ".join(map(str, found.paths))
    answer(
        form,
        *(f"replaced: {each}" for each in replaced),
        *(f"note: {note}" for note in notes),
        f"Output: {found.facts.output}",
        f"Written: {paths} ({found.size / 1e6:.2f} MB)",
        data=plain,
        rows=[plain],
    )


@app.command(
    rich_help_panel=_PANEL,
    epilog=epilog(
        "quietvit check tiny.onnx --against tiny.qvit --images val.parquet --json check.json"
    ),
)
def check(
    file: Exported,
    against: Annotated[Path, typer.Option("--against", help="The .qvit or run that was exported.")],
    images: Annotated[
        str,
        typer.Option(
            "--images", metavar="DATA", help="Images to compare on; labels add top-1, boxes AP."
        ),
    ],
    model: FloatModel = None,
    count: Annotated[
        int | None,
        typer.Option("--count", min=1, help="Number of images.", show_default="all of them"),
    ] = None,
    runtime: Runtime = None,
    threads: Threads = 0,
    seconds: Annotated[
        float, typer.Option(min=0, help="Seconds to time each batch size; 0 disables timing.")
    ] = 10.0,
    json: Annotated[
        Path | None, typer.Option("--json", help="Also write everything to this file.")
    ] = None,
    form: Format = Form.TABLE,
) -> None:
    """Prove that an exported file computes in integers and agrees with its model, and time it.

    The exit code is 1 if the file does not keep its claims.
    """
    from quietvit.data.images import subset
    from quietvit.deployment import check as run
    from quietvit.deployment import open_runtime
    from quietvit.detection import detection_loader, is_detection_spec
    from quietvit.detection.static_parts import MASKS

    if json is not None:
        refuse_unwritable(json)
    loaded = open_runtime(file, runtime, threads)
    quantized = load_quantized(against, model)
    loader: Any
    if loaded.facts.detector is not None and is_detection_spec(images):
        masks = MASKS in loaded.facts.detector
        boxes = subset(open_boxes(images, "test", loaded.facts.labels, masks), count)
        loader = detection_loader(boxes, 8)
    else:
        loader = _pictures(loaded, quantized, images, count)
    found = run(loaded, quantized, loader, seconds=seconds)
    written = None if json is None else found.to_json(json)
    plain = found.to_dict()
    agreed = {
        each["product"]: {key: value for key, value in each.items() if key != "product"}
        for each in plain["agreements"]
    }
    rows = [ran | {"agreement": agreed.get(ran["product"])} for ran in plain["products"]]
    answer(form, str(found), data=plain, rows=rows)
    if written is not None:
        typer.echo(f"Written: {written}")
    if not found.ok:
        raise typer.Exit(1)


@app.command(
    rich_help_panel=_PANEL,
    epilog=epilog(
        "quietvit predict tiny.onnx photo.jpg",
        "quietvit predict tiny.onnx photos/",
        "quietvit predict encoder.onnx photo.jpg --npy photo.npy",
    ),
)
def predict(
    file: Exported,
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE...", help="Image files, folders (without subfolders), or patterns."
        ),
    ],
    top: Annotated[int, typer.Option(min=1, help="How many classes or boxes.")] = 5,
    runtime: Runtime = None,
    threads: Threads = 0,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write classes, or all values, to this file.")
    ] = None,
    npy: Annotated[
        Path | None,
        typer.Option("--npy", help="Write embeddings, (images, ...), to this file."),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(help="Write the images with the boxes of a detector into this folder."),
    ] = None,
    form: Format = Form.TABLE,
) -> None:
    """Print the most probable classes of images, their boxes, or their embeddings.

    The preprocessing in the file prepares the images. An unreadable image is reported and skipped;
    the exit code is then 1.
    """
    from quietvit.data.folder import image_files
    from quietvit.deployment import Embedding, open_runtime
    from quietvit.deployment import predict as run
    from quietvit.deployment.embedding import save_embeddings
    from quietvit.deployment.predicting import drawn, read_image

    loaded = open_runtime(file, runtime, threads)
    detector = loaded.facts.detector is not None
    if npy is not None and (detector or loaded.facts.output.of_classes):
        given = "boxes" if detector else "class scores"
        raise QuietvitError(
            f"{file} gives {given} and no embedding, so --npy has nothing to write. Use --json."
        )
    if pictures is not None and not detector:
        raise QuietvitError(f"{file} gives no boxes, so --pictures has nothing to draw.")
    if form is Form.CSV and not (detector or loaded.facts.output.of_classes):
        raise QuietvitError(
            f"{file} gives embeddings, which are no table. Use --format json, or --npy FILE.npy."
        )
    for path in (json, npy):
        if path is not None:
            refuse_unwritable(path)
    embeddings, results = list[Embedding](), list[dict[str, Any]]()
    failed = list[dict[str, str]]()

    def fail(name: str, error: QuietvitError) -> None:
        complain("error", str(error))
        failed.append({"image": name, "error": str(error)})

    for text in images:
        try:
            names, passed = image_files(text)
        except QuietvitError as error:
            fail(text, error)
            continue
        passed.tell(text, len(names))
        for name in names:
            try:
                image = read_image(name)
            except QuietvitError as error:
                fail(str(name), error)
                continue
            found = run(loaded, image, top)
            if isinstance(found, Embedding):
                lines: list[Any] = [found]
                embeddings.append(found)
                results.append({"image": str(name)} | found.to_dict())
            else:
                lines, kind = found, "boxes" if detector else "classes"
                results.append({"image": str(name), kind: [asdict(each) for each in found]})
                if pictures is not None:
                    pictures.mkdir(parents=True, exist_ok=True)
                    drawn(image, found).save(pictures / f"{Path(name).stem}.png")
            if form is Form.TABLE:  # each image as soon as it is done
                typer.echo(name)
                for each in lines:
                    typer.echo(f"  {each}")
    if form is not Form.TABLE:
        rows = [
            {"image": each["image"], "rank": rank} | _in_columns(entry)
            for each in results
            for rank, entry in enumerate(each.get("classes") or each.get("boxes") or (), start=1)
        ]
        told = {"file": str(file), "images": results, "failed": failed}
        answer(form, data=told, rows=rows)
    if json is not None:
        typer.echo(f"Written: {write_atomic(json, json_text(results, indent=1))}")
    if npy is not None and embeddings:
        typer.echo(f"Written: {save_embeddings(npy, embeddings)}")
    if failed:
        raise typer.Exit(1)


def _in_columns(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a class or a box with a column for each coordinate, without its mask."""
    corners = dict(zip(("x1", "y1", "x2", "y2"), entry.get("corners", ()), strict=False))
    return {key: x for key, x in entry.items() if key not in ("corners", "mask")} | corners


def _pictures(loaded: Any, quantized: QuantizedModel, images: str, count: int | None) -> Any:
    """Return batches of images after the file's preprocessing, with labels if there are any."""
    from quietvit.data import evaluation_loader, evaluation_transform
    from quietvit.data.images import subset
    from quietvit.deployment.evaluation import file_transform

    carried = loaded.facts.preprocessing is not None
    transform = file_transform(loaded) if carried else evaluation_transform(quantized.model)
    dataset = subset(open_any(images, "test", "top-1 is not compared"), count)
    loader = evaluation_loader(dataset, transform, 32)
    return loader if dataset.labelled else (x for x, _ in loader)


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise QuietvitError(f"cannot read the labels {path} as UTF-8 text: {error}.") from error
