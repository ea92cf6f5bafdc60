"""The cost of a regularizer: step time with it over step time without, DeiT-T/S/B and Swin-T.

Images and weights are random, and the optimizer is AdamW. The learning rate is 1e-3, the highest of
the recipes. The precision (column ``precision``) is bfloat16 autocast if the device is faster in
it, else float32. On a CPU, 32 images are in memory at a time and gradients accumulate. One process
measures one model and batch: the variants in turn, repeated. A row gives the median and the
extremes over repeats.

- **Time on a GPU**: whole steps are compared.
- **Time on a CPU**: a percent drowns in the noise of whole steps. So the work in the optimizer's
  hooks is timed by itself (``how`` = hook), at a step at which it acts. It is divided by ``every``
  and by the median plain step. The spread of that step is not in the extremes.
- **Time of TWEO**: it acts in the forward pass, so whole steps are compared on every device.
- ``floor``: matrix FLOPs of the update over those of the step. At equal efficiency this is the
  ratio less 1.
- **Extra memory**: the peak during the update beyond what was there before it. For TWEO it is the
  peak of a step with it less one without. A GPU's allocator reports it. On a CPU it is the bytes of
  tensors made and alive at once.

Cases run from cheap to expensive until --minutes are over. The rest is skipped with a message. A
row that exists is not measured again.

    python benchmarks/overhead.py run --minutes 10
    python benchmarks/overhead.py run --models deit_tiny_patch16_224 --batches 8 --out try.csv
    python benchmarks/overhead.py memory      # that column anew, for rows of a CPU
    python benchmarks/overhead.py summary
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer

import quietvit
from overhead_bench import (
    VARIANTS,
    Bench,
    attached,
    block_mib,
    every,
    extra_memory,
    flops,
    hooks,
    make,
    precision,
    step_flops,
    update,
    whole_steps,
)
from quietvit.files import write_atomic

MODELS = (
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "deit_base_patch16_224",
)
BATCHES = (64, 256)
REFRESH, MOST_TIMES = 100, 20
# Amortized rows of the summary: name -> (often, seldom, every so many steps).
AMORTIZED = {
    f"cd-top, refresh={REFRESH}": ("cd-top", "cd-top-svd", REFRESH),
    f"s2d, refresh={REFRESH}": ("s2d", "s2d-svd", REFRESH),
}
COLUMNS = (
    *("model", "batch", "device", "variant", "how", "plain_ms", "cost_ms", "ratio"),
    *("ratio_low", "ratio_high", "repeats", "floor", "extra_memory_mib", "block_mib", "settings"),
    *("precision", "threads", "quietvit", "torch", "timm", "machine"),
)
OUT = Path("results/overhead.csv")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
OutOption = Annotated[Path, typer.Option(help="The table.")]
Row = dict[str, Any]
Case = tuple[str, str, str, str, str]
"""Model, batch, device, precision, machine: what is measured in one process."""


def measure(
    name: str, batch: int, device: torch.device, variants: Sequence[str], seconds: float
) -> list[Row]:
    """The rows of one model and batch within about so many seconds; none if too few."""
    bench = Bench.of(name, batch, device)
    bench.step()
    one = bench.seconds(bench.step)
    on_device = device.type != "cpu"
    in_steps = [v for v in variants if on_device or v == "tweo"]
    times = max(1, min(MOST_TIMES, int(0.5 / one))) if on_device else 1
    if any("every" in VARIANTS[variant][1] for variant in in_steps):
        times = MOST_TIMES  # in which each acts as often as its setting says
    repeats = min(9, int(seconds * 0.7 / (one * times * (len(in_steps) + 1))) - 1)
    if repeats < 2:
        print(f"skipped {name} batch {batch}: a step takes {one:.1f} s, {seconds:.0f} s are left")
        return []
    made = {variant: make(variant, bench) for variant in variants}
    steps = whole_steps(bench, {v: made[v] for v in in_steps}, repeats, times)
    in_hooks = {v: r for v, r in made.items() if v not in in_steps}
    alone = hooks(bench, in_hooks, 5)
    plain = statistics.median(steps["plain"])
    total = step_flops(name, batch)
    block = block_mib(bench.model, bench.images[:1])
    rows = []
    for variant, regularizer in made.items():
        if variant in in_steps:
            how, samples = "step", steps[variant]
            pairs = zip(samples, steps["plain"], strict=True)
            ratios = [with_it / without for with_it, without in pairs]
        else:
            how, samples = "hook", alone[variant]
            ratios = [1 + cost / plain for cost in samples]
        ratio = statistics.median(ratios)
        floor = 0.0
        if variant not in ("tweo", "cd-compiled"):
            floor = flops(lambda r=regularizer: update(r, bench)) / every(regularizer) / total
        rows.append(
            {
                "model": name,
                "batch": batch,
                "device": device.type,
                "variant": variant,
                "how": how,
                "plain_ms": round(1e3 * plain, 2),
                "cost_ms": round(1e3 * plain * (ratio - 1), 2),
                "ratio": round(ratio, 5),
                "ratio_low": round(min(ratios), 5),
                "ratio_high": round(max(ratios), 5),
                "repeats": len(ratios),
                "floor": round(floor, 6),
                "extra_memory_mib": extra_mib(bench, variant, regularizer),
                "block_mib": round(block, 3),
                "settings": json.dumps(VARIANTS[variant][1], sort_keys=True),
                "precision": precision(device),
                "threads": torch.get_num_threads(),
                "quietvit": quietvit.__version__,
                "torch": torch.__version__,
                "timm": timm.__version__,
                "machine": machine(device),
            }
        )
    return rows


def extra_mib(bench: Bench, variant: str, regularizer: Any) -> float:
    return round(extra_memory(bench, regularizer, in_forward=variant == "tweo"), 3)


def case_of(row: Row) -> Case:
    return row["model"], row["batch"], row["device"], row["precision"], row["machine"]


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    kind = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {kind} {os.cpu_count()} cores"


def read(out: Path) -> list[dict[str, str]]:
    if not out.exists():
        return []
    with out.open(newline="") as handle:
        reader = csv.DictReader(handle)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise typer.BadParameter(f"{out} has other columns; move it away or choose another --out")
    return rows


def append(out: Path, rows: Sequence[Row]) -> None:
    write(out, [*read(out), *rows])


def write(out: Path, rows: Sequence[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(out, text.getvalue())


@app.command()
def run(
    minutes: Annotated[float, typer.Option(help="No case starts after so many minutes.")] = 10.0,
    out: OutOption = OUT,
    models: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(MODELS),
    batches: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(map(str, BATCHES)),
    variants: Annotated[str, typer.Option(help="Comma-separated.")] = "",
    device: Annotated[str, typer.Option(help="cuda or cpu; the GPU where there is one.")] = "",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's own choice.")] = 0,
) -> None:
    """Measure the cases that have no rows yet, cheap ones first."""
    if threads:
        torch.set_num_threads(threads)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # Compiling for a CPU takes longer than the whole measurement.
    usual = [v for v in VARIANTS if where.type == "cuda" or v != "cd-compiled"]
    chosen = variants.split(",") if variants else usual
    for variant in chosen:
        if variant not in VARIANTS:
            raise typer.BadParameter(f"{variant!r} is none of {', '.join(VARIANTS)}")
    end = time.monotonic() + 60 * minutes
    for batch in map(int, batches.split(",")):
        for name in models.split(","):
            key = (name, str(batch), where.type, precision(where), machine(where))
            done = {row["variant"] for row in read(out) if case_of(row) == key}
            todo = [variant for variant in chosen if variant not in done]
            left = end - time.monotonic()
            if not todo or left <= 0:
                continue
            rows = measure(name, batch, where, todo, left / 2 if minutes > 2 else left)
            append(out, rows)
            for row in rows:
                print(name, batch, row["variant"], row["ratio"], row["cost_ms"], "ms", flush=True)


@app.command()
def memory(
    out: OutOption = OUT,
    models: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(MODELS),
    variants: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(VARIANTS),
) -> None:
    """Measure extra memory again for the rows of a CPU like this one."""
    rows: list[Row] = [*read(out)]
    cpu = torch.device("cpu")
    here = ("cpu", precision(cpu), machine(cpu))
    for case in dict.fromkeys(map(case_of, rows)):
        name, batch = case[:2]
        if case[2:] != here:
            print("left out, of another machine:", *case)
            continue
        own = [row for row in rows if case_of(row) == case]
        if name not in models.split(","):
            continue
        for row in own:
            if row["variant"] not in variants.split(","):
                continue
            in_steps = row["variant"] == "tweo"
            bench = Bench.of(name, int(batch) if in_steps else 1, torch.device("cpu"))
            regularizer = make(row["variant"], bench)
            with attached(regularizer, bench):
                bench.step(regularizer)
            row["extra_memory_mib"] = extra_mib(bench, row["variant"], regularizer)
            row["block_mib"] = round(block_mib(bench.model, bench.images[:1]), 3)
            print(name, batch, row["variant"], row["extra_memory_mib"], flush=True)
        write(out, rows)


@app.command()
def summary(out: OutOption = OUT) -> None:
    """Print the table as Markdown: ratio of step times, its extremes, floor, memory."""
    rows = read(out)
    titles = "model, batch, device, precision, machine, variant, ratio, extremes, cost in ms"
    more = "plain step in ms, floor, extra memory in MiB, one block in MiB"
    cells = f"{titles}, {more}".split(", ")
    print("| " + " | ".join(cells) + " |")
    print("|---" * len(cells) + "|")
    for case in dict.fromkeys(map(case_of, rows)):
        own = {row["variant"]: row for row in rows if case_of(row) == case}
        for row in own.values():
            cached = row["variant"] in ("s2d", "cd-top")
            shown = row["variant"] + (" between refreshes" if cached else "")
            line(case, shown, row, float(row["ratio"]), float(row["floor"]))
        for label, (often, seldom, steps) in AMORTIZED.items():
            if seldom not in own or often not in own:
                continue
            light, light_floor = float(own[often]["ratio"]), float(own[often]["floor"])
            ratio = light + (float(own[seldom]["ratio"]) - light) / steps
            floor = light_floor + (float(own[seldom]["floor"]) - light_floor) / steps
            line(case, f"{label} (from the rows above)", own[seldom], ratio, floor, derived=True)


def line(
    case: Case,
    label: str,
    row: dict[str, str],
    ratio: float,
    floor: float,
    derived: bool = False,
) -> None:
    plain = float(row["plain_ms"])
    extremes = "" if derived else f"{float(row['ratio_low']):.4f}–{float(row['ratio_high']):.4f}"
    cells = (
        *case,
        label,
        f"{ratio:.4f}",
        extremes,
        f"{(ratio - 1) * plain:.1f}",
        f"{plain:.0f}",
        f"{floor:.4f}" if floor else "",
        row["extra_memory_mib"],
        row["block_mib"],
    )
    print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    app()
