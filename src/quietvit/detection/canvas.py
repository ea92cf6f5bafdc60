"""Fit images of any size to one canvas, and map boxes and masks back to the original images.

``Canvas`` replaces torchvision's transform, which gives each batch a different size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.transforms.v2 import functional as F

from quietvit.errors import QuietvitError

PADDING = -1 / 32
"""The value of padding in images for detectors with a padding mask. Pixels are in 0..1."""


class Canvas(GeneralizedRCNNTransform):
    """Scale each image to the largest size that fits, at the top left, and pad with the mean.

    All batches then have one shape. Position tables of vision transformers, traces and exported
    files need that. ViTDet (arXiv 2203.16527, appendix A.2) also pads to a fixed square. Scaling
    is bilinear and antialiased. Example: on a canvas of (512, 512), an image (3, 300, 400) becomes
    (3, 384, 512) with 128 rows of padding below.

    Args:
        size: height and width in pixels.
        mean, std: of each channel, for images in 0..1.
        stretch: ignore the aspect ratio and fill the whole canvas, as RT-DETR does.
        marked: ``fit`` pads with ``PADDING`` instead of the mean, for a model that masks padding.
    """

    def __init__(
        self,
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        stretch: bool = False,
        marked: bool = False,
    ) -> None:
        super().__init__(min(size), max(size), list(mean), list(std))
        self.size = (int(size[0]), int(size[1]))
        self.stretch, self.marked = stretch, marked

    def fit(self, image: Tensor) -> Tensor:
        """Fit an image (3, h, w) in 0..1 to the canvas: (3, H, W)."""
        return self.padded(self._scaled(image))

    def padded(self, image: Tensor) -> Tensor:
        """Pad an image (3, h, w) in 0..1 to the canvas, without scaling it."""
        fill = [PADDING] * len(self.image_mean) if self.marked else self.image_mean
        color = torch.as_tensor(fill, dtype=image.dtype, device=image.device)
        whole = color[:, None, None].repeat(1, *self.size)
        whole[:, : image.shape[1], : image.shape[2]] = image
        return whole

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Scale an image (3, h, w), its boxes and its masks (N, h, w), if any."""
        scaled = self._scaled(image)
        if target is not None:
            boxes = resize_boxes(target["boxes"], image.shape[-2:], scaled.shape[-2:])
            target = {**target, "boxes": boxes}
            if "masks" in target:
                target["masks"] = self._fitted(target["masks"], scaled.shape[-2:])
        return scaled, target

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        """Stack normalized images to (N, 3, H, W). The padding is 0, which is the mean."""
        batch = images[0].new_zeros(len(images), images[0].shape[0], *self.size)
        for index, image in enumerate(images):  # indexing keeps gradients to the images
            batch[index, :, : image.shape[1], : image.shape[2]].copy_(image)
        return batch

    @property
    def data_config(self) -> dict[str, Any]:
        """What a detector with this canvas takes, in timm's keys: images in 0..1.

        The canvas itself normalizes by the backbone's mean and std.
        """
        return {
            "input_size": (3, *self.size),
            "mean": (0.0, 0.0, 0.0),
            "std": (1.0, 1.0, 1.0),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash" if self.stretch else "border",
        }

    def factor(self, height: int, width: int) -> float:
        """Return the scale factor of an image that keeps its aspect ratio."""
        return min(self.size[0] / height, self.size[1] / width)

    def _scaled(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        factor = self.factor(height, width)
        size = [max(1, round(height * factor)), max(1, round(width * factor))]
        if self.stretch:
            size = list(self.size)
        if size == [height, width]:
            return image
        scaled: Any = F.resize(image, size, antialias=True)
        return scaled

    @staticmethod
    def _fitted(masks: Tensor, size: Sequence[int]) -> Tensor:
        if masks.shape[-2:] == torch.Size(size):
            return masks
        nearest: Any = F.InterpolationMode.NEAREST
        fitted: Tensor = F.resize(masks, list(size), nearest)
        return fitted

    def __repr__(self) -> str:
        return f"Canvas(size={self.size}, mean={self.image_mean}, std={self.image_std})"


def check_multiples(size: tuple[int, int], step: int, parts: str) -> None:
    """Raise QuietvitError if a side in pixels is no multiple of ``step``; ``parts`` of what."""
    if any(side % step for side in size):
        height, width = (max(step, round(side / step) * step) for side in size)
        raise QuietvitError(
            f"images of {size[0]} x {size[1]} pixels do not divide into the {parts}. Give "
            f"multiples of {step}, such as {height} x {width}."
        )


def is_padding(images: Tensor) -> Tensor:
    """Return which pixels of ``images`` (N, C, H, W) are marked as padding: bool (N, H, W).

    All channels must be within 0.001 of ``PADDING``, so that tiny noise does not matter.
    """
    marked: Tensor = (images - PADDING).abs().amax(dim=1) < 1e-3
    return marked


class PlainCanvas(Canvas):
    """A canvas for networks that normalize by themselves: its batches are in 0..1."""

    def normalize(self, image: Tensor) -> Tensor:
        return image

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        return torch.stack([self.padded(image) for image in images])
