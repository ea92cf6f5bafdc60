"""Options and arguments that the commands share, and how they open models and data.

The commands are in ``commands``. ``complaints`` prints errors.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from quietvit import completion
from quietvit.complaints import complain
from quietvit.errors import QuietvitError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quietvit.detection import DetectionDataset
    from quietvit.quantization import QuantizedModel
    from quietvit.train import TrainResult


Recipe = Annotated[
    str,
    typer.Option(
        "--recipe",
        "-r",
        metavar="NAME|FILE",
        help="A TOML file, or the name of a shipped recipe.",
        autocompletion=completion.recipes,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="KEY=VALUE", help="Override a key of the recipe. Repeatable."
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for all output.")]
OutputOrRecipe = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Folder for all output.", show_default="the recipe's output"
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Measure batch, steps, memory and time; write nothing."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an earlier run where it stopped.")]
Force = Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")]
Discard = Annotated[
    bool,
    typer.Option(
        "--discard",
        help="With --force: delete an unfinished run without asking, checkpoints included.",
    ),
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Name of a timm model, hf:FOLDER, or the folder of a training run."
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="File of weights: safetensors, or a plain state dict.", show_default="random"
    ),
]
Classes = Annotated[
    int | None,
    typer.Option(
        "--classes",
        min=0,
        help="Number of classes of the head; 0 removes it and leaves the encoder.",
        show_default="as in the weights",
    ),
]
Size = Annotated[
    int | None,
    typer.Option("--size", min=1, help="Side of the images in pixels.", show_default="the model's"),
]
_DATA = (
    "Parquet or arrow table, {}, shards:/path/*.tar, hf:/folder, or embedded:digits. Takes its {} "
    "images if it has splits."
)
_FREE = "folder of images, single image"
_NO_LABELS = " Needs no labels."
Images = Annotated[
    str,
    typer.Option(
        "--images", metavar="DATA", help=_DATA.format("folder with one folder per class", "test")
    ),
]
AnyImages = Annotated[
    str,
    typer.Option("--images", metavar="DATA", help=_DATA.format(_FREE, "test") + _NO_LABELS),
]
Calibration = Annotated[
    str,
    typer.Option(
        "--calibration",
        metavar="DATA",
        help=_DATA.format(_FREE, "training")
        + _NO_LABELS
        + " Without data: synthetic:COUNT or synthetic:COUNT:METHOD, such as synthetic:32:pink.",
    ),
]
Minutes = Annotated[
    float | None,
    typer.Option(
        "--minutes",
        help="With synthetic images: total time. At most half of it generates images. Quantizing "
        "then runs to its end.",
    ),
]
SaveImages = Annotated[
    Path | None,
    typer.Option(
        "--save-images",
        metavar="FOLDER",
        help="With synthetic images: write them as PNG files, and a contact sheet.",
    ),
]
Count = Annotated[int, typer.Option("--count", help="Number of images used.")]
Seed = Annotated[int, typer.Option(help="Seed that draws the images.")]
Bits = Annotated[str, typer.Option(help="Bits of weights and activations, each 2 to 16.")]
MethodCount = Annotated[
    int | None,
    typer.Option("--count", help="Number of images used.", show_default="what the method takes"),
]
MethodName = Annotated[
    str,
    typer.Option(
        help="Method, as 'quietvit methods' lists them: rtn-omse, repq-vit+qwt.",
        autocompletion=completion.methods,
    ),
]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="FIELD=VALUE", help="Set a field of the method. Repeatable."
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        "--keep",
        "-k",
        metavar="WHAT=BITS",
        help="Other bits for a role, sites or a detector's part: post_softmax=8, '*.fc1=W4A8', "
        "head=float, part:decoder=float, or a file from choose-bits. Repeatable.",
        autocompletion=completion.roles,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="Where to compute: cpu, cuda, cuda:1, mps, or auto (a GPU if any).",
        autocompletion=completion.devices,
    ),
]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 lets the runtime choose.")]
FloatModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="The original hf:FOLDER or training run, if timm and transformers do not know the "
        "model.",
    ),
]
Runtime = Annotated[
    str | None,
    typer.Option(
        help="onnxruntime, openvino, torchao, or that of a target of your own.",
        show_default="what the suffix says",
    ),
]


def build_model(
    name: str, weights: Path | None, classes: int | None, size: int | None
) -> nn.Module:
    """Build a model in eval mode, or load it from a training run. Report random weights.

    Raises QuietvitError for an unknown model, or if a run is given with weights, classes or size.
    """
    from quietvit.detection import hf_detector, is_detector_folder
    from quietvit.quantization.storage import FORMAT

    if FORMAT.holds(Path(name)):
        raise QuietvitError(
            f"{name} is a quantized model, and this command needs a float model. Give the model "
            "that it was made from. The commands evaluate, export and check take a .qvit."
        )
    if Path(name).is_dir():
        from quietvit.train import TrainResult
        from quietvit.train.result import QUANTIZED

        if (weights, classes or None, size) != (None, None, None):
            raise QuietvitError(
                f"{name} is the folder of a training run, which has its weights, classes and size; "
                "leave --weights, --classes and --size out. Only --classes 0 is allowed: it "
                "removes the head."
            )
        result = TrainResult.read(name)
        if result.config.qat is not None:
            raise QuietvitError(
                f"{name} is a run that trained a quantized model, and this command needs a float "
                "model. Give the run or the weights that it began with. Give this run or its "
                f"{QUANTIZED} to evaluate, export and check."
            )
        return result.load_model() if classes is None else _without_head(name, result)
    if name.startswith("hf:") and is_detector_folder(name[3:]):
        _refuse_no_head(name, classes)
        if weights is not None:
            raise QuietvitError(f"{name} is a detector with its own weights; leave --weights out.")
        sides = None if size is None else (size, size)
        return hf_detector(name[3:], classes, size=sides).eval()
    model = _created(name, classes, weights, size)
    if weights is None and not name.startswith("hf:"):
        typer.echo("note: the weights of the model are random. Give some with --weights.", err=True)
    return model


def _without_head(name: str, result: TrainResult) -> nn.Module:
    """Return the encoder of a run that trained a classifier."""
    from quietvit.data import create_model
    from quietvit.detection import is_detector

    if is_detector(result.task.rebuild(result, None)):
        _refuse_no_head(name, 0)
    chosen = result.config.model
    return create_model(
        chosen.name, 0, result.weights, preprocessing=chosen.preprocessing, **chosen.kwargs
    ).eval()


def _refuse_no_head(name: str, classes: int | None) -> None:
    if classes == 0:
        raise QuietvitError(
            f"{name} is a detector, and only a classifier has a head to remove; leave --classes 0 "
            "out."
        )


def quantized_run(path: str | Path) -> TrainResult | None:
    """Return the finished run in the folder ``path`` if it trained a quantized model, else None."""
    from quietvit.train import TrainResult
    from quietvit.train.result import QUANTIZED

    if not (Path(path) / QUANTIZED).is_dir():
        return None
    result = TrainResult.read(path)
    return result if result.config.qat is not None else None


def load_quantized(path: str | Path, original: str | None) -> QuantizedModel:
    """Load a saved .qvit, or the quantized model of a training run by its folder.

    ``original``: the float model or run with its architecture, if no library builds it.
    """
    from quietvit.quantization import load

    run = quantized_run(path)
    if original is None:
        return load(path) if run is None else run.load_model()  # type: ignore[return-value]
    of = quantized_run(original)
    model = build_model(original, None, None, None) if of is None else of.task.rebuild(of, None)
    return load(path if run is None else run.weights, model)


def build_bare(name: str, classes: int | None, size: int | None) -> nn.Module:
    """Build a model in eval mode to look at its structure, a timm model with random weights."""

    if Path(name).is_dir() or name.startswith("hf:"):
        return build_model(name, None, classes, size)
    return _created(name, classes, None, size)


def _created(name: str, classes: int | None, weights: Path | None, size: int | None) -> nn.Module:
    from quietvit.data import create_model
    from quietvit.data.weights import UnknownModelError

    sized: dict[str, Any] = {} if size is None else {"img_size": size}
    try:
        return create_model(name, classes, weights, **sized).eval()
    except UnknownModelError as error:
        raise QuietvitError(f"there is no folder {name}, and {error}") from error


def example_of(model: nn.Module) -> Tensor:
    """Return one random image (1, C, H, W) of the model's input size."""
    import torch

    from quietvit.data import data_config

    return torch.randn(1, *data_config(model)["input_size"])


