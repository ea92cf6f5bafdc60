"""Wrap an exported file as a model that top-1 or AP can be measured of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from quietvit.classes import name_classes
from quietvit.deployment.companion import heads_of
from quietvit.deployment.facts import Facts
from quietvit.deployment.preprocessing import transform_of
from quietvit.deployment.runtime import Runtime
from quietvit.detection.canvas import PlainCanvas
from quietvit.detection.hf_detectors import Detections
from quietvit.detection.static_parts import assembled
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

    It takes a list of images (3, h, w) in 0..1 of any size. It returns for each image a dict with
    ``boxes``, ``labels`` and ``scores``, and ``masks`` of a Mask R-CNN, as the model does that was
    exported. Images are fitted to the canvas of the file. Padding is the mean, or marked for a
    model that masks it (``quietvit.detection.canvas.PADDING``).

    ``facts`` and ``heads`` are for a file of the float networks, which has no facts.

    Raises QuietvitError if the file is no detector's, or a file of a head is missing.
    """

    def __init__(
        self,
        runtime: Runtime,
        facts: Facts | None = None,
        heads: Mapping[str, Runtime] | None = None,
    ) -> None:
        super().__init__()
        facts = facts or runtime.facts
        if facts.detector is None or facts.preprocessing is None:
            raise QuietvitError(
                f"{runtime.path} gives {facts.output} and no boxes, so it has no AP. Evaluate it "
                "on images with classes."
            )
        self.runtime = runtime
        self.heads = heads_of(runtime, facts) if heads is None else heads
        self.num_classes = int(facts.detector["classes"])
        height, width = facts.input_shape[1:]
        told = facts.detector
        if "kind" not in told and not told["stretch"] and "marked" not in told:
            raise QuietvitError(
                f"{runtime.path} was exported before files masked the padding of images, so its "
                "boxes would be misplaced. Export it again."
            )
        kinds = {name: bool(told.get(name)) for name in ("stretch", "marked")}
        self.transform = PlainCanvas((height, width), told["mean"], (1.0, 1.0, 1.0), **kinds)
        self.whole: nn.Module | None = None
        if "kind" in facts.detector:
            runs = {name: partial(_run, head) for name, head in self.heads.items()}
            self.whole = assembled(facts.detector, partial(_run, runtime), runs, self.transform)
        name_classes(self, facts.labels)

    def forward(self, images: Sequence[Tensor]) -> Sequence[dict[str, Tensor]]:
        images = [image.detach().cpu().float() for image in images]
        if self.whole is not None:
            with torch.no_grad():
                found: list[dict[str, Tensor]] = self.whole(images)
            return found
        fitted = torch.stack([self.transform.fit(image) for image in images])
        queries = _run(self.runtime, fitted)
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        return Detections.of_queries(queries, sizes, self.num_classes)


def _run(runtime: Runtime, rows: Tensor) -> Tensor:
    return torch.from_numpy(runtime(rows.contiguous().numpy()))


def file_transform(runtime: Runtime) -> Callable[[Image.Image], Tensor]:
    """Return the preprocessing stored in the file: PIL RGB -> (C, H, W)."""
    return transform_of(runtime.facts.preprocessing, Path(runtime.path))
