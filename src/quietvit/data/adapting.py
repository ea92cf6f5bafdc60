"""Fit the weights of a transformers model to another image size or number of classes.

``huggingface`` reads and loads them.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger("quietvit")


def adapted(
    state: dict[str, Tensor], model: nn.Module, before: Any, after: Any, source: str
) -> dict[str, Tensor]:
    """Return ``state`` with a new head and resampled position tables, where these differ.

    ``before`` and ``after`` are the transformers configs of ``state`` and of ``model``. Weights
    that differ in another way stay as they are, and strict loading refuses them. Log lines tell
    what changed; ``source`` names the folder in them.
    """
    own = model.state_dict()
    resampled: list[str] = []
    for key in [key for key in own if key in state]:
        old, new = state[key], own[key]
        table = _table(key, old, new.shape, before, after)
        labels = (before.num_labels, after.num_labels)
        # Detectors may have one class more, for no object.
        more = tuple(count + 1 for count in labels)
        if table is not None:
            state[key] = table
            resampled.append(f"{key} from {tuple(old.shape)} to {tuple(new.shape)}")
        elif old.shape == new.shape:
            continue
        elif (len(old), len(new)) in (labels, more) and old.shape[1:] == new.shape[1:]:
            if key.endswith(".weight"):
                logger.warning(
                    "%s: the head '%s' has %d classes, but %d are requested: it starts anew.",
                    source, key.removesuffix(".weight"), *labels,
                )  # fmt: skip
            state[key] = new
        elif key.endswith("relative_position_index"):
            state[key] = new
    if resampled:
        logger.warning("%s: resampled bicubically: %s.", source, "; ".join(resampled[:2]))
    return state


def _table(key: str, old: Tensor, shape: torch.Size, before: Any, after: Any) -> Tensor | None:
    """Return the position table ``key`` at the size of the new config; None for other weights.

    Also None if a config's grid does not match its table; strict loading then names the key.
    """
    if old.shape[-1:] != shape[-1:]:
        return None
    if key.endswith("relative_position_bias_table"):
        grids = _displacements(before), _displacements(after)
        return _resampled(old, shape, *grids, extra_last=True) if old.ndim == 2 else None
    if "position_embedding" not in key:
        return None
    grids = _grid(before), _grid(after)
    if old.ndim == 2:
        return _resampled(old, shape, *grids)
    table = _resampled(old[0], shape[1:], *grids) if len(old) == 1 and old.ndim == 3 else None
    return None if table is None else table[None]


def _resampled(
    table: Tensor,
    shape: torch.Size,
    old: tuple[int, int] | None,
    new: tuple[int, int] | None,
    *,
    extra_last: bool = False,
) -> Tensor | None:
    """Resample a table (extra + h w, D) to a new grid (h, w); keep its extra rows, first or last.

    None if the grid stays or does not match the table. Example: DeiT's class token is 1 extra row:
    (1 + 14 * 14, D) becomes (1 + 16 * 16, D) for 256 pixels.
    """
    if old is None or new is None or old == new:
        return None
    extra = len(table) - math.prod(old)
    if extra < 0 or extra != shape[0] - math.prod(new):
        return None
    from timm.layers.pos_embed import resample_abs_pos_embed

    if extra_last:
        table = table.roll(extra, 0)  # timm expects extra rows in front
    resized: Tensor = resample_abs_pos_embed(
        table[None], list(new), list(old), num_prefix_tokens=extra, antialias=False
    )[0]
    return resized.roll(-extra, 0) if extra_last else resized


def _sides(value: Any) -> tuple[int, int]:
    sides = (value, value) if isinstance(value, int) else tuple(value)
    return int(sides[0]), int(sides[1])


def _grid(config: Any) -> tuple[int, int] | None:
    """Return the number of patches, (down, across); None if the config does not state it."""
    if getattr(config, "image_size", None) is None or getattr(config, "patch_size", None) is None:
        return None
    size, patch = _sides(config.image_size), _sides(config.patch_size)
    return size[0] // patch[0], size[1] // patch[1]


def _displacements(config: Any) -> tuple[int, int] | None:
    """Return the number of displacements, (down, across), in a window or else the whole grid."""
    window = getattr(config, "window_size", None)
    sides = _grid(config) if window is None else _sides(window)
    return None if sides is None else (2 * sides[0] - 1, 2 * sides[1] - 1)


def input_size_of(config: Any) -> tuple[int, int, int]:
    """Return (C, H, W) of a config; 3 channels and 224 pixels if it does not state them."""
    return (int(getattr(config, "num_channels", 3)), *_sides(getattr(config, "image_size", 224)))
