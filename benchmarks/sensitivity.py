"""How well the fast estimate of ``quietvit.sensitivity`` ranks roles and sites, on three models.

Each part gives one CSV row with the exact and the estimated numbers. ``cost``: KL divergence (error
for a model without a classifier) if the part alone is quantized. ``gain``: how much smaller it gets
if the part alone is left in float. The models are DeiT-Tiny and EfficientNet-Lite0 with ImageNet
weights, and the backbone ViT-S/14 at 98 pixels. EfficientNet-Lite0 needs the weights that
hptq_efficientnet.py stores, ViT-S/14 needs vits14.safetensors (see evidence_data.py); both in
--cache. Needs QUIETVIT_TEST_DATA (or --data).

    python benchmarks/sensitivity.py run
    python benchmarks/sensitivity.py summary
"""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import nn

import quietvit
from csv_rows import read
from quietvit.advice import Sensitivity
from quietvit.advice.plots import PlottedSite, role_by_depth
from quietvit.data import calibration_images, create_model, evaluation_transform, load_dataset
from quietvit.files import write_atomic
from quietvit.measure.plots import save

OUT = Path("results/sensitivity.csv")
CALIBRATION, METHOD, BITS = 32, "rtn-omse", "W4A4"
MODELS = ("deit_tiny_patch16_224", "tf_efficientnet_lite0", "vit_small_patch14_dinov2")
FIELDS = (
    *("model", "setting", "images", "kind", "part", "role", "measure"),
    *("cost", "cost_estimate", "changed_alone", "changed_without", "gain", "gain_estimate"),
    *("seconds", "seconds_estimate"),
)

app = typer.Typer(add_completion=False, help=__doc__)
OutOption = Annotated[Path, typer.Option(help="The table.")]


def build(name: str, data: Path, cache: Path) -> nn.Module:
    if name == "deit_tiny_patch16_224":
        return create_model(name, weights=data / f"{name}.safetensors").eval()
    if name == "tf_efficientnet_lite0":
        return create_model(name, weights=cache / f"{name}.safetensors").eval()
    model = timm.create_model(name, img_size=98, num_classes=0, dynamic_img_size=False)
    state = load_file(cache / "vits14.safetensors")
    state["pos_embed"] = timm.layers.resample_abs_pos_embed(
        state["pos_embed"], (7, 7), num_prefix_tokens=1
    )
    model.load_state_dict(state, strict=False)
    return model.eval()


def rows(exact: Sensitivity, estimate: Sensitivity, seconds: tuple[float, float]) -> list[dict]:
    found = []
    for kind in ("role", "site"):
        pairs = zip(getattr(exact, f"{kind}s"), getattr(estimate, f"{kind}s"), strict=True)
        for part, guess in pairs:
            found.append(
                {
                    "model": exact.model,
                    "setting": exact.setting,
                    "images": exact.images,
                    "kind": kind,
                    "part": part.name,
                    "role": part.role,
                    "measure": exact.measure,
                    "cost": exact.cost(part),
                    "cost_estimate": estimate.cost(guess),
                    "changed_alone": part.alone.changed,
                    "changed_without": part.without.changed,
                    "gain": exact.gain(part),
                    "gain_estimate": estimate.gain(guess),
                    "seconds": round(seconds[0], 1),
                    "seconds_estimate": round(seconds[1], 1),
                }
            )
    return found


def write(out: Path, found: list[dict[str, Any]]) -> None:
    def shown(value: Any) -> str:
        return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)

    lines = [",".join(shown(row[field]) for field in FIELDS) for row in found]
    write_atomic(out, "\n".join([",".join(FIELDS), *lines]) + "\n")


@app.command()
def run(
    data: Annotated[Path, typer.Option(envvar="QUIETVIT_TEST_DATA", help="Folder with the data.")],
    cache: Annotated[Path, typer.Option(help="Folder with the other weights.")],
    out: OutOption = OUT,
    models: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(MODELS),
    count: Annotated[int, typer.Option(help="Number of images.")] = 16,
    plots: Annotated[Path | None, typer.Option(help="Folder for plots.")] = None,
) -> None:
    """Measure and estimate, and replace the rows of these models."""
    torch.manual_seed(0)
    for name in models.split(","):
        model = build(name, data, cache)
        transform = evaluation_transform(model)
        images, calibration = (
            calibration_images(load_dataset(f"table:{data / file}.parquet"), n, transform, 0)
            for file, n in (
                ("imagenet_dev_1000", count),
                ("imagenette_calibration_1024", CALIBRATION),
            )
        )
        found, seconds = [], []
        for estimate in (True, False):
            start = time.process_time()
            found.append(
                quietvit.sensitivity(
                    model,
                    METHOD,
                    images,
                    bits=BITS,
                    calibration=calibration,
                    estimate=estimate,
                )
            )
            seconds.append(time.process_time() - start)
            print(found[-1], flush=True)
            if plots is not None:
                for path in found[-1].plot(plots):
                    path.rename(path.with_stem(f"{name}-{'estimate' if estimate else 'exact'}"))
        new = rows(found[1], found[0], (seconds[1], seconds[0]))
        for row in new:
            row["model"] = name
        kept = [row for row in read(out) if row["model"] != name]
        write(out, kept + new)


@app.command()
def summary(out: OutOption = OUT) -> None:
    """Print Spearman's rank correlations of the estimate with the exact measure."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in read(out):
        groups[row["model"], row["kind"]].append(row)
    print("| model | parts | cost alone | gain | CPU s exact | CPU s estimate |")
    print("|---|---|---|---|---|---|")
    for (model, kind), parts in groups.items():
        ranks = [
            spearmanr(
                [float(part[what]) for part in parts],
                [float(part[f"{what}_estimate"]) for part in parts],
            ).statistic
            for what in ("cost", "gain")
        ]
        print(
            f"| {model} | {len(parts)} {kind}s | {ranks[0]:.2f} | {ranks[1]:.2f} | "
            f"{parts[0]['seconds']} | {parts[0]['seconds_estimate']} |"
        )


@app.command()
def plot(path: Path, model: str = MODELS[0], out: OutOption = OUT) -> None:
    """Draw role by depth of one model from the table."""
    parts = [row for row in read(out) if row["model"] == model]
    first = parts[0]
    sites = [
        PlottedSite(row["part"], row["role"], float(row["cost"]), float(row["gain"]))
        for row in parts
        if row["kind"] == "site"
    ]
    title = f"{model}, {first['setting']}: {first['measure']} on {first['images']} images"
    save(role_by_depth(sites, title), path)


if __name__ == "__main__":
    app()
