"""matplotlib plots of lines: outliers and noise along the depth, training curves.

``plots`` has the frame of a panel, and the plots of scores.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from quietvit.report.plots import MARKERS, Look, Panel, frame, limits_of
from quietvit.report.results import ARMS, Results, Run

FEW = 3
"""With more runs than this in an arm, its lines become their mean and the band of all runs."""


def outlier_panels(results: Results) -> list[Panel]:
    """Return one panel per role: largest magnitude / rms along the depth, the largest role first.

    Roles with a single site, such as the patch embedding, have no depth and are left out.
    """
    runs = [(run, [(s.site, s.role, s.ratio) for s in run.outliers]) for run in results.runs]
    return _depth_panels(runs, "max / rms", largest_first=True)


def noise_panels(results: Results) -> list[Panel]:
    """Return one panel per role: signal-to-quantization-noise ratio in dB along the depth.

    The noisiest role comes first.
    """
    runs = [(run, [(s.site, s.role, s.db) for s in run.noise]) for run in results.runs]
    return _depth_panels(runs, "SQNR in dB", largest_first=False)


def training_panels(results: Results) -> list[Panel]:
    """Return the panel of the training loss by step. Runs of earlier versions have no curve."""
    lines = [(run.decay, list(run.curve)) for run in results.runs if run.curve]
    if not lines:
        return []
    values = [loss for _, curve in lines for _, loss in curve]
    limits = limits_of(values)

    def draw(look: Look) -> Figure:
        with frame(look, "training loss") as (figure, axes):
            for arm in (False, True):
                curves = [curve for decay, curve in lines if decay == arm]
                _lines(
                    axes,
                    [[step for step, _ in curve] for curve in curves],
                    [[loss for _, loss in curve] for curve in curves],
                    look.arms[arm],
                    "",
                )
            axes.set_ylim(limits)
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        return figure

    ends = [
        f"{ARMS[arm]} {statistics.fmean(found):.3f}"
        for arm in (0, 1)
        if (found := [curve[-1][1] for decay, curve in lines if decay == bool(arm)])
    ]
    return [Panel("Training loss", f"Training loss by step; at the end {', '.join(ends)}.", draw)]


_Points = Sequence[tuple[str, str, float]]


def _depth_panels(
    runs: Sequence[tuple[Run, _Points]], label: str, largest_first: bool
) -> list[Panel]:
    """``largest_first`` also means that the axis is logarithmic."""
    sites: dict[str, set[str]] = {}
    values: dict[str, list[float]] = {}
    for _, points in runs:
        for site, role, value in points:
            sites.setdefault(role, set()).add(site)
            values.setdefault(role, []).append(value)
    roles = [role for role, found in sites.items() if len(found) > 1]
    if not roles:
        return []
    roles.sort(key=lambda role: -max(values[role]) if largest_first else min(values[role]))
    shown = [value for role in roles for value in values[role]]
    if largest_first:
        shown = [value for value in shown if value > 0] or [1.0]
    low, high = limits_of([math.log2(value) if largest_first else value for value in shown])
    limits = (2**low, 2**high) if largest_first else (low, high)
    return [_depth(role, runs, label, largest_first, limits) for role in roles]


def _depth(
    role: str,
    runs: Sequence[tuple[Run, _Points]],
    label: str,
    logarithmic: bool,
    limits: tuple[float, float],
) -> Panel:
    lines = [(run.decay, [v for _, r, v in points if r == role]) for run, points in runs]

    def draw(look: Look) -> Figure:
        with frame(look, label) as (figure, axes):
            for arm in (False, True):
                heights = [values for decay, values in lines if decay == arm]
                places = [list(range(1, len(values) + 1)) for values in heights]
                _lines(axes, places, heights, look.arms[arm], MARKERS[arm])
            if logarithmic:
                axes.set_yscale("log", base=2)
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_ylim(limits)
            axes.set_xlabel("site, in forward order")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return figure

    means = [
        f"{ARMS[arm]} {statistics.fmean(found):.1f}"
        for arm in (0, 1)
        if (found := [v for decay, values in lines if decay == bool(arm) for v in values])
    ]
    title = role.replace("_", " ")
    return Panel(title, f"{label} of {title} sites along the depth; mean {', '.join(means)}.", draw)


def _lines(
    axes: Axes,
    places: Sequence[Sequence[float]],
    heights: Sequence[Sequence[float]],
    colour: str,
    marker: str,
) -> None:
    """Draw one line per run; the mean and the band of all runs if there are many alike."""
    alike = all(list(each) == list(places[0]) for each in places[1:])
    if len(heights) > FEW and alike:
        table = np.array(heights)
        axes.fill_between(
            places[0], table.min(0), table.max(0), color=colour, alpha=0.2, linewidth=0
        )
        places, heights = places[:1], [table.mean(0).tolist()]
    for xs, ys in zip(places, heights, strict=True):
        shown = marker if len(xs) < 20 else ""
        axes.plot(xs, ys, color=colour, linewidth=1.1, markersize=3.2, alpha=0.8, marker=shown)
