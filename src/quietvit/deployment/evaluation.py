"""Wrap an exported file as a model that ``quietvit.data.evaluate`` can measure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from quietvit.classes import name_classes
from quietvit.deployment.preprocessing import transform_of
from quietvit.deployment.runtime import Runtime
from quietvit.errors import QuietvitError


class FileModel(nn.Module):
    """A file in its runtime as a module: images (B, C, H, W) -> logits (B, classes).

    Raises QuietvitError if the file gives no class scores.
    """

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        output = runtime.facts.output
        if not output.of_classes:
            raise QuietvitError(
                f"{runtime.path} gives {output} and no class scores, so it has no top-1. Use "
                "'quietvit predict' to print its output, or 'quietvit check' to compare it."
            )
        self.runtime = runtime
        name_classes(self, runtime.facts.labels)

    def forward(self, images: Tensor) -> Tensor:
        self.runtime.check_images(tuple(images.shape))
        return torch.from_numpy(self.runtime(images.cpu().numpy()))


def file_transform(runtime: Runtime) -> Callable[[Image.Image], Tensor]:
    """Return the preprocessing stored in the file: PIL RGB -> (C, H, W)."""
    return transform_of(runtime.facts.preprocessing, Path(runtime.path))
