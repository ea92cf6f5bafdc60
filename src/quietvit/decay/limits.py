"""The trust region of a decay: no singular direction of a pair changes sign.

It works on the rates and operators of ``penalties``, and knows no optimizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quietvit.decay.batches import PairBatch, overlaps
from quietvit.decay.penalty import Basis, Operator, Penalty
from quietvit.decay.products import largest_rate, product_dtype
from quietvit.pairs import MatrixPair

Steps = Sequence[float]
Bases = Sequence[Basis | None]
# The largest load of an update in bfloat16: rounding must not flip the sign of a direction.
ROOM = 1 - 2.0**-6
# With two squarings a bound is at most (smaller side)^(1/8) times the true value: 2.3 at 768.
_SQUARINGS = 2


@dataclass(frozen=True)
class BatchesToCheck:
    """Batches whose loads may still exceed 1 after the checks so far.

    ``batches`` holds their positions. ``bounds`` holds the upper bounds of the eigenvalues of all
    sides so far: entry 2 i is A of pair i, entry 2 i + 1 is B of pair i.
    """

    batches: tuple[int, ...]
    bounds: tuple[float, ...]


class TrustRegion:
    """Limits the summed update of every parameter so that no direction changes sign.

    Guarantee: the new value of every parameter is (I - L) times the old one, up to rounding. L is
    the sum of the symmetric linear maps of all pairs that touch the parameter. Its eigenvalues lie
    in [0, 1], or in [-1, 1] for ``cosine``, which also lengthens. So each eigenvector's component
    keeps its sign or becomes zero, at any strength. For a parameter in one pair the eigenvectors
    are the singular directions of the partner (of diag(sqrt w) B for the A of ``peak``).

    Method: side p of a pair has the rate r_p = learning rate x strength x largest eigenvalue of its
    operator. The load of p is the sum of r_q over all sides q that share an entry with it, p
    included. If the load is at most 1, p takes the plain update. Otherwise its eigenvalues are cut
    at r_p / load. So the cuts of sides that share an entry sum to at most 1. Directions below the
    cut keep their plain update. Derived here.

    Example: fc1 (4 h, h) is the second side of (norm2, fc1) with r = 0.3 and the first side of
    (fc1, fc2) with r = 0.9. The load of both is 1.2, so their rates are cut at 0.25 and 0.75.

    Checks, from the cheapest to the most expensive. Each runs only if the one before cannot show
    that all loads are at most 1.

    1. Shapes: a rate is at most (learning rate)(strength)(min(shape)). Costs nothing.
    2. Norm gains as partners: the spread of the gains bounds the rate. One synchronization.
    3. A Gram matrix of the smaller side of each matrix bounds the rate without a decomposition. It
       is squared twice if one product is unlikely to be enough.
    4. Eigenvalues. If a load still exceeds 1, the step is limited, with one warning per region.
    """

    def __init__(
        self,
        pairs: Sequence[MatrixPair],
        parameters: Mapping[str, Tensor],
        batches: Sequence[PairBatch],
        rule: Penalty,
    ) -> None:
        self._pairs = pairs
        self._batches = batches
        self._rule = rule
        views = [view for pair in pairs for view in pair.sides]
        self._sharing = overlaps(views, parameters)
        self._static = [0.0] * len(views)
        self._outputs: dict[int, int] = {}
        for place, batch in enumerate(batches):
            operands = batch.read(parameters)
            bounds = operands.apply(rule.static_bounds)
            for position in batch.members:
                self._static[2 * position : 2 * position + 2] = bounds
            if operands.A.ndim == 2 and operands.before is None and operands.between is None:
                self._outputs[place] = operands.B.shape[1]
        self._matrix: Tensor | None = None
        self._warned = False

    def to_check(self, steps: Steps, parameters: Mapping[str, Tensor]) -> BatchesToCheck:
        """Return the batches that shapes and norm gains cannot clear (checks 1 and 2).

        Reads the gains, with one synchronization, only if shapes are not enough.
        """
        heavy = self._heavy(steps, self._static, 1.0)
        beside = [i for i in heavy if i in self._outputs]
        if not beside:
            return BatchesToCheck(tuple(heavy), tuple(self._static))
        bounds = list(self._static)
        result = [
            self._rule.bound_beside_gains(self._batches[i].read_first(parameters), self._outputs[i])
            for i in beside
        ]
        members = [member for i in beside for member in self._batches[i].members]
        together = torch.cat([bound.to(result[0].device) for bound in result])
        for member, bound in zip(members, together.tolist(), strict=True):
            bounds[2 * member + 1] = bound
        return BatchesToCheck(tuple(self._heavy(steps, bounds, ROOM)), tuple(bounds))

    def _heavy(self, steps: Steps, bounds: Sequence[float], most: float) -> list[int]:
        """Return the batches with a side whose load may exceed ``most``, and those sharing with it.

        Batches that share an entry are included, because the load sums all their rates.
        """
        rates = [step * bound for step, bound in zip(steps, bounds, strict=True)]
        heavy: set[int] = set()
        for side, sharing in enumerate(self._sharing):
            if not sum(rates[q] for q in sharing) <= most:  # not "> most": NaN is heavy too
                heavy.update(q // 2 for q in (side, *sharing))
        return [i for i, batch in enumerate(self._batches) if not heavy.isdisjoint(batch.members)]

    def within(
        self,
        to_check: BatchesToCheck,
        parameters: Mapping[str, Tensor],
        steps: Steps,
        bases: Bases,
        products: str = "float32",
        device: torch.device | None = None,
        *,
        sharp: bool = False,
    ) -> Tensor:
        """Return a flag on the device: whether bounds keep all loads at most 1 (check 3).

        It needs no device synchronization. The limit is ``ROOM`` for products other than float32.
        ``sharp`` squares the Gram matrices always, not only if one product is unlikely to do.
        """
        if device is None:
            device = next(iter(parameters.values())).device
        if not to_check.batches:
            return torch.ones((), dtype=torch.bool, device=device)
        bounds = torch.tensor(to_check.bounds, device=device)
        squarings = _SQUARINGS if sharp or self._is_crowded(steps) else 0
        for i in to_check.batches:
            batch = self._batches[i]
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
        """Return whether one product is unlikely to be enough.

        For a random square matrix one product gives a bound of about (2 min(shape))^(1/2).
        """
        rates = [step * (2 * bound) ** 0.5 for step, bound in zip(steps, self._static, strict=True)]
        return any(sum(rates[q] for q in sharing) > 1 for sharing in self._sharing)

    def limited(
        self, to_check: BatchesToCheck, parameters: Mapping[str, Tensor], steps: Steps, bases: Bases
    ) -> list[tuple[PairBatch, Tensor, Tensor]] | None:
        """Return each batch with its changes of A and B, cut where needed (check 4).

        Returns None if no load exceeds 1. The caller subtracts the changes, shaped like A and B.
        """
        bounds = torch.tensor(to_check.bounds, dtype=torch.float64)
        for i in to_check.batches:
            batch = self._batches[i]
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
        result = []
        for i, batch in enumerate(self._batches):
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
            result.append((batch, step_A, step_B))
        return result

    def _loads(self, rates: Tensor) -> Tensor:
        """Return the load of each side: the 0-1 matrix of sharing sides times all rates."""
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
            f"learning rate x strength would shrink {pair.sides[worst % 2]} in "
            f"{pair.name} by a factor of {float(loads[worst]):.3g} in one step. The step is "
            "limited so that no direction changes sign, which is slow. Lower the strength.",
            stacklevel=2,
        )


def _largest(operator: Operator) -> Tensor:
    """Return the largest absolute eigenvalue of each operator, shape (n,).

    Only ``cosine`` has negative ones (``shift``). There growth counts like decay.
    """
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
    """Return eigenvalues and eigenvectors. Eigenvalues at rounding level become zero."""
    rates, basis = torch.linalg.eigh(gram)
    noise = torch.finfo(gram.dtype).eps * gram.shape[-1] * rates[:, -1:]
    return torch.where(rates < noise, 0.0, rates), basis


def _cut(rates: Tensor, shift: Tensor | None, step: Tensor, cut: Tensor) -> Tensor:
    to = (-1, *([1] * (rates.ndim - 1)))
    if shift is not None:
        rates = rates - shift.view(to)
    return torch.minimum(torch.maximum(rates * step.view(to), -cut.view(to)), cut.view(to))


def _times(directions: Tensor, batch: PairBatch, steps: Steps, side: int) -> Tensor:
    rows = [d * steps[2 * i + side] for d, i in zip(directions, batch.members, strict=True)]
    return torch.stack(rows)


def _where(rows: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(rows.view(-1, *([1] * (yes.ndim - 1))), yes, no)
