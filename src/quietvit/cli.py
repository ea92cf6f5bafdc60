"""The command line: each command parses, calls one public function, and prints.

Nothing is computed here, and nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import sys
import traceback as tracebacks
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from quietvit import __version__
from quietvit.errors import QuietvitError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn


class _Group(TyperGroup):
    """Turns what the user can mend into one paragraph and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except QuietvitError as error:
            if ctx.params.get("traceback"):
                tracebacks.print_exc()
            else:
                _complain("error", str(error))
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            _complain("interrupted", "what was finished is kept; --resume continues.")
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if type(error).__module__.partition(".")[0] in ("click", "typer"):
                raise
            tracebacks.print_exc()
            _complain(
                "unexpected error",
                f"{type(error).__name__}: {error}. This is a fault of quietvit; please report it "
                "with the traceback above.",
            )
            raise typer.Exit(1) from None


def _complain(kind: str, text: str) -> None:
    typer.secho(f"{kind}: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(" ".join(text.split()), err=True)


app = typer.Typer(
    cls=_Group,
    name="quietvit",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="[bold]Start here:[/bold]  quietvit compare --recipe digits --output runs/digits",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quietvit {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where in the code an error was raised.")
    ] = False,
) -> None:
    """Train vision transformers whose activations stay quiet, so that they survive low bits."""


_LOOK = "Look at a model"
_TRAIN = "Train and compare"
_QUANTIZE = "Quantize"

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
Resume = Annotated[bool, typer.Option("--resume", help="Go on where an earlier run stopped.")]
Force = Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Name of a timm model.")]
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
_DATA = "Parquet table, folder with one folder a class, or embedded:digits."
Images = Annotated[str, typer.Option("--images", metavar="DATA", help=_DATA)]
Calibration = Annotated[
    str, typer.Option("--calibration", metavar="DATA", help=f"Calibration images. {_DATA}")
]
Count = Annotated[int, typer.Option("--count", help="Number of images used.")]
Seed = Annotated[int, typer.Option(help="Seed of the draw of images.")]
Bits = Annotated[str, typer.Option(help="Bits of weights and activations, each 2 to 16.")]
MethodName = Annotated[str, typer.Option(help="Method and activation range.")]
Device = Annotated[str, typer.Option(help="Where to compute, such as cpu or cuda.")]


def _console() -> Console:
    from rich.console import Console

    return Console()


def _model(name: str, weights: Path | None, classes: int | None, size: int | None) -> nn.Module:
    from quietvit.data import create_model

    sized: dict[str, Any] = {} if size is None else {"img_size": size}
    return create_model(name, classes, weights, **sized).eval()


def _example(model: nn.Module) -> Tensor:
    import torch

    from quietvit.data import data_config

    return torch.randn(1, *data_config(model)["input_size"])


def _data(text: str) -> str:
    """Name the data set a plain path stands for."""
    if text.partition(":")[0] in ("embedded", "imagefolder", "table"):
        return text
    return f"table:{text}" if text.endswith(".parquet") else f"imagefolder:{text}"


def _draw(model: nn.Module, data: str, count: int, seed: int) -> Tensor:
    from quietvit.data import calibration_images, evaluation_transform, load_dataset

    return calibration_images(load_dataset(_data(data)), count, evaluation_transform(model), seed)


def _epilog(*examples: str) -> str:
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"$ {example}" for example in examples)


@app.command(
    rich_help_panel=_TRAIN,
    epilog=_epilog(
        "quietvit train --recipe digits --output runs/digits",
        "quietvit train -r my.toml -s epochs=3 -s decay.strength=0 --output runs/plain",
    ),
)
def train(
    recipe: Recipe,
    output: Output,
    overrides: Overrides = None,
    resume: Resume = False,
    force: Force = False,
) -> None:
    """Train or fine-tune one model by a recipe."""
    from quietvit.train import load_recipe
    from quietvit.train import train as run

    config = load_recipe(recipe, overrides or []).model_copy(update={"output": output})
    result = run(config, resume=resume, force=force)
    typer.echo(
        f"top-1 {result.top1:.2f} % after {result.steps} steps in {result.train_seconds:.0f} s, "
        f"of it {result.decay_seconds:.1f} s decay"
    )
    typer.echo(f"Written: {result.weights}")


