"""A model's image size and normalization, and the conversion from natural units.

Generators use ImageNet's normalization, so published settings fit every model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from quietvit.data import data_config
from quietvit.detection import is_detector
from quietvit.errors import QuietvitError
from quietvit.normalization import mean_and_std
from quietvit.tracing import plain_model

Size = int | tuple[int, int] | None
_LARGEST_STD = 2.0
"""Images are 0..1, so their deviation is at most 0.5. A few models scale by 1."""


@dataclass(frozen=True)
class PixelScale:
    """The ``size`` (C, H, W) of a model's images, and its normalization (p - mean) / std.

    p are pixels in 0..1. Natural units are pixels in ImageNet's normalization, where natural images
    have mean 0 and deviation 1. If C is not 3, each channel has the average of ImageNet's channels.
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def resized(self, size: Size) -> PixelScale:
        """Return this scale with another height and width. None keeps its own."""
        if size is None:
            return self
        return PixelScale((self.size[0], *_sides(size)), self.mean, self.std)

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
        own = PixelScale((3, *_sides(canvas.size)), (0.0,) * 3, (1.0,) * 3)  # type: ignore[union-attr,arg-type]
        return own.resized(size)
    if where.startswith("torchvision.models.detection"):
        least = getattr(getattr(model, "transform", None), "min_size", (224,))
        side = int(least[-1])
        return PixelScale((3, side, side), (0.0,) * 3, (1.0,) * 3).resized(size)
    if mean_and_std(model) is not None:
        config = data_config(model)
        sides = _input_size(model, config["input_size"])
        mean, std = (_by_channel(config[key], sides[0]) for key in ("mean", "std"))
        own = PixelScale(sides, mean, std)
        _refuse_normalization(model, own)
        return own.resized(size)
    stated = _stated(model)
    if where.startswith("torchvision.models") and not stated:
        side = int(getattr(model, "image_size", 224))
        own = PixelScale((3, side, side), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        return own.resized(size)
    raise QuietvitError(
        f"the normalization of {type(model).__name__} "
        f"{f'cannot be read ({stated})' if stated else 'is unknown'}, so images for it cannot be "
        "generated. Set model.pretrained_cfg = {'input_size': (3, 224, 224), 'mean': (...), 'std': "
        "(...)}, or build the model with quietvit.data.create_model('hf:/folder' or a timm name)."
    )


def _stated(model: nn.Module) -> str:
    """Return the mean and std of a model's ``pretrained_cfg`` in words, empty without both."""
    config = getattr(model, "pretrained_cfg", None)
    config = config if isinstance(config, Mapping) else {}
    found = {key: config[key] for key in ("mean", "std") if config.get(key) is not None}
    return ", ".join(f"{key} {value!r}" for key, value in found.items())


def _by_channel(value: Any, channels: int) -> tuple[float, ...]:
    """Return a mean or std of each channel. One number holds for all channels."""
    return tuple(map(float, (value,) * channels if isinstance(value, int | float) else value))


def _input_size(model: nn.Module, stated: Any) -> tuple[int, int, int]:
    sizes = _whole(stated)
    if len(sizes) == 3:
        return sizes[0], sizes[1], sizes[2]
    raise QuietvitError(
        f"the input_size in pretrained_cfg of {type(model).__name__} is {stated!r}. Set channels, "
        "height and width there, such as (3, 224, 224)."
    )


def _refuse_normalization(model: nn.Module, own: PixelScale) -> None:
    shown = f"mean {own.mean} and std {own.std}"
    if not len(own.mean) == len(own.std) == own.size[0]:
        raise QuietvitError(
            f"{type(model).__name__} takes images with {own.size[0]} channels, but its "
            f"normalization has {shown}. Set one value per channel in model.pretrained_cfg."
        )
    if not all(map(math.isfinite, (*own.mean, *own.std))):
        raise QuietvitError(
            f"the normalization of {type(model).__name__} has {shown}. Set finite numbers in "
            "model.pretrained_cfg."
        )
    if max(map(abs, own.mean)) > 1 or max(own.std) > _LARGEST_STD:
        raise QuietvitError(
            f"the normalization of {type(model).__name__} has {shown}, which does not fit pixels "
            "of 0 to 1. If it is for pixels of 0 to 255, divide both by 255 in "
            "model.pretrained_cfg."
        )


def _sides(size: Any) -> tuple[int, int]:
    """Return height and width. Raises QuietvitError for other values."""
    sides = _whole(size if isinstance(size, list | tuple) else (size, size))
    if len(sides) != 2:
        raise QuietvitError(
            f"the image size is {size!r}. Give one side, or height and width, in whole pixels."
        )
    return sides[0], sides[1]


def _whole(sides: Any) -> tuple[int, ...]:
    """Return sides as integers of Python. Returns () unless all are integers above 0."""
    if not isinstance(sides, list | tuple):
        return ()
    if not all(isinstance(side, Integral) and not isinstance(side, bool) for side in sides):
        return ()
    return tuple(map(int, sides)) if all(side > 0 for side in sides) else ()
