"""Find which matrix products ran in integers, from the runtime's own graph.

A file that says int8 proves nothing, because a runtime may silently compute it in float.
"""

from __future__ import annotations

from dataclasses import dataclass

from quietvit.deployment.facts import Facts, Product
from quietvit.deployment.runtime import Kernel, Runtime


@dataclass(frozen=True)
class Ran:
    """How one matrix product ran: the runtime's operator, integer or not, and the reason if not."""

    product: str
    macs: int
    operator: str
    integer: bool
    reason: str | None = None


@dataclass(frozen=True)
class Proof:
    """How every product ran. ``claimed`` names those that the file says are integers."""

    runtime: str
    ran: tuple[Ran, ...]
    claimed: frozenset[str]
    total_macs: int

    @property
    def integer_share(self) -> float:
        """Share of all multiply-accumulates that ran in integers."""
        macs = sum(ran.macs for ran in self.ran if ran.integer)
        return macs / self.total_macs if self.total_macs else 0.0

    @property
    def broken(self) -> tuple[Ran, ...]:
        """Products that ran in float although the file claims integers."""
        return tuple(ran for ran in self.ran if ran.product in self.claimed and not ran.integer)

    @property
    def counts(self) -> dict[str, int]:
        """The number of products by operator of the runtime, largest first."""
        counts: dict[str, int] = {}
        for ran in self.ran:
            counts[ran.operator] = counts.get(ran.operator, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))


def prove(runtime: Runtime, facts: Facts) -> Proof:
    """Read from the runtime's graph how each product of ``facts`` runs.

    Raises QuietvitError if the runtime does not tell.
    """
    facts = runtime.claims(facts)
    kernels = runtime.kernels(facts)
    ran = tuple(
        _ran(product, kernels.get(f"{product.name}:product"), runtime.precautions)
        for product in facts.products
    )
    claimed = frozenset(p.name for p in facts.products if p.why_float is None)
    return Proof(runtime.name, ran, claimed, facts.total_macs)


def _ran(product: Product, kernel: Kernel | None, precautions: frozenset[str]) -> Ran:
    why = product.why_float
    if why is not None and (kernel is None or not kernel.integer):
        if kernel is not None and kernel.reason is not None and why in precautions:
            why = kernel.reason  # the kernel seen here is more precise than the precaution
        return Ran(product.name, product.macs, kernel.operator if kernel else "float", False, why)
    if kernel is None:
        reason = "no operator of the runtime's graph has its name, so it was fused into another"
        return Ran(product.name, product.macs, "?", False, reason)
    return Ran(product.name, product.macs, kernel.operator, kernel.integer, kernel.reason)
