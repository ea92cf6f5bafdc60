"""Pictures and figures of docs/tutorials. Each command makes those of one page.

    python benchmarks/tutorials.py methods              # picture from results/ptq_deit_tiny.csv
    python benchmarks/tutorials.py diagnosis            # DeiT-Tiny, 32 images
    python benchmarks/tutorials.py loops                # trains on the digits, in seconds
    python benchmarks/tutorials.py photos               # 900 photos of CIFAR-10, ten epochs
    python benchmarks/tutorials.py detector             # BCCD, three epochs

A picture goes beside the page. Figures go to results/tutorials.csv (see ``tutorials_figures``).
``photos`` and ``detector`` run the page's own commands in ``--work``, and keep a finished training
there. Commands that need real weights or images read QUIETVIT_TEST_DATA (or --data).
"""

from __future__ import annotations

import csv
import io
import resource
import statistics
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Annotated

import pyarrow.parquet as pq
import timm
import torch
import torch.nn.functional as F
import typer
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import draw_bounding_boxes

import quietvit
from quietvit.data import calibration_images, create_model, evaluation_transform, load_dataset
from quietvit.detection import detection_loader, evaluate_detector, predictors
from quietvit.detection.loading import evaluation_sample
from quietvit.files import write_atomic
from quietvit.measure.plots import COLOURS, MARKERS, outliers_by_depth
from quietvit.tasks.registry import task_named
from quietvit.train import TrainResult, load_recipe
from tutorials_figures import answer, command, record

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "tutorials"
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PHOTOS = ("airplane", "bird", "dog", "ship")

app = typer.Typer(add_completion=False, help=__doc__)
Data = Annotated[Path, typer.Option(envvar="QUIETVIT_TEST_DATA", help="Weights and images.")]
Work = Annotated[Path | None, typer.Option(help="Folder of the runs. Default: a temporary one.")]


