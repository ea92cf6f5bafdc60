"""A model's image size and normalization, and the conversion from natural units.

Generators use ImageNet's normalization, so published settings fit every model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from quietvit.data import data_config
from quietvit.detection import is_detector
from quietvit.errors import QuietvitError
from quietvit.normalization import mean_and_std
from quietvit.tracing import plain_model

Size = int | tuple[int, int] | None


@dataclass(frozen=True)
class PixelScale:
    """The ``size`` (C, H, W) of a model's images, and its normalization (p - mean) / std.

    p are pixels in 0..1. Natural units are pixels in ImageNet's normalization, where natural images
    have mean 0 and deviation 1. If C is not 3, each channel has the average of ImageNet's channels.
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def natural(self) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of natural images in 0..1, each (C, 1, 1)."""
        parts = (torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD))
        if self.size[0] != 3:
            parts = tuple(x.mean().repeat(self.size[0]) for x in parts)  # type: ignore[assignment]
        return parts[0][:, None, None], parts[1][:, None, None]

    def bounds(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return black and white in natural units, each (C, 1, 1)."""
        mean, std = self.natural()
        return (-mean / std).to(device), ((1 - mean) / std).to(device)

    def to_model(self, images: Tensor) -> Tensor:
        """Convert images (N, C, H, W) from natural units to the model's normalization."""
        mean, std = (x.to(images) for x in self.natural())
        shift, factor = self._own(images)
        return (images * std + mean - shift) / factor

    def to_pixels(self, images: Tensor) -> Tensor:
        """Convert images (N, C, H, W) from the model's normalization to pixels in 0..1."""
        shift, factor = self._own(images)
        return (images * factor + shift).clamp(0, 1)

    def _own(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(x)[:, None, None].to(like) for x in (self.mean, self.std))
        return mean, std


def pixel_scale(model: nn.Module, size: Size = None) -> PixelScale:
    """Return the scale of a model. ``size`` replaces its own height and width.

    A detector states its canvas. timm and ``quietvit.data.create_model`` set
    ``model.pretrained_cfg``. torchvision's classifiers all use ImageNet's normalization.

    Raises:
        QuietvitError: the mean, standard deviation or size is unknown.
    """
    model = plain_model(model)
    where = type(model).__module__
    if is_detector(model):
        canvas = model.transform
        return PixelScale((3, *_sides(size or canvas.size)), (0.0,) * 3, (1.0,) * 3)  # type: ignore[union-attr,arg-type]
    if where.startswith("torchvision.models.detection"):
        least = getattr(getattr(model, "transform", None), "min_size", (224,))
        return PixelScale((3, *_sides(size or int(least[-1]))), (0.0,) * 3, (1.0,) * 3)
    if mean_and_std(model) is not None:
        config = data_config(model)
        channels, height, width = config["input_size"]
        own = PixelScale(
            (channels, *_sides(size or (height, width))),
            tuple(map(float, config["mean"])),
            tuple(map(float, config["std"])),
        )
        if len(own.mean) == len(own.std) == channels:
            return own
        raise QuietvitError(
            f"{type(model).__name__} takes images with {channels} channels, but its normalization "
            f"has mean {own.mean} and std {own.std}. Set one value per channel in "
            "model.pretrained_cfg."
        )
    if where.startswith("torchvision.models"):
        side = size or int(getattr(model, "image_size", 224))
        return PixelScale((3, *_sides(side)), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    raise QuietvitError(
        f"the normalization of {type(model).__name__} is unknown, so images for it cannot be "
        "generated. Set model.pretrained_cfg = {'input_size': (3, 224, 224), 'mean': (...), 'std': "
        "(...)}, or build the model with quietvit.data.create_model('hf:/folder' or a timm name)."
    )


def _sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return height and width. Raises QuietvitError for other values."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise QuietvitError(
            f"the image size is {size!r}. Give one side, or height and width, in whole pixels."
        )
    return sides[0], sides[1]
