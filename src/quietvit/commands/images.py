"""Images for a command: drawn from a data set, or generated for ``synthetic:COUNT:METHOD``.

``console`` opens data sets, and ``synthesis`` generates.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from quietvit.console import draw_images, open_data

if TYPE_CHECKING:
    from torch import Tensor, nn


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

    def draw(self, model: nn.Module, count: int, seed: int, minutes: float | None = None) -> Tensor:
        """Return images (``count``, C, H, W) as the model takes them.

        ``minutes`` limits the time to generate them.
        """
        if self.request is None:
            return draw_images(model, self.dataset, count, seed)
        from quietvit.synthesis import synthesize

        return synthesize(model, count, self.request.method, seed=seed, minutes=minutes)
