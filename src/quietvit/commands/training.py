"""The commands that train: ``train``, ``compare``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from quietvit import completion
from quietvit.console import (
    Discard,
    DryRun,
    Force,
    Output,
    OutputOrRecipe,
    Overrides,
    Recipe,
    Resume,
    agreed,
    epilog,
    first_process,
    listed,
)
from quietvit.width import fitting, show

app = typer.Typer(rich_markup_mode="rich")
_PANEL = "Train and compare"


@app.command(
    rich_help_panel=_PANEL,
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
        typer.Option(
            "--model", help="Replace the model of the recipe: a timm model, or hf:FOLDER."
        ),
    ] = None,
    overrides: Overrides = None,
    resume: Resume = False,
    force: Force = False,
    discard: Discard = False,
    dry_run: DryRun = False,
) -> None:
    """Train or fine-tune a model with a recipe."""
    from quietvit.train import estimate, load_recipe
    from quietvit.train import train as run
    from quietvit.train.earlier import earlier_run

    chosen = [] if model is None else [f"model.name={json.dumps(model)}"]
    config = load_recipe(recipe, [*chosen, *(overrides or [])])
    if dry_run:
        told = str(estimate(config))
        if first_process():
            typer.echo(told)
        return
    if output is not None:
        config = config.model_copy(update={"output": output})
    if force and not (resume or discard):
        discard = agreed(earlier_run(config.output.expanduser()).refusal(force=True, discard=False))
    result = run(config, resume=resume, force=force, discard=discard)
    if not first_process():
        return
    typer.echo(
        f"{result.metric.text(result.score)} after {result.steps} steps in "
        f"{result.train_seconds:.0f} s, of it {result.decay_seconds:.1f} s regularizers"
    )
    typer.echo(f"Written: {result.weights}")


@app.command(
    rich_help_panel=_PANEL,
    epilog=epilog(
        "quietvit compare --recipe digits --output runs/compared",
        "quietvit compare -r digits -o runs/more --seeds 0,1,2,3,4 --bits W8A8,W4A4",
        "quietvit compare -r digits -o runs/compared --resume",
    ),
)
def compare(
    recipe: Recipe,
    output: Output,
    seeds: Annotated[
        str, typer.Option(help="Seeds of training: one run with and one without CD for each.")
    ] = "0,1,2",
    bits: Annotated[
        str,
        typer.Option(
            help="Bits of weights and activations, each 2 to 16; W4A4+attention-maps-8 or "
            "W4A4+post_softmax=8 keeps some at others."
        ),
    ] = "W8A8,W6A6,W4A4+attention-maps-8,W4A4",
    methods: Annotated[
        str,
        typer.Option(
            help="Methods, each with its activation range.", autocompletion=completion.methods
        ),
    ] = "rtn-minmax,rtn-percentile,rtn-omse",
    calibration: Annotated[
        str,
        typer.Option(
            "--calibration",
            metavar="COUNT",
            help="Calibration images from the training data. Without data: synthetic:COUNT or "
            "synthetic:COUNT:METHOD, such as synthetic:32:pink.",
        ),
    ] = "32",
    calibration_seed: Annotated[
        int, typer.Option(help="Seed that draws the calibration images.")
    ] = 0,
    overrides: Overrides = None,
    resume: Resume = False,
    force: Force = False,
    discard: Discard = False,
) -> None:
    """Train with and without Colinearity Decay (CD), quantize both, write one report."""
    from quietvit.compare import CompareConfig
    from quietvit.compare import compare as run
    from quietvit.compare.config import calibration_of
    from quietvit.compare.earlier import refusal
    from quietvit.train import load_recipe

    config = CompareConfig(
        recipe=load_recipe(recipe, overrides or []),
        seeds=listed(seeds),
        bits=listed(bits),
        methods=listed(methods),
        **calibration_of(calibration),
        calibration_seed=calibration_seed,
    )
    if force and not (resume or discard):
        discard = agreed(refusal(output, force=True, discard=False))
    given: dict[str, Any] = {} if first_process() else {"say": lambda text: None}
    found = run(config, output, resume=resume, force=force, discard=discard, **given)
    if not first_process():
        return
    show(
        fitting(found.table.rich(), found.table.rich(compact=True)),
        f"\n{found.verdict}",
        f"Training time added by CD: {found.overhead} %",
        f"Report: {found.page}",
    )
