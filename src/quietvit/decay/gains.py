"""Decay of norm gains alone, strongest on the largest.

``colinearity`` moves gains together with the matrices that read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.decay.checks import refuse_unless_finite
from quietvit.decay.choice import warn_of_left_out
from quietvit.decay.config import Strength, WeightRegularizerConfig
from quietvit.decay.decoupled import WholeUpdate
from quietvit.decay.schedule import Schedule
from quietvit.errors import QuietvitError
from quietvit.pairs import FoundPairs, MatrixPair, find_pairs
from quietvit.pairs.pair import COMPUTED
from quietvit.tensors import untied, wide
from quietvit.tracing import WeightView, trace


class NormGainConfig(WeightRegularizerConfig):
    """Decay of norm gains, ``quietvit.NormGainDecay``. Derived here."""

    strength: Strength = 3.0
    """In weight-decay units. 0 is off."""


class NormGainDecay(WholeUpdate):
    """Decay the gains g of norms: ``g_j <- g_j (1 - lr strength g_j^2 / mean(g^2))``.

    This decoupled update decays the largest gains most. It is in weight-decay units: equal gains
    decay by exactly ``strength``. No gain changes sign: ``lr strength g_j^2 / mean(g^2)`` is cut at
    1. Each gain vector moves once a step, even if several linears read it. The gains are the
    diagonal first matrices of the ``norm_linear`` pairs. Derived here (docs/method.md).

    Args:
        model: the model whose parameters the optimizer holds.
        example: input for ``find_pairs``; not needed where ``pairs`` is given.
        strength: at least 0, in weight-decay units.
        every, schedule: as in ``ColinearityDecay``, but for one schedule only.
        pairs: pairs with diagonal first matrices, instead of those found.

    Raises:
        QuietvitError: bad values, or no gains. While training: a gain is NaN or infinite (no weight
            is changed then), or steps pass without a call.
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
        super().__init__(model, strength=strength, every=every, schedule=schedule)
        if pairs is None:
            if example is None:
                raise QuietvitError(
                    "NormGainDecay needs an example input to find the norms (a batch of one image "
                    "is enough), or pairs=..."
                )
            pairs = _gain_pairs(model, example)
        views = dict.fromkeys(pair.first for pair in pairs if pair.first.diagonal)
        if not views:
            raise QuietvitError(
                f"none of the {len(pairs)} pairs has norm gains as its first matrix (kind "
                "'norm_linear'): there is no gain to decay."
            )
        self.gains: tuple[WeightView, ...] = tuple(views)

    @torch.no_grad()
    def penalties(self) -> dict[str, float]:
        """Return sum_j g_j^4 / (4 mean(g^2)) of each gain vector by name, the mean constant."""
        parameters = self.parameters()
        result = {}
        for view in self.gains:
            g = wide(view.select(parameters[view.parameter_name]))
            result[str(view)] = float((g * _shares(g) * g).sum()) / 4
        return result

    def parameter_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(view.parameter_name for view in self.gains))

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"penalty": "norm_gain", "gains": len(self.gains)}

    def changes(
        self, parameters: Mapping[str, Tensor], rates: Mapping[str, float]
    ) -> dict[str, Tensor]:
        changes: dict[str, Tensor] = {}
        owner = untied({name: parameters[name] for name in rates})
        done: set[tuple[str, object]] = set()
        for view in self.gains:
            name = view.parameter_name
            if name not in rates or (owner[name], view.rows) in done:
                continue
            done.add((owner[name], view.rows))
            g = wide(view.select(parameters[name]))
            share = (_shares(g) * (rates[name] * self.strength)).clamp_max(1.0)
            zeros = torch.zeros_like(wide(parameters[name]))
            view.scatter_add_(changes.setdefault(owner[name], zeros), -g * share)
        refuse_unless_finite(changes, parameters)
        return changes


def _gain_pairs(model: nn.Module, example: Any) -> FoundPairs:
    """The pairs of norm gains. A log line names gains that are in no pair."""
    traced = trace(model, example)
    result = find_pairs(model, kinds=("norm_linear",), trace=traced)
    kept = {pair.first.parameter_name for pair in result}

    def lost(name: str) -> bool:
        gain = traced[name.split(" -> ")[0]].weight
        return gain is not None and gain.parameter_name not in kept

    skipped = [entry for entry in result.skipped if entry[1] == COMPUTED and lost(entry[0])]
    warn_of_left_out("NormGainDecay", skipped)
    return result


def _shares(g: Tensor) -> Tensor:
    """g_j^2 / mean(g^2), shape (n,); 0 where all gains are zero."""
    square = g.square()
    mean = square.mean()
    tiny = torch.finfo(g.dtype).tiny
    return torch.where(mean < tiny, 0.0, square / mean.clamp_min(tiny))
