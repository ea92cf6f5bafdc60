"""``Advice``: the result of ``advise``, with tables for the terminal and JSON.

``ladder`` and ``causes`` measure.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from quietvit.advice.causes import Cause
from quietvit.advice.ladder import Row, pareto
from quietvit.advice.steps import Step
from quietvit.files import finite, json_text, write_atomic
from quietvit.origin import Origins, counted, provenance
from quietvit.text import in_text


@dataclass(frozen=True)
class Advice:
    """The measured settings of one model, the causes of its errors, and the next steps.

    Attributes:
        model: class of the model.
        images: number of images for calibration, and for measuring.
        origins: how these images were generated (``quietvit.synthesize``); None for real images.
        rows: all measured settings, in the order of the trials. The printed table groups them by
            bits.
        target: name of the row whose sites are explained. None if the lowest bits are already good.
        causes: the three most expensive sites, with their causes.
        steps: recommended next steps, with the numbers behind them.
        failed: (setting, reason) for each setting that raised an error.
        skipped: settings that did not fit into the time.
        seconds: total time.
        complete: False if Ctrl-C ended the search.
    """

    model: str
    images: tuple[int, int]
    origins: Origins
    rows: tuple[Row, ...]
    target: str | None
    causes: tuple[Cause, ...]
    steps: tuple[Step, ...]
    failed: tuple[tuple[str, str], ...]
    skipped: tuple[str, ...]
    seconds: float
    complete: bool

    @property
    def pareto(self) -> tuple[Row, ...]:
        """The Pareto front of rows in agreement, bits, size and deployability."""
        return pareto(self.rows)

    def __repr__(self) -> str:
        return f"Advice({self.model}, {len(self.rows)} rows, {len(self.steps)} steps)"

    def __rich__(self) -> Group:
        _, measured = self.images
        told = list(map(counted, self.images, self.origins))
        head = [
            f"{self.model}: {len(self.rows)} settings in {self.seconds:.0f} s, calibrated on "
            f"{told[0]}, measured on {told[1]} without labels",
            *provenance(self.origins),
        ]
        classifier = self.rows[0].agreement is not None
        if classifier:
            error = 50 / measured**0.5
            head.append(f"class kept: standard error at most {error:.1f} points")
        tail = []
        if self.skipped:
            tail.append(f"no time for: {', '.join(self.skipped)}; give more minutes")
        tail += [f"{name} failed: {why}" for name, why in self.failed]
        if not self.complete:
            tail.append("stopped early: only these settings were measured")
        parts: list[Any] = [*head, self._row_table(classifier)]
        if self.causes:
            parts.append(self._cause_table())
        if self.steps:
            parts.append(self._step_table())
        return Group(*parts, *tail)

    def __str__(self) -> str:
        return in_text(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data. ``pareto`` marks the rows on the Pareto front."""
        front = set(self.pareto)
        whole = asdict(self)
        for plain, row in zip(whole["rows"], self.rows, strict=True):
            plain |= {"agreement": row.agreement, "pareto": row in front}
        found: dict[str, Any] = finite(whole)
        return found

    def to_json(self, path: str | Path) -> Path:
        """Write ``to_dict`` to ``path`` atomically. Returns the path."""
        return write_atomic(path, json_text(self.to_dict(), indent=1) + "\n")

    def _row_table(self, classifier: bool) -> Table:
        table = Table(title="Settings (* marks the Pareto front)", title_justify="left")
        table.add_column("")
        table.add_column("method", overflow="fold")
        table.add_column("bits", overflow="fold")
        measures = ("class kept", "KL", "top-1 drop") if classifier else ("error",)
        for name in (*measures, "MiB", "mean bits", "quantized", "s"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("integers", no_wrap=True)
        front = set(self.pareto)
        groups = list(dict.fromkeys(row.bits for row in self.rows))
        for row in sorted(self.rows, key=lambda row: groups.index(row.bits)):
            e = row.effect
            if row.agreement is None:
                values = [f"{100 * (e.error or 0.0):.1f} %"]
            else:
                values = [f"{100 * row.agreement:.1f} %", f"{e.kl or 0.0:.3g}"]
                values.append(f"{100 * (e.drop or 0.0):.1f}")
            table.add_row(
                "*" if row in front else "",
                row.method,
                row.bits,
                *values,
                f"{row.mib:.1f}",
                f"{row.average_bits:.1f}",
                f"{100 * row.integer_share:.0f} %",
                f"{row.seconds:.0f}",
                "deployable" if row.deployable else "simulated",
            )
        return table

    def _cause_table(self) -> Table:
        table = Table(title=f"What holds {self.target} back", title_justify="left")
        for name in ("site", "cost alone", "operand", "why"):
            table.add_column(name, overflow="fold")
        for cause in self.causes:
            operand = f"{cause.operand} ({100 * cause.share:.0f} % of it)"
            table.add_row(cause.site, f"{cause.cost:.3g}", operand, cause.why)
        return table

    def _step_table(self) -> Table:
        table = Table(title="Next steps", title_justify="left")
        for name in ("do", "because"):
            table.add_column(name, overflow="fold")
        for step in self.steps:
            table.add_row(step.do, step.because)
        return table
