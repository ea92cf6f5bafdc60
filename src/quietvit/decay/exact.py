"""The careful update: compute and check every change before any weight is written.

It serves infinite or huge weights, and steps that the trust region must limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from quietvit.decay.batches import PairBatch, batches
from quietvit.decay.penalty import Basis, Penalty
from quietvit.decay.plan import UpdatePlan
from quietvit.decay.products import scaled
from quietvit.errors import QuietvitError
from quietvit.pairs import MatrixPair
from quietvit.tensors import untied, wide


def exact_changes(
    pairs: Sequence[MatrixPair],
    plan: UpdatePlan,
    parameters: Mapping[str, Tensor],
    rule: Penalty,
    bases: Sequence[Basis | None],
    steps: Sequence[float],
    moving: Mapping[str, float],
) -> dict[str, Tensor]:
    """Return the change of each parameter in ``moving``, limited by the trust region.

    Products run in float32, or float64 for float64 weights. Raises QuietvitError if a weight or a
    change is not finite.
    """
    whole = _Whole(parameters, moving)
    for position, batch in enumerate(plan.batches):
        directions = batch.read(parameters).apply(partial(rule.directions, basis=bases[position]))
        whole.add(batch, *directions, steps)
    region = plan.region
    to_check = region.to_check(steps, parameters)
    within = region.within(to_check, parameters, steps, bases, sharp=True)
    is_finite, is_within = torch.stack([whole.finite().to(within.device), within]).tolist()
    if not is_finite:
        raise_not_finite(pairs, parameters, rule)
    if not is_within:
        limited = region.limited(to_check, parameters, steps, bases)
        if limited is not None:
            whole = _Whole(parameters, moving)
            for batch, step_A, step_B in limited:
                whole.add(batch, step_A, step_B, None)
            if not whole.finite():
                raise_not_finite(pairs, parameters, rule)
    return whole.changes


def raise_not_finite(
    pairs: Sequence[MatrixPair], parameters: Mapping[str, Tensor], rule: Penalty
) -> NoReturn:
    """Raise QuietvitError with the name of the first pair that is not finite."""
    for pair in pairs:
        for view in pair.views:
            bad = int((~view.select(parameters[view.parameter_name]).isfinite()).sum())
            if bad:
                raise QuietvitError(
                    f"{pair.name}: {bad} values of {view} are NaN or infinite; no weight was "
                    "changed. Training diverged before this step. Lower the learning rate or clip "
                    "gradients, then resume from an earlier checkpoint or start anew."
                )
    for pair in pairs:
        operands = batches([pair], parameters)[0].read(parameters)
        if not all(part.isfinite().all() for part in operands.apply(rule.directions)):
            raise QuietvitError(
                f"{pair.name}: its {rule.name} update overflows (largest weights "
                f"{float(operands.A.abs().max()):.3g} and {float(operands.B.abs().max()):.3g}); no "
                "weight was changed. Lower the learning rate, then resume from an earlier "
                "checkpoint or start anew."
            )
    raise QuietvitError(
        "the summed update overflows, although every pair is finite: learning rate x strength is "
        "too large. No weight was changed. Lower one of them."
    )


class _Whole:
    """The full-size change of each parameter that moves, summed over all pairs."""

    # A pair may own a part of a parameter: v is rows 2 d to 3 d of a fused qkv weight (3 d, d).
    # The changes of all parts add up in one tensor of the parameter's shape.

    def __init__(self, parameters: Mapping[str, Tensor], moving: Mapping[str, float]) -> None:
        owner = untied({name: parameters[name] for name in moving})
        self.changes = {
            name: torch.zeros_like(wide(parameters[name]), memory_format=torch.contiguous_format)
            for name in dict.fromkeys(owner.values())
        }
        self._of = {name: self.changes[first] for name, first in owner.items()}

    def add(self, batch: PairBatch, dA: Tensor, dB: Tensor, steps: Sequence[float] | None) -> None:
        """Subtract each pair's direction times its step (times 1 if ``steps`` is None)."""
        for side, runs, d in ((0, batch.firsts, dA), (1, batch.seconds, dB)):
            for run in runs:
                whole = self._of.get(run.view.parameter_name)
                if whole is None:
                    continue
                rows = slice(run.start, run.start + run.count)
                if steps is None:
                    run.scatter_add_(whole, -d[rows])
                    continue
                own = [steps[2 * member + side] for member in batch.members[rows]]
                factors = torch.tensor(own, dtype=d.dtype, device=d.device)
                run.scatter_add_(whole, scaled(d[rows], -factors))

    def finite(self) -> Tensor:
        """Return one flag on one device: whether every change is finite."""
        flags = [delta.isfinite().all() for delta in self.changes.values()]
        return torch.stack([flag.to(flags[0].device) for flag in flags]).all()
