"""``Sensitivity``: the result of ``sensitivity``, as tables for the terminal, JSON and a plot.

Nothing is measured here; drawing is in ``plots``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from quietvit.advice.effects import Effect
from quietvit.files import finite, json_text, write_atomic

TOP = 10


@dataclass(frozen=True)
class Part:
    """What one site or one role costs.

    Attributes:
        name: of the site or role, as a key of ``overrides``.
        role: role of the site.
        sites: number of sites that it touches.
        macs: their multiply-accumulates at batch 1.
        bits: of its quantized operands, such as ``4`` or ``4/8``.
        alone: effect if it alone is quantized.
        without: effect if everything but it is quantized. Both are None if not measured.
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
    """What each role and each site costs when a model is quantized. ``print`` shows the tables.

    Attributes:
        model, setting, policy: class of the model, method with bits, and the method's rules.
        images: number of images.
        macs: multiply-accumulates of one image in the whole model.
        whole: effect if everything is quantized.
        roles, sites: in the order of the forward pass. A role includes what an override of that
            role changes, so parts of roles overlap: ``post_softmax`` is in ``attention_value``.
        estimated: whether effects of parts are estimates.
        complete: False if Ctrl-C ended the measurement; the missing effects are None.
    """

    model: str
    setting: str
    policy: str
    images: int
    macs: int
    whole: Effect
    roles: tuple[Part, ...]
    sites: tuple[Part, ...]
    estimated: bool
    complete: bool

    @property
    def measure(self) -> str:
        """The attribute of ``Effect`` that parts are ordered by: ``kl``, else ``error``."""
        return "error" if self.whole.kl is None else "kl"

    def cost(self, part: Part) -> float | None:
        """Effect of quantizing this part alone, in terms of ``measure``; None if not measured."""
        return self._value(part.alone)

    def gain(self, part: Part) -> float | None:
        """How much smaller the effect gets if this part alone is left in float."""
        left, whole = self._value(part.without), self._value(self.whole)
        return None if left is None or whole is None else whole - left

    @property
    def worst_sites(self) -> tuple[Part, ...]:
        """Sites by falling cost; sites that were not measured come last."""
        return self._sorted(self.sites)

    @property
    def worst_roles(self) -> tuple[Part, ...]:
        """Roles by falling cost."""
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
        head = [f"{self.model}, {self.setting}, {self.images} images"]
        head.append(f"everything quantized: {shown(self.whole)}")
        head.append("alone: only this part is quantized; without: everything but this part is")
        if self.estimated:
            head.append("the effects of parts are estimates, from one pass each")
        if not self.complete:
            missing = sum(p.alone is None or p.without is None for p in self.roles + self.sites)
            head.append(
                f"stopped early: {missing} of {len(self.roles + self.sites)} parts lack data"
            )
        sites = self.worst_sites[:TOP]
        return Group(
            *head,
            self._table("Roles, the most expensive first", self.worst_roles),
            self._table(f"The {len(sites)} most expensive of {len(self.sites)} sites", sites),
        )

    def __str__(self) -> str:
        console = Console(width=120, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

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
        """Return plain data, with None for what was not measured."""
        plain: dict[str, Any] = finite(asdict(self) | {"measure": self.measure})
        return plain

    def to_json(self, path: str | Path) -> Path:
        """Write ``to_dict`` to ``path`` atomically. Returns the path."""
        return write_atomic(path, json_text(self.to_dict(), indent=1) + "\n")

    def plot(self, folder: str | Path) -> tuple[Path, ...]:
        """Draw ``sensitivity.png`` into ``folder``: role by depth. Returns its path."""
        from quietvit.advice.plots import PlottedSite, role_by_depth
        from quietvit.measure.plots import save

        what = {"kl": "KL of the outputs, nats", "error": "relative error of the outputs"}
        figure = role_by_depth(
            [PlottedSite(p.name, p.role, self.cost(p), self.gain(p)) for p in self.sites],
            f"{self.model}, {self.setting}: {what[self.measure]}, "
            f"{'estimated' if self.estimated else 'measured'} on {self.images} images",
        )
        return (save(figure, Path(folder) / "sensitivity.png"),)


_TITLES = {"error": "error", "kl": "KL", "changed": "class changed"}
"""Effects that the tables show; JSON has them all."""


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
    """Return ``error 12 %, KL 0.3, class changes 8 %``, without what is None."""
    values = ((name, getattr(effect, name)) for name in _TITLES)
    return ", ".join(f"{_TITLES[n]} {_cell(n, v)}" for n, v in values if v is not None)


def _or_least(value: float | None) -> float:
    return float("-inf") if value is None else value
