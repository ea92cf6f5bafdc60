"""Detection on blood cells (BCCD): does a decay leave a detector that survives quantization?

One row a measurement in results/detect.csv: arm, seed, setting, AP. A run is trained, evaluated as
float and quantized at every setting; what stands in the table already is not done again, and a
training that was cut off goes on from its last checkpoint.

    python benchmarks/detect.py --data /data/bccd --weights deit_tiny_patch16_224.safetensors \
        --arms adamw,cd --seeds 0,1,2

With --parts, the AP of each part instead: only it quantized, and everything but it. Two rows a part
in results/detect_parts.csv, and one for float and for everything quantized.

    python benchmarks/detect.py --data /data/bccd --weights deit_tiny_patch16_224.safetensors \
        --arms adamw --seeds 0 --parts --methods rtn-omse --bits W8A8,W4A4
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import quietvit
from quietvit.detection import (
    BoxAP,
    PartLosses,
    ap_by_part,
    detection_loader,
    evaluate_detector,
    predictors,
)
from quietvit.detection.by_part import Loss
from quietvit.quantization.settings import parse_method
from quietvit.train import TrainResult, load_recipe, train

COLUMNS = (
    "arm", "seed", "epochs", "setting", "policy", "ap", "ap50", "ap75", "small", "medium", "large",
    "coverage", "images", "calibration", "train_seconds", "quantize_seconds", "torch", "quietvit",
)  # fmt: skip
PART_COLUMNS = (
    "arm", "seed", "epochs", "setting", "policy", "part", "quantized", "sites", "macs", "error",
    "ap", "ap50", "ap75", "small", "medium", "large", "images", "calibration", "seconds", "torch",
    "quietvit",
)  # fmt: skip
ARMS = {
    "adamw": ["decay.cd=none"],
    "cd": [],
    "s2d": ["decay.cd=none", "decay.s2d.strength=5e-4"],
    "tweo": ["decay.cd=none", "decay.tweo.strength=0.01"],
}
METHODS = ("rtn-minmax", "rtn-omse", "repq-vit", "gptq")
BITS = ("W8A8", "W6A6", "W4A8", "W4A4")
ATTENTION = "post_softmax"
"""Attention maps stay at 8 bits, as most published W4A4 figures have them."""


def settings(methods: tuple[str, ...], bits: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    """Yield (name, method, bits); HPTQ at W8A8 alone, as published."""
    for each in bits:
        for method in methods:
            if method != "hptq" or each == "W8A8":
                yield f"{each} {method}", method, each


def measured(path: Path) -> set[tuple[str, ...]]:
    """Return (arm, seed, epochs, setting, calibration) of every row that is there."""
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {_key(row) for row in csv.DictReader(file)}


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[key]) for key in ("arm", "seed", "epochs", "setting", "calibration"))


def write(path: Path, *rows: dict[str, Any], columns: tuple[str, ...] = COLUMNS) -> None:
    """Append rows; the file is whole after each call."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        shown = ("arm", "seed", "setting", "part", "quantized", "ap")
        print(*(f"{key}={row[key]}" for key in shown if key in row), flush=True)


def rows_of_parts(base: dict[str, Any], found: PartLosses) -> Iterator[dict[str, Any]]:
    """Yield the rows of one setting. ``quantized``: nothing, all, only or without the part."""
    whole = {"part": "all", "sites": sum(part.sites for part in found.parts), "macs": found.macs}
    losses = [(whole, "nothing", Loss(0.0, found.float_ap)), (whole, "all", found.whole)]
    for part in found.parts:
        told = {"part": part.name, "sites": part.sites, "macs": part.macs}
        for what, loss in (("only", part.alone), ("without", part.without)):
            if loss is None:
                raise SystemExit(f"stopped before {part.name} was measured; nothing is written")
            losses.append((told, what, loss))
    for told, what, loss in losses:
        assert loss.ap is not None  # ap_by_part got a loader
        figures = {"error": round(loss.error, 5), **_figures(loss.ap)}
        yield {**base, **told, "quantized": what, **figures}


