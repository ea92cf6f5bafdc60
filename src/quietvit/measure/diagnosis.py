"""``Diagnosis``: the results of ``diagnose``, as tables for the terminal and as JSON.

Nothing is measured here; drawing is in ``plots``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from quietvit.files import finite, json_text, write_atomic
from quietvit.measure.colinearity import PairStatistics
from quietvit.measure.outliers import SiteStatistics
from quietvit.measure.plots import amplification_spectra, outliers_by_depth, save, site_channels
from quietvit.measure.root_cause import RootCause
from quietvit.text import in_text


@dataclass(frozen=True)
class Diagnosis:
    """Outliers of a model, and what in its weights makes them.

    Attributes:
        sites: statistics in the order of the forward pass: operands of all matrix products, and
            outputs of all norms, activation functions and residual adds.
        pairs: amplification of every pair, in the given order.
        root_causes: what makes the largest output values of the pairs, largest first.
        skipped: (pair, reason) for pairs whose peak was not explained, and (site, reason) for
            sites that were not measured, such as attention scores with a mask.
        images: number of images measured.
        top: number of rows in the tables, and of root causes sought.
    """

    sites: tuple[SiteStatistics, ...]
    pairs: tuple[PairStatistics, ...]
    root_causes: tuple[RootCause, ...]
    skipped: tuple[tuple[str, str], ...]
    images: int
    top: int

    @property
    def worst_sites(self) -> tuple[SiteStatistics, ...]:
        """Tensors by falling max/rms, without softmax probabilities (they are at most 1).

        A tensor that is both a site's output and the next site's operand counts once, as operand.
        """
        distinct: dict[tuple[int, float, float, float], SiteStatistics] = {}
        for s in sorted(self.sites, key=lambda s: s.operand == "output"):
            if s.role != "post_softmax":
                distinct.setdefault((s.count, s.max, s.rms, s.worst_value), s)
        return tuple(sorted(distinct.values(), key=lambda s: -s.max_over_rms))

    @property
    def worst_pairs(self) -> tuple[PairStatistics, ...]:
        """Pairs by falling largest amplification."""
        return tuple(sorted(self.pairs, key=lambda p: -max(p.amplification, default=0.0)))

    def __repr__(self) -> str:
        return f"Diagnosis({len(self.sites)} sites, {len(self.pairs)} pairs)"

    def __rich__(self) -> Group:
        tables = [self._site_table()]
        if self.pairs:
            tables.append(self._pair_table())
        if self.root_causes:
            tables.append(self._cause_table())
        return Group(*tables)

    def __str__(self) -> str:
        return in_text(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data with None for nan and inf; only ``top`` sites keep ``channel_max``."""
        kept = {s.name for s in self.worst_sites[: self.top]}
        whole = asdict(self)
        for entry, site in zip(whole["sites"], self.sites, strict=True):
            if site.name not in kept:
                del entry["channel_max"]
        plain: dict[str, Any] = finite(whole)
        return plain

    def to_json(self, path: str | Path) -> Path:
        """Write ``to_dict`` to ``path`` atomically. Returns the path."""
        return write_atomic(path, json_text(self.to_dict(), indent=1) + "\n")

    def plot(self, folder: str | Path) -> tuple[Path, ...]:
        """Draw PNGs into ``folder``, which is made if missing. Returns their paths.

        Writes ``outliers_by_depth.png``, ``worst_site_channels.png`` and, if there are pairs,
        ``amplification.png``. Files of the same names are replaced.
        """
        figures = {
            "outliers_by_depth.png": outliers_by_depth(self.sites, self.images),
            "worst_site_channels.png": site_channels(self.worst_sites[0]),
        }
        if self.pairs:
            figures["amplification.png"] = amplification_spectra(self.worst_pairs)
        return tuple(save(figure, Path(folder) / name) for name, figure in figures.items())

    def _site_table(self) -> Table:
        title = f"Sites with the heaviest tails ({self.images} images, {len(self.sites)} tensors)"
        table = Table(title=title, title_justify="left")
        table.add_column("site", overflow="fold", ratio=1)
        table.add_column("role", overflow="fold")
        for column in ("max", "rms", "max/rms", "kurtosis", "p99.99/p50", "top share", "channel"):
            table.add_column(column, justify="right", no_wrap=True)
        for s in self.worst_sites[: self.top]:
            share = f"{100 * s.top_share:.0f} % in {s.top_channels}/{s.channels}"
            numbers = (s.max, s.rms, s.max_over_rms, s.kurtosis, s.percentile_ratio)
            cells = (_short(x) for x in numbers)
            table.add_row(s.name, s.role, *cells, share, str(s.worst_channel))
        return table

    def _pair_table(self) -> Table:
        title = f"Pairs that amplify most ({len(self.pairs)} pairs; alignment is 1 at random)"
        table = Table(title=title, title_justify="left")
        table.add_column("pair", overflow="fold", ratio=1)
        for column in ("s₁", "max s‖Bu‖", "‖BA‖", "alignment", "channel", "colinearity", "random"):
            table.add_column(column, justify="right", no_wrap=True)
        for p in self.worst_pairs[: self.top]:
            worst = p.worst_channels[0]
            table.add_row(
                p.name.replace(".weight", ""),
                _short(p.singular_values[0]),
                _short(max(p.amplification)),
                _short(p.product_norm),
                _short(p.alignment),
                str(worst.channel),
                f"{worst.colinearity:.2f}",
                f"{p.expected_worst:.2f}",
            )
        return table

    def _cause_table(self) -> Table:
        title = "Root causes: y = Σ sᵢ (wᵀuᵢ)(vᵢᵀx), through f; the direction that explains most"
        table = Table(title=title, title_justify="left")
        table.add_column("pair", overflow="fold", ratio=1)
        for column in ("channel", "value", "i", "s", "wᵀu", "vᵀx", "product", "through f", "share"):
            table.add_column(column, justify="right", no_wrap=True)
        for cause in self.root_causes:
            c = cause.contribution
            parts = (
                c.singular_value,
                c.second_component,
                c.input_component,
                c.product,
                c.explained,
            )
            table.add_row(
                cause.pair.replace(".weight", ""),
                str(cause.channel),
                _short(cause.value),
                str(c.direction + 1),
                *(_short(x) for x in parts),
                f"{100 * cause.share:.0f} %",
            )
        return table


def _short(x: float) -> str:
    if not math.isfinite(x):
        return "-" if math.isnan(x) else "inf"
    if x != 0 and (abs(x) >= 1e5 or abs(x) < 1e-3):
        return f"{x:.1e}"
    return f"{x:.4g}" if abs(x) < 1000 else f"{x:.0f}"
