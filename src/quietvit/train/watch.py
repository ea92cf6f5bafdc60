"""What is looked at while a run goes on: its largest activation, its most amplifying pair.

Numbers for logs and for the message of a run that diverged; nothing is changed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError

logger = logging.getLogger("quietvit")


@dataclass(frozen=True)
class Seen:
    """The pair with the largest amplification at ``step``, and how many of all are not finite.

    Once the loss is NaN, an optimizer's step soon leaves no pair finite; the last look before tells
    more then.
    """

    step: int
    pair: str
    amplification: float
    infinite: int
    pairs: int

    def __str__(self) -> str:
        if not self.infinite:
            return f"{self.amplification:g}, of {self.pair}"
        return f"infinite for {self.infinite} of {self.pairs} pairs, first {self.pair}"


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

        found = amplifications(self.model, self.pairs)
        pair = max(found, key=found.__getitem__)
        infinite = sum(math.isinf(value) for value in found.values())
        seen = Seen(step, pair, found[pair], infinite, len(found))
        if not infinite:
            self.last = seen
        return seen

    @torch.no_grad()
    def activation(self, images: Tensor) -> tuple[str, float] | None:
        """Return the block with the largest output on ``images`` in eval mode, and that value."""
        if self._activations is None:
            return None
        from quietvit.decay.whole import reshard
        from quietvit.tracing import evaluating

        watch = self._activations
        watch.reset()
        with evaluating(self.model), torch.compiler.set_stance("force_eager"), watch:
            try:
                self.model(images)
            finally:
                reshard(self.model)
        return watch.largest()


def _or_warn(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except QuietvitError as error:
        logger.warning("not everything can be watched: %s", error)
        return None
