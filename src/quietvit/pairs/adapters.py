"""Detect low-rank adapters such as LoRA's."""

from __future__ import annotations

from quietvit.pairs.maps import is_narrow
from quietvit.tracing import Operand, Site, Trace

_MAPS = ("linear", "conv")


def adapters_of(trace: Trace) -> tuple[list[str], frozenset[str]]:
    """Return the names of adapted maps W, and the names of all adapter maps A and B.

    An adapter (LoRA) computes W x + B A x. A and W read the same input, only a factor stands
    between A and B, and A is narrow. Several adapters may be added to one W.
    """
    sites = {site.name: site for site in trace.sites}
    adapted: dict[str, None] = {}
    adapters: set[str] = set()

    def only(operand: Operand, *kinds: str) -> Site | None:
        site = sites[operand.fed_by[0]] if len(operand.fed_by) == 1 else None
        return site if site is not None and site.kind in kinds else None

    for add in (site for site in trace.sites if site.kind == "add"):
        for own, other in (add.operands, add.operands[::-1]):
            up, base = only(own, *_MAPS), only(other, "add", *_MAPS)
            down = None if up is None else only(up.operands[0], *_MAPS)
            while base is not None and base.kind == "add":
                base = only(base.operands[0], "add", *_MAPS)
            if up is None or down is None or base is None or not is_narrow(down, up):
                continue
            if base.operands[0].fed_by == down.operands[0].fed_by and base is not up:
                adapters |= {up.name, down.name}
                if base.role not in ("head", "constant"):
                    adapted[base.name] = None
    return list(adapted), frozenset(adapters)
