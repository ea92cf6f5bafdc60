"""Warn about image tensors that the model's own preprocessing did not normalize.

Only values are checked; ``data.transforms`` normalizes images.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from quietvit.tracing import plain_model

logger = logging.getLogger("quietvit")

_BEYOND = 8.0
_OUTSIDE = 0.35


def warn_unless_normalized(images: Any, model: nn.Module, what: str) -> bool:
    """Log a warning if ``images`` cannot come from the model's preprocessing; return if it did.

    The mean m and std s come from the model's ``pretrained_cfg`` (set by timm and by
    ``create_model``); a model without one gives no warning. Preprocessing maps pixels to values
    from -m/s to (1-m)/s. There is a warning if the images

    - span 0..1, but the model's values go below -0.5 or above 20;
    - reach -1 and 1 exactly, but the model's go beyond -1.5 and 1.5 (another mean and std);
    - have over 35 % of their values outside the model's range, or a value 8 times too large
      (0..255, or normalized twice).

    The bounds are derived here. Real images, images without contrast, and Gaussian noise for the
    usual means and stds give no warning.

    Args:
        images: (N, C, H, W), or a mapping with such a tensor; other objects are ignored.
        model: its preprocessing is the reference; torch's wrappers are removed.
        what: names the images in the message, such as ``calibration``.
    """
    pixels = _pixels(images)
    config = mean_and_std(model)
    if pixels is None or config is None:
        return False
    mean, std = config
    low = min(-m / s for m, s in zip(mean, std, strict=True))
    high = max((1 - m) / s for m, s in zip(mean, std, strict=True))
    x = pixels.detach().float()
    least, most = float(x.min()), float(x.max())
    room = 0.1 * (high - low) / 2
    outside = float(((x < low - room) | (x > high + room)).float().mean())
    guess = ""
    if least >= -1e-3 and most > max(_BEYOND * high, 2.0):
        guess = "They look like pixels of 0 to 255."
    elif max(-least, most) > _BEYOND * max(-low, high) or outside > _OUTSIDE:
        guess = "They look as if normalized twice, or with another mean and std."
    elif low < -0.5 and least >= -1e-3 and least < 0.1 and 0.8 < most <= 1 + 1e-3:
        guess = "They look as if scaled to 0..1, but not normalized."
    elif high > 20 and least >= -1e-3 and 0.5 < most <= 1 + 1e-3:
        guess = "They look as if scaled to 0..1, but the model takes 0 to 255."
    elif low < -1.5 and high > 1.5 and abs(least + 1) < 0.01 and abs(most - 1) < 0.01:
        guess = "They look as if normalized with mean 0.5 and std 0.5."
    if not guess:
        return False
    logger.warning(
        "the %s images have values from %.3g to %.3g (mean %.3g, std %.3g), but the preprocessing "
        "of the model gives %.3g to %.3g (mean %s, std %s). %s The results will be wrong. Use "
        "quietvit.data.evaluation_transform(model). If the model was trained on such images, set "
        "mean and std in model.pretrained_cfg.",
        what, least, most, float(x.mean()), float(x.std(correction=0)), low, high,
        _shown(mean), _shown(std), guess,
    )  # fmt: skip
    return True


def _pixels(images: Any) -> Tensor | None:
    values = images.values() if isinstance(images, Mapping) else [images]
    for value in values:
        if isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point():
            return value if value.numel() else None
    return None


def mean_and_std(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return mean and std in the model's ``pretrained_cfg``; None if they are not stated there."""
    model = plain_model(model)
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping):
        return None
    mean, std = (config.get(key) for key in ("mean", "std"))
    mean, std = ((v,) if isinstance(v, int | float) else v for v in (mean, std))
    if not isinstance(mean, Sequence) or not isinstance(std, Sequence):
        return None
    if len(mean) != len(std) or not mean or not all(value > 0 for value in std):
        return None
    return tuple(map(float, mean)), tuple(map(float, std))


def _shown(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
