"""The results of comparing quantization methods on one model: data, table, sentences, HTML page.

``compare.methods`` measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quietvit.origin import Origin, Origins, in_words, provenance
from quietvit.report.page import grid, section, template
from quietvit.report.plots import DARK, LIGHT, method_panels
from quietvit.report.results import FLOAT, Frozen
from quietvit.report.tables import Column, Table


class MethodRow(Frozen):
    """One quantized model, or the float model (method ``float``), and its measured numbers.

    ``top1``: accuracy in percent, None without labels. ``kept``: percent of the images with the
    float model's class. ``kl``: mean KL divergence from the float model's probabilities, in nats.
    ``error``: relative error of the outputs, ‖ŷ - y‖ / ‖y‖. ``quantized``: percent of the
    multiply-accumulates with two quantized operands. ``deployable``: standard integer kernels
    compute its codes, None for the float model. ``mean_bits``: mean over both operands of all
    multiply-accumulates. ``seconds``: time to quantize. ``origin``: how the calibration images were
    generated (``quietvit.synthesize``), None for real images. ``kept`` and ``kl`` are None if the
    model is not a classifier.
    """

    method: str
    bits: str
    top1: float | None = None
    kept: float | None = None
    kl: float | None = None
    error: float | None = None
    quantized: float
    deployable: bool | None
    mib: float
    mean_bits: float
    seconds: float
    origin: Origin = None

    @property
    def name(self) -> str:
        return f"{self.method} {self.bits}"

    @property
    def score(self) -> float:
        """Top-1, else images with the float model's class, else minus the error, in percent."""
        if self.top1 is not None:
            return self.top1
        return -100 * (self.error or 0.0) if self.kept is None else self.kept


class MethodResults(Frozen):
    """All rows of a comparison, with what was compared on what.

    ``failed``: the reason for each setting that could not be measured. ``missing``: settings that
    are still to be measured. ``identity``: what must be the same to add rows later. ``origin``: how
    the images that measure were generated, None for real images.
    """

    identity: Mapping[str, str]
    rows: tuple[MethodRow, ...]
    failed: Mapping[str, str] = {}
    missing: tuple[str, ...] = ()
    versions: Mapping[str, str]
    command: str
    machine: str
    date: str
    origin: Origin = None

    @property
    def provenance(self) -> list[str]:
        """Lines that say how images were generated, none for real images."""
        found: dict[str, Origin] = {}
        for row in self.rows:
            if row.origin is not None:
                found[in_words(row.origin)] = row.origin
        both: list[Origins] = [(origin, None) for origin in found.values()]
        return [line for pair in (*both, (None, self.origin)) for line in provenance(pair)]

    @property
    def floating(self) -> MethodRow:
        return next(row for row in self.rows if row.method == FLOAT)

    @property
    def measure(self) -> str:
        """What ``MethodRow.score`` is, in words."""
        if self.floating.top1 is not None:
            return "top-1 in %"
        return "minus the error in %" if self.floating.kept is None else "class kept in %"

    def by_bits(self) -> dict[str, list[MethodRow]]:
        """Return the quantized rows by bits, the best method first."""
        found: dict[str, list[MethodRow]] = {}
        for row in self.rows:
            if row.method != FLOAT:
                found.setdefault(row.bits, []).append(row)
        return {bits: sorted(rows, key=lambda row: -row.score) for bits, rows in found.items()}


def sentences(results: MethodResults) -> list[str]:
    """Return one sentence for each choice of bits: the best method, and its distance to float."""
    told = []
    for bits, rows in results.by_bits().items():
        best = rows[0]
        of = f"{best.method} is the best of {len(rows)} methods" if rows[1:] else best.method
        if best.top1 is not None and results.floating.top1 is not None:
            lost = results.floating.top1 - best.top1
            where = "above" if lost < 0 else "below"
            value = f"top-1 {best.top1:.2f} %, {abs(lost):.2f} points {where} float"
        elif best.kept is not None:
            value = f"the float model's class on {best.kept:.2f} % of the images"
        else:
            value = f"error {100 * (best.error or 0.0):.2f} %"
        told.append(f"{bits}: {of}: {value}.")
    return told


def method_table(results: MethodResults) -> Table:
    """Return the table of all rows. Columns that no row has are left out."""
    columns = (
        Column("method", "method", lambda row: row.method, numeric=False),
        Column("bits", "bits", lambda row: row.bits, numeric=False),
        Column("top-1 %", "top1", lambda row: row.top1, _decimals(2)),
        Column("class kept %", "kept", lambda row: row.kept, _decimals(2)),
        Column("KL", "kl", lambda row: row.kl, _decimals(4)),
        Column("error", "error", lambda row: row.error, _decimals(4), detail=True),
        Column("quantized %", "quantized", lambda row: row.quantized, _decimals(1)),
        Column("kernels", "deployable", lambda row: row.deployable, _kernels, numeric=False),
        Column("MiB", "mib", lambda row: row.mib, _decimals(1)),
        Column("mean bits", "mean_bits", lambda row: row.mean_bits, _decimals(1), detail=True),
        Column("s", "seconds", lambda row: row.seconds, _decimals(1)),
        Column("generated", "generated", _generated, _or_dash, numeric=False, detail=True),
    )
    given = [c for c in columns if any(c.value(row) is not None for row in results.rows)]
    facts = results.identity
    title = f"{facts['model']} on {facts['images']}, calibrated on {facts['calibration']}"
    return Table(title, tuple(given), results.rows)


def _generated(row: MethodRow) -> str | None:
    """Return how the calibration images of a row were generated, in words."""
    return None if row.origin is None else in_words(row.origin)


def render_methods(results: MethodResults) -> str:
    """Return the whole page as HTML."""
    return template("methods.html.j2").render(
        results=results,
        sentences=sentences(results),
        table=grid(method_table(results)),
        sections=(
            section(
                "Methods by bits",
                f"{results.measure}; further right is better. The dashed line is the float model.",
                method_panels(results.by_bits(), results.floating.score, results.measure),
            ),
        ),
        glossary=GLOSSARY,
        light=LIGHT,
        dark=DARK,
    )


GLOSSARY = {
    "W4A8": "weights as 4-bit integers, activations as 8-bit integers",
    "top-1": "share of the images whose most probable class is right",
    "class kept": "share of the images with the same class as the float model; needs no labels",
    "KL": "mean divergence from the float model's probabilities, in nats; 0 is the same",
    "quantized": "share of the multiply-accumulates whose two operands are quantized",
    "kernels": "integers: standard integer kernels compute this; simulated: only this library does",
    "MiB": "size of all parameters, with quantized weights packed at their bits",
}


def _decimals(count: int) -> Any:
    return lambda value: "–" if value is None else f"{value:.{count}f}"


def _or_dash(value: str | None) -> str:
    return "–" if value is None else value


def _kernels(deployable: bool | None) -> str:
    return {None: "float", True: "integers", False: "simulated"}[deployable]


def in_order(rows: Sequence[MethodRow], wanted: Sequence[str]) -> tuple[MethodRow, ...]:
    """Return float first, then the rows named in ``wanted`` in that order, then all others."""
    places = {name: place for place, name in enumerate(wanted)}
    last = len(places)
    return tuple(
        sorted(rows, key=lambda row: -1 if row.method == FLOAT else places.get(row.name, last))
    )
