"""Plain weight decay of the entries that Colinearity Decay moves: its control.

Decay that depends on the spectrum is in ``colinearity``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.decay.checks import refuse_unless_finite
from quietvit.decay.choice import chosen_pairs
from quietvit.decay.config import Strength, WeightRegularizerConfig
from quietvit.decay.decoupled import WholeUpdate
from quietvit.decay.schedule import Schedule
from quietvit.pairs import MatrixPair
from quietvit.tensors import untied, wide
from quietvit.tracing import WeightView


class PairWeightConfig(WeightRegularizerConfig):
    """Plain weight decay of the matrices that Colinearity Decay acts on, ``PairWeightDecay``.

    Its control. Derived here.
    """

    strength: Strength = 1.0
    """In weight-decay units. 0 is off."""
    kinds: tuple[str, ...] | None = None
    """Kinds of pairs; none: ``quietvit.pairs.DEFAULT_KINDS``."""


class PairWeightDecay(WholeUpdate):
    """Weight decay ``W <- W (1 - lr strength)`` of the matrices and gains of pairs.

    Each entry decays once a step, even if it is in several pairs or has several names. It decays
    after the optimizer's step; AdamW decays before it, with the same arithmetic. This comes beside
    the optimizer's own ``weight_decay``. ``lr strength`` is cut at 1. A control, derived here.

    Args:
        model: the model whose parameters the optimizer holds.
        example: input for ``find_pairs``; not needed where ``pairs`` is given.
        strength: at least 0, in weight-decay units.
        kinds: kinds of pairs (default: ``quietvit.pairs.DEFAULT_KINDS``; where ``pairs`` is given,
            all of them).
        every, schedule, pairs: as in ``ColinearityDecay``, but for one schedule only.

    Raises:
        QuietvitError: bad values, or no pairs. While training: a weight is NaN or infinite (no
            weight is changed then), or steps pass without a call.

    One device synchronization per step.
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
        super().__init__(model, strength=strength, every=every, schedule=schedule)
        self.pairs = chosen_pairs(type(self).__name__, self.model, example, kinds, pairs)
        self.views: tuple[WeightView, ...] = tuple(
            dict.fromkeys(view for pair in self.pairs for view in pair.sides)
        )

    @torch.no_grad()
    def penalties(self) -> dict[str, float]:
        """Return half the sum of squares of the entries that decay, by parameter."""
        parameters = self.parameters()
        first = untied(parameters)
        result = {}
        for name in dict.fromkeys(first.values()):
            whole = wide(parameters[name])
            mask = self._mask(name, first, whole)
            result[name] = float((whole if mask is None else whole * mask).square().sum()) / 2
        return result

    def parameter_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(view.parameter_name for view in self.views))

    def settings(self) -> dict[str, Any]:
        kinds = sorted({pair.kind for pair in self.pairs})
        own = {"penalty": "weight", "kinds": kinds, "pairs": len(self.pairs)}
        return super().settings() | own

    def changes(
        self, parameters: Mapping[str, Tensor], rates: Mapping[str, float]
    ) -> dict[str, Tensor]:
        first = untied(parameters)
        result: dict[str, Tensor] = {}
        for name, rate in rates.items():
            step = min(1.0, rate * self.strength)
            if step == 0 or first[name] in result:
                continue
            whole = wide(parameters[name])
            change = whole * (1 - step) - whole  # exact for steps up to 1/2: added, AdamW's product
            mask = self._mask(first[name], first, whole)
            result[first[name]] = change if mask is None else torch.where(mask, change, 0.0)
        refuse_unless_finite(result, parameters)
        return result

    def _mask(self, name: str, first: Mapping[str, str], whole: Tensor) -> Tensor | None:
        """Which entries of a parameter decay under any of its names; None means all.

        Example: of a fused qkv (3 h, h), pairs of V and the projection cover rows 2 h to 3 h.
        """
        views = [view for view in self.views if first[view.parameter_name] == name]
        if any(view.rows is None and view.cols is None for view in views):
            return None
        mask = torch.zeros(whole.shape, dtype=torch.bool, device=whole.device)
        for view in views:
            view.scatter_(mask, torch.ones_like(view.select(mask)))
        return mask
