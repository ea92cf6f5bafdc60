"""Which files are readable images, and messages about files that were skipped.

Only the suffix decides; ``decoding`` opens files.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections import Counter
from pathlib import PurePath

logger = logging.getLogger("quietvit")

# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif",
    ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".j2k", ".jpx", ".qoi", ".avif",
    ".heic", ".heif", ".hif", ".jxl",
})
"""Suffixes of images, readable here or not."""

_INSTALLS = {
    ".heic": "pillow-heif",
    ".heif": "pillow-heif",
    ".hif": "pillow-heif",
    ".avif": "pillow-avif-plugin",
    ".jxl": "pillow-jxl-plugin",
}
_PLUGINS = ("pillow_heif", "pillow_avif", "pillow_jxl")
_ONLY_IDENTIFIED = frozenset({"BUFR", "GRIB", "HDF5", "WMF", "MPEG", "EPS"})
"""Formats that Pillow recognizes but cannot decode by itself."""
_SIDE_SUFFIXES = frozenset({
    ".txt", ".json", ".jsonl", ".xml", ".csv", ".tsv", ".md", ".rst", ".html", ".yaml", ".yml",
    ".toml", ".ini", ".cfg", ".log", ".lst", ".cls", ".pdf", ".py", ".ipynb", ".sh", ".md5",
    ".sha1", ".sha256", ".lnk", ".url",
})
_SIDE_NAMES = frozenset({
    "thumbs.db", "desktop.ini", ".ds_store", "readme", "license", "sha256sums",
})
# fmt: on


@functools.cache
def register_plugins() -> None:
    """Register the installed Pillow plugins for HEIC, AVIF and JPEG XL."""
    for name in _PLUGINS:
        if importlib.util.find_spec(name) is None:
            continue
        try:
            plugin = importlib.import_module(name)  # the import registers AVIF and JPEG XL
            if name == "pillow_heif":
                plugin.register_heif_opener()
        except Exception as error:  # a broken installation raises any exception
            logger.warning("the Pillow plugin %s is installed but does not load: %s", name, error)


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """Return the suffixes that Pillow decodes here, in lower case with their dot."""
    from PIL import Image, features

    register_plugins()
    Image.init()
    left_out = set(_ONLY_IDENTIFIED)
    for format_, feature in (("WEBP", "webp"), ("JPEG2000", "jpg_2000")):
        if not features.check(feature):
            left_out.add(format_)
    return frozenset(
        suffix
        for suffix, format_ in Image.registered_extensions().items()
        if format_ in Image.OPEN and format_ not in left_out
    )


def is_readable(name: str) -> bool:
    """Whether a file with this name is an image that can be read here."""
    return suffix_of(name) in readable_suffixes()


def suffix_of(name: str) -> str:
    """Return the suffix of a file name in lower case with its dot; "" if it has none."""
    _, dot, end = name.rpartition("/")[2].rpartition(".")  # pathlib is slow for a million names
    return f".{end}".lower() if dot else ""


def remedy_for(suffix: str) -> str:
    """Return ``": pip install ..."`` for a suffix that needs a plugin; else ``""``."""
    package = _INSTALLS.get(suffix)
    return f": pip install {package}" if package else ""


class PassedOver:
    """Counts the skipped files of a data set by suffix, and logs them once."""

    def __init__(self) -> None:
        self._images: Counter[str] = Counter()
        self._side: Counter[str] = Counter()

    def add(self, name: str, count: int = 1) -> None:
        """Count ``count`` files with this name or suffix."""
        suffix, file = suffix_of(name), PurePath(name).name.lower()
        shown = suffix or "without a suffix"
        side = suffix in _SIDE_SUFFIXES or file in _SIDE_NAMES
        (self._side if side else self._images)[file if file in _SIDE_NAMES else shown] += count

    def update(self, other: PassedOver) -> None:
        """Add the counts of ``other``."""
        self._images += other._images
        self._side += other._side

    def __str__(self) -> str:
        """List the skipped files and their remedy: ``12 .heic (pip install pillow-heif)``."""
        return _listed(self._images + self._side)

    def tell(self, name: str, used: int) -> None:
        """Log the skipped files: images as a warning, side files (texts, ...) at level INFO."""
        if self._images:
            bad = self._images.total()
            logger.warning(
                "%s: %d of %d files are skipped, because they cannot be read as images: %s. "
                "Install the plugin that reads them, or convert them to .jpg or .png.",
                name, bad, used + bad, _listed(self._images),
            )  # fmt: skip
        if self._side:
            logger.info(
                "%s: %d files beside the images are skipped: %s.",
                name, self._side.total(), _listed(self._side),
            )  # fmt: skip


def _listed(counts: Counter[str]) -> str:
    parts = []
    for suffix, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        remedy = remedy_for(suffix).removeprefix(": ")
        parts.append(f"{count} {suffix}" + (f" ({remedy})" if remedy else ""))
    return ", ".join(parts)
