"""Images for a command: drawn from a data set, or generated for ``synthetic:COUNT:METHOD``.

``console`` opens data sets, and ``synthesis`` generates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from quietvit.console import draw_images, open_data
from quietvit.errors import QuietvitError

if TYPE_CHECKING:
    from torch import Tensor, nn


class Minutes:
    """The ``--minutes`` of a command that generates images and then works with them.

    All sources together may generate for half of the time. Each takes an equal part of what is left
    of this half.

    Args:
        total: minutes, or None without a limit.
        sources: how many sources generate images.
        now: gives the time in seconds.

    Raises:
        QuietvitError: the total is not above 0.
    """

    def __init__(
        self, total: float | None, sources: int, now: Callable[[], float] = time.monotonic
    ) -> None:
        if total is not None and not total > 0:
            raise QuietvitError(f"--minutes is {total:g}. Give a number above 0.")
        self._total = math.inf if total is None else total
        self._sources, self._now = sources, now
        self._spent = 0.0

    def generate(self, draw: Callable[[float | None], Tensor]) -> Tensor:
        """Return ``draw(minutes)`` for the next source, with the minutes that it may take.

        They are None without a limit.
        """
        most = (self._total / 2 - self._spent) / self._sources
        # An earlier source can overrun its part by one step. The next one still gets a moment.
        limit = None if most == math.inf else max(most, self._total / 100)
        start = self._now()
        drawn = draw(limit)
        self._spent += (self._now() - start) / 60
        self._sources -= 1
        return drawn

    @property
    def left(self) -> float:
        """Minutes for the work: all that generating did not take, at least 1 % of the total."""
        return max(self._total - self._spent, self._total / 100)


class Source:
    """The source of a command's images without labels.

    Args:
        spec: a data set, or ``synthetic:COUNT:METHOD``.
        split: ``train`` or ``test``, if the data set has both.

    Raises:
        QuietvitError: the specification of generated images is invalid. A data set is opened, and
            checked, when it is first needed.
    """

    def __init__(self, spec: str, split: Literal["train", "test"] = "test") -> None:
        from quietvit.synthesis.settings import is_synthetic, parse_request

        self.spec, self.split = spec, split
        self.request = parse_request(spec) if is_synthetic(spec) else None

    @cached_property
    def dataset(self) -> Any:
        """The opened data set. None if the images are generated."""
        return None if self.request is not None else open_data(self.spec, self.split, labels=False)

    @property
    def name(self) -> str:
        """The name of the data set, or the specification of generated images."""
        return self.spec if self.request is not None else str(self.dataset.name)

    def count(self, wanted: int) -> int:
        """Return ``wanted``, or all images if there are fewer. A COUNT in the spec comes first."""
        if self.request is not None:
            return self.request.count or wanted
        return min(wanted, len(self.dataset))

    def draw(
        self, model: nn.Module, count: int, seed: int, minutes: Minutes | None = None
    ) -> Tensor:
        """Return images (``count``, C, H, W) as the model takes them.

        ``minutes`` limits the time to generate them. Drawing real images takes nothing from it.
        """
        if self.request is None:
            return draw_images(model, self.dataset, count, seed)
        from quietvit.synthesis import synthesize

        method = self.request.method

        def generated(limit: float | None) -> Tensor:
            return synthesize(model, count, method, seed=seed, minutes=limit)

        return generated(None) if minutes is None else minutes.generate(generated)
