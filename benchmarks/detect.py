"""Detection on blood cells (BCCD): does a decay leave a detector that survives quantization?

One row a measurement in results/detect.csv: arm, seed, setting, AP. A run is trained, evaluated as
float and quantized at every setting; what stands in the table already is not done again, and a
training that was cut off goes on from its last checkpoint.

    python benchmarks/detect.py --data /data/bccd --weights deit_tiny_patch16_224.safetensors \
        --arms adamw,cd --seeds 0,1,2
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
from quietvit.detection import BoxAP, detection_loader, evaluate_detector, predictors
from quietvit.quantization.settings import parse_method
from quietvit.train import TrainResult, load_recipe, train

COLUMNS = (
    "arm", "seed", "epochs", "setting", "policy", "ap", "ap50", "ap75", "small", "medium", "large",
    "coverage", "images", "calibration", "train_seconds", "quantize_seconds", "torch", "quietvit",
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


def write(path: Path, row: dict[str, Any]) -> None:
    """Append one row; the file is whole after each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(*(f"{key}={row[key]}" for key in ("arm", "seed", "setting", "ap")), flush=True)


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
    parser.add_argument("--results", type=Path, default=Path("results/detect.csv"))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
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
    wanted = [("float", "", ""), *chosen]
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
