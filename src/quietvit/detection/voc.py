"""Read annotations in Pascal VOC's XML format, with one file per image.

Only boxes are read. Parts, poses and segmentations are ignored.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from quietvit.data.formats import is_readable
from quietvit.detection.checks import MAX_BAD_BOXES, Problems, checked_boxes
from quietvit.detection.dataset import DetectionDataset, Record
from quietvit.errors import QuietvitError, nearest

_SPLITS = {"train": ("train", "trainval"), "test": ("val", "test")}


def open_voc(
    root: str | Path,
    split: str | None = None,
    class_names: Sequence[str] | None = None,
    max_bad_boxes: int = MAX_BAD_BOXES,
) -> DetectionDataset:
    """Open a folder of annotations and images, in order of file name.

    VOC counts pixels from 1 and includes the last pixel, so 1 is subtracted from xmin and ymin.
    ``difficult`` objects get ``iscrowd = 1``, which is closest to VOC's own rule. Training leaves
    them out. Evaluation counts them neither as missed nor as false.

    Args:
        root: a folder with ``Annotations/*.xml`` and ``JPEGImages/``, or one with XML and images.
        split: ``train`` takes the images listed in ``ImageSets/Main/train.txt`` (or
            ``trainval.txt``), ``test`` those in ``val.txt`` (or ``test.txt``), and None all.
        class_names: classes of label 1, 2, ... None takes the names in the files, sorted.
        max_bad_boxes: tolerate this many wrong annotations (see ``checks.Problems``).

    Raises:
        QuietvitError: a folder, list or annotation is missing or incomplete, or too many are wrong.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise QuietvitError(
            f"the folder {folder} of VOC annotations does not exist. Check the path."
        ) from FileNotFoundError(folder)
    annotations = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
    images = folder / "JPEGImages" if (folder / "JPEGImages").is_dir() else annotations
    files = _listed(folder, annotations, split)
    name = f"voc:{folder}" if split is None else f"voc:{folder} ({split})"
    parsed = [(file, _parsed(file)) for file in files]
    if class_names is None:
        objects = (o for _, tree in parsed for o in tree.iter("object"))
        class_names = sorted({_text(o, "name") for o in objects})
    problems = Problems(name, max_bad_boxes)
    records = []
    for image_id, (file, tree) in enumerate(parsed, start=1):
        place = _image_of(file, tree, images)
        if place is None:
            problems.add(f"{file} has no image in {images}")
            continue
        records.append(_record(file, tree, place, image_id, class_names, problems))
    problems.tell()
    return DetectionDataset(records, class_names, range(1, len(class_names) + 1), name)


def _listed(folder: Path, annotations: Path, split: str | None) -> list[Path]:
    if split is None:
        every = sorted(path for path in annotations.glob("*.xml") if not path.name.startswith("."))
        if not every:
            raise QuietvitError(
                f"{annotations} holds no annotations (*.xml). Give the folder that holds "
                "Annotations/ and JPEGImages/, or XML files beside their images."
            )
        return every
    lists = [folder / "ImageSets" / "Main" / f"{name}.txt" for name in _SPLITS[split]]
    chosen = next((path for path in lists if path.is_file()), None)
    if chosen is None:
        raise QuietvitError(
            f"{folder} has no list of images for {split!r} ({' or '.join(map(str, lists))}). Add "
            "one, or give two folders: 'voc:/train,/test'."
        )
    stems = [line.split()[0] for line in chosen.read_text(encoding="utf-8").splitlines() if line]
    files = [annotations / f"{stem}.xml" for stem in stems]
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        raise QuietvitError(
            f"{chosen} lists {len(files)} images, and {len(missing)} have no annotations"
            f"{f', first {missing[0]}' if missing else ''}. Correct the list."
        )
    return files


def _parsed(file: Path) -> ET.Element:
    try:
        return ET.parse(file).getroot()
    except ET.ParseError as error:
        raise QuietvitError(
            f"{file} could not be read as XML ({error}). Correct or remove it."
        ) from error


def _image_of(file: Path, tree: ET.Element, images: Path) -> Path | None:
    """Find the image by the name in the annotation, or else by the name of the XML file."""
    stated = images / Path(tree.findtext("filename") or file.stem).name
    if stated.is_file():
        return stated
    beside = sorted(images.glob(f"{file.stem}.*"))
    return next((path for path in beside if is_readable(str(path)) and path != file), None)


def _record(
    file: Path,
    tree: ET.Element,
    place: Path,
    image_id: int,
    names: Sequence[str],
    problems: Problems,
) -> Record:
    size = _size(file, tree)
    corners, labels, crowd, told = [], [], [], []
    for index, element in enumerate(tree.iter("object"), start=1):
        what = f"object {index} of {file.name}"
        name = _text(element, "name", file)
        if name not in names:
            problems.add(f"{what} has the class {name!r}, which is unknown{nearest(name, names)}")
            continue
        corners.append(list(_box(element, file)))
        labels.append(names.index(name) + 1)
        crowd.append(int((element.findtext("difficult") or "0").strip() == "1"))
        told.append(what)
    boxes, kept = checked_boxes(np.array(corners), size, told, problems)
    boxes = boxes[kept]
    return Record(
        path=str(place),
        image_id=image_id,
        size=size,
        boxes=boxes,
        labels=np.array(labels, np.int64)[kept],
        area=np.prod(boxes[:, 2:] - boxes[:, :2], axis=1, dtype=np.float32),
        iscrowd=np.array(crowd, np.int64)[kept],
    )


def _size(file: Path, tree: ET.Element) -> tuple[int, int]:
    size = tree.find("size")
    return _number(size, "width", file), _number(size, "height", file)


def _box(element: ET.Element, file: Path) -> Iterator[float]:
    box = element.find("bndbox")
    for key, first in (("xmin", 1.0), ("ymin", 1.0), ("xmax", 0.0), ("ymax", 0.0)):
        try:
            yield float(_text(box, key, file)) - first
        except ValueError as error:
            raise QuietvitError(
                f"{file}: {key} of a bndbox is not a number. Correct it."
            ) from error


def _number(element: ET.Element | None, key: str, file: Path) -> int:
    try:
        return int(_text(element, key, file))
    except ValueError as error:
        raise QuietvitError(f"{file}: {key} is not an integer. Correct it.") from error


def _text(element: ET.Element | None, key: str, file: Path | None = None) -> str:
    text = None if element is None else element.findtext(key)
    if text is None:
        raise QuietvitError(
            f"{file or 'an annotation'} lacks <{key}>. Pascal VOC's XML has it in <size>, <object> "
            "or <bndbox>. Add it, or remove the file."
        )
    return text.strip()
