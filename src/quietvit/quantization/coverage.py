"""``Coverage``: which share of a model's multiply-accumulates runs on quantized operands.

It is computed in ``quantized``; here it is kept and shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Coverage:
    """Which share of the multiply-accumulates runs on quantized operands, and what does not.

    A product counts as quantized when both its operands are. ``untouched``: every other matrix
    multiplication, with the reason.
    """

    quantized_macs: int
    total_macs: int
    untouched: tuple[tuple[str, str], ...]
    untouched_macs: tuple[int, ...]

    @property
    def fraction(self) -> float:
        """quantized_macs / total_macs, 0 for a model without any."""
        return self.quantized_macs / self.total_macs if self.total_macs else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "quantized_macs": self.quantized_macs,
            "total_macs": self.total_macs,
            "fraction": self.fraction,
            "untouched": [
                {"site": site, "macs": macs, "reason": reason}
                for (site, reason), macs in zip(self.untouched, self.untouched_macs, strict=True)
            ],
        }

    def __str__(self) -> str:
        lines = [
            f"coverage {100 * self.fraction:.2f} %: {self.quantized_macs / 1e6:.2f} of "
            f"{self.total_macs / 1e6:.2f} MMACs an image on quantized operands"
        ]
        width = max((len(site) for site, _ in self.untouched), default=0)
        for (site, reason), macs in zip(self.untouched, self.untouched_macs, strict=True):
            lines.append(f"  float: {site:<{width}}  {macs / 1e6:>9.2f} MMACs  {reason}")
        return "\n".join(lines)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table("float site", "MMACs", "reason")
        for (site, reason), macs in zip(self.untouched, self.untouched_macs, strict=True):
            table.add_row(site, f"{macs / 1e6:.2f}", reason)
        return Group(str(self).splitlines()[0], *([table] if self.untouched else []))
