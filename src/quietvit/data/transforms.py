"""Transforms from images to tensors, with the size, mean, std and interpolation of the model.

Evaluation, calibration and training all use ``data_config``, so they cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor, nn

from quietvit.data.policies import mend
from quietvit.errors import QuietvitError
from quietvit.section import Section, low_to_high

Transform = Callable[[Image.Image], Tensor]
Area = Annotated[float, Field(gt=0, le=1)]


class Augmentation(Section):
    """Random changes of training images."""

    crop: Literal["none", "shift", "resized"] = "shift"
    """``none`` resizes the whole image. ``shift`` resizes it and moves it. ``resized`` is timm's
    random resized crop."""
    shift: float = Field(default=0.125, ge=0, le=0.5)
    """The largest move, as a share of the image's size. Edges are padded."""
    scale: tuple[Area, Area] = (0.08, 1.0)
    """The least and the largest share of the area that ``resized`` crops."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    color_jitter: float = Field(default=0.0, ge=0)
    """Strength of random brightness, contrast and saturation. Acts together with
    ``auto_augment``, unlike in timm's scripts."""
    auto_augment: str | None = None
    """A timm policy such as ``rand-m9-mstd0.5-inc1``."""
    erasing: float = Field(default=0.0, ge=0, le=1)
    """Probability of random erasing."""

    @field_validator("crop", mode="before")
    @classmethod
    def _none_is_a_crop(cls, crop: Any) -> Any:
        """Read a recipe's ``none``, which means "unset" for other keys, as a crop."""
        return "none" if crop is None else crop

    _low_to_high = field_validator("scale")(low_to_high)

    def idle(self) -> list[str]:
        """Return a text for each setting that has no effect with this crop."""
        useless = []
        for key, crop in (("shift", "shift"), ("scale", "resized")):
            value, default = getattr(self, key), type(self).model_fields[key].default
            if self.crop != crop and value != default:
                useless.append(
                    f"{key} ({value}) belongs to crop {crop!r}; with crop {self.crop!r} it does "
                    "nothing"
                )
        return useless


def data_config(model: nn.Module) -> dict[str, Any]:
    """Return the model's data config: input_size (C, H, W), mean, std, interpolation, crop_pct.

    It is timm's ``resolve_model_data_config``, except that the size comes from the patch embedding
    if it states one. timm keeps the size of the pretrained weights.
    """
    from timm.data.config import resolve_model_data_config

    config: dict[str, Any] = resolve_model_data_config(model)
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if built_for is not None:
        config["input_size"] = (config["input_size"][0], *(int(side) for side in built_for))
    return config


def evaluation_transform(model: nn.Module) -> Transform:
    """Return timm's own evaluation transform for ``model``: PIL RGB -> tensor (3, H, W)."""
    from timm.data.transforms_factory import create_transform

    transform: Transform = create_transform(**data_config(model), is_training=False)
    return transform


def training_transform(model: nn.Module, augmentation: Augmentation | None = None) -> Transform:
    """Return a training transform for ``model``: PIL RGB -> tensor (3, H, W).

    It draws from the CPU generators of ``random``, ``numpy`` and ``torch``.

    Raises:
        QuietvitError: timm does not know the policy ``auto_augment``.
    """
    augmentation = augmentation or Augmentation()
    config = data_config(model)
    if augmentation.crop == "resized":
        return _resized_crop(config, augmentation)
    return _whole_image(config, augmentation)


def _resized_crop(config: dict[str, Any], augmentation: Augmentation) -> Transform:
    from timm.data.transforms_factory import transforms_imagenet_train

    try:
        transform = transforms_imagenet_train(
            img_size=tuple(config["input_size"][-2:]),
            scale=augmentation.scale,
            hflip=augmentation.flip,
            color_jitter=augmentation.color_jitter,
            force_color_jitter=augmentation.color_jitter > 0,
            auto_augment=augmentation.auto_augment,
            interpolation=config["interpolation"],
            mean=config["mean"],
            std=config["std"],
            re_prob=augmentation.erasing,
            re_mode="pixel",
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise _unknown_policy(augmentation) from error
    mended: Transform = mend(transform)
    return mended


def _whole_image(config: dict[str, Any], augmentation: Augmentation) -> Transform:
    from timm.data.random_erasing import RandomErasing
    from timm.data.transforms import str_to_interp_mode
    from torchvision import transforms

    size = list(config["input_size"][1:])
    mean, std = list(config["mean"]), list(config["std"])
    steps: list[Any] = [transforms.Resize(size, str_to_interp_mode(config["interpolation"]))]
    if augmentation.crop == "shift" and augmentation.shift > 0:
        sides = [round(augmentation.shift * side) for side in size]
        steps.append(transforms.RandomCrop(size, padding=[sides[1], sides[0]], padding_mode="edge"))
    if augmentation.flip > 0:
        steps.append(transforms.RandomHorizontalFlip(augmentation.flip))
    if augmentation.auto_augment:
        steps.append(_policy(augmentation, config))
    if augmentation.color_jitter > 0:
        steps.append(transforms.ColorJitter(*[augmentation.color_jitter] * 3))
    steps += [transforms.ToTensor(), transforms.Normalize(mean, std)]
    if augmentation.erasing > 0:
        steps.append(RandomErasing(augmentation.erasing, mode="pixel", device="cpu"))
    transform: Transform = transforms.Compose(steps)
    return transform


def _policy(augmentation: Augmentation, config: dict[str, Any]) -> Any:
    from timm.data import auto_augment

    policy = augmentation.auto_augment or ""
    options = {
        "translate_const": int(min(config["input_size"][1:]) * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in config["mean"]),
    }
    makers = {
        "rand": auto_augment.rand_augment_transform,
        "augmix": auto_augment.augment_and_mix_transform,
    }
    make = makers.get(policy.split("-")[0], auto_augment.auto_augment_transform)
    try:
        return mend(make(policy, options))
    except (AssertionError, ValueError, KeyError) as error:
        raise _unknown_policy(augmentation) from error


def _unknown_policy(augmentation: Augmentation) -> QuietvitError:
    return QuietvitError(
        f"timm does not know the augmentation policy {augmentation.auto_augment!r}; write one such "
        "as 'rand-m9-mstd0.5-inc1', 'augmix-m5-w4-d2' or 'original', or leave it out."
    )
