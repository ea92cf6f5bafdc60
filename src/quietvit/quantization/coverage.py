"""``Coverage``: the share of a model's multiply-accumulates that runs on quantized operands.

A method decides which operands are quantized.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quietvit.quantization.adjustments import Compensation
from quietvit.quantization.method import Method
from quietvit.quantization.slot import Slot
from quietvit.tracing import MATMUL_KINDS, Trace


@dataclass(frozen=True)
class Coverage:
    """Share of the multiply-accumulates (MACs) on quantized operands, and what stays float.

    A product counts as quantized if both its operands are. ``untouched``: every other matrix
    product, with the reason. ``by_bits``: MACs of the quantized products by operand bits, largest
    first. ``W4A8`` is a 4-bit weight with an 8-bit activation, ``A8A4`` is two activations.
    ``MXFP4`` is two operands of that format, ``W MXFP4 A MXFP8-E4M3`` two different ones.
    """

    quantized_macs: int
    total_macs: int
    untouched: tuple[tuple[str, str], ...]
    untouched_macs: tuple[int, ...]
    by_bits: tuple[tuple[str, int], ...] = ()

    @property
    def fraction(self) -> float:
        """quantized_macs / total_macs; 0 for a model without MACs."""
        return self.quantized_macs / self.total_macs if self.total_macs else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "quantized_macs": self.quantized_macs,
            "total_macs": self.total_macs,
            "fraction": self.fraction,
            "by_bits": dict(self.by_bits),
            "untouched": [
                {"site": site, "macs": macs, "reason": reason}
                for (site, reason), macs in zip(self.untouched, self.untouched_macs, strict=True)
            ],
        }

    def shares(self) -> str:
        """Return ``MACs: 78 % W4A4, 14 % A8A4, 8 % float``; the float share comes last."""
        left = self.total_macs - self.quantized_macs
        parts = [*self.by_bits, *([("float", left)] if left else [])]
        return "MACs: " + ", ".join(f"{_percent(n / self.total_macs)} {name}" for name, n in parts)

    def __str__(self) -> str:
        lines = [
            f"coverage {100 * self.fraction:.2f} %: {self.quantized_macs / 1e6:.2f} of "
            f"{self.total_macs / 1e6:.2f} MMACs an image on quantized operands"
        ]
        if self.total_macs:
            lines.append(self.shares())
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
        head = str(self).splitlines()[: 2 if self.total_macs else 1]
        return Group(*head, *([table] if self.untouched else []))


def _percent(share: float) -> str:
    """Whole percent; three digits if that would show 0 or 100."""
    whole = f"{100 * share:.0f}"
    return f"{whole} %" if whole not in ("0", "100") else f"{100 * share:.3g} %"


def coverage_of(
    trace: Trace,
    method: Method,
    labels: Mapping[str, str],
    compensations: Mapping[str, Compensation],
) -> Coverage:
    """Count one image's MACs.

    ``labels`` of quantizers by ``Slot.key``, ``compensations`` by block name.
    """
    done, untouched, macs = Counter[str](), [], []
    for site in trace.matmuls:
        slots = (Slot(site, 0), Slot(site, 1))
        if site.kind not in MATMUL_KINDS:
            reasons = [f"inside {site.function}, which cannot be taken apart"]
        else:
            reasons = [_why_float(method, slot) for slot in slots if slot.key not in labels]
        if reasons:
            untouched.append((site.name, "; ".join(dict.fromkeys(reasons))))
            macs.append(site.macs)
        else:
            done[_label(slots, labels)] += site.macs
    extra = 0
    for name, compensation in compensations.items():
        extra += compensation.macs
        untouched.append((name, "compensation of a block, float"))
        macs.append(compensation.macs)
    by_bits = tuple(done.most_common())
    return Coverage(done.total(), trace.macs + extra, tuple(untouched), tuple(macs), by_bits)


def _label(slots: tuple[Slot, Slot], labels: Mapping[str, str]) -> str:
    first, second = (labels[slot.key] for slot in slots)
    if not (first.isdecimal() and second.isdecimal()):
        if first == second:
            return first
        return f"W {second} A {first}" if slots[1].is_weight else f"A {first} A {second}"
    return f"W{second}A{first}" if slots[1].is_weight else f"A{first}A{second}"


def _why_float(method: Method, slot: Slot) -> str:
    if method.slot_bits(slot) is None:
        return f"{slot.operand} float: {method.why_float(slot)}"
    return f"{slot.operand} float: {method.name} chose no quantizer"
