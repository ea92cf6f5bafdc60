"""matplotlib plots: scores with seeds as dots, outliers and noise along the depth.

A panel is as wide as a phone, so that the page can stack panels without shrinking the text. No
display is needed. The colours are from Okabe and Ito.
"""

from __future__ import annotations

import base64
import io
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from quietvit.report.results import ARMS, FLOAT, Results, Run
from quietvit.tasks import Metric

WIDTH, HEIGHT = 3.6, 2.5


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


def accuracy_panels(results: Results) -> list[Panel]:
    """Return one panel per method: scores by bits, float first. Dots are seeds, bars are means."""
    methods: dict[str, list[str]] = {}
    for setting in results.settings:
        bits, _, method = setting.partition(" ")
        methods.setdefault(method, []).append(bits)
    runs = [run for pair in results.pairs() for run in pair]
    limits = _limits([run.score(key) for run in runs for key in (FLOAT, *results.settings)])
    return [
        _accuracy(method, bits, runs, limits, results.metric) for method, bits in methods.items()
    ]


def _limits(values: Sequence[float]) -> tuple[float, float]:
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
        with _panel(look, metric.axis) as (figure, axes):
            for arm in (0, 1):
                chosen = [run for run in runs if run.decay == bool(arm)]
                for at, setting in enumerate(settings):
                    values = [run.score(setting) for run in chosen]
                    _seeds(axes, at + 0.22 * (2 * arm - 1), values, look.arms[arm], MARKERS[arm])
            axes.set_xticks(range(len(settings)), [FLOAT, *bits])
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


def outlier_panels(results: Results) -> list[Panel]:
    """Return one panel per role: largest magnitude / rms along the depth, one line per seed.

    Roles with a single site, such as the patch embedding, have no depth and are left out.
    """
    runs = [(run, [(s.site, s.role, s.ratio) for s in run.outliers]) for run in results.runs]
    return _depth_panels(runs, "max / rms", logarithmic=True)


def noise_panels(results: Results) -> list[Panel]:
    """Return one panel per role: signal-to-quantization-noise ratio in dB along the depth."""
    runs = [(run, [(s.site, s.role, s.db) for s in run.noise]) for run in results.runs]
    return _depth_panels(runs, "SQNR in dB", logarithmic=False)


_Points = Sequence[tuple[str, str, float]]


def _depth_panels(
    runs: Sequence[tuple[Run, _Points]], label: str, logarithmic: bool
) -> list[Panel]:
    sites: dict[str, set[str]] = {}
    for _, points in runs:
        for site, role, _ in points:
            sites.setdefault(role, set()).add(site)
    roles = [role for role, positions in sites.items() if len(positions) > 1]
    if not roles:
        return []
    values = [value for _, points in runs for _, role, value in points if role in roles]
    if logarithmic:
        values = [value for value in values if value > 0] or [1.0]
    low, high = _limits([math.log2(value) if logarithmic else value for value in values])
    limits = (2**low, 2**high) if logarithmic else (low, high)
    return [_depth(role, runs, label, logarithmic, limits) for role in roles]


def _depth(
    role: str,
    runs: Sequence[tuple[Run, _Points]],
    label: str,
    logarithmic: bool,
    limits: tuple[float, float],
) -> Panel:
    lines = [(run.decay, [v for _, r, v in points if r == role]) for run, points in runs]

    def draw(look: Look) -> Figure:
        with _panel(look, label) as (figure, axes):
            for decay, values in lines:
                axes.plot(
                    range(1, len(values) + 1),
                    values,
                    color=look.arms[decay],
                    linewidth=1.1,
                    markersize=3.2,
                    alpha=0.8,
                    marker=MARKERS[decay] if len(values) < 20 else "",
                )
            if logarithmic:
                axes.set_yscale("log", base=2)
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_ylim(limits)
            axes.set_xlabel("site, in forward order")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return figure

    means = [
        f"{ARMS[arm]} {statistics.fmean(heights):.1f}"
        for arm in (0, 1)
        if (heights := [v for decay, values in lines if decay == bool(arm) for v in values])
    ]
    title = role.replace("_", " ")
    return Panel(title, f"{label} of {title} sites along the depth; mean {', '.join(means)}.", draw)


@contextmanager
def _panel(look: Look, label: str) -> Iterator[tuple[Figure, Axes]]:
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
