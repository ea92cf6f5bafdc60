"""The command line: each command parses, calls one public function, and prints.

Nothing is computed here, and nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quietvit import __version__
from quietvit.commands import add_to
from quietvit.console import (
    Architecture,
    Bits,
    Calibration,
    Classes,
    Count,
    Device,
    DryRun,
    ErrorsAsParagraphs,
    Force,
    Images,
    MethodCount,
    MethodName,
    MethodOptions,
    Model,
    Output,
    OutputOrRecipe,
    Overrides,
    Recipe,
    Resume,
    Seed,
    Size,
    Weights,
    build_bare,
    build_model,
    draw_images,
    epilog,
    example_of,
    listed,
    moved_to,
    open_data,
)
from quietvit.errors import QuietvitError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from quietvit.data.sources import ImageDataset
    from quietvit.quantization import Method


app = typer.Typer(
    cls=ErrorsAsParagraphs,
    name="quietvit",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="[bold]Start here:[/bold]  quietvit compare --recipe digits --output runs/compared",
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


def _console(least: int = 0) -> Console:
    from rich.console import Console

    console = Console()
    return console if console.width >= least else Console(width=least)


@app.command(
    rich_help_panel=_TRAIN,
    epilog=epilog(
        "quietvit train --recipe digits --output runs/digits",
        "quietvit train -r my.toml -s epochs=3 -s decay.cd=none --output runs/plain",
        "quietvit train --recipe digits --dry-run",
    ),
)
def train(
    recipe: Recipe,
    output: OutputOrRecipe = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="In place of the recipe's: a timm model, or hf:FOLDER."),
    ] = None,
    overrides: Overrides = None,
    resume: Resume = False,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Train or fine-tune one model by a recipe."""
    from quietvit.train import estimate, load_recipe
    from quietvit.train import train as run

    chosen = [] if model is None else [f"model.name={json.dumps(model)}"]
    config = load_recipe(recipe, [*chosen, *(overrides or [])])
    first = os.environ.get("RANK", "0") == "0"
    if dry_run:
        told = str(estimate(config))
        if first:
            typer.echo(told)
        return
    if output is not None:
        config = config.model_copy(update={"output": output})
    result = run(config, resume=resume, force=force)
    if not first:
        return
    typer.echo(
        f"top-1 {result.top1:.2f} % after {result.steps} steps in {result.train_seconds:.0f} s, "
        f"of it {result.decay_seconds:.1f} s regularizers"
    )
    typer.echo(f"Written: {result.weights}")


