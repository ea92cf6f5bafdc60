"""Hugging Face data sets: a folder written by ``save_to_disk``, or a name on the hub.

Needs the package ``datasets``, which maps its arrow tables from disk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from quietvit.data.images import ImageDataset, NoLabelsError
from quietvit.errors import QuietvitError

_SPLITS = {"train": ("train",), "test": ("validation", "val", "valid", "test")}


def open_hub(
    rest: str, split: str | None, num_classes: int | None, labels: bool = True
) -> ImageDataset:
    """Open ``hf:/folder`` or ``hf:owner/name[:configuration]``.

    Images are the column of type ``Image``, labels the column of type ``ClassLabel``. Of several
    columns, those called image or img, and label, labels or fine_label are used. Class names are
    kept. The test images are the split ``validation`` (or val, valid), else ``test``. Without
    ``labels`` no label column is needed or read.

    Raises:
        NoLabelsError: labels are needed, but there is no label column.
        QuietvitError: ``datasets`` is missing, the folder or name cannot be opened, or the split or
            column is missing.
    """
    data_set = opened(rest)
    data = split_of(data_set, split, rest)
    image = image_column(data.features, rest)
    read = reader(data, image, rest)
    name = f"hf:{rest}" if split is None else f"hf:{rest} ({split})"
    if not labels:
        return ImageDataset(None, read, "row {}".format, name=name, count=len(data))
    label = _label_column(data.features, rest)
    feature = data.features[label]
    names = tuple(getattr(feature, "names", None) or ()) or None
    if num_classes is None and names is not None:
        num_classes = len(names)
    if num_classes is None and split == "test":
        num_classes = int(_labels(split_of(data_set, "train", rest), label, rest).max()) + 1
    return ImageDataset(
        _labels(data, label, rest),
        read,
        "row {}".format,
        num_classes=num_classes,
        name=name,
        class_names=names,
    )


def has_splits(rest: str) -> bool:
    """Whether a data set has splits: True on the hub; in a folder, if it holds a DatasetDict."""
    folder = Path(rest).expanduser()
    return (folder / "dataset_dict.json").exists() if folder.is_dir() else True


def opened(rest: str) -> Any:
    """Return the ``Dataset`` or ``DatasetDict``. Raises QuietvitError like ``open_hub``."""
    try:
        import datasets
    except ImportError as error:
        raise QuietvitError(
            f"hf:{rest} needs the package datasets: pip install 'quietvit[datasets]'."
        ) from error
    folder = Path(rest).expanduser()
    local = folder.is_dir() or rest.startswith(("/", ".", "~"))
    try:
        if local:
            return datasets.load_from_disk(str(folder))
        name, _, configuration = rest.partition(":")
        return datasets.load_dataset(name, configuration or None)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = (
            "it must be a folder written by datasets' save_to_disk"
            if local
            else "check the name and the connection to the hub, or save it on another machine with "
            "save_to_disk and give that folder as 'hf:/folder'"
        )
        raise QuietvitError(f"hf:{rest} could not be opened ({reason}); {remedy}.") from error


def split_of(data: Any, split: str | None, rest: str) -> Any:
    """Return the ``Dataset`` of ``train``, ``test`` or the only split."""
    if not isinstance(data, dict):
        if split == "test":
            raise QuietvitError(
                f"hf:{rest} is one data set without splits, so it has no test images; save a "
                "DatasetDict with 'train' and 'test'."
            )
        return data
    wanted = list(data) if split is None and len(data) == 1 else _SPLITS.get(split or "", ())
    for name in wanted:
        if name in data:
            return data[name]
    raise QuietvitError(
        f"hf:{rest} has the splits {', '.join(map(repr, data))}; "
        + (
            "ask for 'train' or 'test'."
            if split is None
            else f"none is called {' or '.join(map(repr, wanted))}."
        )
    )


def image_column(features: Any, rest: str) -> str:
    """Return the name of the column of images."""
    from datasets import Image

    images = [name for name, kind in features.items() if isinstance(kind, Image)]
    return _one(images, ("image", "img"), "images (type Image)", features, rest)


def _label_column(features: Any, rest: str) -> str:
    from datasets import ClassLabel, Value

    labels = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    labels = labels or [
        name
        for name, kind in features.items()
        if isinstance(kind, Value) and "int" in kind.dtype and name in ("label", "labels")
    ]
    usual = ("label", "labels", "fine_label")
    try:
        return _one(labels, usual, "labels (type ClassLabel)", features, rest)
    except QuietvitError as error:
        if labels:
            raise
        raise NoLabelsError(
            f"{error} Training and evaluation need labels; calibration does not."
        ) from error


def _one(columns: list[str], usual: tuple[str, ...], what: str, features: Any, rest: str) -> str:
    chosen = columns if len(columns) == 1 else [name for name in usual if name in columns]
    if not chosen:
        listing = ", ".join(f"{name!r} ({type(kind).__name__})" for name, kind in features.items())
        raise QuietvitError(
            f"hf:{rest} has {len(columns) or 'no'} columns of {what}"
            f"{' to choose from' * bool(columns)}: it has {listing}. Cast or rename "
            "the columns to 'image' and 'label', or remove the others; then save it again."
        )
    return chosen[0]


def _labels(data: Any, label: str, rest: str) -> np.ndarray:
    column = data.select_columns([label]).with_format("arrow")[:].column(label)
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise QuietvitError(f"row {row} of hf:{rest} has no label; fill it in or drop the row.")
    labels: np.ndarray = column.to_numpy().astype(np.int64)
    return labels


def reader(data: Any, image: str, rest: str) -> Callable[[int], bytes]:
    """Return a function from the number of a row to its encoded image."""
    from datasets import Image

    encoded = data.select_columns([image]).cast_column(image, Image(decode=False))
    return partial(_read_row, encoded, image, rest)


def _read_row(data: Any, image: str, rest: str, index: int) -> bytes:
    value = data[int(index)][image] or {}
    if value.get("bytes"):
        return bytes(value["bytes"])
    path = value.get("path")
    try:
        return Path(path or "").read_bytes()
    except OSError as error:
        reason = f"its file {path} could not be read" if path else "it holds neither bytes nor path"
        raise QuietvitError(f"row {index} of hf:{rest} has no image: {reason}.") from error
