"""Print the result of a command: a table for people, or only JSON or CSV for programs.

The commands compute the result. ``width`` fits tables into the terminal.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from enum import StrEnum
from typing import Annotated, Any

import typer

from quietvit.files import json_text
from quietvit.width import show


class Form(StrEnum):
    """The form of a result on standard output."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


Format = Annotated[
    Form,
    typer.Option(
        "--format",
        help="Form of the result. With json and csv, standard output holds nothing else.",
    ),
]

_results: list[Any] = []
"""The streams for results, while ``only_results`` sends all other text to standard error."""


@contextmanager
def only_results(form: Form | None) -> Iterator[None]:
    """Inside, keep standard output for ``answer``, unless people read it (a table)."""
    if form in (None, Form.TABLE):
        yield
        return
    _results.append(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _results.pop()


def answer(
    form: Form,
    *parts: Any,
    data: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Print the result of a command in the chosen form. Call it once for each command.

    Args:
        parts: texts and rich tables for people, see ``width.show``.
        data: plain data for JSON. Its numbers are not rounded.
        rows: the lines of the CSV table. A nested mapping becomes one column for each of its keys,
            such as ``effect_kl``, and a list becomes JSON. None becomes an empty cell.
    """
    if form is Form.TABLE:
        show(*parts)
        return
    text = json_text(data, indent=1) + "\n" if form is Form.JSON else _csv(rows)
    stream = _results[-1]
    if stream is not None:
        stream.write(text)
        stream.flush()


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    nested = {key for row in rows for key, value in row.items() if isinstance(value, Mapping)}
    flat = [
        dict(_flat({k: v for k, v in row.items() if v is not None or k not in nested}))
        for row in rows
    ]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in flat:
        writer.writerow([_cell(row.get(key)) for key in columns])
    return out.getvalue()


def _flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}_")
        else:
            yield f"{prefix}{key}", value


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | tuple) else value