def stored(picture: Figure | Image.Image, name: str) -> None:
    """Write a PNG of few colours, which is small, and print its name and size."""
    if isinstance(picture, Figure):
        whole = io.BytesIO()
        picture.savefig(whole, format="png", dpi=100)
        picture = Image.open(whole)
    small = io.BytesIO()
    picture.convert("RGB").quantize(96, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    path = write_atomic(PAGES / f"{name}.png", small.getvalue())
    print(path, f"{len(small.getvalue()) / 1000:.0f} kB")


@app.command()
def methods() -> None:
    """Top-1 of each method at each bits, from results/ptq_deit_tiny.csv."""
    top1: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with (ROOT / "results/ptq_deit_tiny.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            top1[row["setting"]][row["bits"]].append(float(row["top1"]))
    chosen = [s for s, by_bits in top1.items() if {"W8A8", "W6A6", "W4A4"} <= by_bits.keys()]
    chosen.sort(key=lambda s: statistics.median(top1[s]["W4A4"]))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for bits, colour, marker in zip(("W8A8", "W6A6", "W4A4"), COLOURS, MARKERS, strict=False):
        medians = [statistics.median(top1[s][bits]) for s in chosen]
        axes.plot(medians, range(len(chosen)), marker, color=colour, label=bits)
    axes.axvline(top1["float"]["float"][0], color="#333333", linewidth=1, label="float")
    axes.set_yticks(range(len(chosen)), chosen)
    axes.set_xlabel("top-1 on 1000 images, %")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    stored(figure, "methods")


@app.command()
def diagnosis(data: Data) -> None:
    """Activations of DeiT-Tiny by depth, and the cause of the largest one."""
    weights = data / "deit_tiny_patch16_224.safetensors"
    model = create_model("deit_tiny_patch16_224", 1000, weights).eval()
    photos = load_dataset(f"table:{data / 'imagenet_dev_1000.parquet'}")
    images = calibration_images(photos, 32, evaluation_transform(model))
    found = quietvit.diagnose(model, images)
    print(found)
    stored(outliers_by_depth(found.sites, found.images), "diagnosis")
    heaviest = found.worst_sites[:10]
    behind_gelu = [site for site in heaviest if site.role == "post_gelu"]
    residual = max((site for site in found.sites if site.role == "add"), key=lambda site: site.max)
    pair, causes = found.worst_pairs[0], found.root_causes[:10]
    channel = pair.worst_channels[0].channel
    into = [cause for cause in causes if cause.channel == channel]
    figures: dict[str, float | str] = {
        "heaviest sites": len(heaviest),
        "heaviest sites behind GELU": len(behind_gelu),
        "max/rms behind GELU": max(site.max_over_rms for site in behind_gelu),
        "largest residual": residual.max,
        "channel of the largest residual": residual.worst_channel,
        "worst pair": pair.name,
        "channel of the worst pair": channel,
        "alignment of the worst pair": pair.alignment,
        "causes": len(causes),
        "causes in this channel": len(into),
        "largest share in this channel, %": 100 * max(cause.share for cause in into),
    }
    record("diagnosis", figures, "DeiT-Tiny, first 32 images of imagenet_dev_1000, float32")


@app.command()
def loops() -> None:
    """Penalty and accuracy of the loop of examples/plain_loop.py, with and without the decay."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, 16, mode="nearest").expand(-1, 3, -1, -1)
    labels = torch.tensor(digits.target)
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    figures: dict[str, float | str] = {}
    for strength, colour, marker in zip((0.0, 1.0), COLOURS, MARKERS, strict=False):
        penalties, scores = learned(images, labels, strength)
        arm = "with" if strength else "without"
        figures[f"top-1 {arm}, %"] = scores[-1]
        figures |= {f"penalty {arm}, {at}": penalties[-(at == "end")] for at in ("start", "end")}
        label = "with Colinearity Decay" if strength else "without"
        left.plot(penalties, color=colour, marker=marker, markersize=4, label=label)
        right.plot(scores, color=colour, marker=marker, markersize=4)
    left.set_yscale("log")
    left.legend(frameon=False)
    for axes, title in ((left, "penalty"), (right, "top-1 on 597 digits, %")):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    stored(figure, "loops")
    record("training-loops", figures, "1200 digits, 8 epochs, 597 test digits, seed 0")


def learned(images: Tensor, labels: Tensor, strength: float) -> tuple[list[float], list[float]]:
    """Train as examples/plain_loop.py does; return penalty and top-1 after each epoch."""
    torch.manual_seed(0)
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **small)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    decay = quietvit.ColinearityDecay(model, images[:1], strength=strength).attach(optimizer)
    penalties, scores = [], []
    for epoch in range(9):
        if epoch:
            for batch in torch.randperm(1200).split(32):
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
                optimizer.zero_grad()
        with torch.no_grad():
            correct = model.eval()(images[1200:]).argmax(1) == labels[1200:]
        model.train()
        penalties.append(decay.penalty())
        scores.append(100 * float(correct.float().mean()))
    return penalties, scores


def folder(output: Path, data: Path) -> None:
    """Write 200 training and 25 test photos of four classes of CIFAR-10 as a folder of PNGs."""
    for split, source, count in (("train", "train", 200), ("val", "test", 25)):
        table = pq.read_table(data / f"cifar10_{source}.parquet")
        seen: Counter[str] = Counter()
        for image, label in zip(table["image"], table["label"], strict=True):
            name = CIFAR[label.as_py()]
            if name not in PHOTOS or seen[name] == count:
                continue
            path = output / split / name / f"{seen[name]:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            held = image.as_py()
            Image.open(io.BytesIO(held["bytes"] if isinstance(held, dict) else held)).save(path)
            seen[name] += 1


@app.command()
def photos(data: Data, work: Work = None) -> None:
    """Run the commands of photos.md, and draw three test photos of each class with the answers."""
    work = work or Path(tempfile.mkdtemp())
    images, run = work / "photos", work / "mine"
    if not images.exists():
        folder(images, data)
    source = f"imagefolder:{images}"
    weights = data / "deit_tiny_patch16_224.safetensors"
    if not (run / "result.json").exists():
        settings = (f"data.dataset={source}", f"model.weights={weights}", "threads=1")
        settings += ("model.kwargs.img_size=96", "decay.cd=none", "precision=no")
        options = [part for setting in settings for part in ("-s", setting)]
        command("train", "--recipe", "finetune_imagefolder", "--output", str(run), *options)
    file, exported = work / "mine.qvit", work / "mine.onnx"
    evaluated = answer("evaluate", str(run), "--images", str(images))
    quantized = answer(
        *("quantize", str(run), "--calibration", str(images), "--images", str(images)),
        *("--bits", "W8A8", "--output", str(file), "--force"),
    )
    command("export", str(file), "--to", "onnx", "--output", str(exported), "--force")
    checked = answer("check", str(exported), "--against", str(file), "--images", str(images))
    products = checked["products"]
    figures: dict[str, float | str] = {
        "training photos": len(list((images / "train").glob("*/*"))),
        "test photos": evaluated["images"],
        "top-1 of train, %": evaluated["scores"]["top1"],
        "top-1 of quantize, %": quantized["evaluation"]["scores"]["top1"],
        "on quantized operands, %": 100 * quantized["coverage"]["fraction"],
        "products": len(products),
        "products in integers": sum(each["integer"] for each in products),
        "codes that differ": sum(each["wrong"] for each in checked["agreements"]),
        "top-1 of check, %": checked["classes"]["top1"],
        "times smaller": checked["float_bytes"] / checked["bytes"],
    }
    setting = "four classes of CIFAR-10 at 96 pixels, 10 epochs without CD, seed 0"
    record("photos", figures, f"{setting}, one thread, float32 training")
    figure = Figure(figsize=(7, 2.7), layout="constrained")
    panels = iter(figure.subplots(2, 6).flat)
    for name in PHOTOS:
        for path in sorted((images / "val" / name).iterdir())[:3]:
            (found,) = quietvit.predict(exported, path, top=1)
            panel = next(panels)
            panel.imshow(Image.open(path))
            panel.set_axis_off()
            colour = COLOURS[0] if found.label == name else COLOURS[1]
            panel.set_title(
                f"{found.label} {100 * found.probability:.0f} %", fontsize=9, color=colour
            )
    stored(figure, "photos")


@app.command()
def detector(data: Data, work: Work = None) -> None:
    """Train three epochs on BCCD; draw boxes of a test image as annotated, in float, at W4A4."""
    run, bccd = (work or Path(tempfile.mkdtemp())) / "cells", data / "bccd"
    weights = data / "deit_tiny_patch16_224.safetensors"
    dataset = f"data.dataset=coco:{bccd / 'train.json'},{bccd / 'test.json'}"
    figures: dict[str, float | str] = {}
    if not (run / "result.json").exists():
        before = cpu_seconds()
        settings = (dataset, f"model.weights={weights}", "epochs=3", "threads=1", "precision=no")
        options = [part for setting in settings for part in ("-s", setting)]
        command("train", "--recipe", "detect_bccd_deit", "--output", str(run), *options)
        (run / "cpu_seconds").write_text(f"{cpu_seconds() - before:.1f}")
    figures["CPU seconds of train"] = float((run / "cpu_seconds").read_text())
    test_images, file, exported = f"coco:{bccd / 'test.json'}", run / "w8a8.qvit", run / "w8a8.onnx"
    trained = answer("evaluate", str(run), "--images", test_images)
    command(
        *("quantize", str(run), "--calibration", f"coco:{bccd / 'train.json'}", "--bits", "W8A8"),
        *("--output", str(file), "--force"),
    )
    command("export", str(file), "--model", str(run), "--output", str(exported), "--force")
    shipped = answer("evaluate", str(exported), "--images", test_images)
    figures |= {"epochs": 3, "test images": trained["images"]}
    figures |= {"AP, float": trained["scores"]["ap"], "AP, file of W8A8": shipped["scores"]["ap"]}
    task = task_named("detection")(load_recipe("detect_bccd_deit", [dataset]))
    train, test = task.open_data()
    model = TrainResult.read(run).load_model()
    kept = {"post_softmax": 8, **dict.fromkeys(predictors(model), 8)}
    method = quietvit.RepQViT(weight_bits=4, activation_bits=4, overrides=kept)
    quantized = quietvit.quantize(model, method, task.calibration(model, train, 16, 0))
    figures["AP, W4A4"] = evaluate_detector(quantized, detection_loader(test, 8)).ap
    image, target = test[0]
    pixels, _ = evaluation_sample(image, target)
    figure = Figure(figsize=(7, 2.2), layout="constrained")
    panels = iter(figure.subplots(1, 3))
    annotated = {**target, "scores": torch.ones(len(target["boxes"]))}
    with torch.no_grad():
        seen = {"annotated": annotated, "float": model([pixels])[0], "W4A4": quantized([pixels])[0]}
    for title, found in seen.items():
        sure = found["scores"] > 0.5
        figures[f"boxes, {title}"] = int(sure.sum())
        panel = next(panels)
        picture = draw_bounding_boxes(
            pil_to_tensor(image),
            found["boxes"][sure],
            colors=[COLOURS[int(label) - 1] for label in found["labels"][sure]],
            width=3,
        )
        panel.imshow(picture.permute(1, 2, 0).numpy())
        panel.set_axis_off()
        panel.set_title(f"{title}: {int(sure.sum())} boxes", fontsize=10)
    overlap = box_iou(seen["W4A4"]["boxes"], seen["float"]["boxes"])
    sure = [seen[name]["scores"] > 0.5 for name in ("W4A4", "float")]
    same = overlap[sure[0]][:, sure[1]].amax(1) >= 0.5
    figures["boxes at W4A4 over a box in float"] = int(same.sum())
    record("detector", figures, "BCCD, 256 x 320, seed 0, one thread, float32 training")
    stored(figure, "detector")


def cpu_seconds() -> float:
    """CPU seconds of the finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    app()
