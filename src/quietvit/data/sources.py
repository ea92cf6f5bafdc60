"""Data sets by name: embedded digits, image folders, tables, WebDataset shards, Hugging Face.

This module selects the form and opens the digits; the other forms have their own modules.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from quietvit.data.folder import holds_splits, open_folder
from quietvit.data.hub import has_splits as hub_has_splits
from quietvit.data.hub import open_hub
from quietvit.data.images import ImageDataset, NoLabelsError, Sample, Transformed, subset
from quietvit.data.paths import split_parts
from quietvit.data.shards import open_shards
from quietvit.data.table import SUFFIXES, open_table
from quietvit.errors import QuietvitError, nearest

__all__ = [
    "ImageDataset",
    "NoLabelsError",
    "Sample",
    "Split",
    "Transformed",
    "has_splits",
    "holds_splits",
    "load_dataset",
    "spec_of",
    "subset",
]

Split = Literal["train", "test"] | None

EMBEDDED = ("digits",)
FORMS = ("embedded", "imagefolder", "table", "shards", "hf")
_WRITTEN = (
    "'embedded:digits', 'imagefolder:/path' (with train/ and val/ or test/ inside), "
    "'table:/train.parquet[,/test.parquet]', 'shards:/train-{0000..1023}.tar[,/val-*.tar]', "
    "'hf:/folder' (as datasets' save_to_disk writes it) or 'hf:owner/name[:configuration]' (from "
    "the hub over the network); both need quietvit[datasets]"
)


def load_dataset(
    spec: str, split: Split = None, *, num_classes: int | None = None, labels: bool = True
) -> ImageDataset:
    """Open the data set that ``spec`` names. Images are decoded on access.

    Args:
        spec: one of these forms; tables and shards may be brace ranges, globs or folders.

            - ``embedded:digits``: 1797 handwritten digits of 8 x 8 pixels from scikit-learn, with a
              fixed stratified split (1198 for training, 599 for testing);
            - ``imagefolder:/path`` with ``train/`` and ``val/`` or ``test/``, each with one folder
              for each class (``train/``, if present, defines the classes);
            - ``table:/train.parquet,/test.parquet`` with the columns ``image`` (encoded bytes, or a
              struct with ``bytes``) and ``label`` (integer); also arrow and feather files;
            - ``shards:/train-{0000..1023}.tar,/val-{0000..0049}.tar``: local WebDataset shards with
              ``.jpg`` (or another image) and ``.cls`` (or ``.json`` with ``label``);
            - ``hf:/folder``, saved by ``datasets``, or ``hf:owner/name[:configuration]``, from the
              hub.
        split: ``train``, ``test``, or None for everything: all digits, the folder itself as class
            folders (an error if they are splits), the first table or shards.
        num_classes: labels at or above it are an error; None uses the training split's.
        labels: False if only images are needed, as for calibration. Labels are then not read, a
            folder may have any structure, and ``imagefolder:`` may name a single image or a
            pattern such as ``photos/*.jpg``.

    Raises:
        NoLabelsError: labels are needed, but the data set has none at all.
        QuietvitError: unknown form, missing path or column, zero images, label out of range. A
            missing or truncated image raises when it is read, and names its file, row or sample.
    """
    form, _, rest = spec.partition(":")
    if split not in ("train", "test", None):
        raise QuietvitError(f"split is 'train', 'test' or None, not {split!r}.")
    if form == "embedded":
        return _embedded(rest, split, num_classes)
    if form == "imagefolder" and rest:
        return open_folder(Path(rest).expanduser(), split, num_classes, labels)
    openers = {"table": open_table, "shards": open_shards, "hf": open_hub}
    if form in openers and rest:
        return openers[form](rest, split, num_classes, labels)
    raise QuietvitError(f"no data set is named {spec!r}{nearest(form, FORMS)}; write {_WRITTEN}.")


def spec_of(text: str) -> str:
    """Return ``text`` as ``form:rest``; a path's suffix selects table, shards or imagefolder."""
    form, colon, _ = text.partition(":")
    if colon and form in FORMS:
        return text
    if text.endswith(SUFFIXES):
        return f"table:{text}"
    return f"shards:{text}" if text.endswith(".tar") else f"imagefolder:{text}"


def has_splits(spec: str) -> bool:
    """Whether the data set separates training from test images."""
    form, _, rest = spec.partition(":")
    if form == "imagefolder":
        return holds_splits(Path(rest).expanduser())
    if form == "hf":
        return hub_has_splits(rest)
    return form == "embedded" or len(split_parts(rest)) > 1


def _embedded(name: str, split: Split, num_classes: int | None) -> ImageDataset:
    if name not in EMBEDDED:
        raise QuietvitError(
            f"no embedded data set is named {name!r}{nearest(name, EMBEDDED)}; there is: "
            f"{', '.join(EMBEDDED)}."
        )
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    chosen = np.arange(len(digits.target))
    if split is not None:
        parts = train_test_split(chosen, test_size=1 / 3, random_state=0, stratify=digits.target)
        chosen = np.sort(parts[0 if split == "train" else 1])
    pixels = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return ImageDataset(
        digits.target[chosen],
        partial(_picture, pixels),
        "image {}".format,
        num_classes=10 if num_classes is None else num_classes,
        name="embedded:digits",
        class_names=tuple(str(digit) for digit in range(10)),
    )


def _picture(pixels: np.ndarray, index: int) -> Image.Image:
    return Image.fromarray(pixels[index])
