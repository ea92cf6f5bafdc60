"""The trust region of a decay: no singular direction of a pair is carried through zero.

Works on rates and operators from ``penalties``; knows no optimizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quietvit.decay.penalty import Basis, Operator, Penalty
from quietvit.decay.plan import Batch, overlaps
from quietvit.decay.products import largest_rate, product_dtype
from quietvit.pairs import MatrixPair

Steps = Sequence[float]
Bases = Sequence[Basis | None]
# What a load may be where the update is going to be computed in bfloat16.
ROOM = 1 - 2.0**-6
# A bound is then at most (smaller side)^(1/8) times the truth: 2.3 at 768.
_SQUARINGS = 2


@dataclass(frozen=True)
class Suspects:
    """Batches that cheap bounds do not keep within, and the bounds of all sides' rates so far."""

    batches: tuple[int, ...]
    bounds: tuple[float, ...]


class TrustRegion:
    """Limits the summed update of every parameter so that no direction changes sign.

    Guarantee: for every parameter, the new value is (I - L) times the old one, with L a symmetric
    linear map (the sum of the maps of all pairs that touch the parameter) whose eigenvalues lie in
    [0, 1], or in [-1, 1] for ``cosine``, which also lengthens; up to rounding. So along each
    eigenvector, and for a parameter in one pair along each singular direction of the partner (of
    diag(sqrt w) B for the A of ``peak``), the component keeps its sign or becomes zero, at any
    strength.

    How: side p of a pair has the largest rate r_p = learning rate x strength x largest eigenvalue
    of its operator. The load of p is the sum of r_q over all sides q that share an entry with it.
    Where the load is at most 1, the plain update is taken as it is. Elsewhere the eigenvalues
    of p are cut at r_p / load, so that the cuts of sides that share an entry sum to at most 1;
    directions below the cut keep their plain update. Derived here.

    Cost: nothing while (learning rate)(strength)(min(shape)) summed over shared entries is at most
    1; beyond that, the spread of norm gains where they are partners; where that is not enough, one
    Gram matrix of the smaller side per pair to bound the rates without a decomposition, squared
    twice where one product is not enough, or unlikely to be; only where that bound exceeds 1,
    eigenvalues, and a warning (once) where they do too.
    """

    def __init__(
        self,
        pairs: Sequence[MatrixPair],
        parameters: Mapping[str, Tensor],
        plan: Sequence[Batch],
        rule: Penalty,
    ) -> None:
        self._pairs = pairs
        self._plan = plan
        self._rule = rule
        views = [view for pair in pairs for view in (pair.first, pair.second)]
        self._sharing = overlaps(views, parameters)
        self._static = [0.0] * len(views)
        self._outputs: dict[int, int] = {}
        for place, batch in enumerate(plan):
            operands = batch.read(parameters)
            bounds = operands.apply(rule.static_bounds)
            for position in batch.members:
                self._static[2 * position : 2 * position + 2] = bounds
            if operands.A.ndim == 2 and operands.before is None and operands.between is None:
                self._outputs[place] = operands.B.shape[1]
        self._matrix: Tensor | None = None
        self._warned = False

    def suspects(self, steps: Steps, parameters: Mapping[str, Tensor]) -> Suspects:
        """Return the batches that neither shapes nor norm gains keep within.

        The gains are read, with one sync, only where shapes alone are not enough.
        """
        heavy = self._heavy(steps, self._static, 1.0)
        beside = [i for i in heavy if i in self._outputs]
        if not beside:
            return Suspects(tuple(heavy), tuple(self._static))
        bounds = list(self._static)
        found = [
            self._rule.bound_beside_gains(self._plan[i].read_first(parameters), self._outputs[i])
            for i in beside
        ]
        members = [member for i in beside for member in self._plan[i].members]
        together = torch.cat([bound.to(found[0].device) for bound in found])
        for member, bound in zip(members, together.tolist(), strict=True):
            bounds[2 * member + 1] = bound
        return Suspects(tuple(self._heavy(steps, bounds, ROOM)), tuple(bounds))

    def _heavy(self, steps: Steps, bounds: Sequence[float], most: float) -> list[int]:
        """The batches with a side whose load may exceed ``most``, and those that it shares with."""
        rates = [step * bound for step, bound in zip(steps, bounds, strict=True)]
        heavy: set[int] = set()
        for side, sharing in enumerate(self._sharing):
            if not sum(rates[q] for q in sharing) <= most:  # NaN is heavy
                heavy.update(q // 2 for q in (side, *sharing))
        return [i for i, batch in enumerate(self._plan) if not heavy.isdisjoint(batch.members)]

    def within(
        self,
        suspects: Suspects,
        parameters: Mapping[str, Tensor],
        steps: Steps,
        bases: Bases,
        products: str = "float32",
        device: torch.device | None = None,
        *,
        sharp: bool = False,
    ) -> Tensor:
        """Return a flag on the device: do bounds keep all loads at most 1? No sync.

        Where the update is going to be computed in bfloat16, at most ``ROOM``. ``sharp``: by Gram
        matrices squared, whether or not one product is likely to be enough.
        """
        if device is None:
            device = next(iter(parameters.values())).device
        if not suspects.batches:
            return torch.ones((), dtype=torch.bool, device=device)
        bounds = torch.tensor(suspects.bounds, device=device)
        squarings = _SQUARINGS if sharp or self._is_crowded(steps) else 0
        for i in suspects.batches:
            batch = self._plan[i]
            operands = batch.read(parameters)
            dtype = product_dtype(products, operands.A)
            rate = partial(largest_rate, dtype=dtype, squarings=squarings)
            bound_A, bound_B = operands.apply(partial(self._rule.bounds, basis=bases[i], rate=rate))
            members = torch.tensor(batch.members, device=device)
            for side, bound in enumerate((bound_A, bound_B)):
                at = 2 * members + side
                bounds[at] = torch.minimum(bounds[at], bound.to(bounds))
        rates = bounds * torch.tensor(steps, device=device)
        return (self._loads(rates) <= (1 if products == "float32" else ROOM)).all()

    def _is_crowded(self, steps: Steps) -> bool:
        """Whether one product is unlikely to be enough.

        Of random square matrices it gives a bound of (2 min(shape))^(1/2).
        """
        rates = [step * (2 * bound) ** 0.5 for step, bound in zip(steps, self._static, strict=True)]
        return any(sum(rates[q] for q in sharing) > 1 for sharing in self._sharing)

    def limited(
        self, suspects: Suspects, parameters: Mapping[str, Tensor], steps: Steps, bases: Bases
    ) -> list[tuple[Batch, Tensor, Tensor]] | None:
        """Return each batch with its steps for A and B, cut where needed; None if none is."""
        bounds = torch.tensor(suspects.bounds, dtype=torch.float64)
        for i in suspects.batches:
            batch = self._plan[i]
            operators = batch.read(parameters).apply(partial(self._rule.operators, basis=bases[i]))
            for side, operator in enumerate(operators):
                at = 2 * torch.tensor(batch.members) + side
                bounds[at] = _largest(operator).cpu().to(bounds)
        rates = bounds * torch.tensor(steps, dtype=torch.float64)
        loads = self._loads(rates)
        if bool((loads <= 1).all()):
            return None
        self._warn(loads)
        cuts = torch.where(loads > 1, rates / loads, torch.inf)
        found = []
        for i, batch in enumerate(self._plan):
            operands = batch.read(parameters)
            A, B = operands.A, operands.B
            dA, dB = operands.apply(partial(self._rule.directions, basis=bases[i]))
            step_A, step_B = (_times(d, batch, steps, side) for side, d in enumerate((dA, dB)))
            at = 2 * torch.tensor(batch.members)
            cut_A, cut_B = cuts[at].to(A), cuts[at + 1].to(B)
            if bool(torch.isfinite(torch.cat([cut_A, cut_B])).any()):
                of_A, of_B = operands.apply(partial(self._rule.operators, basis=bases[i]))
                factors = torch.tensor(steps, device=A.device, dtype=A.dtype)
                at = at.to(A.device)
                cut = _cut_step_A(A, of_A, factors[at], cut_A)
                step_A = _where(torch.isfinite(cut_A), cut, step_A)
                cut = _cut_step_B(B, of_B, factors[at + 1], cut_B)
                step_B = _where(torch.isfinite(cut_B), cut, step_B)
            found.append((batch, step_A, step_B))
        return found

    def _loads(self, rates: Tensor) -> Tensor:
        if self._matrix is None or self._matrix.device != rates.device:
            matrix = torch.zeros(len(self._sharing), len(self._sharing))
            for side, sharing in enumerate(self._sharing):
                matrix[side, sharing] = 1.0
            self._matrix = matrix.to(rates.device)
        return self._matrix.to(rates.dtype) @ rates

    def _warn(self, loads: Tensor) -> None:
        if self._warned:
            return
        self._warned = True
        worst = int(loads.argmax())
        pair = self._pairs[worst // 2]
        warnings.warn(
            f"learning rate x strength would shrink {(pair.first, pair.second)[worst % 2]} in "
            f"{pair.name} by a factor of {float(loads[worst]):.3g} in one step; the step is "
            "limited so that no direction changes sign. A lower strength is cheaper and milder.",
            stacklevel=2,
        )


def _largest(operator: Operator) -> Tensor:
    """Largest absolute eigenvalue that matters, shape (n,): of cosine, growth counts as well."""
    gram = operator.gram
    top = gram.amax(-1) if gram.ndim == 2 else torch.linalg.eigvalsh(gram)[:, -1]
    if operator.weights is not None:
        top = top * operator.weights.amax(-1)
    if operator.shift is not None:
        top = torch.maximum(top - operator.shift, operator.shift)
    return top.clamp_min(0)


def _cut_step_A(A: Tensor, operator: Operator, step: Tensor, cut: Tensor) -> Tensor:
    if operator.gram.ndim == 2:
        return A * _cut(operator.gram, operator.shift, step, cut)
    rates, basis = _decomposed(operator.gram)
    factors = _cut(rates, operator.shift, step, cut)
    return basis @ (factors[:, :, None] * (basis.mT @ A))


def _cut_step_B(B: Tensor, operator: Operator, step: Tensor, cut: Tensor) -> Tensor:
    diagonal = operator.gram.ndim == 2
    rates, basis = (operator.gram, None) if diagonal else _decomposed(operator.gram)
    rates = rates[:, None, :]
    if operator.weights is not None:
        rates = rates * operator.weights[:, :, None]
    factors = _cut(rates, operator.shift, step, cut)
    return B * factors if basis is None else ((B @ basis) * factors) @ basis.mT


def _decomposed(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, zero where they are rounding errors of the largest, and eigenvectors."""
    rates, basis = torch.linalg.eigh(gram)
    noise = torch.finfo(gram.dtype).eps * gram.shape[-1] * rates[:, -1:]
    return torch.where(rates < noise, 0.0, rates), basis


def _cut(rates: Tensor, shift: Tensor | None, step: Tensor, cut: Tensor) -> Tensor:
    to = (-1, *([1] * (rates.ndim - 1)))
    if shift is not None:
        rates = rates - shift.view(to)
    return torch.minimum(torch.maximum(rates * step.view(to), -cut.view(to)), cut.view(to))


def _times(directions: Tensor, batch: Batch, steps: Steps, side: int) -> Tensor:
    rows = [d * steps[2 * i + side] for d, i in zip(directions, batch.members, strict=True)]
    return torch.stack(rows)


def _where(rows: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(rows.view(-1, *([1] * (yes.ndim - 1))), yes, no)
