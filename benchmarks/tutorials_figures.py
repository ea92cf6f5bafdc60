"""The table results/tutorials.csv: the figures that the tutorials quote, one row each.

``tutorials`` measures them. tests/test_tutorials_figures.py compares the pages with the table.
Nothing is measured here.
"""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from csv_rows import read
from quietvit.deployment.processor import described
from quietvit.files import write_atomic

OUT = Path(__file__).parents[1] / "results" / "tutorials.csv"
COLUMNS = ("page", "figure", "value", "setting", "versions", "machine")
PACKAGES = ("quietvit", "torch", "torchvision", "timm", "onnxruntime")


def record(page: str, figures: Mapping[str, float | str], setting: str, out: Path = OUT) -> None:
    """Write the figures of a page in place of its earlier rows, and print them.

    ``setting`` says what was run: the images, the seed and what differs from the page.
    """
    facts = setting, versions(), f"{described()}, {os.cpu_count()} cores"
    rows = [row for row in read(out) if row["page"] != page]
    rows += [
        dict(zip(COLUMNS, (page, name, shown(value), *facts), strict=True))
        for name, value in figures.items()
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: row["page"]))
    write_atomic(out, text.getvalue().encode())
    print(*(f"{page} {name} {shown(value)}" for name, value in figures.items()), sep="\n")


def shown(value: float | str) -> str:
    """A number with six digits at most."""
    return value if isinstance(value, str) else f"{value:.6g}"


def versions() -> str:
    """The packages that compute the figures. A package that is not installed is left out."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def command(*arguments: str) -> None:
    """Run a command of quietvit as a user does. Raises CalledProcessError if it fails."""
    print("quietvit", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "quietvit.cli", *arguments], check=True)


def answer(*arguments: str) -> dict[str, Any]:
    """Return what a command with ``--format json`` prints. Raises as ``command`` does."""
    print("quietvit", *arguments, flush=True)
    whole = [sys.executable, "-m", "quietvit.cli", *arguments, "--format", "json"]
    return json.loads(subprocess.run(whole, check=True, stdout=subprocess.PIPE).stdout)
