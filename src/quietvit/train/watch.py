"""Watch a run: its largest activation and its matrix pair with the largest amplification.

The numbers go to logs and into the error of a run that diverged. Nothing is changed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError

logger = logging.getLogger("quietvit")


@dataclass(frozen=True)
class Seen:
    """The pair with the largest amplification after ``step``, and how many pairs are not finite.

    A NaN loss soon makes every pair infinite. The first pair then means nothing, and an earlier
    ``Seen`` is more useful.
    """

    step: int
    pair: str
    amplification: float
    infinite: int
    pairs: int

    def __str__(self) -> str:
        if not self.infinite:
            return f"{self.amplification:g}, of {self.pair}"
        only = f", {self.pair}" if self.infinite == 1 else ""
        return f"infinite for {self.infinite} of {self.pairs} pairs{only}"


class Watch:
    """Measures a model's blocks and pairs. Skips, with a warning, what the model lacks.

    ``example``: one image (1, 3, H, W) for the trace. ``model`` may be inside a quantized model,
    ``whole``, which then runs.
    """

    def __init__(self, model: nn.Module, example: Tensor, whole: nn.Module | None = None) -> None:
        from quietvit.decay.activations import ActivationWatch
        from quietvit.pairs import find_pairs
        from quietvit.tracing import trace

        self.model = model
        self.whole = model if whole is None else whole
        self.last: Seen | None = None
        self.pairs: Any = ()
        self._activations: ActivationWatch | None = None
        traced = _or_warn(lambda: trace(model, example))
        if traced is not None:
            self.pairs = _or_warn(lambda: find_pairs(model, trace=traced)) or ()
            self._activations = _or_warn(lambda: ActivationWatch(model, traced))

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of the residual blocks."""
        return () if self._activations is None else self._activations.blocks

    def amplification(self, step: int) -> Seen | None:
        """Return the pair with the largest amplification; keep it as ``last`` if all are finite.

        Every process must call if the model is sharded.
        """
        if not self.pairs:
            return None
        from quietvit.decay import amplifications

        worst = _worst(amplifications(self.model, self.pairs), step)
        if not worst.infinite:
            self.last = worst
        return worst

    def amplification_of(self, weights: Mapping[str, Tensor], step: int) -> Seen | None:
        """Return the pair with the largest amplification in ``weights`` (name -> full tensor).

        None if a weight of a pair is missing.
        """
        if not (self.pairs and weights):
            return None
        from quietvit.decay.amplification import amplifications_of

        try:
            return _worst(amplifications_of(weights, self.pairs), step)
        except KeyError:
            return None

    @torch.no_grad()
    def activation(self, images: Tensor) -> tuple[str, float] | None:
        """Return (block, value) of the largest output magnitude on ``images`` in eval mode."""
        if self._activations is None:
            return None
        from quietvit.tensors import reshard
        from quietvit.tracing import evaluating

        watch = self._activations
        watch.reset()
        with evaluating(self.whole), torch.compiler.set_stance("force_eager"), watch:
            try:
                self.whole(images)
            finally:
                reshard(self.model)
        return watch.largest()


def _worst(amplifications: Mapping[str, float], step: int) -> Seen:
    pair = max(amplifications, key=amplifications.__getitem__)
    infinite = sum(math.isinf(value) for value in amplifications.values())
    return Seen(step, pair, amplifications[pair], infinite, len(amplifications))


def _or_warn(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except QuietvitError as error:
        logger.warning("the logs will lack some values: %s", error)
        return None
