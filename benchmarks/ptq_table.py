"""The table of ``ptq_deit_tiny.py``: its rows, how they are added and shown.

Nothing is measured here.
"""

from __future__ import annotations

import csv
import fcntl
import io
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from quietvit.errors import QuietvitError

# (setting, source) -> float top-1 and top-1 by bits; the published ones on the validation set.
FIELD = "published comparisons of the field [public]"
DOPQ = "arXiv 2408.03291: its own TanQ, blocks reconstructed on 1024 images"
OWN_CODE = "the authors' own code on these weights and images, not run by this script"
PUBLISHED: dict[tuple[str, str], tuple[float, dict[str, float]]] = {
    ("ptq4vit", FIELD): (72.21, {"W6A6": 69.68, "W4A4": 36.96}),
    ("repq-vit", FIELD): (72.21, {"W6A6": 70.76, "W4A4": 57.43}),
    ("erq", FIELD): (72.21, {"W4A4": 60.29}),
    ("adalog", FIELD): (72.21, {"W4A4": 63.52}),
    ("qdrop-240", f"{FIELD}; 20000 iterations, uniform quantizers"): (72.21, {"W4A4": 64.95}),
    ("dopq-vit", DOPQ): (72.21, {"W6A6": 71.17, "W4A4": 65.54}),
    ("qdrop-240-on-dopq-vit", DOPQ): (72.21, {"W6A6": 71.17, "W4A4": 65.54}),
    ("repq-vit", OWN_CODE): (78.5, {"W8A8": 78.7, "W6A6": 78.1, "W4A4": 62.7}),
    ("ptq4vit", f"{OWN_CODE}; 2 rounds, 50 candidates"): (
        78.5,
        {"W8A8": 77.9, "W6A6": 75.3, "W4A4": 40.5},
    ),
    ("fq-vit-attention8", f"{OWN_CODE}; residual adds and logits too"): (78.5, {"W8A8": 78.0}),
}
COLUMNS = (
    *("setting", "bits", "seed", "images", "top1", "drop", "coverage", "kernels"),
    *("calibration_images", "calibration_seconds", "calibration_cpu_seconds"),
    *("peak_memory_mib", "baseline_memory_mib", "fields", "torch", "timm", "machine", "threads"),
)
Row = dict[str, str]


@dataclass(frozen=True)
class Job:
    """A planned row: a method with some bits and one draw of calibration images.

    ``fields`` is JSON. ``bits`` "float" is the model itself, without calibration.
    """

    setting: str
    method: str
    bits: str
    seed: str
    fields: str
    images: int

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.setting, self.bits, self.seed, self.fields


def read(out: Path) -> list[Row]:
    """Rows of the table. Raises QuietvitError for a table with other columns."""
    if not out.exists():
        return []
    with out.open(newline="") as handle:
        reader = csv.DictReader(handle)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise QuietvitError(f"{out} has other columns; move it away or choose another --out.")
    return rows


def finished(out: Path, images: int) -> set[tuple[str, str, str, str]]:
    """Keys of the existing rows. Raises QuietvitError for rows on other images."""
    rows = read(out)
    other = sorted({row["images"] for row in rows} - {str(images)})
    if other:
        raise QuietvitError(f"{out} holds rows on {', '.join(other)} images, not {images}.")
    return {key_of(row) for row in rows}


def append(out: Path, job: Job, measured: dict[str, Any]) -> None:
    """Add the row in one write, with a header if it is first. Does nothing if it exists by now."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("ab") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        rows = read(out) if out.stat().st_size else []
        if job.key in map(key_of, rows):
            return
        reference = next((r["top1"] for r in rows if r["setting"] == "float"), measured["top1"])
        row = measured | {
            "setting": job.setting,
            "bits": job.bits,
            "seed": job.seed,
            "images": job.images,
            "fields": job.fields,
            "drop": round(float(reference) - measured["top1"], 2),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "machine": f"{platform.machine()} {os.cpu_count()} cores",
        }
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        if not rows:
            writer.writeheader()
        writer.writerow(row)
        handle.write(text.getvalue().encode())
    print(" ".join(f"{name}={row[name]}" for name in COLUMNS[:11] if name in row), flush=True)


def key_of(row: Row) -> tuple[str, str, str, str]:
    return row["setting"], row["bits"], row["seed"], row["fields"]


def spread(values: Sequence[float]) -> str:
    """Median (smallest–largest) of several figures. For fewer than three it says how many."""
    if not values:
        return ""
    text = f"{statistics.median(values):.1f}"
    if len(values) > 1:
        text += f" ({min(values):.1f}–{max(values):.1f})"
    return text + (f", {len(values)} seed{'s' * (len(values) > 1)}" if len(values) < 3 else "")


def _median(rows: Sequence[Row], column: str, digits: int = 0) -> str:
    values = [float(row[column]) for row in rows if row[column]]
    return f"{statistics.median(values):.{digits}f}" if values else ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(rows: Sequence[Row]) -> str:
    """Markdown: one line per setting. Top-1 by bits, CPU time and memory of the calibration.

    A setting that ran with several sets of fields has a line for each.
    """
    quantized = [row for row in rows if row["setting"] != "float"]
    bits = sorted({row["bits"] for row in quantized}, key=_by_bits)
    head = ["setting", *bits, "images", "CPU s", "peak MiB", "of it before", "kernels"]
    lines = [_line(head), "|---" * len(head) + "|"]
    variants = list(dict.fromkeys((row["setting"], row["fields"]) for row in quantized))
    for setting, fields in variants:
        own = [r for r in quantized if (r["setting"], r["fields"]) == (setting, fields)]
        single = [name for name, _ in variants].count(setting) == 1
        cells = [setting if single else f"{setting} `{fields}`"]
        cells += [spread([float(r["top1"]) for r in own if r["bits"] == b]) for b in bits]
        cells += [_median(own, "calibration_images"), _median(own, "calibration_cpu_seconds", 1)]
        cells += [_median(own, "peak_memory_mib"), _median(own, "baseline_memory_mib")]
        cells.append(", ".join(sorted({row["kernels"] for row in own})))
        lines.append(_line(cells))
    reference = [row["top1"] for row in rows if row["setting"] == "float"]
    return "\n".join([*lines, "", f"float: {float(reference[0]):.1f}" if reference else "no float"])


def _by_bits(bits: str) -> list[int]:
    return [-int(part) for part in bits.removeprefix("W").split("A")]


def compared(rows: Sequence[Row]) -> str:
    """Markdown: median drop of each setting beside published ones, in points of top-1.

    For a setting that ran with several sets of fields, the last one counts.
    """
    head = ["setting", "bits", "drop here", "drop there", "difference", "source"]
    lines = [_line(head), "|---" * len(head) + "|"]
    for (setting, source), (reference, figures) in PUBLISHED.items():
        for bits, top1 in figures.items():
            there = reference - top1
            own = [r for r in rows if (r["setting"], r["bits"]) == (setting, bits)]
            drops = [float(r["drop"]) for r in own if r["fields"] == own[-1]["fields"]]
            here = f"{statistics.median(drops):.1f}" if drops else ""
            gap = f"{statistics.median(drops) - there:+.1f}" if drops else ""
            lines.append(_line([setting, bits, here, f"{there:.2f}", gap, source]))
    return "\n".join(lines)
