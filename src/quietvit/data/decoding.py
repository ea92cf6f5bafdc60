"""Decode encoded bytes, a PIL image or an array into an upright 8-bit RGB image.

All data sets and ``predict`` use this decoder. ``formats`` decides which files are images.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from quietvit.data.formats import register_plugins, remedy_for
from quietvit.errors import QuietvitError

BACKGROUND = (255, 255, 255)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_16_BIT_FORMATS = ("PNG", "PPM")  # Pillow may open their 16-bit grey images as 32-bit "I"


class _UnclearError(Exception):
    """The range of an image's values does not show which value is white."""


def decode(content: bytes | Image.Image | np.ndarray, where: Callable[[], str]) -> Image.Image:
    """Return the image upright, as 8-bit RGB. The input is not changed.

    The result holds only pixels, so decoding it again changes nothing.

    - The EXIF orientation (1 to 8) is applied in every format that has one.
    - The first of several frames (GIF, TIFF, APNG, WebP) is used; the current one of a PIL image.
    - Transparent pixels become white (``BACKGROUND``): RGBA, LA, PA, transparent palettes and
      colours.
    - 16-bit values are divided by 257, so 65535 becomes 255.
    - 32-bit integers in 0..255 stay; values up to 65535 count as 16-bit values.
    - Floats in 0..1 are multiplied by 255. If the largest is in 2..255, they are only rounded.
    - Pillow converts CMYK, YCbCr, HSV and LAB; colour profiles are not applied.

    Args:
        content: an encoded image, a PIL image, or an array (H, W), (H, W, 1), (H, W, 3) or
            (H, W, 4) of integers or floats.
        where: returns the image's name for errors; called only if there is an error.

    Raises:
        QuietvitError: the image is empty, truncated, damaged or of an unknown format, an array of
            another shape, or values outside the ranges above.
    """
    return upright(content, where)[0]


def upright(
    content: bytes | Image.Image | np.ndarray, where: Callable[[], str]
) -> tuple[Image.Image, int]:
    """Return the image like ``decode``, and the EXIF orientation (1 to 8) that was applied."""
    register_plugins()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = _opened(content)
            image.load()
            turn = _orientation(image)
            colours = _in_colours(image)
            result = colours.transpose(_TURNS[turn]) if turn in _TURNS else colours
            result.info = {}  # the orientation and transparency in it are applied now
            return result, turn
    except _UnclearError as error:
        raise QuietvitError(f"the image at {where()} {error}") from error
    except Exception as error:  # damaged files raise any exception
        raise QuietvitError(
            f"the image at {where()} could not be decoded: {_reason(content, error)}; replace it "
            "or leave it out."
        ) from error


def _opened(content: bytes | Image.Image | np.ndarray) -> Image.Image:
    if isinstance(content, Image.Image):
        return content
    if not isinstance(content, np.ndarray):
        return Image.open(io.BytesIO(content))
    values = content[..., 0] if content.ndim == 3 and content.shape[-1] == 1 else content
    if values.ndim not in (2, 3) or values.size == 0 or values.shape[2:] not in ((), (3,), (4,)):
        raise _UnclearError(
            f"is an array of shape {content.shape}; give one image of shape (height, width, 3) or "
            "(height, width), before any transform of the model."
        )
    return Image.fromarray(_eight_bits(values))


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged EXIF block: the pixels are good, and viewers ignore it, too
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _in_colours(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey(image)
    if image.mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None
        return converted
    if image.has_transparency_data:
        return _on_background(image)
    return image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """Convert a grey image of more than 8 bits to RGB."""
    values = np.asarray(image)
    if image.mode == "I" and image.format in _16_BIT_FORMATS:
        values = values.astype(np.uint16)
    grey = Image.fromarray(_eight_bits(values))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
        return _on_background(grey)
    return grey.convert("RGB")


def _on_background(image: Image.Image) -> Image.Image:
    transparent = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        image = image.copy()  # a 16-bit PNG: Pillow keeps only the high byte of its pixels
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if image.mode == "La":
        image = image.convert("LA")
    shown = image.convert("RGBA")
    background = Image.new("RGBA", shown.size, (*BACKGROUND, 255))
    return Image.alpha_composite(background, shown).convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Scale values to uint8, 0..255, by the rules of ``decode``."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind not in "uif":
        raise _UnclearError(f"holds values of type {values.dtype}; give integers or floats.")
    low, high = values.min(), values.max()
    exact = values.astype(np.float64)
    is_16_bit = values.dtype.kind == "u" and values.dtype.itemsize == 2
    if values.dtype.kind != "f" and low >= 0 and high <= 65535:
        scale = 1 / 257 if is_16_bit or high > 255 else 1.0
    elif values.dtype.kind == "f" and low >= -1e-3 and (high <= 1 + 1e-3 or 2 <= high <= 255.5):
        scale = 255.0 if high <= 1 + 1e-3 else 1.0
    else:
        known = "0 to 1 or 0 to 255" if values.dtype.kind == "f" else "0 to 255 or 0 to 65535"
        raise _UnclearError(
            f"holds values from {low:g} to {high:g} ({values.dtype}), so it is unknown which value "
            f"is white: values must lie in {known}. Scale them, and save the image with 8 bits."
        )
    return np.clip(np.rint(exact * scale), 0, 255).astype(np.uint8)


def _reason(content: bytes | Image.Image | np.ndarray, error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    if isinstance(content, Image.Image):
        return f"{text} (a PIL image of mode {content.mode})"
    if isinstance(content, np.ndarray):
        return text
    size = len(content)
    if size == 0:
        return "it is empty (0 bytes)"
    if isinstance(error, UnidentifiedImageError):
        remedy = remedy_for(_suffix_of(content))
        begin = bytes(content[:12])
        return f"Pillow cannot identify its format ({size} bytes, beginning with {begin!r}){remedy}"
    return f"{text} ({size} bytes)"


def _suffix_of(content: bytes) -> str:
    """Return the suffix of a format that needs a plugin, given its first bytes; else ""."""
    brand: Any = bytes(content[8:12]) if content[4:8] == b"ftyp" else b""
    if brand in (b"avif", b"avis"):
        return ".avif"
    if brand in (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"):
        return ".heic"
    return ".jxl" if content[:2] == b"\xff\x0a" or content[4:8] == b"JXL " else ""
