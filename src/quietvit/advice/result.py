"""``Sensitivity``: the result of ``sensitivity``, with tables for the terminal, JSON and a plot.

``sensitivity`` measures, and ``plots`` draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from quietvit.advice.effects import Effect
from quietvit.files import finite, json_text, write_atomic
from quietvit.origin import Origins, counted, provenance
from quietvit.text import in_text

TOP = 10


@dataclass(frozen=True)
class Part:
    """The cost of one site or one role.

    Attributes:
        name: name of the site or role, as a key of ``overrides``.
        role: role of the site.
        sites: number of its sites.
        macs: multiply-accumulates of these sites at batch size 1.
        bits: bits of its quantized operands, such as ``4`` or ``4/8``.
        alone: effect of quantizing only this part; None if not measured.
        without: effect of quantizing everything except this part; None if not measured.
    """

    name: str
    role: str
    sites: int
    macs: int
    bits: str
    alone: Effect | None
    without: Effect | None


@dataclass(frozen=True)
class Sensitivity:
    """The cost of quantizing each role and each site of a model. ``print`` shows the tables.

    Attributes:
        model, setting, policy: class of the model, method with bits, and the method's rules.
        images: number of images.
        part_images: number of images behind the effects of parts. It is smaller than ``images``
            if Ctrl-C ended the estimate.
        origins: how the images for calibration and for measuring were generated
            (``quietvit.synthesize``); None for real images.
        macs: multiply-accumulates of the whole model for one image.
        whole: effect of quantizing everything.
        roles, sites: parts in the order of the forward pass. A role holds the operands that its
            override changes. Roles overlap: ``post_softmax`` is in ``attention_value``.
        estimated: whether the effects of parts are estimates.
        complete: False if Ctrl-C ended the measurement. Missing effects are None.
    """

    model: str
    setting: str
    policy: str
    images: int
    part_images: int
    origins: Origins
    macs: int
    whole: Effect
    roles: tuple[Part, ...]
    sites: tuple[Part, ...]
    estimated: bool
    complete: bool

    @property
    def measure(self) -> str:
        """The attribute of ``Effect`` that sorts parts: ``kl`` of a classifier, else ``error``."""
        return "error" if self.whole.kl is None else "kl"

    def cost(self, part: Part) -> float | None:
        """Return the effect of quantizing only this part, in ``measure``; None if not measured."""
        return self._value(part.alone)

    def gain(self, part: Part) -> float | None:
        """Return how much the effect of quantizing everything shrinks if this part stays float."""
        left, whole = self._value(part.without), self._value(self.whole)
        return None if left is None or whole is None else whole - left

    @property
    def worst_sites(self) -> tuple[Part, ...]:
        """Sites in order of descending cost. Sites that were not measured come last."""
        return self._sorted(self.sites)

    @property
    def worst_roles(self) -> tuple[Part, ...]:
        """Roles in order of descending cost. Roles that were not measured come last."""
        return self._sorted(self.roles)

    def _value(self, effect: Effect | None) -> float | None:
        found: float | None = None if effect is None else getattr(effect, self.measure)
        return found

    def _sorted(self, parts: Sequence[Part]) -> tuple[Part, ...]:
        costs = {part.name: self.cost(part) for part in parts}
        return tuple(sorted(parts, key=lambda part: -_or_least(costs[part.name])))

    def __repr__(self) -> str:
        return (
            f"Sensitivity({self.model}, {self.setting}, {len(self.roles)} roles, "
            f"{len(self.sites)} sites)"
        )

    def __rich__(self) -> Group:
        head = [f"{self.model}, {self.setting}, {counted(self.images, self.origins[1])}"]
        head += provenance(self.origins)
        head.append(f"everything quantized: {shown(self.whole)}")
        head.append("alone: only this part is quantized; without: all other parts are quantized")
        if self.estimated:
            head.append("the effects of parts are estimates")
        if not self.complete and self.part_images < self.images:
            head.append(f"stopped early: parts are estimated on {self.part_images} of the images")
        elif not self.complete:
            missing = sum(p.alone is None or p.without is None for p in self.roles + self.sites)
            head.append(
                f"stopped early: {missing} of {len(self.roles + self.sites)} parts are not measured"
            )
        sites = self.worst_sites[:TOP]
        return Group(
            *head,
            self._table("Roles, the most expensive first", self.worst_roles),
            self._table(f"The {len(sites)} most expensive of {len(self.sites)} sites", sites),
        )

    def __str__(self) -> str:
        return in_text(self)

    def _table(self, title: str, parts: Sequence[Part]) -> Table:
        table = Table(title=title, title_justify="left")
        table.add_column("part", overflow="fold")
        table.add_column("bits", justify="right", no_wrap=True)
        table.add_column("MACs", justify="right", no_wrap=True)
        names = _names(self)
        for when in ("alone", "without"):
            for name in names:
                table.add_column(f"{when}: {_TITLES[name]}", justify="right")
        for part in parts:
            share = f"{100 * part.macs / self.macs:.0f} %" if self.macs else "-"
            cells = [
                _cell(name, None if effect is None else getattr(effect, name))
                for effect in (part.alone, part.without)
                for name in names
            ]
            table.add_row(part.name, part.bits, share, *cells)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, with None for missing values."""
        plain: dict[str, Any] = finite(asdict(self) | {"measure": self.measure})
        return plain

    def to_json(self, path: str | Path) -> Path:
        """Write ``to_dict`` to ``path`` atomically. Returns the path."""
        return write_atomic(path, json_text(self.to_dict(), indent=1) + "\n")

    def plot(self, folder: str | Path) -> tuple[Path, ...]:
        """Draw ``sensitivity.png``, a map of roles by depth, into ``folder``. Returns its path."""
        from quietvit.advice.plots import PlottedSite, role_by_depth
        from quietvit.measure.plots import save

        what = {"kl": "KL of the outputs, nats", "error": "relative error of the outputs"}
        images = counted(self.images, self.origins[1])
        figure = role_by_depth(
            [PlottedSite(p.name, p.role, self.cost(p), self.gain(p)) for p in self.sites],
            f"{self.model}, {self.setting}: {what[self.measure]}, "
            f"{'estimated' if self.estimated else 'measured'} on {images}",
        )
        return (save(figure, Path(folder) / "sensitivity.png"),)


_TITLES = {"error": "error", "kl": "KL", "changed": "class changed"}
"""Effects in the tables. JSON has all effects."""


def _names(found: Sensitivity) -> tuple[str, ...]:
    if found.estimated:
        return (found.measure,)
    return ("error",) if found.measure == "error" else ("kl", "changed")


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name == "kl":
        return f"{value:.3g}"
    return f"{100 * value:.3g} %"


def shown(effect: Effect) -> str:
    """Return for example ``error 12 %, KL 0.3, class changed 8 %``. Values of None are left out."""
    values = ((name, getattr(effect, name)) for name in _TITLES)
    return ", ".join(f"{_TITLES[n]} {_cell(n, v)}" for n, v in values if v is not None)


def _or_least(value: float | None) -> float:
    return float("-inf") if value is None else value
