"""Hugging Face data sets with boxes: a column ``objects`` as in COCO.

``quietvit.data.hub`` opens the data set and its images.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from PIL import Image

from quietvit.data.hub import image_column, opened, reader, split_of
from quietvit.detection.checks import MAX_BAD_BOXES, Problems
from quietvit.detection.coco import record_of
from quietvit.detection.dataset import DetectionDataset, Record
from quietvit.errors import QuietvitError, nearest

CATEGORY = ("category", "category_id", "label", "labels")


def open_objects(
    rest: str,
    split: str | None = None,
    class_names: Sequence[str] | None = None,
    max_bad_boxes: int = MAX_BAD_BOXES,
) -> DetectionDataset:
    """Open a folder that ``save_to_disk`` wrote, or a name on the hub.

    The column ``objects`` holds for each object ``bbox`` (x, y, width, height in pixels) and
    ``category``, and may hold ``area`` and ``iscrowd``. The columns ``image_id``, ``width`` and
    ``height`` are used if they exist.

    Args:
        rest: the folder or name, without ``objects:``.
        split: ``train`` or ``test``; None takes the only split.
        class_names: number the classes as these. None takes those of the ``ClassLabel``, or the
            values that occur, in order.
        max_bad_boxes: see ``checks.Problems``.

    Raises:
        QuietvitError: as ``quietvit.data.hub.open_hub``; no column of boxes, or more wrong
            annotations than allowed.
    """
    data = split_of(opened(rest), split, rest)
    image = image_column(data.features, rest)
    _refuse_without_boxes(data.features, rest)
    read_image = reader(data, image, rest)
    columns = [name for name in data.column_names if name != image]
    rows = [dict(row) for row in data.select_columns(columns)]
    objects = [list(_objects(row["objects"])) for row in rows]
    own = _class_names(data.features["objects"])
    if own is None:
        own = sorted({str(_category(entry, rest)) for of_image in objects for entry in of_image})
        number = {name: name for name in own}
    else:
        number = {str(index): name for index, name in enumerate(own)} | {n: n for n in own}
    names = list(class_names or own)
    name = f"objects:{rest}" if split is None else f"objects:{rest} ({split})"
    problems = Problems(name, max_bad_boxes)
    records = []
    for index, (row, entries) in enumerate(zip(rows, objects, strict=True)):
        read = partial(read_image, index)
        size = _size(row, read)
        named = [_named(entry, number, rest) for entry in entries]
        records.append(_record(index, row, named, size, names, problems, read))
    problems.tell()
    return DetectionDataset(records, names, range(1, len(names) + 1), name)


def _record(
    index: int,
    row: Mapping[str, Any],
    objects: Sequence[tuple[str, Mapping[str, Any]]],
    size: tuple[int, int],
    names: Sequence[str],
    problems: Problems,
    read: Callable[[], bytes],
) -> Record:
    kept, labels, told = [], [], []
    for place, (category, entry) in enumerate(objects):
        what = f"object {place} of row {index}"
        if category not in names:
            problems.add(
                f"{what} has the class {category!r}, which is unknown{nearest(category, names)}"
            )
        elif len(entry["bbox"]) != 4:
            problems.add(f"{what} has a bbox of {len(entry['bbox'])} numbers")
        else:
            # Missing values are None here; record_of expects them left out.
            kept.append({key: value for key, value in entry.items() if value or key == "bbox"})
            labels.append(names.index(category) + 1)
            told.append(what)
    image_id = row.get("image_id")
    return record_of(
        f"row {index}",
        image_id if isinstance(image_id, int) else index + 1,
        size,
        kept,
        labels,
        told,
        problems,
        read,
    )


def _refuse_without_boxes(features: Mapping[str, Any], rest: str) -> None:
    if "objects" not in features or "bbox" not in str(features["objects"]):
        raise QuietvitError(
            f"objects:{rest} has no column 'objects' with 'bbox'; its columns are "
            f"{', '.join(features)}. Rename the column of boxes, and save the data set again."
        )


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield objects from a list of dicts, or from a dict of lists (older data sets)."""
    if not isinstance(value, Mapping):
        yield from value or ()
        return
    for values in zip(*value.values(), strict=True):
        yield dict(zip(value, values, strict=True))


def _category(entry: Mapping[str, Any], rest: str) -> Any:
    for key in CATEGORY:
        if entry.get(key) is not None:
            return entry[key]
    raise QuietvitError(
        f"an object of objects:{rest} has no category; it has {', '.join(entry)}. Its class must "
        f"be called {' or '.join(CATEGORY)}."
    )


def _named(
    entry: Mapping[str, Any], number: Mapping[str, str], rest: str
) -> tuple[str, Mapping[str, Any]]:
    category = str(_category(entry, rest))
    return number.get(category, category), entry


def _class_names(feature: Any) -> list[str] | None:
    """Return the names of a ``ClassLabel`` somewhere below the column's feature."""
    names = getattr(feature, "names", None)
    if names:
        return list(names)
    inner = getattr(feature, "feature", feature)
    if isinstance(inner, Mapping):
        candidates = (_class_names(inner[key]) for key in CATEGORY if key in inner)
        return next((names for names in candidates if names), None)
    return None if inner is feature else _class_names(inner)


def _size(row: Mapping[str, Any], read: Any) -> tuple[int, int]:
    """Return (width, height): from the columns, else from the header of the image."""
    if row.get("width") and row.get("height"):
        return int(row["width"]), int(row["height"])
    with Image.open(io.BytesIO(read())) as image:
        return image.size
