"""``choose_bits``: choose the bits of each site under a budget, from the cost of each site alone.

``sensitivity`` measures the costs, and scipy's ``milp`` finds the best choice.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from quietvit.advice.sensitivity import measured
from quietvit.advice.sizes import FLOAT_BITS, average_bits
from quietvit.advice.switches import Switches, read_batches, refuse_training
from quietvit.errors import QuietvitError
from quietvit.files import finite, json_text, write_atomic
from quietvit.quantization import Method, OnTop, Slot
from quietvit.quantization.on_top import SHARED
from quietvit.quantization.settings import parse_bits, parse_method, written_bits
from quietvit.tracing import MATMUL_KINDS, Site, Trace, plain_model
from quietvit.tracing import trace as trace_model

CHOICES = ("W4A4", "W6A6", "W8A8")


@dataclass(frozen=True)
class BitChoice:
    """The bits chosen for each site.

    Attributes:
        overrides: bits by site name, for ``Method.overrides`` of any method.
        method: the given method with these bits, for ``quietvit.quantize(model, choice.method)``.
        cost: sum of the costs of the sites alone at their bits, in ``measure``.
        measure: ``kl``, or ``error`` for a model that is not a classifier (squares are summed).
        average_bits: mean over both operands and all multiply-accumulates. Float counts 32.
        weight_bytes: packed size of the weights of all matrix products, without scales.
        complete: False if Ctrl-C ended the search before all choices were measured.
    """

    overrides: Mapping[str, str]
    method: Method
    cost: float
    measure: str
    average_bits: float
    weight_bytes: float
    complete: bool = True

    def __str__(self) -> str:
        counts = Counter(self.overrides.values()).most_common()
        sites = ", ".join(f"{number} sites {bits}" for bits, number in counts)
        early = "" if self.complete else "; stopped early, before all choices were measured"
        return (
            f"{self.average_bits:.2f} bits on average, weights {self.weight_bytes / 2**20:.2f} "
            f"MiB: {sites}; the {self.measure} of the sites alone sums to {self.cost:.3g}{early}"
        )

    def to_json(self, path: str | Path) -> Path:
        """Write overrides and numbers to ``path`` atomically. Returns the path."""
        plain = {key: value for key, value in vars(self).items() if key != "method"}
        return write_atomic(path, json_text(finite(plain), indent=1) + "\n")


def choose_bits(
    model: nn.Module,
    method: Method | str,
    images: Any,
    *,
    average: float | None = None,
    weight_bytes: float | None = None,
    choices: Sequence[str] = CHOICES,
    calibration: Any = None,
    estimate: bool = True,
    trace: Trace | None = None,
    progress: bool = True,
) -> BitChoice:
    """Choose the bits of each site to minimize the change of the outputs under a budget.

    For each choice, the model is calibrated once, and the cost of each site alone is measured or
    estimated (``quietvit.sensitivity``). The sum of these costs is minimized exactly. This treats
    sites as independent, which holds best for small errors. For several budgets, call
    ``quietvit.advice.bit_costs`` once, and ``choose`` for each budget.

    Sites with overrides, exclusions or bits of their own in ``method`` keep them and count in the
    budget. By default, these are the patch embedding and the head.

    Args:
        model: the float model, in eval mode.
        method: a config or a name. Its working bits are replaced.
        images: as for ``quietvit.sensitivity``.
        average: budget of mean bits over both operands and all multiply-accumulates. Uniform W6A6
            has 6. A float operand counts 32.
        weight_bytes: budget for the weights of all matrix products. Give exactly one budget.
        choices: bits to choose from.
        calibration, trace, progress: as for ``quietvit.sensitivity``.
        estimate: estimate the costs instead of measuring them.

    Raises:
        QuietvitError: not exactly one budget, a budget below the least possible, fewer than two
            choices, or see ``quietvit.sensitivity``.
    """
    search = _Search(model, method, images, choices, trace)
    search.problem().check(average, weight_bytes)
    costs = search.measure(calibration, estimate, progress)
    return costs.choose(average=average, weight_bytes=weight_bytes)


def bit_costs(
    model: nn.Module,
    method: Method | str,
    images: Any,
    *,
    choices: Sequence[str] = CHOICES,
    calibration: Any = None,
    estimate: bool = True,
    trace: Trace | None = None,
    progress: bool = True,
) -> BitCosts:
    """Measure the cost of each site at each choice of bits. See ``choose_bits`` for arguments.

    Ctrl-C ends the search. The result then has the choices so far, if there are at least two.
    """
    search = _Search(model, method, images, choices, trace)
    return search.measure(calibration, estimate, progress)


@dataclass(frozen=True)
class BitCosts:
    """The cost of each site alone at each choice of bits.

    Attributes:
        trace: trace of the model.
        settings: the method at each choice.
        costs: costs by choice and site name, in ``measure``. Costs in ``error`` are squared.
        measure: ``kl`` or ``error``.
        complete: False if Ctrl-C ended the search.
    """

    trace: Trace
    settings: Mapping[str, Method]
    costs: Mapping[str, Mapping[str, float]]
    measure: str
    complete: bool

    def choose(
        self, *, average: float | None = None, weight_bytes: float | None = None
    ) -> BitChoice:
        """Choose the bits of each site under a budget, as ``choose_bits`` does."""
        problem = _Problem(self.trace, self.settings)
        chosen = problem.solve(self.costs, average, weight_bytes)
        overrides = {site.name: name for site, name in chosen.items()}
        lowest = next(iter(self.settings.values()))
        every = {**lowest.overrides.plain(), **overrides}
        final = with_bits(lowest, lowest.weight_bits, lowest.activation_bits, every)
        return BitChoice(
            overrides=overrides,
            method=final,
            cost=sum(self.costs[name].get(site.name, 0.0) for site, name in chosen.items()),
            measure=self.measure,
            average_bits=average_bits(self.trace, final),
            weight_bytes=weight_size(self.trace, final),
            complete=self.complete,
        )


class _Search:
    """The checked arguments of ``choose_bits``, and the measurement of costs."""

    def __init__(
        self,
        model: nn.Module,
        method: Method | str,
        images: Any,
        choices: Sequence[str],
        trace: Trace | None,
    ) -> None:
        refuse_training(model)
        names = list(dict.fromkeys(written_bits(choice) for choice in choices))
        if len(names) < 2:
            shown = ", ".join(names) or "none"
            raise QuietvitError(f"choices is {shown}. Give at least two choices of bits.")
        given = parse_method(method) if isinstance(method, str) else method
        self.settings = {name: with_bits(given, *parse_bits(name)) for name in names}
        self.model = plain_model(model)
        self.batches = read_batches(images, self.model)
        self.trace = trace or trace_model(self.model, self.batches[0][:1])

    def problem(self) -> _Problem:
        return _Problem(self.trace, self.settings)

    def measure(self, calibration: Any, estimate: bool, progress: bool) -> BitCosts:
        costs: dict[str, dict[str, float]] = {}
        measure = "kl"
        try:
            for name, setting in self.settings.items():
                switches = Switches(
                    self.model,
                    setting,
                    self.batches,
                    calibration=calibration,
                    trace=self.trace,
                    progress=progress,
                )
                found = measured(switches, estimate=estimate, progress=progress)
                if not found.complete:
                    raise KeyboardInterrupt
                measure = found.measure
                power = 1 if measure == "kl" else 2
                costs[name] = {
                    part.name: (found.cost(part) or 0.0) ** power for part in found.sites
                }
        except KeyboardInterrupt:
            if len(costs) < 2:
                raise
        return BitCosts(
            trace=self.trace,
            settings={name: self.settings[name] for name in costs},
            costs=costs,
            measure=measure,
            complete=len(costs) == len(self.settings),
        )


def with_bits(
    method: Method,
    weight_bits: int | None,
    activation_bits: int | None,
    overrides: Mapping[str, Any] | None = None,
) -> Method:
    """Return the method with other working bits and, if given, other overrides."""
    if isinstance(method, OnTop):
        base = with_bits(method.base, weight_bits, activation_bits, overrides)
        own = {key: value for key, value in method if key not in (*SHARED, "base")}
        return type(method)(**own, base=base)
    fields = dict(method) | {"weight_bits": weight_bits, "activation_bits": activation_bits}
    if overrides is not None:
        fields["overrides"] = overrides
    return type(method)(**fields)


def weight_size(trace: Trace, method: Method) -> float:
    """Return the bytes of the weights of all matrix products at the method's bits. Float has 32."""
    bits: dict[Any, tuple[int, int]] = {}
    for site in trace.matmuls:
        if site.weight_shape is not None:
            own = _bits_of(method, site)[1] or FLOAT_BITS
            key = site.weight or site.name
            bits[key] = max(own, bits.get(key, (0, 0))[0]), math.prod(site.weight_shape)
    return sum(own * entries for own, entries in bits.values()) / 8