def open_data(text: str, split: Literal["train", "test"], *, labels: bool = True) -> Any:
    """Open the data at a path or spec: ``split`` if it has splits, else all of it.

    ``labels``: see ``load_dataset``. Without them, images with boxes are accepted too.
    """
    from quietvit.data import load_dataset
    from quietvit.data.sources import has_splits, spec_of
    from quietvit.detection import is_detection_spec

    if text.partition(":")[0].lower() == "synthetic":
        raise QuietvitError(
            f"{text} cannot be opened here: images are generated only for --calibration, and for "
            "--images of advise, sensitivity and choose-bits. There write synthetic:32 or such as "
            "synthetic:32:pink, in lower case. For a folder of this name, give ./ before it."
        )
    if is_detection_spec(text):
        if labels:
            raise QuietvitError(
                f"{text} holds images with boxes, and a classifier needs one class for each image; "
                "give images with classes, or a detector."
            )
        return open_boxes(text, split)
    spec = spec_of(text)
    return load_dataset(spec, split if has_splits(spec) else None, labels=labels)


def open_any(text: str, split: Literal["train", "test"], missing: str) -> Any:
    """Open data with labels if it has any. If not, a note ends with ``missing``."""
    from quietvit.data.images import NoLabelsError

    try:
        return open_data(text, split)
    except NoLabelsError:
        dataset = open_data(text, split, labels=False)
        typer.echo(f"note: the images have no labels, so {missing}.", err=True)
        return dataset