@app.command(
    rich_help_panel=_TRAIN,
    epilog=_epilog(
        "quietvit compare --recipe digits --output runs/digits",
        "quietvit compare -r digits -o runs/more --seeds 0,1,2,3,4 --bits W8A8,W4A4",
        "quietvit compare -r digits -o runs/digits --resume",
    ),
)
def compare(
    recipe: Recipe,
    output: Output,
    seeds: Annotated[str, typer.Option(help="Seeds of training; one run of each arm a seed.")] = (
        "0,1,2"
    ),
    bits: Annotated[
        str, typer.Option(help="Bits of weights and activations, each 2 to 16.")
    ] = "W8A8,W6A6,W4A4",
    methods: Annotated[
        str, typer.Option(help="Methods with activation range.")
    ] = "rtn-minmax,rtn-percentile,rtn-omse",
    calibration: Annotated[
        int, typer.Option("--calibration", help="Calibration images, from the training data.")
    ] = 32,
    calibration_seed: Annotated[int, typer.Option(help="Seed of the draw of these.")] = 0,
    overrides: Overrides = None,
    resume: Resume = False,
    force: Force = False,
) -> None:
    """Train with and without Colinearity Decay, quantize both, report on one page."""
    from quietvit.compare import CompareConfig
    from quietvit.compare import compare as run
    from quietvit.train import load_recipe

    config = CompareConfig(
        recipe=load_recipe(recipe, overrides or []),
        seeds=_listed(seeds),
        bits=_listed(bits),
        methods=_listed(methods),
        calibration_images=calibration,
        calibration_seed=calibration_seed,
    )
    found = run(config, output, resume=resume, force=force)
    console = _console()
    console.print(found.table.rich(compact=console.width < 110))
    console.print(f"\n{found.verdict}", highlight=False)
    console.print(f"Time that CD adds to the training: {found.overhead} %", highlight=False)
    console.print(f"Page: {found.page}", highlight=False, soft_wrap=True)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


@app.command(
    rich_help_panel=_LOOK,
    epilog=_epilog(
        "quietvit diagnose deit_tiny_patch16_224 --weights w.safetensors --images val.parquet",
        "quietvit diagnose vit_base_patch16_224 --weights w.safetensors --images photos/ -o out",
    ),
)
def diagnose(
    model: Model,
    images: Images,
    weights: Weights = None,
    classes: Classes = None,
    size: Size = None,
    count: Count = 32,
    seed: Seed = 0,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for diagnosis.json and the plots."),
    ] = None,
    force: Force = False,
) -> None:
    """Show where outliers are and which weights make them."""
    from quietvit.files import refuse_nonempty
    from quietvit.measure import diagnose as run

    if output is not None:
        refuse_nonempty(output, force)
    built = _model(model, weights, classes, size)
    found = run(built, _draw(built, images, count, seed))
    _console().print(found)
    if output is not None:
        written = [found.to_json(output / "diagnosis.json"), *found.plot(output)]
        typer.echo("Written: " + ", ".join(map(str, written)))


@app.command(rich_help_panel=_LOOK, epilog=_epilog("quietvit pairs deit_tiny_patch16_224"))
def pairs(
    model: Model,
    kinds: Annotated[
        str | None,
        typer.Option(
            help="Kinds of pairs, comma-separated.", show_default="mlp,value_output,gated_mlp"
        ),
    ] = None,
    size: Size = None,
) -> None:
    """List the weight pairs that Colinearity Decay acts on."""
    from quietvit.pairs import DEFAULT_KINDS, find_pairs

    built = _model(model, None, None, size)
    chosen = DEFAULT_KINDS if kinds is None else _listed(kinds)
    typer.echo(str(find_pairs(built, _example(built), kinds=chosen)))


