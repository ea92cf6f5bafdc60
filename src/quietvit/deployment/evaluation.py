"""Wrap an exported file as a model that top-1 or AP can be measured of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from quietvit.classes import name_classes
from quietvit.deployment.preprocessing import transform_of
from quietvit.deployment.runtime import Runtime
from quietvit.detection.canvas import Canvas
from quietvit.detection.hf_detectors import Detections
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


class FileDetector(nn.Module):
    """A detector's file in its runtime, with the interface of ``quietvit.detection``.

    It takes a list of images (3, h, w) in 0..1 of any size and returns ``Detections``. An image
    that keeps its aspect ratio is padded with the mean, and the file has no mask of the padding.

    Raises QuietvitError if the file is no detector's.
    """

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        facts = runtime.facts
        if facts.detector is None or facts.preprocessing is None:
            raise QuietvitError(
                f"{runtime.path} gives {facts.output} and no boxes, so it has no AP. Evaluate it "
                "on images with classes."
            )
        self.runtime = runtime
        self.num_classes = int(facts.detector["classes"])
        height, width = facts.input_shape[1:]
        mean, stretch = facts.detector["mean"], bool(facts.detector["stretch"])
        self.transform = Canvas((height, width), mean, (1.0, 1.0, 1.0), stretch)
        name_classes(self, facts.labels)

    def forward(self, images: Sequence[Tensor]) -> Detections:
        fitted = torch.stack([self.transform.fit(image.cpu()) for image in images])
        queries = torch.from_numpy(self.runtime(fitted.numpy()))
        return Detections.of_queries(queries, [*map(self._stands_for, images)], self.num_classes)

    def _stands_for(self, image: Tensor) -> tuple[float, float]:
        """Return the size in pixels of ``image`` that the whole canvas stands for."""
        height, width = int(image.shape[-2]), int(image.shape[-1])
        if self.transform.stretch:
            return height, width
        factor = self.transform.factor(height, width)
        return self.transform.size[0] / factor, self.transform.size[1] / factor


def file_transform(runtime: Runtime) -> Callable[[Image.Image], Tensor]:
    """Return the preprocessing stored in the file: PIL RGB -> (C, H, W)."""
    return transform_of(runtime.facts.preprocessing, Path(runtime.path))
