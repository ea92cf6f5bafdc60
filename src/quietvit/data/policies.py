"""Repair timm's auto-augment policies, such as ``rand-m9-mstd0.5-inc1``, for every Pillow version.

``transforms`` chooses the policy and the steps around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from PIL import Image


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Keep the highest ``bits_to_keep`` bits of every value; 0 or fewer give a black image.

    timm uses 0 bits (``PosterizeIncreasing`` at magnitude 10, ``Posterize`` below 2.5) and down to
    -8 bits (``mmax30``). Pillow up to 12 returned a black image for them; since 13 it raises.
    """
    from timm.data import auto_augment

    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    result: Image.Image = auto_augment.posterize(image, bits_to_keep)
    return result


def mend(transform: Any) -> Any:
    """Replace timm's posterize in all steps of ``transform`` (not in timm) and return it."""
    from timm.data import auto_augment

    for operation in _operations(transform):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = posterize
    return transform


def _operations(policy: Any) -> Iterator[Any]:
    """Yield the policy operations in ``policy``: a list, or an object with lists as attributes."""
    from timm.data.auto_augment import AugmentOp

    if isinstance(policy, AugmentOp):
        yield policy
    elif isinstance(policy, list | tuple):
        for inner in policy:
            yield from _operations(inner)
    elif hasattr(policy, "__dict__"):
        for inner in vars(policy).values():
            if isinstance(inner, list | tuple):
                yield from _operations(inner)
