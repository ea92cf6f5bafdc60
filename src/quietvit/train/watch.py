"""What is looked at while a run goes on: its largest activation, its most amplifying pair.

Numbers for logs and for the message of a run that diverged; nothing is changed.
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
    """The pair with the largest amplification after ``step``, and how many of all are not finite.

    Once the loss is NaN, an optimizer's step soon leaves no pair finite. Which of them stands first
    says nothing then; a look before tells more.
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
    """Looks at a model's blocks and pairs; what it has none of is left out, with a warning.

    ``example``: one image (1, 3, H, W) to trace by.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        from quietvit.decay.activations import ActivationWatch
        from quietvit.pairs import find_pairs
        from quietvit.tracing import trace

        self.model = model
        self.last: Seen | None = None
        self.pairs: Any = ()
        self._activations: ActivationWatch | None = None
        traced = _or_warn(lambda: trace(model, example))
        if traced is not None:
            self.pairs = _or_warn(lambda: find_pairs(model, trace=traced)) or ()
            self._activations = _or_warn(lambda: ActivationWatch(model, traced))

    @property
    def blocks(self) -> tuple[str, ...]:
        """The residual blocks."""
        return () if self._activations is None else self._activations.blocks

    def amplification(self, step: int) -> Seen | None:
        """Return the pair with the largest amplification now, and keep it if that is a number.

        Every process must call where the model is in parts.
        """
        if not self.pairs:
            return None
        from quietvit.decay import amplifications

        seen = _worst(amplifications(self.model, self.pairs), step)
        if not seen.infinite:
            self.last = seen
        return seen

    def amplification_of(self, weights: Mapping[str, Tensor], step: int) -> Seen | None:
        """Return the pair with the largest amplification in ``weights``, by name and whole.

        None where one of a pair is missing.
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
        """Return the block with the largest output on ``images`` in eval mode, and that value."""
        if self._activations is None:
            return None
        from quietvit.tensors import reshard
        from quietvit.tracing import evaluating

        watch = self._activations
        watch.reset()
        with evaluating(self.model), torch.compiler.set_stance("force_eager"), watch:
            try:
                self.model(images)
            finally:
                reshard(self.model)
        return watch.largest()


def _worst(found: Mapping[str, float], step: int) -> Seen:
    pair = max(found, key=found.__getitem__)
    infinite = sum(math.isinf(value) for value in found.values())
    return Seen(step, pair, found[pair], infinite, len(found))


def _or_warn(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except QuietvitError as error:
        logger.warning("not everything can be watched: %s", error)
        return None
