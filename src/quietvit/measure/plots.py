"""Plots of a diagnosis, as PNG files. They avoid pyplot, so no global state changes.

The statistics are given; nothing is measured here.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quietvit.files import write_atomic
from quietvit.measure.colinearity import PairStatistics
from quietvit.measure.outliers import SiteStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's palette (grey for yellow): readers with colour blindness can tell these apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
ROLES = {
    "post_norm": "after a norm",
    "post_gelu": "after GELU",
    "post_activation": "after the activation",
    "attention_output": "attention output",
    "add": "residual stream",
    "query": "query",
    "key": "key",
    "value": "value",
}
WORST_PAIRS = 5


def outliers_by_depth(sites: Sequence[SiteStatistics], images: int) -> Figure:
    """Plot max and rms of each kind of activation, in the order of the forward pass."""
    figure = new_figure(9, 4.6)
    above, below = figure.subplots(2, 1, sharex=True)
    styles = zip(ROLES, COLOURS, MARKERS, strict=True)
    for role, colour, marker in styles:
        places = [i for i, s in enumerate(sites) if s.role == role]
        if not places:
            continue
        chosen = [sites[i] for i in places]
        for axes, heights in ((above, [s.max for s in chosen]), (below, [s.rms for s in chosen])):
            axes.plot(
                places,
                [h or float("nan") for h in heights],
                color=colour,
                marker=marker,
                markersize=4,
                linewidth=1,
                markeredgecolor="#333333",
                markeredgewidth=0.4,
                label=ROLES[role],
            )
    for axes, label in ((above, "max |x|"), (below, "rms")):
        _logarithmic(axes.yaxis)
        axes.set_ylabel(label)
        _tidy(axes)
    ticks = _depth_ticks(sites)
    below.set_xticks([i for i, _ in ticks], [name for _, name in ticks])
    below.set_xlabel("depth (block, in the order of the forward pass)")
    handles, labels = above.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(f"Activations by depth, {images} images", fontsize=11)
    return figure


def site_channels(site: SiteStatistics) -> Figure:
    """Plot the largest magnitude of each channel of one site."""
    figure = new_figure(9, 3.4)
    axes = figure.subplots()
    heights = site.channel_max
    axes.vlines(range(len(heights)), 0, heights, color=COLOURS[0], linewidth=1)
    axes.axhline(site.rms, color=COLOURS[1], linewidth=1.2, linestyle="--", label="rms of the site")
    for channel in sorted(range(len(heights)), key=lambda k: -heights[k])[:1]:
        right = channel > len(heights) / 2
        axes.annotate(
            f"channel {channel}: {heights[channel]:.3g}",
            (channel, heights[channel]),
            xytext=(-6 if right else 6, 3),
            textcoords="offset points",
            ha="right" if right else "left",
            fontsize=8,
        )
    axes.set_xlim(-1, len(heights))
    axes.set_ylim(0, 1.25 * max(heights) if max(heights) else 1)
    axes.set_xlabel("channel")
    axes.set_ylabel("max |x|")
    axes.legend(loc="upper center", frameon=False, fontsize=8)
    _tidy(axes)
    axes.set_title(f"{site.name} ({site.role}): max/rms {site.max_over_rms:.1f}", fontsize=11)
    return figure


def amplification_spectra(pairs: Sequence[PairStatistics]) -> Figure:
    """Plot the amplification s_i·‖B u_i‖ of the first ``WORST_PAIRS`` pairs over the rank i."""
    figure = new_figure(9, 3.8)
    axes = figure.subplots()
    for n, pair in enumerate(pairs[:WORST_PAIRS]):
        spectrum = [x if x > 0 else float("nan") for x in pair.amplification]
        label = pair.name.split(": ", 1)[-1].replace(" -> ", "\n→ ").replace(".weight", "")
        axes.plot(
            range(1, len(spectrum) + 1),
            spectrum,
            color=COLOURS[n],
            linestyle=LINES[n],
            marker=MARKERS[n],
            markersize=4,
            markevery=[0],
            linewidth=1.3,
            label=label,
        )
    _logarithmic(axes.xaxis)
    _logarithmic(axes.yaxis)
    axes.set_xlabel("singular direction i of the first matrix A")
    axes.set_ylabel("amplification sᵢ ‖B uᵢ‖")
    _tidy(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle("Pairs that amplify most", fontsize=11)
    return figure


def _depth_ticks(sites: Sequence[SiteStatistics]) -> list[tuple[int, str]]:
    """Return (position, number) of the start of each block, thinned to at most 16."""
    ticks: list[tuple[int, str]] = []
    for i, site in enumerate(sites):
        numbers = [part for part in site.site.split(".") if part.isdigit()]
        name = ".".join(numbers[:2]) if site.site.startswith("layers") else ".".join(numbers[:1])
        if name and (not ticks or ticks[-1][1] != name):
            ticks.append((i, name))
    return ticks[:: max(1, -(-len(ticks) // 16))]


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure, sizes in inches, without pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _logarithmic(axis: Axis) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes = axis.axes
    (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="y", alpha=0.3, linewidth=0.6)
    axes.tick_params(labelsize=8)


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG atomically. Returns the path."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return write_atomic(path, buffer.getvalue())
