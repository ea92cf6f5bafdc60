"""Read annotations in COCO's JSON format (``images``, ``annotations``, ``categories``).

Boxes are read, and masks if they are wanted. Keypoints and captions are ignored.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quietvit.detection.checks import MAX_BAD_BOXES, Problems, checked_boxes
from quietvit.detection.dataset import DetectionDataset, Record
from quietvit.detection.masks import Outline, outline_of
from quietvit.errors import QuietvitError, nearest

_KEYS = ("images", "annotations", "categories")


def open_coco(
    annotations: str | Path,
    images: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    max_bad_boxes: int = MAX_BAD_BOXES,
    masks: bool = False,
) -> DetectionDataset:
    """Open the images of an annotation file, in the order of the file.

    Args:
        annotations: a JSON file with three lists. ``images`` have id, file_name, width and height.
            ``annotations`` have image_id, category_id and bbox (x, y, width, height in pixels of
            the stored image); area and iscrowd are optional. ``categories`` have id and name.
        images: the folder that the file names are relative to. None tries the folder of
            ``annotations``. Inside and beside it, None also tries ``images`` and the name of the
            file (``train2017`` for ``instances_train2017.json``).
        class_names: classes of label 1, 2, ... None takes the categories in order of their ids.
        max_bad_boxes: tolerate this many wrong annotations (see ``checks.Problems``).
        masks: also read ``segmentation``: polygons or run lengths (RLE, compressed or not).

    Raises:
        QuietvitError: the file is missing or has another format, no folder holds the images, or
            too many annotations are wrong: no area, outside of the image, an unknown category or
            image, a wrong segmentation, or a missing image file. Or masks are wanted, and an
            annotation has no segmentation.
    """
    path = Path(annotations).expanduser()
    content = _read(path)
    name = f"coco:{path}"
    categories = sorted(content["categories"], key=lambda category: category["id"])
    known = [str(category["name"]) for category in categories]
    ids = [int(category["id"]) for category in categories]
    names = tuple(known if class_names is None else class_names)
    problems = Problems(name, max_bad_boxes)
    number = {
        id_: names.index(own) + 1 for id_, own in zip(ids, known, strict=True) if own in names
    }
    listed = content["images"]
    folder = _folder(path, images, listed)
    of_image = defaultdict(list)
    own = {image["id"] for image in listed}
    for annotation in content["annotations"]:
        if annotation["image_id"] not in own:
            problems.add(
                f"annotation {annotation.get('id')} is of image {annotation['image_id']}, which is "
                "not listed"
            )
        elif annotation["category_id"] not in number:
            problems.add(_unknown_category(annotation, categories, names))
        else:
            of_image[annotation["image_id"]].append(annotation)
    records = []
    for image in listed:
        place = folder / image["file_name"]
        if not place.is_file():
            problems.add(f"the image {place} (id {image['id']}) does not exist")
            continue
        own_ones = of_image[image["id"]]
        size = int(image["width"]), int(image["height"])
        told = [f"annotation {a.get('id')} of {place.name}" for a in own_ones]
        outlines = None
        if masks:
            outlines = [
                outline_of(a.get("segmentation"), size, what, str(path), problems)
                for a, what in zip(own_ones, told, strict=True)
            ]
        records.append(
            record_of(
                str(place),
                int(image["id"]),
                size,
                own_ones,
                [number[a["category_id"]] for a in own_ones],
                told,
                problems,
                outlines=outlines,
            )
        )
    problems.tell()
    id_of = {label: id_ for id_, label in number.items()}
    # Classes that this file does not list get new ids: names (square, disc, star) with listed ids
    # 3 and 7 give star, label 3, the id 7 + 3 = 10.
    free = max(ids, default=0)
    category_ids = [id_of.get(label, free + label) for label in range(1, len(names) + 1)]
    return DetectionDataset(records, names, category_ids, name)


def record_of(
    path: str,
    image_id: int,
    size: tuple[int, int],
    annotations: Sequence[Mapping[str, Any]],
    labels: Sequence[int],
    told: Sequence[str],
    problems: Problems,
    read: Callable[[], bytes] | None = None,
    outlines: Sequence[Outline | None] | None = None,
) -> Record:
    """Return the record of one image from its annotations with COCO's ``bbox``.

    ``area`` and ``iscrowd`` are optional. ``told`` names each annotation in messages. Wrong boxes
    go to ``problems`` and are left out, as are objects whose outline is None.
    """
    sized = np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)
    corners = np.concatenate([sized[:, :2], sized[:, :2] + sized[:, 2:]], axis=1)
    boxes, kept = checked_boxes(corners, size, told, problems)
    if outlines is not None:
        kept = kept & np.array([outline is not None for outline in outlines], bool)
    area = [float(a.get("area", a["bbox"][2] * a["bbox"][3])) for a in annotations]
    return Record(
        path=path,
        image_id=image_id,
        size=size,
        boxes=boxes[kept],
        labels=np.array(labels, np.int64)[kept],
        area=np.array(area, np.float32)[kept],
        iscrowd=np.array([int(a.get("iscrowd", 0)) for a in annotations], np.int64)[kept],
        read=read,
        outlines=None
        if outlines is None
        else tuple(o for o, keep in zip(outlines, kept, strict=True) if o is not None and keep),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise QuietvitError(
            f"the annotations {path} could not be read: {error.strerror or error}. Check the path."
        ) from error
    except ValueError as error:
        raise QuietvitError(
            f"the annotations {path} are not valid JSON ({error}). Give a file in COCO's format."
        ) from error
    if not isinstance(content, dict) or any(not isinstance(content.get(k), list) for k in _KEYS):
        keys = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise QuietvitError(
            f"{path} is not in COCO's format: it needs lists under {', '.join(_KEYS)}, but holds "
            f"{keys}."
        )
    try:
        _complete(content)
    except (KeyError, TypeError, ValueError) as error:
        raise QuietvitError(f"{path} is not in COCO's format: {error}.") from error
    return content


def _complete(content: Mapping[str, Any]) -> None:
    """Raise ValueError if an entry lacks a key, has a wrong bbox, or repeats an id."""
    needed = {
        "images": ("id", "file_name", "width", "height"),
        "annotations": ("image_id", "category_id", "bbox"),
        "categories": ("id", "name"),
    }
    for section, keys in needed.items():
        for place, entry in enumerate(content[section]):
            lacking = [key for key in keys if key not in entry]
            if lacking:
                raise ValueError(f"entry {place} of {section} has no {lacking[0]!r}")
            if section == "annotations" and len(entry["bbox"]) != 4:
                raise ValueError(f"entry {place} of annotations has a bbox of {entry['bbox']}")
        ids = Counter(entry["id"] for entry in content[section] if section != "annotations")
        twice = [id_ for id_, count in ids.items() if count > 1]
        if twice:
            raise ValueError(f"{section} has the id {twice[0]} more than once")


def _unknown_category(
    annotation: Mapping[str, Any], categories: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> str:
    named = {category["id"]: str(category["name"]) for category in categories}
    id_ = annotation["category_id"]
    what = f"annotation {annotation.get('id')} of image {annotation['image_id']}"
    if id_ not in named:
        return f"{what} has the category {id_}, which is not listed"
    return (
        f"{what} has the category {named[id_]!r}, which the training images do not have"
        f"{nearest(named[id_], names)}"
    )


def _folder(path: Path, images: str | Path | None, listed: Sequence[Mapping[str, Any]]) -> Path:
    if images is not None:
        folder = Path(images).expanduser()
        if not folder.is_dir():
            raise QuietvitError(
                f"the image folder {folder} does not exist. Check the path."
            ) from FileNotFoundError(folder)
        return folder
    own = path.stem.removeprefix("instances_")
    around = (path.parent, path.parent.parent)
    tried = [path.parent, *(place / name for place in around for name in ("images", own))]
    first = [str(image["file_name"]) for image in listed[:20]]
    for folder in tried:
        if any((folder / name).is_file() for name in first):
            return folder
    raise QuietvitError(
        f"none of these folders holds the first images that {path} lists ({', '.join(first[:2])}): "
        f"{', '.join(map(os.fspath, tried))}. Name the folder: 'coco:{path}@/folder/of/images'."
    ) from FileNotFoundError(path.parent)
