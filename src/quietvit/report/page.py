"""The HTML page: one self-contained file with table, verdict, plots and provenance.

``results`` computes the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from quietvit.report.lines import noise_panels, outlier_panels, training_panels
from quietvit.report.plots import DARK, LIGHT, Panel, accuracy_panels, overview_panel, svg_uri
from quietvit.report.results import Results, headline, overhead, summarize, verdict
from quietvit.report.tables import Table, figures_table, runs_table, scores_table, summary_table


def render_page(results: Results) -> str:
    """Return the whole page as HTML.

    Raises:
        QuietvitError: no seed has both a run with and a run without CD.
    """
    rows = summarize(results)
    return template("page.html.j2").render(
        results=results,
        headline=headline(rows, results.metric.name),
        verdict=verdict(rows, results.metric.name),
        overview=section("", "", [overview_panel(rows, results.metric)])["panels"][0],
        summary=grid(summary_table(results)),
        scores=grid(scores_table(results)),
        figures=grid(figures_table(results)) if results.further else None,
        runs=grid(runs_table(results)),
        overhead=overhead(results),
        glossary=_glossary(results),
        sections=(
            section(
                "Accuracy" if results.metric.key == "top1" else results.metric.title,
                f"{results.metric.title} of the float model and after quantization, one panel per "
                "method. Dots are seeds, bars are their mean.",
                accuracy_panels(results),
            ),
            section(
                "Outliers",
                "Largest magnitude divided by root mean square of the inputs of each matrix "
                "multiplication along the depth (logarithmic). Lower is easier to quantize. The "
                f"role with the largest outlier comes first. {_LINES} Roles with one site are in "
                "results.json only.",
                outlier_panels(results),
            ),
            section(
                "Quantization noise",
                "Signal-to-quantization-noise ratio at the output of each matrix multiplication "
                f"for {results.noise_setting}, along the depth. Higher is better. The noisiest "
                f"role comes first. {_LINES}",
                noise_panels(results),
            ),
            section(
                "Training", f"Loss of the training batches. {_LINES}", training_panels(results)
            ),
        ),
        light=LIGHT,
        dark=DARK,
    )


_LINES = "A line is one seed; with more than three seeds it is their mean, in a band of all seeds."


def _glossary(results: Results) -> dict[str, str]:
    """Return the terms of the page with their meaning."""
    return {
        "W4A8": "weights as 4-bit integers, activations as 8-bit integers",
        results.metric.name: f"{results.metric.in_words}; larger is better",
        "Δ points": "the score with CD minus the score without, in percentage points",
        "saved": "Δ minus that of the float models: what quantization itself costs less with CD",
        "max / rms": "the largest magnitude of a tensor divided by its root mean square: how far "
        "its outliers stretch the range",
        "SQNR": "signal-to-quantization-noise ratio in decibels; 6 dB are one bit",
    }


def template(name: str) -> Template:
    """Return a template of this package."""
    environment = Environment(
        loader=PackageLoader("quietvit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def section(title: str, text: str, panels: Sequence[Panel]) -> dict[str, Any]:
    """Return a section of a page, with each panel drawn for both themes."""
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


def grid(table: Table) -> dict[str, Any]:
    """Return a table for the macro ``grid`` of the templates."""
    return {
        "title": table.title,
        "columns": table.columns,
        "rows": [
            {"cells": cells, "outcome": getattr(row, "outcome", "")}
            for row, cells in zip(table.rows, table.cells(), strict=True)
        ],
    }