@app.command(rich_help_panel=_LOOK, epilog=_epilog("quietvit trace swin_tiny_patch4_window7_224"))
def trace(
    model: Model,
    size: Size = None,
    matmuls: Annotated[
        bool, typer.Option("--matmuls", help="Only the matrix multiplications.")
    ] = False,
) -> None:
    """List every matrix multiplication, norm, softmax and activation of a model."""
    from dataclasses import replace

    from quietvit.tracing import trace as run

    built = _model(model, None, None, size)
    found = run(built, _example(built))
    typer.echo(str(replace(found, sites=found.matmuls) if matmuls else found))


@app.command(
    rich_help_panel=_QUANTIZE,
    epilog=_epilog(
        "quietvit quantize deit_tiny_patch16_224 --weights w.safetensors "
        "--calibration calib.parquet --bits W4A8 --method rtn-omse -o tiny.qvit",
        "quietvit evaluate tiny.qvit --images val.parquet",
    ),
)
def quantize(
    model: Model,
    calibration: Calibration,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write (.qvit).")],
    weights: Weights = None,
    classes: Classes = None,
    size: Size = None,
    bits: Bits = "W8A8",
    method: MethodName = "rtn-minmax",
    count: Count = 32,
    seed: Seed = 0,
    images: Annotated[
        str | None,
        typer.Option("--images", metavar="DATA", help="Evaluate the result on these, too."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Quantize a model by a method, with a few calibration images."""
    from quietvit.quantization import quantize as run
    from quietvit.quantization.settings import parse_method

    chosen = parse_method(method, bits)
    built = _model(model, weights, classes, size)
    result = run(built, chosen, _draw(built, calibration, count, seed))
    typer.echo(str(result.coverage))
    typer.echo(f"Written: {result.save(output, force=force)}")
    if images is not None:
        _evaluate(result, built, images, 64, "cpu")


@app.command(
    rich_help_panel=_QUANTIZE,
    epilog=_epilog(
        "quietvit evaluate deit_tiny_patch16_224 --weights w.safetensors --images val.parquet",
        "quietvit evaluate tiny.qvit --images val.parquet",
    ),
)
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|FILE", help="Name of a timm model, or a .qvit file.")
    ],
    images: Images,
    weights: Weights = None,
    classes: Classes = None,
    size: Size = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    device: Device = "cpu",
) -> None:
    """Measure top-1 of a float model or a quantized file."""
    if model.endswith(".qvit"):
        from quietvit.quantization import load

        quantized = load(model)
        _evaluate(quantized, quantized.model, images, batch, device)
        return
    built = _model(model, weights, classes, size)
    _evaluate(built, built, images, batch, device)


def _evaluate(
    model: nn.Module, configured: nn.Module, images: str, batch: int, device: str
) -> None:
    from quietvit.data import evaluate as run
    from quietvit.data import evaluation_loader, evaluation_transform, load_dataset

    dataset = load_dataset(_data(images))
    loader = evaluation_loader(dataset, evaluation_transform(configured), batch)
    top1 = run(model.to(device), loader, device, progress=sys.stderr.isatty())
    typer.echo(f"top-1 {top1:.2f} % on {len(dataset)} images of {dataset.name}")


@app.command(rich_help_panel=_QUANTIZE, epilog=_epilog("quietvit methods 'rtn*'"))
def methods(
    pattern: Annotated[str, typer.Argument(help="Wildcard of names.")] = "*",
) -> None:
    """List the quantization methods: what each needs, costs and claims."""
    from rich.table import Table

    from quietvit.quantization import method_rows

    rows = method_rows(pattern)
    if not rows:
        raise QuietvitError(f"no method matches {pattern!r}; 'quietvit methods' lists them all.")
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    _console().print(table)


def main() -> None:
    """Entry point of the ``quietvit`` command."""
    app()


if __name__ == "__main__":
    main()
