"""Detection on blood cells (BCCD): does a decay leave a detector that survives quantization?

One row a measurement in results/detect.csv: arm, seed, split, setting, AP. A run is trained,
evaluated as float and quantized at every setting. A restart skips measured rows and continues a
training from its last checkpoint. Settings are chosen on the validation images with one seed
(``--split val``), then judged on the test images with several seeds.

    python benchmarks/detect.py --data /data/bccd --weights deit_tiny_patch16_224.safetensors \
        --arms 'adamw*,cd*' --seeds 0 --split val --methods rtn-omse --bits W4A4
    python benchmarks/detect.py --data /data/bccd --weights deit_tiny_patch16_224.safetensors \
        --arms 'adamw lr 1e-3,cd 1' --seeds 0,1,2

With ``--parts``, results/detect_parts.csv gets the AP by part: once with only this part quantized,
once with all other parts quantized. It also has rows for float and for everything quantized.

    python benchmarks/detect.py --data /data/bccd --weights deit_tiny_patch16_224.safetensors \
        --arms 'adamw lr 1e-3' --seeds 0 --parts --methods rtn-omse --bits W8A8,W4A4
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import csv_rows
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
    "arm", "seed", "epochs", "precision", "split", "setting", "policy",
    "ap", "ap50", "ap75", "small", "medium", "large", "coverage", "images",
    "calibration", "train_seconds", "quantize_seconds", "torch", "quietvit",
)  # fmt: skip
PART_COLUMNS = (
    "arm", "seed", "epochs", "precision", "split", "setting", "policy",
    "part", "quantized", "sites", "macs", "error", "ap", "ap50", "ap75", "small", "medium", "large",
    "images", "calibration", "seconds", "torch", "quietvit",
)  # fmt: skip
OFF = "decay.cd=none"
ARMS = {
    **{f"adamw lr {lr}": [OFF, f"optimizer.lr={lr}"] for lr in ("5e-4", "1e-3", "2e-3")},
    "adamw wd 0.5": [OFF, "optimizer.weight_decay=0.5"],
    **{f"cd {strength}": [f"decay.cd.strength={strength}"] for strength in ("0.3", "1", "3", "10")},
    # The first of S2D is as published; the others have a threshold that acts on such a model.
    "s2d 5e-4": [OFF, "decay.s2d.strength=5e-4"],
    **{
        f"s2d {strength} above 0.3": [
            *(OFF, f"decay.s2d.strength={strength}", "decay.s2d.threshold=0.3"),
        ]
        for strength in ("5e-3", "5e-2", "0.2")
    },
    **{
        f"tweo {strength}": [OFF, f"decay.tweo.strength={strength}"]
        for strength in ("0.003", "0.01", "0.03", "0.1")
    },
}
"""Four settings of each family, as in ``evidence.py``; they change the recipe's settings."""
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
    """Return (arm, seed, epochs, precision, split, setting, calibration) of every row."""
    return {_key(row) for row in csv_rows.read(path)}


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    names = ("arm", "seed", "epochs", "precision", "split", "setting", "calibration")
    return tuple(str(row[name]) for name in names)


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
    name = f"{arm.replace(' ', '-')}-seed{seed}-{arguments.epochs}-{arguments.precision}"
    output = arguments.runs / name
    overrides = [
        f"data.dataset=coco:{arguments.data}/train.json,{arguments.data}/test.json",
        f"model.weights={arguments.weights}",
        f"seed={seed}",
        f"epochs={arguments.epochs}",
        f"precision={arguments.precision}",
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
    parser.add_argument("--arms", default="adamw*,cd*", help="names or wildcards")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--precision", default="bf16", choices=("no", "bf16"))
    parser.add_argument("--split", default="test", choices=("val", "test"))
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
        for arm in _arms(arguments.arms):
            one_run(arguments, arm, seed, chosen)


def one_run(
    arguments: argparse.Namespace, arm: str, seed: int, chosen: list[tuple[str, str, str]]
) -> None:
    """Train, evaluate and quantize one run, but for what the table holds."""
    done = measured(arguments.results)
    base = {
        "arm": arm, "seed": seed, "epochs": arguments.epochs, "precision": arguments.precision,
        "split": arguments.split, "calibration": arguments.calibration,
        "torch": torch.__version__, "quietvit": quietvit.__version__,
    }  # fmt: skip
    wanted = [*([] if arguments.parts else [("float", "", "")]), *chosen]
    left = [one for one in wanted if _key({**base, "setting": one[0]}) not in done]
    if not left:
        return
    result = trained(arguments, arm, seed)
    data = f"coco:{arguments.data}/train.json,{arguments.data}/{arguments.split}.json"
    own = result.config.data.model_copy(update={"dataset": data})
    task = type(result.task)(result.config.model_copy(update={"data": own}))
    images, test = task.open_data()
    loader = detection_loader(test, 8)
    model = result.load_model()
    calibration = task.calibration(model, images, arguments.calibration, 0)
    trace = None if arguments.parts else quietvit.trace(model, calibration[:1])
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
        quantized = quietvit.quantize(model, config, calibration, trace=trace, progress=False)
        seconds = round(time.perf_counter() - started, 1)
        row = {
            **base,
            **_figures(evaluate_detector(quantized, loader)),
            "setting": setting,
            "policy": config.policy(),
            "coverage": round(quantized.coverage.fraction, 4),
            "quantize_seconds": seconds,
        }
        write(arguments.results, row)


def _figures(found: BoxAP) -> dict[str, float]:
    names = ("ap", "ap50", "ap75", "small", "medium", "large")
    return {name: round(getattr(found, name), 2) for name in names}


def _arms(patterns: str) -> list[str]:
    wanted = _listed(patterns)
    found = [arm for arm in ARMS if any(fnmatch.fnmatchcase(arm, each) for each in wanted)]
    if not found:
        raise SystemExit(f"--arms {patterns} matches none of: {', '.join(ARMS)}")
    return found


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


if __name__ == "__main__":
    main()
