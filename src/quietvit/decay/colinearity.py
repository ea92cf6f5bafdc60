"""Colinearity Decay: the update of ordered pairs under a penalty, attached to an optimizer.

The penalties themselves are in ``penalties``, the trust region in ``limits``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.decay.attach import DecoupledUpdate, Schedule
from quietvit.decay.limits import TrustRegion
from quietvit.decay.penalties import PENALTIES, Basis, Penalty, Top, scaled
from quietvit.decay.plan import Batch, batches, wide
from quietvit.decay.schedule import check_kinds, factor_at
from quietvit.errors import QuietvitError, nearest
from quietvit.pairs import DEFAULT_KINDS, MatrixPair, find_pairs


class ColinearityDecay(DecoupledUpdate):
    """Decay the alignment of ordered matrix pairs, A first, then B, as a decoupled update.

    After every optimizer step, from the values before the update,
    ``B <- B - lr strength dB`` and ``A <- A - lr strength dA`` with the directions of the penalty
    (``energy``: dB = B A A^T / nu(A), dA = B^T B A / nu(B), nu the mean squared singular value).
    It is weight decay re-weighted by the spectrum of the partner; strength is in weight-decay
    units. No singular direction ever changes sign (see ``TrustRegion``). A parameter in several
    pairs, or under several names, moves once by the sum; a matrix that is the same side of n pairs
    of one kind (the gain before separate q, k and v, the V that query heads share, the last layer
    of a gated MLP) by the mean of the n, so that strength keeps its units. Derived here
    (docs/method.md): the formula of arXiv 2605.01330 is not public to us.

    Args:
        model: the model whose parameters the optimizer holds.
        example: input for ``find_pairs``; not needed where ``pairs`` is given.
        strength: at least 0, in weight-decay units; or a mapping from kind to strength, which also
            says which kinds take part (0 leaves a kind out). The default, like that of ``penalty``
            and ``kinds``, is provisional: it rests on one fine-tune (docs/lab-log.md).
        penalty: ``energy``, ``peak``, ``cosine`` or ``top``, or a ``Penalty`` such as
            ``quietvit.decay.penalties.Top(count=4)``.
        every: apply every n-th step, with n-fold strength.
        kinds: kinds of pairs (default: those of ``strength`` if a mapping, else
            ``quietvit.pairs.DEFAULT_KINDS``, else, where ``pairs`` is given, all of them).
        schedule: function from the optimizer step (0, 1, ...) to a factor of the strength, such as
            ``quietvit.decay.StrengthSchedule``; or a mapping from kind to such functions.
        pairs: explicit pairs instead of ``find_pairs(model, example)``.

    Raises:
        QuietvitError: on a strength that is negative or not finite, an unknown penalty or kind, no
            pairs; while training, on a pair that holds NaN or infinity (no weight is changed then)
            and on steps that pass without a call. One device synchronisation per step.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any = None,
        *,
        strength: float | Mapping[str, float] = 1.0,
        penalty: str | Penalty = "energy",
        every: int = 1,
        kinds: Sequence[str] | None = None,
        schedule: Schedule | Mapping[str, Schedule] | None = None,
        pairs: Sequence[MatrixPair] | None = None,
    ) -> None:
        super().__init__(model, every=every, schedule=schedule)
        self.rule = _penalty_named(penalty)
        self.strength = checked_strength(strength)
        if isinstance(kinds, str):
            raise QuietvitError(f"kinds={kinds!r}: give a sequence of kinds, such as ({kinds!r},).")
        self.pairs = self._chosen(model, example, kinds, pairs)
        if isinstance(self.schedule, Mapping):
            check_kinds(self.schedule, {pair.kind for pair in self.pairs})
        self._shares = _shares(self.pairs)
        self._plan: tuple[object, list[Batch], TrustRegion] | None = None
        self._bases: list[Basis | None] = []
        self._applied = 0

    def penalty(self) -> float:
        """Return the stated penalty summed over all pairs, strength not included. One sync."""
        return math.fsum(self.penalties().values())

    @torch.no_grad()
    def penalties(self) -> dict[str, float]:
        """Return the stated penalty of each pair by its name (equal names are added up)."""
        parameters = self._parameters()
        plan, _ = self._planned(parameters)
        found: dict[str, float] = {}
        for position, batch in enumerate(plan):
            A, B = batch.read(parameters)
            basis = self._bases[position] if self._bases else None
            values = self.rule.penalty(A, B, basis).tolist()
            for pair, value in zip(batch.pairs, values, strict=True):
                found[pair.name] = found.get(pair.name, 0.0) + value
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the step counter, the settings, and cached singular directions of ``top``."""
        state = super().state_dict()
        state["applied"] = self._applied
        state["bases"] = [list(basis) for basis in self._bases if basis is not None]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave. Raises QuietvitError where the settings differ."""
        super().load_state_dict(state)
        self._applied = int(state["applied"])
        parameters = self._parameters()
        plan, _ = self._planned(parameters)
        bases = [(u, v) for u, v in state["bases"]]
        if bases and len(bases) != len(plan):
            raise QuietvitError(
                f"the state holds singular directions of {len(bases)} batches of pairs, this model "
                f"gives {len(plan)} (another dtype or another set of pairs); start without it."
            )
        like = [batch.read(parameters)[1] for batch in plan[: len(bases)]]
        self._bases = [(u.to(B), v.to(B)) for (u, v), B in zip(bases, like, strict=True)]

    def _names(self) -> tuple[str, ...]:
        views = (view for pair in self.pairs for view in (pair.first, pair.second))
        return tuple(dict.fromkeys(view.parameter_name for view in views))

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "penalty": self.rule.name,
            "kinds": sorted({pair.kind for pair in self.pairs}),
            "pairs": len(self.pairs),
            "strength": self.strength if isinstance(self.strength, float) else dict(self.strength),
            "every": self.every,
        }
        if isinstance(self.rule, Top):
            settings |= {"count": self.rule.count, "refresh": self.rule.refresh}
        return settings

    def _strength_of(self, pair: MatrixPair) -> float:
        strength = self.strength if isinstance(self.strength, float) else self.strength[pair.kind]
        if not isinstance(self.schedule, Mapping):
            return strength  # the factor that all kinds share is in the rates
        return strength * factor_at(
            self.schedule[pair.kind], self.steps, f"schedule[{pair.kind!r}]"
        )

    def _deltas(
        self, parameters: Mapping[str, Tensor], rates: Mapping[str, float]
    ) -> dict[str, Tensor]:
        if not any(
            self._strength_of(pair) * rate for pair in self.pairs for rate in rates.values()
        ):
            return {}
        plan, region = self._planned(parameters)
        self._refresh(plan, parameters)
        views = [(pair, view) for pair in self.pairs for view in (pair.first, pair.second)]
        steps = [
            self._strength_of(pair) * rates.get(view.parameter_name, 0.0) * share
            for (pair, view), share in zip(views, self._shares, strict=True)
        ]
        whole = _Whole(parameters, rates)
        suspects = region.suspects(steps)
        for position, batch in enumerate(plan):
            A, B = batch.read(parameters)
            dA, dB = self.rule.directions(A, B, self._bases[position])
            whole.add(batch, dA, dB, steps)
        within = region.within(suspects, parameters, steps, self._bases)
        is_finite, is_within = torch.stack([whole.finite().to(within.device), within]).tolist()
        if not is_finite:
            self._blame(parameters)
        if not is_within:
            limited = region.limited(suspects, parameters, steps, self._bases)
            if limited is not None:
                whole = _Whole(parameters, rates)
                for batch, stepA, stepB in limited:
                    whole.add(batch, stepA, stepB, None)
                if not whole.finite():
                    self._blame(parameters)
        self._applied += 1
        return whole.deltas

    def _refresh(self, plan: Sequence[Batch], parameters: Mapping[str, Tensor]) -> None:
        due = isinstance(self.rule, Top) and self._applied % self.rule.refresh == 0
        if len(self._bases) != len(plan):
            self._bases = [None] * len(plan)
            due = isinstance(self.rule, Top)
        if due:
            self._bases = [self._basis(batch, parameters) for batch in plan]

    def _basis(self, batch: Batch, parameters: Mapping[str, Tensor]) -> Basis | None:
        A, B = batch.read(parameters)
        if not (A.isfinite().all() and B.isfinite().all()):
            self._blame(parameters)
        return self.rule.basis(A, B)

    def _planned(self, parameters: Mapping[str, Tensor]) -> tuple[list[Batch], TrustRegion]:
        identity: dict[int, int] = {}
        signature = [
            (p.shape, p.dtype, p.device, identity.setdefault(id(p), len(identity)))
            for p in parameters.values()
        ]
        if self._plan is None or self._plan[0] != signature:
            plan = batches(self.pairs, parameters)
            region = TrustRegion(self.pairs, parameters, plan, self.rule)
            self._plan = (signature, plan, region)
        return self._plan[1], self._plan[2]

    def _blame(self, parameters: Mapping[str, Tensor]) -> None:
        """Raise, naming the first pair that is not finite."""
        for pair in self.pairs:
            for view in (pair.first, pair.second):
                bad = int((~view.select(parameters[view.parameter_name]).isfinite()).sum())
                if bad:
                    raise QuietvitError(
                        f"{pair.name}: {bad} values of {view} are NaN or infinite; no weight was "
                        "changed. Training diverged before this step: lower the learning rate, "
                        "clip gradients, and resume from an earlier checkpoint."
                    )
        for pair in self.pairs:
            A, B = batches([pair], parameters)[0].read(parameters)
            if not all(part.isfinite().all() for part in self.rule.directions(A, B)):
                raise QuietvitError(
                    f"{pair.name}: its {self.rule.name} update overflows (largest weights "
                    f"{float(A.abs().max()):.3g} and {float(B.abs().max()):.3g}); no weight was "
                    "changed. Lower the learning rate and resume from an earlier checkpoint."
                )
        raise QuietvitError(
            "the update of the pairs is not finite though every pair is: the learning rate times "
            f"the strength overflows (strength {self.strength}); no weight was changed."
        )

    def _chosen(
        self,
        model: nn.Module,
        example: Any,
        kinds: Sequence[str] | None,
        pairs: Sequence[MatrixPair] | None,
    ) -> tuple[MatrixPair, ...]:
        per_kind = None if isinstance(self.strength, float) else self.strength
        if kinds is None and per_kind is not None:
            kinds = [kind for kind, value in per_kind.items() if value > 0]
        if kinds is not None and not kinds:
            raise QuietvitError(f"strength={self.strength}, kinds={kinds}: no kind is left.")
        if kinds is not None and per_kind is not None:
            for kind in kinds:
                if kind not in per_kind:
                    raise QuietvitError(
                        f"kind {kind!r} has no strength{nearest(kind, per_kind)}; strength is "
                        f"given for {sorted(per_kind)}."
                    )
            kinds = [kind for kind in kinds if per_kind[kind] > 0]
        if pairs is None:
            if example is None:
                raise QuietvitError(
                    "ColinearityDecay needs an example input to find the pairs (a batch of one "
                    "image is enough), or pairs=..."
                )
            chosen = tuple(find_pairs(model, example, kinds=tuple(kinds or DEFAULT_KINDS)))
        else:
            chosen = tuple(pair for pair in pairs if kinds is None or pair.kind in kinds)
            have = sorted({pair.kind for pair in pairs})
            for kind in kinds or ():
                if have and kind not in have:
                    raise QuietvitError(
                        f"no pair is of kind {kind!r}{nearest(kind, have)}; the pairs given are "
                        f"of {have}."
                    )
        if not chosen:
            raise QuietvitError("no pairs: give at least one MatrixPair, or pairs=None.")
        return chosen


