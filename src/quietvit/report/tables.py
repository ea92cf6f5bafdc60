"""Tables with the same columns and rows for the terminal (rich), for CSV and for the page.

``results`` computes the numbers.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

from quietvit.report.results import FLOAT, Results, Row, Run, signed, summarize

_STYLES = {"better": "green", "worse": "red"}


@dataclass(frozen=True)
class Column:
    """A column. ``header`` and ``text`` are for people, ``key`` and ``value`` for CSV.

    ``detail`` columns are left out on narrow terminals.
    """

    header: str
    key: str
    value: Callable[[Any], Any]
    text: Callable[[Any], str] = str
    numeric: bool = True
    detail: bool = False


@dataclass(frozen=True)
class Table:
    """A title, columns, and rows of any type that the columns can read."""

    title: str
    columns: tuple[Column, ...]
    rows: Sequence[Any]

    def cells(self) -> list[list[str]]:
        """Return the text of every cell, row by row."""
        return [[column.text(column.value(row)) for column in self.columns] for row in self.rows]

    def csv(self) -> str:
        """Return the table as CSV with full precision. None becomes an empty cell."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([column.key for column in self.columns])
        for row in self.rows:
            values = (column.value(row) for column in self.columns)
            writer.writerow(["" if value is None else value for value in values])
        return out.getvalue()

    def rich(self, compact: bool = False) -> RichTable:
        """Return the table for the terminal. ``compact`` leaves out the detail columns."""
        shown = [not (compact and column.detail) for column in self.columns]
        table = RichTable(
            title=self.title,
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        for column in compress(self.columns, shown):
            justify: Literal["left", "right"] = "right" if column.numeric else "left"
            table.add_column(column.header, justify=justify, no_wrap=column.key != "outcome")
        for row, cells in zip(self.rows, self.cells(), strict=True):
            style = _STYLES.get(getattr(row, "outcome", ""))
            table.add_row(*compress(cells, shown), style=style)
        return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def summary_table(results: Results) -> Table:
    """Return the main table: the scores of both arms at every setting, paired over seeds."""
    rows: Sequence[Row] = summarize(results)
    seeds = rows[0].seeds
    return Table(
        f"{results.metric.in_words}, {results.model} on {results.data}, "
        f"mean ± standard deviation over {seeds} seed{'s' if seeds > 1 else ''}",
        (
            Column("setting", "setting", lambda row: row.setting, numeric=False),
            Column("without CD", "without", lambda row: row.without),
            Column("with CD", "with", lambda row: row.with_decay),
            Column("Δ points", "difference", lambda row: row.difference, signed),
            Column("95 % interval", "interval", lambda row: row.interval, detail=True),
            Column("saved", "saved", lambda row: row.saved, signed, detail=True),
            Column("seeds", "agreement", lambda row: row.agreement, numeric=False, detail=True),
            Column("outcome", "outcome", lambda row: row.outcome, numeric=False),
        ),
        rows,
    )


def summary_csv(results: Results) -> str:
    """Return the main table as CSV, with a column each for mean, deviation and bounds."""
    columns: dict[str, Callable[[Row], Any]] = {
        "setting": lambda row: row.setting,
        "seeds": lambda row: row.seeds,
        "without_mean": lambda row: row.without.mean,
        "without_deviation": lambda row: row.without.deviation,
        "with_mean": lambda row: row.with_decay.mean,
        "with_deviation": lambda row: row.with_decay.deviation,
        "difference": lambda row: row.difference,
        "low_95": lambda row: row.low,
        "high_95": lambda row: row.high,
        "saved": lambda row: row.saved,
        "saved_low_95": lambda row: row.saved_low,
        "saved_high_95": lambda row: row.saved_high,
        "seeds_better": lambda row: row.better,
        "seeds_worse": lambda row: row.worse,
        "outcome": lambda row: row.outcome,
    }
    table = Table(
        "", tuple(Column("", key, value) for key, value in columns.items()), summarize(results)
    )
    return table.csv()


def runs_table(results: Results) -> Table:
    """Return one row per seed and arm: float score, largest outlier, steps and times."""
    return Table(
        f"{results.metric.in_words}, times in seconds",
        (
            Column("seed", "seed", lambda run: run.seed),
            Column("arm", "arm", lambda run: run.arm, numeric=False),
            Column(FLOAT, f"float_{results.metric.key}", lambda run: run.float_score, _number),
            Column(
                "largest max/rms",
                "largest_max_over_rms",
                lambda run: max((site.ratio for site in run.outliers), default=None),
                _number,
            ),
            Column("steps", "steps", lambda run: run.steps),
            Column("training s", "train_seconds", lambda run: run.train_seconds, _number),
            Column("of it CD s", "decay_seconds", lambda run: run.decay_seconds, _number),
        ),
        sorted(results.runs, key=lambda run: (run.seed, run.decay)),
    )


def scores_table(results: Results) -> Table:
    """Return one row per setting and seed: both scores, and their difference."""
    lines = [(setting, pair) for setting in (FLOAT, *results.settings) for pair in results.pairs()]
    return Table(
        f"{results.metric.in_words} of every seed",
        (
            Column("setting", "setting", lambda line: line[0], numeric=False),
            Column("seed", "seed", lambda line: line[1][0].seed),
            Column("without CD", "without", lambda line: line[1][0].score(line[0]), _number),
            Column("with CD", "with", lambda line: line[1][1].score(line[0]), _number),
            Column(
                "Δ points",
                "difference",
                lambda line: line[1][1].score(line[0]) - line[1][0].score(line[0]),
                signed,
            ),
        ),
        lines,
    )


def figures_table(results: Results) -> Table:
    """Return one row per seed, arm and setting, with all figures, such as AP50 and mask AP."""
    score = Column(
        results.metric.name, results.metric.key, lambda line: line[0].score(line[1]), _number
    )
    return Table(
        f"all figures in {results.metric.unit}",
        (
            Column("seed", "seed", lambda line: line[0].seed),
            Column("arm", "arm", lambda line: line[0].arm, numeric=False),
            Column("setting", "setting", lambda line: line[1], numeric=False),
            score,
            *_further(results),
        ),
        _lines(results),
    )


def _further(results: Results) -> tuple[Column, ...]:
    """Return a column for each figure besides the metric, of lines (run, setting)."""

    def column(name: str) -> Column:
        header = name.replace("_", " ").replace("ap", "AP")
        return Column(header, name, lambda line: line[0].figure(line[1], name), _number)

    return tuple(map(column, results.further))


def _lines(results: Results) -> list[tuple[Run, str]]:
    return [
        (run, setting)
        for run in sorted(results.runs, key=lambda run: (run.seed, run.decay))
        for setting in (FLOAT, *results.settings)
    ]


def tidy_csv(results: Results) -> str:
    """Return every score as CSV, one line per seed, arm and setting."""
    return Table(
        "",
        (
            Column("", "seed", lambda line: line[0].seed),
            Column("", "arm", lambda line: line[0].arm),
            Column("", "setting", lambda line: line[1]),
            Column("", results.metric.key, lambda line: line[0].score(line[1])),
            *_further(results),
            Column("", "images", lambda line: line[0].images),
            Column("", "train_seconds", lambda line: line[0].train_seconds),
            Column("", "decay_seconds", lambda line: line[0].decay_seconds),
        ),
        _lines(results),
    ).csv()