def trained(arguments: argparse.Namespace, arm: str, seed: int) -> TrainResult:
    """Train one arm, or go on with it, or read what is finished."""
    output = arguments.runs / f"{arm}-seed{seed}-{arguments.epochs}"
    overrides = [
        f"data.dataset=coco:{arguments.data}/train.json,{arguments.data}/test.json",
        f"model.weights={arguments.weights}",
        f"seed={seed}",
        f"epochs={arguments.epochs}",
        f"output={output}",
        *ARMS[arm],
        *arguments.overrides,
    ]
    config = load_recipe("detect_bccd_deit", overrides)
    return train(config, resume=output.exists(), progress=sys.stderr.isatty())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of BCCD as COCO JSON")
    parser.add_argument("--weights", type=Path, required=True, help="DeiT-Tiny of ImageNet")
    parser.add_argument("--arms", default="adamw,cd")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--bits", default=",".join(BITS))
    parser.add_argument("--calibration", type=int, default=32)
    parser.add_argument("--runs", type=Path, default=Path("runs/detect"))
    parser.add_argument("--parts", action="store_true", help="measure the AP of each part")
    parser.add_argument("--results", type=Path, help="default: results/detect.csv, or _parts.csv")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    name = "detect_parts.csv" if arguments.parts else "detect.csv"
    arguments.results = arguments.results or Path("results") / name
    chosen = list(settings(_listed(arguments.methods), _listed(arguments.bits)))
    for seed in map(int, _listed(arguments.seeds)):
        for arm in _listed(arguments.arms):
            one_run(arguments, arm, seed, chosen)


def one_run(
    arguments: argparse.Namespace, arm: str, seed: int, chosen: list[tuple[str, str, str]]
) -> None:
    """Train, evaluate and quantize one run, but for what the table holds."""
    done = measured(arguments.results)
    base = {
        "arm": arm, "seed": seed, "epochs": arguments.epochs, "calibration": arguments.calibration,
        "torch": torch.__version__, "quietvit": quietvit.__version__,
    }  # fmt: skip
    wanted = [*([] if arguments.parts else [("float", "", "")]), *chosen]
    left = [one for one in wanted if _key({**base, "setting": one[0]}) not in done]
    if not left:
        return
    result = trained(arguments, arm, seed)
    task = result.task
    images, test = task.open_data()
    loader = detection_loader(test, 8)
    model = result.load_model()
    calibration = task.calibration(model, images, arguments.calibration, 0)
    trace = quietvit.trace(model, calibration[:1])
    kept = [f"{what}=8" for what in (ATTENTION, *predictors(model))]
    base |= {"train_seconds": round(result.train_seconds, 1), "images": len(test)}
    for setting, method, bits in left:
        started = time.perf_counter()
        if setting == "float":
            found = evaluate_detector(model, loader)
            write(arguments.results, {**base, **_figures(found), "setting": setting})
            continue
        config = parse_method(method, bits, keep=kept)
        if arguments.parts:
            parts = ap_by_part(model, config, calibration, loader, progress=False)
            seconds = round(time.perf_counter() - started, 1)
            told = {"setting": setting, "policy": config.policy(), "seconds": seconds}
            own_base = {key: value for key, value in base.items() if key in PART_COLUMNS}
            rows = rows_of_parts(own_base | told, parts)
            write(arguments.results, *rows, columns=PART_COLUMNS)
            continue
        own = quietvit.quantize(model, config, calibration, trace=trace, progress=False)
        seconds = round(time.perf_counter() - started, 1)
        row = {
            **base,
            **_figures(evaluate_detector(own, loader)),
            "setting": setting,
            "policy": config.policy(),
            "coverage": round(own.coverage.fraction, 4),
            "quantize_seconds": seconds,
        }
        write(arguments.results, row)


def _figures(found: BoxAP) -> dict[str, float]:
    names = ("ap", "ap50", "ap75", "small", "medium", "large")
    return {name: round(getattr(found, name), 2) for name in names}


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


if __name__ == "__main__":
    main()
