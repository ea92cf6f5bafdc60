"""The HTML page: one self-contained file with table, verdict, plots and provenance.

``results`` computes the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from quietvit.report.plots import (
    DARK,
    LIGHT,
    Panel,
    accuracy_panels,
    noise_panels,
    outlier_panels,
    svg_uri,
)
from quietvit.report.results import Results, overhead, summarize, verdict
from quietvit.report.tables import Table, runs_table, summary_table


def render_page(results: Results) -> str:
    """Return the whole page as HTML.

    Raises:
        QuietvitError: no seed has both a run with and a run without CD.
    """
    environment = Environment(
        loader=PackageLoader("quietvit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        results=results,
        verdict=verdict(summarize(results), results.metric.name),
        summary=_grid(summary_table(results)),
        runs=_grid(runs_table(results)),
        overhead=overhead(results),
        sections=(
            _section(
                "Accuracy" if results.metric.key == "top1" else results.metric.title,
                f"{results.metric.title} of the float model and after quantization, one panel per "
                "method. Dots are seeds, bars are their mean.",
                accuracy_panels(results),
            ),
            _section(
                "Outliers",
                "Largest magnitude divided by root mean square of the inputs of each matrix "
                "multiplication, by role, along the depth (logarithmic). One line per seed; "
                "lower is easier to quantize. Roles with one site are in results.json only.",
                outlier_panels(results),
            ),
            _section(
                "Quantization noise",
                f"Signal-to-quantization-noise ratio at the output of each matrix multiplication "
                f"for {results.noise_setting}, along the depth. One line per seed; higher is "
                "better.",
                noise_panels(results),
            ),
        ),
        light=LIGHT,
        dark=DARK,
    )


def _section(title: str, text: str, panels: Sequence[Panel]) -> dict[str, Any]:
    drawn = [
        {
            "title": panel.title,
            "alt": panel.alt,
            "light": svg_uri(panel.draw(LIGHT)),
            "dark": svg_uri(panel.draw(DARK)),
        }
        for panel in panels
    ]
    return {"title": title, "text": text, "panels": drawn}


def _grid(table: Table) -> dict[str, Any]:
    return {
        "title": table.title,
        "columns": table.columns,
        "rows": [
            {"cells": cells, "outcome": getattr(row, "outcome", "")}
            for row, cells in zip(table.rows, table.cells(), strict=True)
        ],
    }
