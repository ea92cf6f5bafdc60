"""Colinearity Decay: a decoupled update of ordered matrix pairs.

The penalties are in ``penalties``, the trust region in ``limits``, the order of the work in
``plan``, and the writing in ``update`` (the usual case) and ``exact`` (the careful one).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from quietvit.decay.batches import PairBatch
from quietvit.decay.choice import asked_kinds, checked_strength, chosen_pairs
from quietvit.decay.config import RunFacts, Schedules, Strengths, WeightRegularizerConfig
from quietvit.decay.decoupled import DecoupledUpdate
from quietvit.decay.exact import exact_changes, raise_not_finite
from quietvit.decay.penalties import Basis, Penalty, penalty_named
from quietvit.decay.plan import Source, UpdatePlan, make_plan
from quietvit.decay.products import checked_products
from quietvit.decay.schedule import Schedule, check_kinds, factor_at
from quietvit.decay.totals import strength_of
from quietvit.decay.update import Update, directed
from quietvit.errors import QuietvitError
from quietvit.pairs import MatrixPair
from quietvit.tensors import sharded_like


class ColinearityConfig(WeightRegularizerConfig):
    """Colinearity Decay, ``quietvit.ColinearityDecay``.

    Derived here (docs/method.md); the formula of arXiv 2605.01330 is not public to us.
    """

    strength: Strengths = 1.0  # type: ignore[assignment]
    """In weight-decay units; a table gives one for each kind of pair. 0 is off."""
    total: float | None = Field(default=None, gt=0)
    """In place of ``strength``: strength times the sum of learning rates over the run, such as
    0.06. The factor of ``schedule`` is not counted."""
    penalty: Literal["energy", "peak", "cosine", "top"] = "energy"
    """What is penalized, see docs/method.md."""
    kinds: tuple[str, ...] | None = None
    """Kinds of pairs; none: those of ``strength``, or ``quietvit.pairs.DEFAULT_KINDS``."""
    schedule: Schedules | None = None  # type: ignore[assignment]
    """Factor of the strength over the run; a table of tables gives one for each kind."""
    fold_gains: bool = False
    """Take the gain of the norm in front of a first matrix as part of it."""
    products: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the matrix products; ``auto`` is bfloat16 where that is fast."""
    sharded: bool = False
    """Divide the update between the processes."""
    compile: bool = False
    """Compile the update."""

    @property
    def active(self) -> bool:
        values = self.strength.values() if isinstance(self.strength, dict) else [self.strength]
        return any(value > 0 for value in values)

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.total is not None and self.strength != 1.0:
            raise ValueError(
                f"strength is {self.strength} and total is {self.total:g}, but total takes the "
                "place of strength; set strength to 1, its default, or total to none"
            )
        return self

    def arguments(self, facts: RunFacts) -> dict[str, Any]:
        """See ``RegularizerConfig``. ``total`` becomes a strength."""
        values = super().arguments(facts)
        if (total := values.pop("total")) is not None:
            values["strength"] = strength_of(total, facts.rates())
        return values

    def restore(self, regularizer: Any, state: Mapping[str, Any]) -> None:
        """See ``RegularizerConfig``. A run that goes on at another rate keeps its strength."""
        if self.total is not None:
            regularizer.strength = state["settings"]["strength"]
        super().restore(regularizer, state)


