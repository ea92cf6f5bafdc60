"""What quantization-aware training (QAT) gains over PTQ, with and without CD: DeiT-Tiny, CIFAR-10.

The workload is ``deit`` of ``evidence_data``. Two float models are trained for each seed: AdamW and
AdamW with Colinearity Decay (CD), both with the strength that the study chose. Each is quantized
after training (PTQ). QAT starts from the PTQ model of RTN with OMSE ranges. It trains weights and
steps for half as many steps, at a tenth of the learning rate, without CD. As a control, ``longer``
trains the float model by the same steps, and quantizes it then. A row that exists is not run again.
Needs QUIETVIT_TEST_DATA (or --data).

    python benchmarks/qat_accuracy.py run
    python benchmarks/qat_accuracy.py summary
"""

from __future__ import annotations

import copy
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from safetensors.torch import load_file, save
from torch import nn

import quietvit
from csv_rows import append
from csv_rows import read as read_rows
from evidence_data import SCALES, Split, Workload, build, normalized, read, varied
from evidence_run import CALIBRATION, batches, factor, top1, train
from quietvit.files import write_atomic
from quietvit.quantization.quantized import QuantizedModel

OUT = Path("results/qat_accuracy.csv")
CACHE = Path("runs/evidence")
WORKLOAD = SCALES["cpu"]["deit"]
# What the study of docs/evidence.md chose for this workload, on held-out images.
ARMS: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 5.0},
    "cd": {"cd": {"strength": {"mlp": 2.2, "norm_linear": 2.2, "value_output": 2.2}}},
}
BITS = ("W4A4+attention-maps-8", "W4A8")
PTQ = ("rtn-omse", "repq-vit")
SHARE, LOWER = 0.5, 0.1
FIELDS = ("arm", "seed", "bits", "training", "method", "top1", "float", "seconds", "torch")

app = typer.Typer(add_completion=False, help=__doc__)
OutOption = Annotated[Path, typer.Option(help="The table.")]


def float_model(arm: str, seed: int, split: Split, data: Path, cache: Path) -> nn.Module:
    """Train the float model of an arm, or read it where an earlier run stored it."""
    file = cache / f"qat-{arm}-{seed}.safetensors"
    if file.exists():
        model = build(WORKLOAD, data, cache)
        model.load_state_dict(load_file(file))
        return model.eval()
    model, _ = train(WORKLOAD, ARMS[arm], seed, split, data, cache)
    write_atomic(file, save({k: v.contiguous() for k, v in model.state_dict().items()}))
    return model


def trained(trainee: nn.Module, workload: Workload, split: Split, seed: int) -> None:
    """Train a float model, or weights and steps of a quantized one, in place."""
    model = trainee
    if isinstance(trainee, QuantizedModel):
        quietvit.learn_steps(trainee)
        model = trainee.model
    x, y = split.train
    optimizer = torch.optim.AdamW(
        trainee.parameters(), lr=LOWER * workload.rates[0], weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: factor(step, workload.steps, workload.warmup)
    )
    generator = torch.Generator().manual_seed(seed)
    trainee.train()
    for picked in islice(batches(len(x), workload.batch, generator), workload.steps):
        images = normalized(varied(x[picked], workload.size // 8, generator), model)
        loss = F.cross_entropy(trainee(images), y[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    trainee.eval()


@app.command()
def run(
    data: Annotated[Path, typer.Option(envvar="QUIETVIT_TEST_DATA", help="Folder with the data.")],
    out: OutOption = OUT,
    cache: Annotated[Path, typer.Option(help="Folder for images and float models.")] = CACHE,
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2",
    arms: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(ARMS),
) -> None:
    """Measure what has no row yet, and append one row each."""
    split = read(WORKLOAD, data, cache, torch.device("cpu"))
    shorter = replace(WORKLOAD, steps=round(SHARE * WORKLOAD.steps))
    x, y = (each[: WORKLOAD.quantized] for each in split.test)
    done = {tuple(row[name] for name in FIELDS[:5]) for row in read_rows(out)}
    for seed in map(int, seeds.split(",")):
        for arm in arms.split(","):
            wanted = [(b, way, method) for way in ("ptq", "longer") for b in BITS for method in PTQ]
            wanted += [(b, "qat", PTQ[0]) for b in BITS]
            wanted = [each for each in wanted if (arm, str(seed), *each) not in done]
            if not wanted:
                continue
            model = float_model(arm, seed, split, data, cache)
            calibration = normalized(split.train[0][:CALIBRATION], model)
            models = {"ptq": model, "qat": model}
            for bits, training, method in wanted:
                start = time.perf_counter()
                if training not in models:
                    models[training] = copy.deepcopy(model)
                    trained(models[training], shorter, split, seed)
                own = models[training]
                torch.manual_seed(seed)
                quantized = quietvit.quantize(own, method, calibration, bits=bits, progress=False)
                if training == "qat":
                    trained(quantized, shorter, split, seed)
                hits = top1(quantized, x, y, model)
                new = [arm, seed, bits, training, method, hits, top1(own, x, y, model)]
                new += [round(time.perf_counter() - start, 1), torch.__version__]
                append(out, FIELDS, new)
                print(*new, flush=True)


@app.command()
def summary(out: OutOption = OUT) -> None:
    """Print top-1 as Markdown: mean ± standard deviation over the seeds."""
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    floats: dict[tuple[bool, str], dict[str, float]] = defaultdict(dict)
    for row in read_rows(out):
        found[row["training"], row["method"]][f"{row['arm']} {row['bits']}"].append(
            float(row["top1"])
        )
        floats[row["training"] == "longer", row["arm"]][row["seed"]] = float(row["float"])

    def cell(values: list[float]) -> str:
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}" if values else ""

    columns = [f"{arm} {bits}" for bits in BITS for arm in ARMS]
    print("| | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for longer, name in ((False, "float"), (True, "float, longer")):
        cells = [cell([*floats[longer, column.split()[0]].values()]) for column in columns]
        print(f"| {name} | " + " | ".join(cells) + " |")
    for (training, method), by_column in found.items():
        cells = [cell(by_column[column]) for column in columns]
        print(f"| {training} {method} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    app()