@app.command(
    rich_help_panel=_TRAIN,
    epilog=epilog(
        "quietvit compare --recipe digits --output runs/compared",
        "quietvit compare -r digits -o runs/more --seeds 0,1,2,3,4 --bits W8A8,W4A4",
        "quietvit compare -r digits -o runs/compared --resume",
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
        seeds=listed(seeds),
        bits=listed(bits),
        methods=listed(methods),
        calibration_images=calibration,
        calibration_seed=calibration_seed,
    )
    found = run(config, output, resume=resume, force=force)
    console = _console()
    console.print(found.table.rich(compact=console.width < 110))
    console.print(f"\n{found.verdict}", highlight=False)
    console.print(f"Time that CD adds to the training: {found.overhead} %", highlight=False)
    console.print(f"Page: {found.page}", highlight=False, soft_wrap=True)


@app.command(
    rich_help_panel=_LOOK,
    epilog=epilog(
        "quietvit diagnose deit_tiny_patch16_224 --weights w.safetensors --images val.parquet",
        "quietvit diagnose runs/digits --images embedded:digits --output runs/digits-diagnosis",
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
    sites_only: Annotated[
        bool, typer.Option("--sites-only", help="Leave the weights out, for models without pairs.")
    ] = False,
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
    built = build_model(model, weights, classes, size)
    drawn = draw_images(built, open_data(images, "test"), count, seed)
    found = run(built, drawn, pairs=() if sites_only else None)
    _console(least=120).print(found)
    if output is not None:
        written = [found.to_json(output / "diagnosis.json"), *found.plot(output)]
        typer.echo("Written: " + ", ".join(map(str, written)))


@app.command(rich_help_panel=_LOOK, epilog=epilog("quietvit pairs deit_tiny_patch16_224"))
def pairs(
    model: Architecture,
    kinds: Annotated[
        str | None,
        typer.Option(
            help="Kinds of pairs, comma-separated.",
            show_default="mlp,value_output,gated_mlp,norm_linear",
        ),
    ] = None,
    size: Size = None,
) -> None:
    """List the weight pairs that Colinearity Decay acts on."""
    from quietvit.pairs import DEFAULT_KINDS, find_pairs

    built = build_bare(model, size)
    chosen = DEFAULT_KINDS if kinds is None else listed(kinds)
    typer.echo(str(find_pairs(built, example_of(built), kinds=chosen)))


@app.command(rich_help_panel=_LOOK, epilog=epilog("quietvit trace swin_tiny_patch4_window7_224"))
def trace(
    model: Architecture,
    size: Size = None,
    matmuls: Annotated[
        bool, typer.Option("--matmuls", help="Only the matrix multiplications.")
    ] = False,
) -> None:
    """List every matrix multiplication, norm, softmax and activation of a model."""
    from dataclasses import replace

    from quietvit.tracing import trace as run

    built = build_bare(model, size)
    found = run(built, example_of(built))
    typer.echo(str(replace(found, sites=found.matmuls) if matmuls else found))


@app.command(
    rich_help_panel=_QUANTIZE,
    epilog=epilog(
        "quietvit quantize deit_tiny_patch16_224 --weights w.safetensors "
        "--calibration calib.parquet --bits W4A8 --method rtn-omse -o tiny.qvit",
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
    count: MethodCount = None,
    seed: Seed = 0,
    images: Annotated[
        str | None,
        typer.Option("--images", metavar="DATA", help="Evaluate the result on these, too."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace it.")] = False,
) -> None:
    """Quantize a model by a method, with a few calibration images."""
    from quietvit.quantization import quantize as run
    from quietvit.quantization.settings import parse_method

    chosen = parse_method(method, bits, options or ())
    built = build_model(model, weights, classes, size)
    dataset = open_data(calibration, "train")
    drawn = draw_images(built, dataset, _count_of(chosen, dataset, count), seed)
    result = run(built, chosen, drawn)
    typer.echo(str(result.coverage))
    typer.echo(f"Written: {result.save(output, force=force)}")
    if images is not None:
        _evaluate(result, built, images, 64, "cpu")


@app.command(
    rich_help_panel=_QUANTIZE,
    epilog=epilog(
        "quietvit evaluate deit_tiny_patch16_224 --weights w.safetensors --images val.parquet",
        "quietvit evaluate runs/digits --images embedded:digits",
        "quietvit evaluate tiny.qvit --images val.parquet",
    ),
)
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|FILE",
            help="Name of a timm model, folder of a training run, or a saved .qvit.",
        ),
    ],
    images: Images,
    weights: Weights = None,
    classes: Classes = None,
    size: Size = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    device: Device = "cpu",
) -> None:
    """Measure top-1 of a float model or a quantized file."""
    if model.endswith(".qvit") or (Path(model) / "quantization.json").is_file():
        from quietvit.quantization import load

        quantized = load(model)
        _evaluate(quantized, quantized.model, images, batch, device)
        return
    built = build_model(model, weights, classes, size)
    _evaluate(built, built, images, batch, device)


def _count_of(method: Method, dataset: ImageDataset, count: int | None) -> int:
    """As many images as asked for; else as the method takes, or all where there are fewer."""
    if count is None and len(dataset) < method.images:
        typer.echo(
            f"note: {method.name} takes {method.images} images, {dataset.name} has {len(dataset)}.",
            err=True,
        )
    return count if count is not None else min(method.images, len(dataset))


def _evaluate(
    model: nn.Module, configured: nn.Module, images: str, batch: int, device: str
) -> None:
    from quietvit.data import evaluate as run
    from quietvit.data import evaluation_loader, evaluation_transform

    dataset = open_data(images, "test")
    loader = evaluation_loader(dataset, evaluation_transform(configured), batch)
    top1 = run(moved_to(model, device), loader, device, progress=sys.stderr.isatty())
    typer.echo(f"top-1 {top1:.2f} % on {len(dataset)} images of {dataset.name}")


@app.command(rich_help_panel=_QUANTIZE, epilog=epilog("quietvit methods 'rtn*'"))
def methods(
    pattern: Annotated[str, typer.Argument(help="Wildcard of names.")] = "*",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """List the quantization methods: what each needs, costs and claims."""
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
    console = _console()
    console.print(table)
    for row in rows:
        text = f"{row['method']}: {row['source']}. Published with: {row['published']}."
        console.print(text, highlight=False, markup=False)


add_to(app)


def main() -> None:
    """Entry point of the ``quietvit`` command."""
    app()


if __name__ == "__main__":
    main()