class ColinearityDecay(DecoupledUpdate):
    """Decay the alignment of ordered matrix pairs (A first, then B), as a decoupled update.

    After every optimizer step it computes, from the values before the update,
    ``B <- B - lr strength dB`` and ``A <- A - lr strength dA``. The penalty gives the directions.
    For ``energy``, dB = B A A^T / nu(A) and dA = B^T B A / nu(B), where nu is the mean squared
    singular value. So it is weight decay, weighted by the spectrum of the partner, and strength is
    in weight-decay units. No singular direction ever changes sign (see ``TrustRegion``).

    A parameter in several pairs, or with several names, moves once, by the sum. A matrix that is
    the same side of n pairs of one kind moves by their mean, so that strength keeps its units.
    Examples are the gain before separate q, k and v, the V that query heads share, and the last
    layer of a gated MLP.

    Derived here (docs/method.md): the formula of arXiv 2605.01330 is not public to us.

    Args:
        model: the model whose parameters the optimizer holds.
        example: input for ``find_pairs``; not needed where ``pairs`` is given.
        strength: at least 0, in weight-decay units; or a mapping from kind to strength, which also
            says which kinds take part (0 leaves a kind out). The defaults of ``strength``,
            ``penalty`` and ``kinds`` are provisional: they rest on two short fine-tunes. From
            scratch a third of the strength was better (docs/lab-log.md).
        penalty: ``energy``, ``peak``, ``cosine`` or ``top``, or a ``Penalty`` such as
            ``quietvit.decay.penalties.Top(count=4)``.
        every: apply every n-th step, with n-fold strength.
        kinds: kinds of pairs (default: those of ``strength`` if a mapping, else
            ``quietvit.pairs.DEFAULT_KINDS``, else, where ``pairs`` is given, all of them).
        schedule: function from the optimizer step (0, 1, ...) to a factor of the strength, such as
            ``quietvit.StrengthSchedule``; or a mapping from kind to such functions.
        pairs: explicit pairs instead of ``find_pairs(model, example)``.
        fold_gains: of the pairs found, see ``find_pairs``.
        products: precision of the matrix products: ``float32``, ``bfloat16`` (sums and weights
            stay float32), or ``auto``, bfloat16 where the processor is faster at it (float64
            weights keep float64). In bfloat16 a change is off by some 0.2 % of itself (DeiT-Tiny:
            median over parameters 0.15 %, largest 0.3 %; ``cosine`` 0.3 and 1.1 %).
        sharded: divide the work among the processes of the default process group; all then write
            the same numbers. In a single process it changes nothing.
        compile: compile the pure part of the update with ``torch.compile``, once for each shape of
            pairs; learning rate and strength do not compile it anew.

    Raises:
        QuietvitError: the strength is negative or not finite, the penalty or a kind is unknown, or
            there are no pairs. While training: a pair holds NaN or infinity (no weight is changed
            then), or steps pass without a call.

    Scales of BatchNorms between two matrices (see ``find_pairs``) are read at each step, and
    averaged over the default process group if there is one.

    One device synchronization per step. Memory: the changes of about one block are held at a time
    (on a GPU of up to 2^24 numbers, because small products would cost launches). The changes of all
    pairs are held when the trust region must limit the step.
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
        fold_gains: bool = False,
        products: str = "auto",
        sharded: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(model, every=every, schedule=schedule)
        self.products = checked_products(products)
        self.sharded = bool(sharded)
        self.rule = penalty_named(penalty)
        self.strength = checked_strength(strength)
        # Kinds that only their schedules name: whoever gave one expects it to do something.
        alone = kinds is None and isinstance(self.strength, float)
        self.pairs = chosen_pairs(
            type(self).__name__,
            model,
            example,
            asked_kinds(kinds, self.strength),
            pairs,
            fold_gains=fold_gains,
            scheduled=self.schedule if alone and isinstance(self.schedule, Mapping) else (),
        )
        if isinstance(self.schedule, Mapping):
            check_kinds(self.schedule, {pair.kind for pair in self.pairs})
        self._shares = _shares(self.pairs)
        self._compiled = bool(compile)
        self._run = directed(self.rule, compiled=self._compiled)
        self._plan: tuple[object, UpdatePlan] | None = None
        self._bases: list[Basis | None] = []
        self._applied = 0

    @torch.no_grad()
    def penalties(self) -> dict[str, float]:
        """Return the stated penalty of each pair by its name (equal names are added up)."""
        source = self._source()
        result: dict[str, float] = {}
        for position, batch in enumerate(self._plan_for(source).batches):
            basis = self._bases[position] if self._bases else None
            sides = batch.read(source).apply(partial(self.rule.sides, basis=basis))
            for pair, value in zip(batch.pairs, (sides[0] + sides[1]).tolist(), strict=True):
                result[pair.name] = result.get(pair.name, 0.0) + value
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the step counter, the settings, and cached singular directions of ``top``."""
        state = super().state_dict()
        state["applied"] = self._applied
        state["bases"] = self._bases_of_pairs()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave. Raises QuietvitError where the settings differ."""
        super().load_state_dict(state)
        self._applied = int(state["applied"])
        bases = state["bases"]
        if bases and len(bases) != len(self.pairs):
            raise QuietvitError(
                f"the state holds singular directions of {len(bases)} pairs, this model has "
                f"{len(self.pairs)}; start without it."
            )
        self._bases = []
        if not bases:
            return
        source = self._source()
        for batch in self._plan_for(source).batches:
            like = batch.read(source).B
            own = [bases[member] for member in batch.members]
            u, v = (torch.stack([basis[side] for basis in own]).to(like) for side in (0, 1))
            self._bases.append((u, v))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_run": None}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._run = directed(self.rule, compiled=self._compiled)

    def _bases_of_pairs(self) -> list[list[Tensor]]:
        """The cached singular directions of each pair, in the order of the pairs."""
        result: dict[int, list[Tensor]] = {}
        if self._plan is not None:
            for batch, basis in zip(self._plan[1].batches, self._bases, strict=False):
                if basis is not None:
                    for row, member in enumerate(batch.members):
                        result[member] = [directions[row].clone() for directions in basis]
        return [result[member] for member in sorted(result)]

    def parameter_names(self) -> tuple[str, ...]:
        views = (view for pair in self.pairs for view in pair.sides)
        return tuple(dict.fromkeys(view.parameter_name for view in views))

    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "penalty": self.rule.name,
            "kinds": sorted({pair.kind for pair in self.pairs}),
            "pairs": len(self.pairs),
            "strength": self.strength if isinstance(self.strength, float) else dict(self.strength),
            "every": self.every,
        }
        folded = sum(pair.before is not None for pair in self.pairs)
        if folded:
            settings["folded"] = folded
        return settings | self.rule.settings()

    def _strength_of(self, pair: MatrixPair) -> float:
        strength = self.strength if isinstance(self.strength, float) else self.strength[pair.kind]
        if not isinstance(self.schedule, Mapping):
            return strength  # the factor that all kinds share is in the rates
        return strength * factor_at(
            self.schedule[pair.kind], self.steps, f"schedule[{pair.kind!r}]"
        )

    def _write(self, rates: Mapping[str, float]) -> None:
        steps = self._steps(rates)
        if not any(steps):
            return
        source = self._source()
        source.agree()
        plan = self._plan_for(source)
        with torch.autocast(next(iter(source.parameters.values())).device.type, enabled=False):
            self._refresh(plan, source)
            if self._is_simple(plan, source, steps):
                update = Update(plan, source, self._run, self._bases, steps, rates, self.products)
                update.write_divided() if self._processes() > 1 else update.write()
            else:
                changes = exact_changes(
                    self.pairs, plan, source, self.rule, self._bases, steps, rates
                )
                for name, change in changes.items():
                    parameter = source.parameters[name]
                    parameter.add_(sharded_like(parameter, change))
        self._applied += 1

    def _steps(self, rates: Mapping[str, float]) -> list[float]:
        """Learning rate x strength x share of each side: pair 0 first, pair 0 second, pair 1 ..."""
        strengths = {pair.kind: self._strength_of(pair) for pair in self.pairs}
        views = [(pair, view) for pair in self.pairs for view in pair.sides]
        return [
            strengths[pair.kind] * rates.get(view.parameter_name, 0.0) * share
            for (pair, view), share in zip(views, self._shares, strict=True)
        ]

    def _is_simple(self, plan: UpdatePlan, source: Source, steps: Sequence[float]) -> bool:
        """Whether all changes will be finite, and none must be limited. One synchronization."""
        if not (self.rule.stays_finite and plan.has_safe_steps(steps)):
            return False
        stays_finite = plan.cannot_overflow(source.norms())
        to_check = plan.region.to_check(steps, source)
        within = plan.region.within(
            to_check, source, steps, self._bases, self.products, stays_finite.device
        )
        if any(source.in_parts(name) for name in source):
            for name in source:
                source.release(name)
        return bool(stays_finite & within)

    def _refresh(self, plan: UpdatePlan, source: Source) -> None:
        is_new = len(self._bases) != len(plan.batches)
        if is_new:
            self._bases = [None] * len(plan.batches)
        if self.rule.caches and (is_new or self.rule.is_due(self._applied)):
            self._bases = [self._basis(batch, source) for batch in plan.batches]

    def _basis(self, batch: PairBatch, source: Source) -> Basis | None:
        A, B = batch.read(source).partners()
        if not (A.isfinite().all() and B.isfinite().all()):
            raise_not_finite(self.pairs, source, self.rule)
        return self.rule.basis(A, B)

    def _processes(self) -> int:
        """Among how many processes the update is divided."""
        import torch.distributed as dist

        if not (self.sharded and dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size()

    def _source(self) -> Source:
        views = (view for pair in self.pairs for view in pair.views)
        return Source(self.model, list(dict.fromkeys(view.parameter_name for view in views)))

    def _plan_for(self, source: Source) -> UpdatePlan:
        """The plan of the update, made again only if shapes, devices or processes change."""
        processes = self._processes()
        key = (source.signature(), processes)
        if self._plan is None or self._plan[0] != key:
            plan = make_plan(self.pairs, source, self.rule, divided_by=processes)
            self._plan = (key, plan)
        return self._plan[1]


def _shares(pairs: Sequence[MatrixPair]) -> list[float]:
    """For each side of each pair: 1 / (number of pairs of its kind that share this side).

    Example: one norm gain before separate q, k and v is the first side of three ``norm_linear``
    pairs, so each of them moves it by a third.
    """
    sides = [(pair.kind, side, view) for pair in pairs for side, view in enumerate(pair.sides)]
    count = Counter(sides)
    return [1.0 / count[side] for side in sides]
