"""Plain weight decay of the very entries that Colinearity Decay moves: its control.

Whatever weighs entries by a spectrum is in ``colinearity``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.decay.attach import Schedule, WholeUpdate
from quietvit.decay.choice import chosen_pairs
from quietvit.decay.plan import wide
from quietvit.decay.regularizer import one_strength
from quietvit.decay.schedule import one_schedule
from quietvit.decay.whole import refuse_unless_finite, untied
from quietvit.pairs import MatrixPair
from quietvit.tracing import WeightView


class PairWeightDecay(WholeUpdate):
    """Weight decay ``W <- W (1 - lr strength)`` of the entries of matrices and gains in pairs.

    Each entry decays once a step, in however many pairs it is, and over all its names. After the
    optimizer's step, where AdamW decays before it: the arithmetic of both is the same. Comes beside
    the optimizer's own ``weight_decay``. ``lr strength`` is cut at 1. A control, derived here.

    Args:
        model: the model whose parameters the optimizer holds.
        example: input for ``find_pairs``; not needed where ``pairs`` is given.
        strength: at least 0, in weight-decay units.
        kinds: kinds of pairs (default: ``quietvit.pairs.DEFAULT_KINDS``; where ``pairs`` is given,
            all of them).
        every, schedule, pairs: as in ``ColinearityDecay``, but for one schedule only.

    Raises:
        QuietvitError: on bad values, on no pairs; while training, on a weight that is NaN or
            infinite (no weight is changed then), and on steps that pass without a call. One device
            synchronisation per step.
    """

    concerns = "parameters of the pairs"

    def __init__(
        self,
        model: nn.Module,
        example: Any = None,
        *,
        strength: float,
        kinds: Sequence[str] | None = None,
        every: int = 1,
        schedule: Schedule | None = None,
        pairs: Sequence[MatrixPair] | None = None,
    ) -> None:
        super().__init__(model, every=every, schedule=one_schedule(schedule, "PairWeightDecay"))
        self.strength = one_strength(strength, "PairWeightDecay")
        self.pairs = chosen_pairs(type(self).__name__, self.model, example, kinds, pairs)
        self.views: tuple[WeightView, ...] = tuple(
            dict.fromkeys(view for pair in self.pairs for view in (pair.first, pair.second))
        )

    def penalty(self) -> float:
        """Return half the sum of squares of all entries that decay, strength not included."""
        return math.fsum(self.penalties().values())

    @torch.no_grad()
    def penalties(self) -> dict[str, float]:
        """Return half the sum of squares of the entries that decay, by parameter."""
        parameters = self._parameters()
        first = untied(parameters)
        found = {}
        for name in dict.fromkeys(first.values()):
            whole = wide(parameters[name])
            mask = self._mask(name, first, whole)
            found[name] = float((whole if mask is None else whole * mask).square().sum()) / 2
        return found

    def _names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(view.parameter_name for view in self.views))

    def _settings(self) -> dict[str, Any]:
        return {
            "penalty": "weight",
            "kinds": sorted({pair.kind for pair in self.pairs}),
            "pairs": len(self.pairs),
            "strength": self.strength,
            "every": self.every,
        }

    def _deltas(
        self, parameters: Mapping[str, Tensor], rates: Mapping[str, float]
    ) -> dict[str, Tensor]:
        first = untied(parameters)
        found: dict[str, Tensor] = {}
        for name, rate in rates.items():
            step = min(1.0, rate * self.strength)
            if step == 0 or first[name] in found:
                continue
            whole = wide(parameters[name])
            change = whole * (1 - step) - whole  # exact for steps up to 1/2: added, AdamW's product
            mask = self._mask(first[name], first, whole)
            found[first[name]] = change if mask is None else torch.where(mask, change, 0.0)
        refuse_unless_finite(found, parameters)
        return found

    def _mask(self, name: str, first: Mapping[str, str], whole: Tensor) -> Tensor | None:
        """Which entries of a parameter decay, under any of its names; None for all of them."""
        views = [view for view in self.views if first[view.parameter_name] == name]
        if any(view.rows is None and view.cols is None for view in views):
            return None
        mask = torch.zeros(whole.shape, dtype=torch.bool, device=whole.device)
        for view in views:
            view.scatter_(mask, torch.ones_like(view.select(mask)))
        return mask