def open_boxes(
    text: str,
    split: Literal["train", "test"],
    class_names: Sequence[str] | None = None,
    masks: bool = False,
) -> DetectionDataset:
    """Open images with boxes: ``split`` if there are splits. Their classes are found by name."""
    from quietvit.detection import load_detection_dataset
    from quietvit.detection.sources import has_splits

    return load_detection_dataset(
        text, split if has_splits(text) else None, class_names=class_names, masks=masks
    )


def draw_images(model: nn.Module, dataset: Any, count: int, seed: int) -> Tensor:
    """Draw ``count`` images without replacement, as the model takes them."""
    from quietvit.data import calibration_images, evaluation_transform
    from quietvit.detection import detection_calibration, is_detector

    if is_detector(model):
        canvas: Any = model.transform
        return detection_calibration(dataset, count, canvas.fit, seed)
    return calibration_images(dataset, count, evaluation_transform(model), seed)


def first_process() -> bool:
    """Whether this process prints: it is the only one, or the first of torchrun's."""
    return os.environ.get("RANK", "0") == "0"


def interactive() -> bool:
    """Whether a user at a terminal can answer a question, and no launcher started this process."""
    return "RANK" not in os.environ and sys.stdin.isatty() and sys.stderr.isatty()


def agreed(refusal: QuietvitError | None) -> bool:
    """Ask on a terminal whether to do what ``refusal`` forbids. False if nobody can answer."""
    if refusal is None or not interactive():
        return False
    complain("warning", str(refusal))
    return typer.confirm("Delete all of this?", default=False, err=True)


def epilog(*examples: str) -> str:
    """Format examples for the end of a command's help."""
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"$ {example}" for example in examples)


def listed(text: str) -> tuple[str, ...]:
    """Split a comma-separated option."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
