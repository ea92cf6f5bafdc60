"""Decay of norm gains alone, weighted towards the largest, attached to an optimizer.

The gains as first matrices of pairs, moved together with their readers, are in ``colinearity``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.decay.attach import Schedule, WholeUpdate
from quietvit.decay.choice import say_left_out
from quietvit.decay.plan import wide
from quietvit.decay.regularizer import one_strength
from quietvit.decay.schedule import one_schedule
from quietvit.decay.whole import refuse_unless_finite
from quietvit.errors import QuietvitError
from quietvit.pairs import FoundPairs, MatrixPair, find_pairs
from quietvit.pairs.pair import COMPUTED
from quietvit.tracing import WeightView, trace


class NormGainDecay(WholeUpdate):
    """Decay the gains g of norms: ``g_j <- g_j (1 - lr strength g_j^2 / mean(g^2))``.

    A decoupled update in weight-decay units (equal gains decay by exactly ``strength``) that falls
    hardest on the largest gains; none changes sign: ``lr strength g_j^2 / mean(g^2)`` is cut at 1.
    Each gain vector moves once a step, however many linears read it. The gains are the diagonal
    first matrices of the ``norm_linear`` pairs of the model. Derived, from the prototype of
    docs/method.md.

    Args and errors are those of ``ColinearityDecay``; ``pairs`` must hold diagonal first matrices.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any = None,
        *,
        strength: float,
        every: int = 1,
        schedule: Schedule | None = None,
        pairs: Sequence[MatrixPair] | None = None,
    ) -> None:
        super().__init__(model, every=every, schedule=one_schedule(schedule, "NormGainDecay"))
        self.strength = one_strength(strength, "NormGainDecay")
        if pairs is None:
            if example is None:
                raise QuietvitError(
                    "NormGainDecay needs an example input to find the norms (a batch of one image "
                    "is enough), or pairs=..."
                )
            pairs = _found(model, example)
        views = dict.fromkeys(pair.first for pair in pairs if pair.first.diagonal)
        if not views:
            raise QuietvitError(
                f"none of the {len(pairs)} pairs has norm gains as its first matrix (kind "
                "'norm_linear'): there is no gain to decay."
            )
        self.gains: tuple[WeightView, ...] = tuple(views)

    def penalty(self) -> float:
        """Return sum over norms of sum_j g_j^4 / (4 mean(g^2)), mean constant; no strength."""
        return math.fsum(self.penalties().values())

    @torch.no_grad()
    def penalties(self) -> dict[str, float]:
        """Return sum_j g_j^4 / (4 mean(g^2)) of each gain vector by its parameter's name."""
        parameters = self._parameters()
        found = {}
        for view in self.gains:
            g = wide(view.select(parameters[view.parameter_name]))
            found[str(view)] = float((g * _shares(g) * g).sum()) / 4
        return found

    def _names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(view.parameter_name for view in self.gains))

    def _settings(self) -> dict[str, Any]:
        return {
            "penalty": "norm_gain",
            "gains": len(self.gains),
            "strength": self.strength,
            "every": self.every,
        }

    def _deltas(
        self, parameters: Mapping[str, Tensor], rates: Mapping[str, float]
    ) -> dict[str, Tensor]:
        deltas: dict[str, Tensor] = {}
        done: set[tuple[int, object]] = set()
        owner: dict[int, str] = {}
        for view in self.gains:
            name = view.parameter_name
            if name not in rates or (id(parameters[name]), view.rows) in done:
                continue
            whole = parameters[name]
            done.add((id(whole), view.rows))
            g = wide(view.select(whole))
            share = (_shares(g) * (rates[name] * self.strength)).clamp_max(1.0)
            target = deltas.setdefault(
                owner.setdefault(id(whole), name), torch.zeros_like(wide(whole))
            )
            view.scatter_add_(target, -g * share)
        refuse_unless_finite(deltas, parameters)
        return deltas


def _found(model: nn.Module, example: Any) -> FoundPairs:
    """The pairs of norm gains; a log line says which gains are in none."""
    traced = trace(model, example)
    found = find_pairs(model, kinds=("norm_linear",), trace=traced)
    kept = {pair.first.parameter_name for pair in found}

    def lost(name: str) -> bool:
        gain = traced[name.split(" -> ")[0]].weight
        return gain is not None and gain.parameter_name not in kept

    skipped = [entry for entry in found.skipped if entry[1] == COMPUTED and lost(entry[0])]
    say_left_out("NormGainDecay", skipped)
    return found


def _shares(g: Tensor) -> Tensor:
    square = g.square()
    mean = square.mean()
    tiny = torch.finfo(g.dtype).tiny
    return torch.where(mean < tiny, 0.0, square / mean.clamp_min(tiny))
