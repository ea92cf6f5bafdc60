"""``Coverage``: which share of a model's multiply-accumulates runs on quantized operands.

Which operands are quantized is decided by a method.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from quietvit.quantization.adjustments import Compensation
from quietvit.quantization.method import Method
from quietvit.quantization.slot import Slot
from quietvit.tracing import MATMUL_KINDS, Trace


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


def coverage_of(
    trace: Trace,
    method: Method,
    quantized: Container[str],
    compensations: Mapping[str, Compensation],
) -> Coverage:
    """Count the multiply-accumulates of one image.

    ``quantized``: the keys of the slots that have a quantizer. ``compensations``: by block name.
    """
    done, untouched, macs = 0, [], []
    for site in trace.matmuls:
        if site.kind not in MATMUL_KINDS:
            reasons = [f"inside {site.function}, which cannot be taken apart"]
        else:
            slots = (Slot(site, 0), Slot(site, 1))
            reasons = [_why_float(method, slot) for slot in slots if slot.key not in quantized]
        if reasons:
            untouched.append((site.name, "; ".join(dict.fromkeys(reasons))))
            macs.append(site.macs)
        else:
            done += site.macs
    extra = 0
    for name, compensation in compensations.items():
        extra += compensation.macs
        untouched.append((name, "compensation of a block, float"))
        macs.append(compensation.macs)
    return Coverage(done, trace.macs + extra, tuple(untouched), tuple(macs))


def _why_float(method: Method, slot: Slot) -> str:
    if method.slot_bits(slot) is None:
        return f"{slot.operand} float: {method.why_float(slot)}"
    return f"{slot.operand} float: left so by {method.name}"
