"""The command ``evaluate``, and how ``quantize`` evaluates too. Other packages do the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quietvit.answers import Form, Format, answer
from quietvit.classes import names_of
from quietvit.console import (
    Classes,
    Device,
    FloatModel,
    Images,
    Runtime,
    Size,
    Threads,
    Weights,
    build_model,
    epilog,
    load_quantized,
    open_boxes,
    open_data,
    quantized_run,
)
from quietvit.devices import checked_device
from quietvit.errors import QuietvitError

if TYPE_CHECKING:
    from torch import Tensor, nn

app = typer.Typer(rich_markup_mode="rich")
_PANEL = "Quantize"


@dataclass(frozen=True)
class Measured:
    """Scores in percent by name (``top1``, or ``BoxAP.figures``), and on what they were measured.

    ``runtime``: name and version of the runtime of an exported file.
    """

    scores: dict[str, float]
    text: str
    images: int
    data: str
    device: str
    runtime: str | None = None

    def to_dict(self) -> dict[str, Any]:
        names = ("scores", "images", "data", "device", "runtime")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        line = f"{self.text} on {self.images} images of {self.data}"
        return line if self.runtime is None else f"{line}\nin {self.runtime}"


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
    form: Format = Form.TABLE,
) -> None:
    """Measure top-1 of a float model, a quantized model, or an exported file in its runtime.

    A detector is measured by COCO's box AP, on coco:FILE.json or voc:FOLDER. A mask detector is
    measured by mask AP, too. An exported file uses its own preprocessing.
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
        found = _evaluate_file(Path(model), images, batch, device, runtime, threads)
    else:
        device = checked_device(device)
        if kind == "qvit":
            quantized = load_quantized(model, float_model)
            found = evaluated(quantized, quantized.model, images, batch, device)
        else:
            built = build_model(model, weights, classes, size)
            found = evaluated(built, built, images, batch, device)
    plain = {"model": model, "kind": kind, **found.to_dict()}
    row = {key: value for key, value in plain.items() if key != "scores"} | found.scores
    answer(form, str(found), data=plain, rows=[row])


def _kind_of(path: Path) -> str:
    """Return what ``evaluate`` got: a ``qvit``, an ``exported`` file, or a ``model`` name."""
    from quietvit.deployment.targets import target_of
    from quietvit.quantization.storage import FORMAT

    if path.suffix == FORMAT.suffix or FORMAT.holds(path) or quantized_run(path) is not None:
        return "qvit"
    return "model" if target_of(path) is None else "exported"


def _evaluate_file(
    path: Path, images: str, batch: int, device: str, runtime: str | None, threads: int
) -> Measured:
    from quietvit.deployment import open_runtime
    from quietvit.deployment.evaluation import FileDetector, FileModel, file_transform
    from quietvit.detection.static_parts import MASKS

    if device not in ("cpu", "auto"):
        raise QuietvitError(
            f"exported files run only on the CPU; leave out --device {device}, or evaluate the "
            ".qvit on that device."
        )
    loaded = open_runtime(path, runtime, threads)
    if loaded.facts.detector is not None:
        masks, names = MASKS in loaded.facts.detector, loaded.facts.labels
        found = _measure_boxes(FileDetector(loaded), names, images, batch, "cpu", masks)
    else:
        found = _measure(FileModel(loaded), file_transform(loaded), images, batch, "cpu")
    return replace(found, runtime=loaded.name)


def evaluated(
    model: nn.Module, configured: nn.Module, images: str, batch: int, device: str
) -> Measured:
    """Move a model to a device and measure it on images, named as on the command line.

    ``configured`` is the float model, whose preprocessing and classes count.
    """
    from quietvit.data import evaluation_transform
    from quietvit.detection import is_detector, predicts_masks

    if is_detector(configured):
        masks = predicts_masks(configured)
        names = names_of(configured)
        return _measure_boxes(model.to(device), names, images, batch, device, masks)
    return _measure(model.to(device), evaluation_transform(configured), images, batch, device)


def _measure_boxes(
    model: nn.Module,
    names: Sequence[str] | None,
    images: str,
    batch: int,
    device: str,
    masks: bool = False,
) -> Measured:
    from quietvit.detection import detection_loader, evaluate_detector

    dataset = open_boxes(images, "test", names, masks)
    # 100 masks of 640 x 480 pixels take 123 MB for each image.
    loader = detection_loader(dataset, min(batch, 8) if masks else batch)
    found = evaluate_detector(model, loader, device, progress=True)
    return Measured(found.figures(), f"box {found}", len(dataset), dataset.name, device)


def _measure(
    model: nn.Module, transform: Callable[[Any], Tensor], images: str, batch: int, device: str
) -> Measured:
    from quietvit.data import evaluate as run
    from quietvit.data import evaluation_loader

    dataset = open_data(images, "test")
    loader = evaluation_loader(dataset, transform, batch)
    top1 = run(model, loader, device, progress=True)
    return Measured({"top1": top1}, f"top-1 {top1:.2f} %", len(dataset), dataset.name, device)
