"""Plots of sensitivities, as figures for ``quietvit.measure.plots.save``.

Nothing is measured here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from quietvit.advice.places import depths_of, place_of
from quietvit.measure.plots import new_figure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class PlottedSite(NamedTuple):
    """A site with its cost and gain, which are None if not measured."""

    name: str
    role: str
    cost: float | None
    gain: float | None


def role_by_depth(sites: Sequence[PlottedSite], title: str) -> Figure:
    """Draw the cost of each site alone and its gain in float. Sites are in forward order."""
    rows = list(dict.fromkeys(place_of(site.name)[0] for site in sites))
    roles = {place_of(site.name)[0]: site.role for site in sites}
    depths = depths_of([site.name for site in sites])
    columns = list(dict.fromkeys(depths))
    cost = np.full((len(rows), len(columns)), math.nan)
    gain = cost.copy()
    for site, depth in zip(sites, depths, strict=True):
        at = rows.index(place_of(site.name)[0]), columns.index(depth)
        cost[at] = math.nan if site.cost is None else site.cost
        gain[at] = math.nan if site.gain is None else site.gain
    labels = [row if roles[row] in row else f"{row} ({roles[row]})" for row in rows]
    height = 1.0 + 0.24 * len(rows)
    figure = new_figure(max(6.0, 4.0 + 0.35 * len(columns)), 2 * height)
    above, below = figure.subplots(2, 1)
    _map(above, cost, labels, columns, "quantized alone")
    _map(below, gain, labels, columns, "gain if only this site stays in float (gray: none)")
    below.set_xlabel("depth (block)")
    figure.suptitle(title, fontsize=10)
    return figure


def _map(
    axes: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str
) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    positive = values[np.isfinite(values) & (values > 0)]
    top = float(positive.max()) if positive.size else 1.0
    # Show three decades. Smaller positive values share the lowest color.
    norm = LogNorm(top / 1000, top)
    drawn = np.where(values > 0, np.maximum(values, top / 1000), top / 1e6)
    colours = colormaps["cividis"].with_extremes(under="#c8c8c8")
    image = axes.imshow(np.ma.masked_invalid(drawn + 0 * values), norm=norm, cmap=colours)
    axes.set_aspect("auto")
    axes.set_facecolor("#ffffff")
    axes.set_xticks(
        range(len(columns)), columns, fontsize=7, rotation=90 if len(columns) > 16 else 0
    )
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set_title(title, fontsize=9, loc="left")
    axes.figure.colorbar(image, ax=axes, fraction=0.04, pad=0.01).ax.tick_params(labelsize=7)
