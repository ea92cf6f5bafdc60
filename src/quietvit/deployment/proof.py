"""Which matrix products ran in integers, as the runtime's own graph tells.

A file that says int8 proves nothing: a runtime may compute all of it in float and not say so.
"""

from __future__ import annotations

from dataclasses import dataclass

from quietvit.deployment.facts import Facts, Product
from quietvit.deployment.runtime import Kernel, Runtime


@dataclass(frozen=True)
class Ran:
    """How one matrix product ran: the runtime's operator, whether in integers, and why not."""

    product: str
    macs: int
    operator: str
    integer: bool
    reason: str | None = None


@dataclass(frozen=True)
class Proof:
    """How every product ran. ``claimed``: those that the file says are integers."""

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
        """Products that the file claims are integers and that ran in float."""
        return tuple(ran for ran in self.ran if ran.product in self.claimed and not ran.integer)

    @property
    def counts(self) -> dict[str, int]:
        """How many products each operator of the runtime computed."""
        found: dict[str, int] = {}
        for ran in self.ran:
            found[ran.operator] = found.get(ran.operator, 0) + 1
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def prove(runtime: Runtime, facts: Facts) -> Proof:
    """Read off the runtime's graph how each product of ``facts`` runs.

    Raises QuietvitError where the runtime does not tell.
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
            why = kernel.reason  # what was seen says more than what was to be feared
        return Ran(product.name, product.macs, kernel.operator if kernel else "float", False, why)
    if kernel is None:
        reason = "no operator of the runtime's graph bears its name: it was fused into another"
        return Ran(product.name, product.macs, "?", False, reason)
    return Ran(product.name, product.macs, kernel.operator, kernel.integer, kernel.reason)
