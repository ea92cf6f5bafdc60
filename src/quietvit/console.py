"""What the commands share: options and arguments, and opening the model and data that they name.

The commands are in ``commands``; what is said of an error is in ``complaints``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from quietvit.complaints import complain
from quietvit.errors import QuietvitError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quietvit.data import ImageDataset


Recipe = Annotated[
    str,
    typer.Option(
        "--recipe", "-r", metavar="NAME|FILE", help="Recipe: a TOML file, or one shipped by name."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key of the recipe; repeat."),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for everything written.")]
OutputOrRecipe = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Folder for everything written.", show_default="the recipe's output"
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print batch, steps, memory and time, measured; write nothing."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where an earlier run stopped.")]
Force = Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")]
Discard = Annotated[
    bool,
    typer.Option(
        "--discard", help="With --force: delete an unfinished run and its checkpoints, unasked."
    ),
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Name of a timm model, hf:FOLDER, or the folder of a training run."
    ),
]
Architecture = Annotated[str, typer.Argument(metavar="MODEL", help="Name of a timm model.")]
Weights = Annotated[
    Path | None,
    typer.Option(help="Weights file: safetensors, or a plain state dict.", show_default="random"),
]
Classes = Annotated[
    int | None,
    typer.Option("--classes", min=1, help="Classes of the head.", show_default="as in the weights"),
]
Size = Annotated[
    int | None,
    typer.Option("--size", min=1, help="Side of the images in pixels.", show_default="the model's"),
]
_DATA = (
    "Parquet or arrow table, {}, shards:/path/*.tar, hf:/folder, or embedded:digits; its {} images "
    "if split."
)
_FREE = "folder of images, single image"
_NO_LABELS = " Labels are not needed."
Images = Annotated[
    str,
    typer.Option(
        "--images", metavar="DATA", help=_DATA.format("folder with one folder a class", "test")
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
        help=_DATA.format(_FREE, "training") + _NO_LABELS,
    ),
]
Count = Annotated[int, typer.Option("--count", help="Number of images used.")]
Seed = Annotated[int, typer.Option(help="Seed of the draw of images.")]
Bits = Annotated[str, typer.Option(help="Bits of weights and activations, each 2 to 16.")]
MethodCount = Annotated[
    int | None,
    typer.Option("--count", help="Number of images used.", show_default="what the method takes"),
]
MethodName = Annotated[
    str, typer.Option(help="Method, as 'quietvit methods' lists them: rtn-omse, repq-vit+qwt.")
]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="FIELD=VALUE", help="Set a field of the method; repeat."),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        "--keep",
        "-k",
        metavar="WHAT=BITS",
        help="Other bits for a role or sites: post_softmax=8, '*.fc1=W4A8', head=float; repeat.",
    ),
]
Device = Annotated[str, typer.Option(help="Where to compute, such as cpu or cuda.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 is the runtime's own choice.")]
FloatModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="hf:FOLDER or a training run it was made from, if timm and transformers have no name "
        "for it.",
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
    """Build a model in eval mode, or load that of a training run; says so if it is random.

    Raises QuietvitError for what neither is, and for weights named beside a training run.
    """
    from quietvit.data import create_model

    if Path(name).is_dir():
        from quietvit.train import TrainResult

        if (weights, classes, size) != (None, None, None):
            raise QuietvitError(
                f"{name} is the folder of a training run, which has its weights, classes and size; "
                "leave --weights, --classes and --size out."
            )
        return TrainResult.read(name).load_model()
    if weights is None and not name.startswith("hf:"):
        typer.echo("note: no --weights given, so the weights of the model are random.", err=True)
    sized: dict[str, Any] = {} if size is None else {"img_size": size}
    return create_model(name, classes, weights, **sized).eval()


def build_bare(name: str, size: int | None) -> nn.Module:
    """Build a timm model for looking at its structure alone."""
    from quietvit.data import create_model

    sized: dict[str, Any] = {} if size is None else {"img_size": size}
    return create_model(name, **sized).eval()


def example_of(model: nn.Module) -> Tensor:
    """Return one random image of the size the model takes."""
    import torch

    from quietvit.data import data_config

    return torch.randn(1, *data_config(model)["input_size"])


def open_data(text: str, split: Literal["train", "test"], *, labels: bool = True) -> ImageDataset:
    """Open the data a plain path stands for: ``split`` where it has splits, else all of it.

    ``labels``: as for ``load_dataset``.
    """
    from quietvit.data import load_dataset
    from quietvit.data.sources import has_splits, spec_of

    spec = spec_of(text)
    return load_dataset(spec, split if has_splits(spec) else None, labels=labels)


def draw_images(model: nn.Module, dataset: ImageDataset, count: int, seed: int) -> Tensor:
    """Return ``count`` images as the model takes them, drawn without replacement."""
    from quietvit.data import calibration_images, evaluation_transform

    return calibration_images(dataset, count, evaluation_transform(model), seed)


def moved_to(model: nn.Module, device: str) -> nn.Module:
    """Move a model. Raises QuietvitError where there is no such device."""
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise QuietvitError(
            f"the model cannot be computed on device {device!r}: {str(error).splitlines()[0]}; "
            "choose another, such as --device cpu."
        ) from error


def interactive() -> bool:
    """Whether somebody sits at a terminal in front of this process alone."""
    return "RANK" not in os.environ and sys.stdin.isatty() and sys.stderr.isatty()


def agreed(refusal: QuietvitError | None) -> bool:
    """Ask on a terminal whether to do what ``refusal`` refuses; False where nobody can be asked."""
    if refusal is None or not interactive():
        return False
    complain("warning", str(refusal))
    return typer.confirm("Delete all of this?", default=False, err=True)


def epilog(*examples: str) -> str:
    """Return examples as the text below a command's help."""
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"$ {example}" for example in examples)


def listed(text: str) -> tuple[str, ...]:
    """Split a comma-separated option."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
