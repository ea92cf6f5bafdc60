"""Images for a command: drawn from a data set, or generated for ``synthetic:COUNT:METHOD``.

``console`` opens data sets, and ``synthesis`` generates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from quietvit.console import draw_images, open_data

if TYPE_CHECKING:
    from torch import Tensor, nn


def refuse_malformed(*specs: str | None) -> None:
    """Raise QuietvitError for a wrong ``synthetic:...``, before the long work begins."""
    from quietvit.synthesis.settings import is_synthetic, parse_request

    for spec in specs:
        if spec is not None and is_synthetic(spec):
            parse_request(spec)


def draw_or_generate(
    model: nn.Module, spec: str, count: int, seed: int, split: Literal["train", "test"] = "test"
) -> Tensor:
    """Return images (N, C, H, W) as the model takes them, without labels.

    Args:
        model: the float model; generated images are made for it.
        spec: a data set, or ``synthetic:COUNT:METHOD``.
        count: number of images, or all if there are fewer. COUNT comes first.
        seed: draws the images, or generates them.
        split: ``train`` or ``test``, if the data set has both.
    """
    from quietvit.synthesis import synthesize
    from quietvit.synthesis.settings import is_synthetic, parse_request

    if is_synthetic(spec):
        request = parse_request(spec)
        return synthesize(model, request.count or count, request.method, seed=seed)
    dataset = open_data(spec, split, labels=False)
    return draw_images(model, dataset, min(count, len(dataset)), seed)
