"""Read and append the rows of a CSV table, for benchmarks that run only what has no row yet."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read(out: Path) -> list[dict[str, str]]:
    """Return all rows. There are none if the file does not exist."""
    if not out.exists():
        return []
    with out.open(newline="") as handle:
        return list(csv.DictReader(handle))


def append(out: Path, fields: Sequence[str], values: Sequence[Any]) -> None:
    """Add one row, and the header to a new file."""
    fresh = not out.exists()
    with out.open("a", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerows([*([fields] if fresh else []), values])
