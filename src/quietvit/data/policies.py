"""timm's auto-augment policies, such as ``rand-m9-mstd0.5-inc1``, so that every Pillow runs them.

Which policy is used, and what comes before and after it, is decided in ``transforms``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from PIL import Image


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Keep the highest ``bits_to_keep`` bits of every value; with 0 or fewer the image is black.

    timm's levels reach 0 bits (``PosterizeIncreasing`` at magnitude 10, ``Posterize`` below 2.5)
    and -8 (at ``mmax30``). Pillow made a black image of them up to 12, and refuses them since 13.
    """
    from timm.data import auto_augment

    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    found: Image.Image = auto_augment.posterize(image, bits_to_keep)
    return found


def mend(transform: Any) -> Any:
    """Give every posterizing step inside ``transform`` the one above; returns ``transform``.

    timm and torchvision keep steps in lists, which are followed; nothing outside is changed.
    """
    from timm.data import auto_augment

    for operation in _operations(transform):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = posterize
    return transform


def _operations(part: Any) -> Iterator[Any]:
    """Every operation of a policy in ``part``: a list, or what keeps lists in its attributes."""
    from timm.data.auto_augment import AugmentOp

    if isinstance(part, AugmentOp):
        yield part
    elif isinstance(part, list | tuple):
        for inner in part:
            yield from _operations(inner)
    elif hasattr(part, "__dict__"):
        for inner in vars(part).values():
            if isinstance(inner, list | tuple):
                yield from _operations(inner)
