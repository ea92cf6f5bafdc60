"""Translate the preprocessing settings of transformers to timm's data config.

The translation is checked on two test images. ``transforms`` processes real images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from quietvit.errors import QuietvitError

_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_BY_HAND = (
    "Remove preprocessor_config.json from a copy of the folder, and set model.preprocessing (mean, "
    "std, interpolation, crop_pct, crop_mode) yourself."
)


def translated_preprocessing(
    settings: Mapping[str, Any], built_for: tuple[int, int, int], source: str = "the folder"
) -> dict[str, Any]:
    """Return timm's data config for the settings of an image processor.

    Args:
        settings: transformers' size, crop_size, do_*, resample, image_mean, image_std, ...
        built_for: the model's (channels, height, width), used if the processor does not resize.

    Raises QuietvitError for steps that timm's evaluation transform lacks.
    """
    if settings.get("do_flip_channel_order"):
        raise QuietvitError(
            f"{source} needs images in the order blue, green, red (do_flip_channel_order), which "
            "the transforms here do not support; give another model."
        )
    factor = float(settings.get("rescale_factor") or 1 / 255) if settings.get("do_rescale") else 1.0
    scale = round(255.0 * factor, 9)
    if settings.get("do_normalize"):
        mean = tuple(float(value) / scale for value in settings["image_mean"])
        std = tuple(float(value) / scale for value in settings["image_std"])
    else:
        mean, std = (0.0,) * 3, (1 / scale,) * 3
    final, resized, mode = _sizes(settings, built_for[1:], source)
    return {
        "input_size": (built_for[0], *final),
        "mean": mean,
        "std": std,
        "interpolation": _RESAMPLE.get(settings.get("resample", 3), "bicubic"),
        "crop_pct": _crop_pct(final[0], resized),
        "crop_mode": mode,
    }


def _sizes(
    settings: Mapping[str, Any], built_for: tuple[int, int], source: str
) -> tuple[tuple[int, int], int, str]:
    """Return the final size, the (shorter) side before the crop, and timm's crop mode."""
    size = settings.get("size") if settings.get("do_resize", True) else None
    crop = settings.get("crop_size") if settings.get("do_center_crop") else None
    final = None if crop is None else _named_sides(crop)
    if size is None:
        return final or built_for, (final or built_for)[0], "center" if final else "squash"
    if "shortest_edge" in size:
        edge = int(size["shortest_edge"])
        crop_pct = settings.get("crop_pct")
        if final is None and crop_pct is not None:  # ConvNeXt: no crop for 384 pixels or more
            whole = edge >= 384
            return (
                (edge, edge),
                edge if whole else int(edge / crop_pct),
                ("squash" if whole else "center"),
            )
        return final or (edge, edge), edge, "center"
    sides = _named_sides(size)
    if sides is None:
        raise QuietvitError(
            f"{source} resizes images to {dict(size)}, which is neither height and width nor "
            "shortest edge; give a model with one image size."
        )
    return final or sides, sides[0], "squash"


def _named_sides(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if size.get("height") is None or size.get("width") is None:
        return None
    return int(size["height"]), int(size["width"])


def _crop_pct(final: int, resized: int) -> float:
    """Return final / resized, adjusted so that timm's floor(final / crop_pct) is ``resized``."""
    share = final / resized
    return share if math.floor(final / share) == resized else final / (resized + 0.5)


def check_translation(processor: Any, config: Mapping[str, Any], source: str) -> None:
    """Process two test images with the processor and with timm's transform, and compare.

    Some processors resize to more than their ``size`` (LeViT's and PoolFormer's). Raises
    QuietvitError if sizes differ, or if values differ by more than interpolation explains.
    """
    import torch
    from timm.data.transforms_factory import create_transform

    transform = create_transform(**config, is_training=False)
    for sides in ((300, 300), (400, 300)):
        coarse = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize(sides, Image.Resampling.BICUBIC)
        try:
            theirs = torch.as_tensor(processor(picture, return_tensors="pt")["pixel_values"])[0]
        except Exception as error:
            raise QuietvitError(
                f"the preprocessing of {source} ({type(processor).__name__}) returned no "
                f"pixel_values for a test image ({error}). {_BY_HAND}"
            ) from error
        ours: Any = transform(picture)
        if theirs.shape != ours.shape and theirs.shape[-2] != theirs.shape[-1]:
            continue  # it keeps the aspect ratio, so its images cannot be batched
        apart = math.inf
        if theirs.shape == ours.shape:
            apart = float((theirs - ours).abs().mean() / theirs.std())
        if apart > 0.05:
            raise QuietvitError(
                f"the preprocessing of {source} ({type(processor).__name__}) does more than its "
                f"settings say: for an image of {sides[0]} x {sides[1]} its result differs from "
                f"timm's (shapes {tuple(theirs.shape)} and {tuple(ours.shape)}, mean difference "
                f"{apart:.2g} standard deviations). {_BY_HAND}"
            )
