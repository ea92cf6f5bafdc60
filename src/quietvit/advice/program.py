"""``Program``: the integer program that chooses bits for each operand under a budget.

``bits`` gives it the costs. scipy's ``milp`` solves it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from quietvit.advice.sizes import FLOAT_BITS, average_bits, weight_size
from quietvit.advice.switches import number_above_0
from quietvit.errors import QuietvitError
from quietvit.quantization import Method, Slot
from quietvit.tracing import Trace


@dataclass(frozen=True)
class _Unit:
    """Operands that share one choice, and their key in ``Method.overrides``."""

    key: str
    slots: tuple[Slot, ...]

    def bits(self, method: Method) -> tuple[int | None, ...]:
        return tuple(map(method.slot_bits, self.slots))


class Program:
    """The units that can choose, and how much of the budget each choice uses.

    A site with a weight is one unit, because kernels exist for pairs such as W4A8. Each operand of
    a product of activations is a unit of its own.
    """

    def __init__(self, trace: Trace, settings: Mapping[str, Method]) -> None:
        self._trace, self._settings = trace, settings
        first = next(iter(settings.values()))
        units = []
        for site in trace.matmuls:
            slots = tuple(
                slot
                for slot in (Slot(site, 0), Slot(site, 1))
                if first.overrides.key_for(slot) is None
            )
            if site.kind not in first.kinds:
                continue
            if site.weight_shape is not None and len(slots) == 2:
                units.append(_Unit(site.name, slots))
            else:
                units += [_Unit(f"{site.name}:{slot.operand}", (slot,)) for slot in slots]
        self._units = [unit for unit in units if len(set(map(unit.bits, settings.values()))) > 1]

    def _uses(self, average: float | None) -> tuple[np.ndarray, float]:
        """Return each choice's use of the budget, (units, choices), and that of everything else."""
        total = sum(site.macs for site in self._trace.matmuls)
        uses = np.zeros((len(self._units), len(self._settings)))
        for j, method in enumerate(self._settings.values()):
            for i, unit in enumerate(self._units):
                for slot, own in zip(unit.slots, unit.bits(method), strict=True):
                    bits = own or FLOAT_BITS
                    if average is not None:
                        uses[i, j] += slot.site.macs * bits / 2 / total
                    elif slot.is_weight and slot.site.weight_shape is not None:
                        uses[i, j] += math.prod(slot.site.weight_shape) * bits / 8
        counted = average_bits if average is not None else weight_size
        first = next(iter(self._settings.values()))
        return uses, counted(self._trace, first) - float(uses[:, 0].sum())

    def check(self, average: float | None, weight_bytes: float | None) -> float:
        """Return the budget.

        Raises:
            QuietvitError: not one budget, nothing can choose, or the fewest bits exceed the budget.
        """
        if (average is None) == (weight_bytes is None):
            raise QuietvitError("give one budget, either average (bits) or weight_bytes.")
        budget = average if average is not None else weight_bytes
        assert budget is not None
        if not number_above_0(budget):
            raise QuietvitError(f"the budget is {budget!r}. Give a positive number.")
        if not self._units:
            raise QuietvitError(
                "overrides, exclude or other fields of the method already decide the bits of every "
                "site, so there is nothing to choose. Remove some of them."
            )
        uses, fixed = self._uses(average)
        least = fixed + float(uses.min(1).sum())
        if least > budget * (1 + 1e-9):
            unit = "bits on average" if average is not None else "bytes of weights"
            raise QuietvitError(
                f"no choice of bits meets the budget of {budget:g} {unit}: the least possible is "
                f"{math.ceil(1000 * least) / 1000:g} with {', '.join(self._settings)}. Raise the "
                "budget, or add a choice with fewer bits. Sites with fixed bits also count, such "
                "as the patch embedding and the head."
            )
        return budget

    def solve(
        self,
        costs: Mapping[tuple[Slot, int], float],
        average: float | None,
        weight_bytes: float | None,
    ) -> tuple[dict[str, str], float]:
        """Return the overrides with the least total cost within the budget, and this cost."""
        budget = self.check(average, weight_bytes)
        names = list(self._settings)
        cost = np.zeros((len(self._units), len(names)))
        for j, method in enumerate(self._settings.values()):
            for i, unit in enumerate(self._units):
                for slot, bits in zip(unit.slots, unit.bits(method), strict=True):
                    cost[i, j] += costs.get((slot, bits), 0.0) if bits else 0.0
        uses, fixed = self._uses(average)
        # One 0/1 variable per (unit, choice), flattened. Row i of ``one_each`` sums the choices of
        # unit i: with 2 units and 3 choices, the rows are 111000 and 000111.
        one_each = np.kron(np.eye(len(self._units)), np.ones(len(names)))
        # The second term breaks ties: between equal costs, the smaller use wins.
        goal = cost.ravel() / max(cost.max(), 1e-30) + 1e-9 * uses.ravel() / max(uses.max(), 1e-30)
        result = milp(
            goal,
            integrality=np.ones(goal.size),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(uses.ravel(), -np.inf, (budget - fixed) * (1 + 1e-9)),
            ],
        )
        if result.x is None:
            raise QuietvitError(
                f"scipy found no choice of bits ({result.message}). Raise the budget."
            )
        best = result.x.reshape(cost.shape).argmax(1)
        chosen = {unit.key: names[j] for unit, j in zip(self._units, best, strict=True)}
        total = float(cost[np.arange(len(best)), best].sum())
        return _by_site(chosen), total


def _by_site(chosen: Mapping[str, str]) -> dict[str, str]:
    """Write operands of one site that chose the same under the name of the site."""
    merged: dict[str, str] = {}
    for key, bits in chosen.items():
        site, _, operand = key.rpartition(":")
        both = operand in ("left", "right") and all(
            chosen.get(f"{site}:{each}") == bits for each in ("left", "right")
        )
        merged[site if both else key] = bits
    return merged
