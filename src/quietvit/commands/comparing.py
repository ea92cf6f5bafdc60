"""The command ``compare-methods``. ``quietvit.compare`` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quietvit import completion
from quietvit.answers import Form, Format, answer
from quietvit.commands.images import Source
from quietvit.console import (
    AnyImages,
    Classes,
    Device,
    Model,
    Seed,
    Size,
    Weights,
    build_model,
    epilog,
    listed,
    open_any,
)
from quietvit.devices import checked_device
from quietvit.errors import QuietvitError
from quietvit.width import fitting

app = typer.Typer(rich_markup_mode="rich")
_PANEL = "Quantize"


@app.command(
    "compare-methods",
    rich_help_panel=_PANEL,
    epilog=epilog(
        "quietvit compare-methods deit_tiny_patch16_224 --weights w.safetensors "
        "--methods rtn-omse,repq-vit --bits W8A8,W4A4 --images val.parquet "
        "--calibration calib.parquet --output compared",
        "quietvit compare-methods runs/mine --methods rtn-omse,erq --bits W4A4 "
        "--images /my/images --calibration synthetic:32:pink -o compared",
    ),
)
def compare_methods(
    model: Model,
    images: AnyImages,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder for the page, methods.csv, comparison.json."),
    ],
    calibration: Annotated[
        str,
        typer.Option(
            "--calibration",
            metavar="DATA",
            help="Images for calibration, without labels. Without data: synthetic:COUNT or "
            "synthetic:COUNT:METHOD, such as synthetic:32:pink.",
        ),
    ],
    methods: Annotated[
        str, typer.Option(help="Methods, comma-separated.", autocompletion=completion.methods)
    ] = "rtn-omse,smoothquant,repq-vit",
    bits: Annotated[str, typer.Option(help="Bits, comma-separated.")] = "W8A8,W4A8,W4A4",
    weights: Weights = None,
    classes: Classes = None,
    size: Size = None,
    count: Annotated[
        int | None,
        typer.Option(
            "--count", min=1, help="Images to measure on.", show_default="all of --images"
        ),
    ] = None,
    calibration_count: Annotated[
        int, typer.Option("--calibration-count", min=1, help="Images for calibration.")
    ] = 32,
    seed: Seed = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Replace another comparison in the folder.")
    ] = False,
    device: Device = "cpu",
    form: Format = Form.TABLE,
) -> None:
    """Compare quantization methods on a model: accuracy, size, time, share in integers.

    With labels it measures top-1, and always how often the float model's class is kept. The same
    command again continues a comparison that was stopped, and measures only what is missing.
    """
    from quietvit.compare import compare_methods as run
    from quietvit.data import evaluation_loader, evaluation_transform
    from quietvit.data.images import subset
    from quietvit.detection import is_detector
    from quietvit.quantization.settings import setting_names
    from quietvit.report.methods import method_table, sentences

    device = checked_device(device)
    setting_names(listed(bits), listed(methods))
    source = Source(calibration, "train")
    built = build_model(model, weights, classes, size).to(device)
    if is_detector(built):
        raise QuietvitError(
            f"{model} is a detector, and compare-methods compares outputs of a fixed shape. Use "
            "'quietvit quantize ... --images coco:FILE.json' for each method."
        )
    dataset = subset(open_any(images, "test", "top-1 is not measured"), count)
    wanted = source.count(calibration_count)
    found = run(
        built,
        evaluation_loader(dataset, evaluation_transform(built), 32),
        lambda: source.draw(built, wanted, seed),
        output,
        methods=listed(methods),
        bits=listed(bits),
        labelled=dataset.labelled,
        described={
            "model": Path(model).name if Path(model).is_dir() else model,
            "images": f"{len(dataset)} images of {dataset.name}",
            "calibration": f"{wanted} images of {source.name}, seed {seed}",
        },
        force=force,
    )
    table = method_table(found.results)
    answer(
        form,
        fitting(table.rich(), table.rich(compact=True)),
        *found.results.provenance,
        *sentences(found.results),
        *(f"{name} failed: {why}" for name, why in found.results.failed.items()),
        f"Report: {found.page}",
        data=found.results.model_dump(mode="json"),
        rows=[row.model_dump(mode="json") for row in found.results.rows],
    )
