"""Compare the boxes that a file and the simulated detector find, and measure the AP of both.

``comparing`` compares the outputs of networks, and ``parity`` the integers inside.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

from quietvit.deployment.comparing import AGREEMENT, DISTURBANCE
from quietvit.deployment.evaluation import FileDetector
from quietvit.deployment.runtime import Runtime
from quietvit.detection.average_precision import BoxAP, box_ap, predict_all
from quietvit.detection.loading import DetectionSamples
from quietvit.errors import QuietvitError
from quietvit.inputs import image_batches
from quietvit.quantization import QuantizedModel

LEAST_SCORE, IOU, SCORE = 0.05, 0.9, 0.05
"""Boxes from this score on are compared. They agree from this IoU on, up to this score apart."""

Batch = tuple[list[Tensor], Any]


@dataclass(frozen=True)
class Detected:
    """How many boxes of the simulated detector the file also finds.

    ``boxes`` counts those with a score of at least ``LEAST_SCORE``. ``same`` counts those for which
    the file has a box of the same class with an IoU of at least ``IOU`` and a score at most
    ``SCORE`` apart. ``steady`` counts those that the simulated detector itself finds again if the
    images are perturbed by 1e-6. ``ap`` and ``ap_simulated`` are None without annotated boxes.
    """

    images: int
    boxes: int
    same: int
    steady: int
    ap: BoxAP | None = None
    ap_simulated: BoxAP | None = None

    @property
    def agreement(self) -> float:
        """Percent of the boxes that the file also finds."""
        return 100 * self.same / self.boxes if self.boxes else 100.0

    @property
    def steadiness(self) -> float:
        """Percent of the boxes that the simulated detector finds again after a perturbation."""
        return 100 * self.steady / self.boxes if self.boxes else 100.0

    @property
    def least(self) -> float:
        """The least agreement in percent that chance explains.

        The file may lose 1 % of the boxes, or twice as many as the perturbation, plus three
        standard errors. Boxes of one image are not independent, so these count images.
        """
        p = self.steadiness / 100
        lost = max(100 - AGREEMENT, 2 * (100 - self.steadiness))
        return 100 - lost - 300 * math.sqrt(max(p * (1 - p), 1 / self.images) / self.images)

    @property
    def failures(self) -> tuple[str, ...]:
        """One sentence if the agreement is below ``least``. AP is only reported."""
        if self.agreement >= self.least:
            return ()
        return (
            f"the file finds {self.agreement:.2f} % of the {self.boxes} boxes of the simulated "
            f"model, less than {self.least:.2f} %. That model finds {self.steadiness:.2f} % of "
            f"them again if images are perturbed by {DISTURBANCE:g}",
        )


def detection_batches(images: Any, size: int) -> Iterator[Batch]:
    """Yield (images (3, h, w) in 0..1, their targets or None) of any form of images.

    A batch of ``detection_loader`` passes unchanged. Raises QuietvitError for other forms than it
    and those of ``inputs.image_batches``.
    """
    if _with_boxes(images):
        yield from images
        return
    for batch in image_batches(images, size):
        yield list(batch.images.detach().float().cpu()), None


def canvases(images: Any, runtime: Runtime, size: int) -> Iterator[Tensor]:
    """Yield batches (B, C, H, W) of ``detection_batches``, fitted to the canvas of a file.

    Images that are no ``detection_loader``'s must fit already.
    """
    fit = FileDetector(runtime).transform.fit
    for batch, _ in detection_batches(images, size):
        yield torch.stack([fit(x) for x in batch] if _with_boxes(images) else batch)


def _with_boxes(images: Any) -> bool:
    """Whether ``images`` is a ``detection_loader``."""
    return isinstance(getattr(images, "dataset", None), DetectionSamples)


def compare_detections(
    detector: FileDetector, quantized: QuantizedModel, batches: Iterable[Batch]
) -> Detected:
    """Compare the file with the simulated model on ``detection_batches``.

    Raises QuietvitError if the file and the data have different numbers of classes.
    """
    noise = torch.Generator().manual_seed(0)
    count = boxes = same = steady = 0
    judged: list[list[Any]] = [[], []]
    for images, targets in batches:
        disturbed = [x * (1 + DISTURBANCE * torch.randn(x.shape, generator=noise)) for x in images]
        with torch.no_grad():
            own = list(quantized(images))
            again = [_without_masks(found) for found in quantized(disturbed)]
        theirs = list(detector(images))
        for ours, moved, there in zip(own, again, theirs, strict=True):
            sure = ours["scores"] >= LEAST_SCORE
            kept = {key: x[sure] for key, x in _without_masks(ours).items()}
            boxes += len(kept["scores"])
            same, steady = same + _found(kept, there), steady + _found(kept, moved)
        count += len(images)
        if targets is not None:
            for found, results in zip(judged, (theirs, own), strict=True):
                found += predict_all(_Known(results), [(images, targets)])
    if not count:
        raise QuietvitError("there are no images to check; give at least one.")
    known = any(there["boxes"] for there, _ in judged[0])
    ap, ap_simulated = (box_ap(found) if known else None for found in judged)
    return Detected(count, boxes, same, steady, ap, ap_simulated)


class _Known(torch.nn.Module):
    """A detector whose results are known already."""

    def __init__(self, results: Sequence[dict[str, Tensor]]) -> None:
        super().__init__()
        self.results = results

    def forward(self, images: Any) -> Any:
        return self.results


def _without_masks(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return boxes, labels and scores. Masks take much memory."""
    return {key: value for key, value in found.items() if key != "masks"}


def _found(boxes: dict[str, Tensor], among: dict[str, Tensor]) -> int:
    """Count the boxes that ``among`` holds too."""
    if not len(among["scores"]):
        return 0
    apart = (boxes["scores"][:, None] - among["scores"]).abs()
    alike = boxes["labels"][:, None] == among["labels"]
    alike &= (box_iou(boxes["boxes"], among["boxes"]) >= IOU) & (apart <= SCORE)
    return int(alike.any(dim=1).sum())
