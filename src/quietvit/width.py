"""Print tables to fit the terminal. A table that is too wide becomes a list; nothing is cut.

The callers build the tables.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# Wider than any line, so nothing is wrapped.
_ENDLESS = 100_000


def columns(stream: Any) -> int | None:
    """Return the width of ``stream``: COLUMNS, else that of the terminal, else None (a file)."""
    text = os.environ.get("COLUMNS", "")
    if text.isdigit() and int(text) > 0:
        return int(text)
    if stream is not None and stream.isatty():
        return shutil.get_terminal_size().columns
    return None


def show(*parts: Any) -> None:
    """Print texts and rich tables to standard output.

    Text is never wrapped. A table wider than the terminal is printed as a list, one line per cell.
    In a file every table keeps its full width.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=columns(sys.stdout) or _ENDLESS)
    for part in _flat(parts):
        if not isinstance(part, Table):
            text = Text(part) if isinstance(part, str) else part
            console.print(text, highlight=False, soft_wrap=True)
        elif _fits(console, part):
            console.print(part)
        else:
            for line in _listed(part):
                console.print(line, highlight=False, soft_wrap=True)
    if sys.stdout is not None:
        sys.stdout.flush()


def _flat(parts: Iterable[Any]) -> Iterator[Any]:
    from rich.console import Group

    for part in parts:
        if hasattr(part, "__rich__"):
            yield from _flat([part.__rich__()])
        elif isinstance(part, Group):
            yield from _flat(part.renderables)
        else:
            yield part


def fitting(table: Any, compact: Any) -> Any:
    """Return ``compact`` if only it fits the width of standard output, else ``table``."""
    from rich.console import Console

    console = Console(width=columns(sys.stdout) or _ENDLESS)
    return compact if _fits(console, compact) and not _fits(console, table) else table


def _fits(console: Console, table: Any) -> bool:
    """Whether the table fits without wrapping or truncation."""
    from rich.measure import Measurement

    wide = console.options.update(width=_ENDLESS, max_width=_ENDLESS)
    return Measurement.get(console, wide, table).maximum <= console.width


def _listed(table: Any) -> Iterator[Any]:
    """Yield the lines of a list: per row the first cell, then ``header: cell`` for the others."""
    from rich.text import Text

    if table.title:
        yield Text(str(table.title), style="bold")
    headers = [str(column.header) for column in table.columns]
    cells = zip(*(column.cells for column in table.columns), strict=True)
    for row, values in zip(table.rows, cells, strict=True):
        yield Text(str(values[0]), style=row.style or "")
        for header, value in zip(headers[1:], values[1:], strict=True):
            if str(value):
                yield Text(f"  {header}: {value}")
    yield Text("")