def _bits_of(method: Method, site: Site) -> tuple[int | None, int | None]:
    if site.kind not in MATMUL_KINDS or site.kind not in method.kinds:
        return None, None
    return method.slot_bits(Slot(site, 0)), method.slot_bits(Slot(site, 1))


class _Problem:
    """The integer program: sites that can choose, and the use of the budget by each choice."""

    def __init__(self, trace: Trace, settings: Mapping[str, Method]) -> None:
        self._trace, self._settings = trace, settings
        first = next(iter(settings.values()))
        self.sites = [
            site
            for site in trace.matmuls
            if len({_bits_of(method, site) for method in settings.values()}) > 1
            and all(first.overrides.key_for(Slot(site, index)) is None for index in (0, 1))
        ]

    def _uses(self, average: float | None) -> tuple[np.ndarray, float]:
        """Return each choice's use of the budget, (sites, choices), and that of all other sites."""
        total = sum(site.macs for site in self._trace.matmuls)
        counted = average_bits if average is not None else weight_size
        uses = np.zeros((len(self.sites), len(self._settings)))
        for j, method in enumerate(self._settings.values()):
            for i, site in enumerate(self.sites):
                first, second = (bits or FLOAT_BITS for bits in _bits_of(method, site))
                if average is not None:
                    uses[i, j] = site.macs * (first + second) / 2 / total
                elif site.weight_shape is not None:
                    uses[i, j] = math.prod(site.weight_shape) * second / 8
        method = next(iter(self._settings.values()))
        return uses, counted(self._trace, method) - float(uses[:, 0].sum())

    def check(self, average: float | None, weight_bytes: float | None) -> None:
        """Raise QuietvitError unless there is one budget, and the fewest bits meet it."""
        if (average is None) == (weight_bytes is None):
            raise QuietvitError("give one budget, either average (bits) or weight_bytes.")
        uses, fixed = self._uses(average)
        least = fixed + float(uses.min(1).sum())
        budget = average if average is not None else weight_bytes
        assert budget is not None
        if least > budget * (1 + 1e-9):
            unit = "bits on average" if average is not None else "bytes of weights"
            raise QuietvitError(
                f"no choice of bits meets the budget of {budget:g} {unit}: the least possible is "
                f"{math.ceil(1000 * least) / 1000:g} with {', '.join(self._settings)}. Raise the "
                "budget, or add a choice with fewer bits. Sites with fixed bits also count, such "
                "as the patch embedding and the head."
            )

    def solve(
        self,
        costs: Mapping[str, Mapping[str, float]],
        average: float | None,
        weight_bytes: float | None,
    ) -> dict[Site, str]:
        """Return the choice of each site with the least total cost within the budget."""
        self.check(average, weight_bytes)
        names = list(self._settings)
        if not self.sites:
            return {}
        cost = np.array(
            [[costs[name].get(site.name, 0.0) for name in names] for site in self.sites]
        )
        uses, fixed = self._uses(average)
        budget = average if average is not None else weight_bytes
        assert budget is not None
        # One 0/1 variable per (site, choice), flattened. Row i of ``one_each`` sums the choices of
        # site i: with 2 sites and 3 choices, the rows are 111000 and 000111.
        one_each = np.kron(np.eye(len(self.sites)), np.ones(len(names)))
        # The second term breaks ties: between equal costs, the smaller use wins.
        goal = cost.ravel() / max(cost.max(), 1e-30) + 1e-9 * uses.ravel() / max(uses.max(), 1e-30)
        found = milp(
            goal,
            integrality=np.ones(goal.size),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(uses.ravel(), -np.inf, (budget - fixed) * (1 + 1e-9)),
            ],
        )
        if found.x is None:
            raise QuietvitError(
                f"scipy found no choice of bits ({found.message}). Raise the budget."
            )
        best = found.x.reshape(cost.shape).argmax(1)
        return {site: names[j] for site, j in zip(self.sites, best, strict=True)}