class _Whole:
    """Full-size changes of the parameters that move, summed over all pairs."""

    def __init__(self, parameters: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        self.deltas: dict[str, Tensor] = {}
        self._of: dict[str, Tensor] = {}
        owner: dict[int, str] = {}
        for name in rates:
            first = owner.setdefault(id(parameters[name]), name)
            if first == name:
                self.deltas[name] = torch.zeros_like(
                    wide(parameters[name]), memory_format=torch.contiguous_format
                )
            self._of[name] = self.deltas[first]

    def add(self, batch: Batch, dA: Tensor, dB: Tensor, steps: Sequence[float] | None) -> None:
        """Subtract each pair's direction times its step (1 where ``steps`` is None)."""
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
                if len(set(own)) == 1:
                    run.scatter_add_(whole, d[rows] * -own[0])
                else:
                    factors = torch.tensor(own, dtype=d.dtype, device=d.device)
                    run.scatter_add_(whole, scaled(d[rows], -factors))

    def finite(self) -> Tensor:
        """Return one flag on one device: is every change finite?"""
        flags = [delta.isfinite().all() for delta in self.deltas.values()]
        return torch.stack([flag.to(flags[0].device) for flag in flags]).all()


def _shares(pairs: Sequence[MatrixPair]) -> list[float]:
    """For each side of each pair 1 / (number of pairs of its kind that have this very side)."""
    sides = [
        (pair.kind, side, view)
        for pair in pairs
        for side, view in enumerate((pair.first, pair.second))
    ]
    count = Counter(sides)
    return [1.0 / count[side] for side in sides]


def checked_strength(strength: float | Mapping[str, float]) -> float | dict[str, float]:
    """Return the strength as float or as a dict of floats. Raises QuietvitError if unusable."""

    def checked(value: Any, where: str) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not (math.isfinite(number) and number >= 0):
            raise QuietvitError(
                f"strength={value!r}{where}: give a finite number, 0 or more, in weight-decay "
                "units (2.0 means: as strong as weight_decay=2.0 where the partner's spectrum is "
                "flat)."
            )
        return number

    if isinstance(strength, Mapping):
        return {str(kind): checked(value, f" for {kind}") for kind, value in strength.items()}
    return checked(strength, "")


def _penalty_named(penalty: str | Penalty) -> Penalty:
    if isinstance(penalty, Penalty):
        return penalty
    if penalty not in PENALTIES:
        raise QuietvitError(
            f"penalty {penalty!r} is unknown{nearest(str(penalty), PENALTIES)}; known: "
            f"{', '.join(PENALTIES)}."
        )
    return PENALTIES[penalty]()
