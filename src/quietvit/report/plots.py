"""matplotlib plots of scores: an overview, seeds as dots, methods by bits. Lines are in ``lines``.

A panel is as wide as a phone, so that the page can stack panels without shrinking the text. No
display is needed. The colours are from Okabe and Ito.
"""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from quietvit.report.results import FLOAT, Results, Row, Run, signed
from quietvit.tasks import Metric

WIDTH, HEIGHT = 3.6, 2.5
_LONG = 8
"""Longer labels below an axis are turned, in characters."""


@dataclass(frozen=True)
class Look:
    """Colours of one theme: ``ink`` for text, ``arms`` for (without CD, with CD)."""

    ink: str
    grid: str
    arms: tuple[str, str]


LIGHT = Look(ink="#33373d", grid="#d8dade", arms=("#c25100", "#0072b2"))
DARK = Look(ink="#c9ced6", grid="#3d434c", arms=("#e69f00", "#56b4e9"))
MARKERS = ("o", "s")


@dataclass(frozen=True)
class Panel:
    """One plot: its title, a description for screen readers, and a function that draws it."""

    title: str
    alt: str
    draw: Callable[[Look], Figure]


def svg_uri(figure: Figure) -> str:
    """Return the figure as an SVG data URI. The same figure gives the same bytes."""
    out = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "quietvit", "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()


def overview_panel(rows: Sequence[Row], metric: Metric) -> Panel:
    """Return one panel: the difference by CD at every setting, with its 95 % interval."""
    ends = [end for row in rows for end in (row.low, row.high) if end is not None]
    limits = limits_of([0.0, *ends, *(row.difference for row in rows)])

    def draw(look: Look) -> Figure:
        with frame(look, "") as (figure, axes):
            figure.set_size_inches(1.4 * WIDTH, 0.7 + 0.24 * max(len(rows), 3))
            axes.axvline(0, color=look.ink, linewidth=0.8)
            heights = range(len(rows), 0, -1)
            for height, row in zip(heights, rows, strict=True):
                colour = look.arms[row.difference > 0]
                if row.low is not None and row.high is not None:
                    axes.hlines(height, row.low, row.high, color=colour, linewidth=2)
                axes.plot(row.difference, height, MARKERS[1], color=colour, markersize=5)
            axes.set_yticks(heights, [row.setting for row in rows])
            axes.set_ylim(0.4, len(rows) + 0.6)
            axes.set_xlim(limits)
            axes.set_xlabel(f"{metric.name} with CD minus without, points")
        return figure

    told = ", ".join(f"{row.setting} {signed(row.difference)}" for row in rows)
    return Panel("With CD minus without", f"Difference in points by setting: {told}.", draw)


def accuracy_panels(results: Results) -> list[Panel]:
    """Return one panel per method: scores by bits, float first. Dots are seeds, bars are means."""
    methods: dict[str, list[str]] = {}
    for setting in results.settings:
        bits, _, method = setting.partition(" ")
        methods.setdefault(method, []).append(bits)
    runs = [run for pair in results.pairs() for run in pair]
    limits = limits_of([run.score(key) for run in runs for key in (FLOAT, *results.settings)])
    return [
        _accuracy(method, bits, runs, limits, results.metric) for method, bits in methods.items()
    ]


def limits_of(values: Sequence[float]) -> tuple[float, float]:
    """Return the limits of an axis that shows these values with a small margin."""
    margin = 0.05 * (max(values) - min(values)) or 1.0
    return min(values) - margin, max(values) + margin


def _accuracy(
    method: str,
    bits: Sequence[str],
    runs: Sequence[Run],
    limits: tuple[float, float],
    metric: Metric,
) -> Panel:
    settings = [FLOAT, *(f"{width} {method}" for width in bits)]

    def draw(look: Look) -> Figure:
        with frame(look, metric.axis) as (figure, axes):
            for arm in (0, 1):
                chosen = [run for run in runs if run.decay == bool(arm)]
                for at, setting in enumerate(settings):
                    values = [run.score(setting) for run in chosen]
                    _seeds(axes, at + 0.22 * (2 * arm - 1), values, look.arms[arm], MARKERS[arm])
            labels = [FLOAT, *bits]
            axes.set_xticks(range(len(settings)), labels)
            if max(map(len, labels)) > _LONG:
                for label in axes.get_xticklabels():
                    label.set(rotation=30, ha="right", rotation_mode="anchor")
            axes.set_xlim(-0.6, len(settings) - 0.4)
            axes.set_ylim(limits)
        return figure

    return Panel(
        method, f"{metric.title} by bits with {method}; the numbers are in the first table.", draw
    )


def _seeds(axes: Axes, x: float, values: Sequence[float], colour: str, marker: str) -> None:
    step = min(0.07, 0.2 / max(len(values), 1))
    spots = [x + step * (i - (len(values) - 1) / 2) for i in range(len(values))]
    axes.plot(spots, values, marker, color=colour, markersize=4, alpha=0.75, markeredgewidth=0)
    if values:
        axes.hlines(statistics.fmean(values), x - 0.17, x + 0.17, color=colour, linewidth=2)


def method_panels(by_bits: Mapping[str, Sequence[Any]], floating: float, label: str) -> list[Panel]:
    """Return one panel for each choice of bits: the score of each method, the best one on top.

    ``by_bits`` holds rows with ``method`` and ``score``, the best one first.
    """
    scores = [row.score for rows in by_bits.values() for row in rows]
    limits = limits_of([*scores, floating])
    return [_methods(bits, rows, floating, label, limits) for bits, rows in by_bits.items()]


def _methods(
    bits: str, rows: Sequence[Any], floating: float, label: str, limits: tuple[float, float]
) -> Panel:
    def draw(look: Look) -> Figure:
        with frame(look, "") as (figure, axes):
            figure.set_figheight(0.7 + 0.28 * max(len(rows), 3))
            heights = range(len(rows), 0, -1)
            axes.axvline(floating, color=look.arms[0], linestyle="--", linewidth=1)
            axes.plot([row.score for row in rows], heights, "o", color=look.arms[1], markersize=6)
            axes.set_yticks(heights, [row.method for row in rows])
            axes.set_ylim(0.4, len(rows) + 0.6)
            axes.set_xlim(limits)
            axes.set_xlabel(label)
        return figure

    values = ", ".join(f"{row.method} {row.score:.2f}" for row in rows)
    return Panel(bits, f"{label} at {bits}: {values}; float {floating:.2f}.", draw)


@contextmanager
def frame(look: Look, label: str) -> Iterator[tuple[Figure, Axes]]:
    """Give a figure and axes for a panel, and style them at the end."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_ylabel(label)
    yield figure, axes
    axes.grid(visible=True, axis="y", color=look.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(look.grid)
    axes.tick_params(which="both", colors=look.ink, labelsize=9, length=0)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set(color=look.ink, fontsize=9)
