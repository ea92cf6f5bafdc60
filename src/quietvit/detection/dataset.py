"""The data set of images with boxes: ``dataset[i] -> (PIL image, target)``.

``coco`` and ``voc`` read the annotation files, ``checks`` finds wrong boxes, ``masks`` draws masks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.tv_tensors import BoundingBoxes, Mask

from quietvit.data.decoding import upright
from quietvit.detection.masks import Outline, bitmaps, turned_bitmaps
from quietvit.errors import QuietvitError

Target = dict[str, Any]
"""The objects of one image of H x W pixels:

- ``boxes``: ``tv_tensors.BoundingBoxes`` (N, 4), float32, corners x1, y1, x2, y2 in pixels;
- ``labels``: (N,), int64, 1 to the number of classes (0 is the background);
- ``category_ids``: (N,), int64, the class numbers of the annotation file;
- ``area``: (N,), float32, in pixels, from the annotation file;
- ``iscrowd``: (N,), int64, 1 for objects that evaluation ignores;
- ``image_id``: an integer, ``size``: (H, W);
- ``masks``: ``tv_tensors.Mask`` (N, H, W), uint8, 1 on the object. Only if the data set has masks.
"""


@dataclass(frozen=True)
class Record:
    """One image: its file, id, size (width, height) as annotated, and N boxes.

    ``boxes`` (N, 4) holds corners in pixels of the stored image, float32. ``read`` returns the
    encoded image; None reads the file at ``path``. ``outlines`` holds N masks, or is None.
    """

    path: str
    image_id: int
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    area: np.ndarray
    iscrowd: np.ndarray
    read: Callable[[], bytes] | None = None
    outlines: tuple[Outline, ...] | None = None


class DetectionDataset(Dataset[tuple[Image.Image, Target]]):
    """Images with boxes, decoded on access: ``dataset[i] -> (PIL image in RGB, Target)``.

    Images are upright, as everywhere in this package. Most annotation tools ignore the EXIF
    orientation and use pixels of the stored image. Boxes are therefore rotated with the image.
    If the annotated width and height fit only the upright image, the boxes are kept as they are.

    Args:
        records: one for each image. An image without boxes is background.
        class_names: classes of label 1, 2, ...
        category_ids: numbers of these classes in the annotation file.
        name: name of the data set in error messages.

    Raises:
        QuietvitError: there are no images.
    """

    groups: np.ndarray | None = None
    """None: every image can be read alone (see ``quietvit.data.ImageDataset``)."""

    def __init__(
        self,
        records: Sequence[Record],
        class_names: Sequence[str],
        category_ids: Sequence[int],
        name: str,
    ) -> None:
        self.records = tuple(records)
        self.class_names = tuple(class_names)
        self.category_ids = tuple(category_ids)
        self.name = name
        if not self.records:
            raise QuietvitError(f"{name} holds no images at all. Check the path and its contents.")

    @property
    def has_masks(self) -> bool:
        """Whether targets have ``masks``."""
        return self.records[0].outlines is not None

    @property
    def num_classes(self) -> int:
        """The number of classes, without the background."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Image.Image, Target]:
        record = self.records[index]
        try:
            content = Path(record.path).read_bytes() if record.read is None else record.read()
        except OSError as error:
            raise QuietvitError(
                f"the image {record.path} could not be read: {error.strerror or error}. Restore "
                f"the file, or remove its annotations from {self.name}."
            ) from error
        image, turn = upright(content, lambda: record.path)
        boxes, masks = self._upright(record, turn, image)
        ids = np.asarray(self.category_ids, np.int64)[record.labels - 1]
        target = {
            "boxes": BoundingBoxes(
                torch.from_numpy(boxes), format="XYXY", canvas_size=(image.height, image.width)
            ),
            "labels": torch.from_numpy(record.labels),
            "category_ids": torch.from_numpy(ids),
            "area": torch.from_numpy(record.area),
            "iscrowd": torch.from_numpy(record.iscrowd),
            "image_id": record.image_id,
            "size": (image.height, image.width),
        }
        return image, target if masks is None else target | {"masks": Mask(masks)}

    def where(self, index: int) -> str:
        """Return the file of image ``index``."""
        return self.records[index].path

    def checksum(self) -> str:
        """Return a checksum of boxes, labels, masks, image ids, and file names without folders."""
        digest = hashlib.sha256()
        for record in self.records:
            digest.update(f"{Path(record.path).name} {record.image_id}\n".encode())
            for values in (record.boxes, record.labels, record.iscrowd):
                digest.update(np.ascontiguousarray(values).tobytes())
            for outline in record.outlines or ():
                digest.update(outline.content)
        return digest.hexdigest()

    def chosen(self, indices: Sequence[int]) -> DetectionDataset:
        """Return these images in this order."""
        records = [self.records[index] for index in indices]
        return DetectionDataset(records, self.class_names, self.category_ids, self.name)

    def _upright(
        self, record: Record, turn: int, image: Image.Image
    ) -> tuple[np.ndarray, Tensor | None]:
        """Return boxes and masks in pixels of the image, which EXIF's ``turn`` rotated."""
        stored = image.size if turn < 5 else image.size[::-1]
        if record.size == image.size != stored:
            turn, stored = 1, image.size
        if record.size != stored:
            raise QuietvitError(
                f"{record.path} has {stored[0]} x {stored[1]} pixels, but its annotations in "
                f"{self.name} say {record.size[0]} x {record.size[1]}. Give the image folder that "
                "belongs to the annotations."
            )
        boxes = turned(record.boxes, turn, stored)
        if record.outlines is None:
            return boxes, None
        masks = turned_bitmaps(bitmaps(record.outlines, stored), turn)
        return boxes, torch.from_numpy(masks)


def turned(boxes: np.ndarray, orientation: int, size: tuple[int, int]) -> np.ndarray:
    """Map boxes (N, 4) from a stored image of ``size`` (width, height) to the upright image.

    ``orientation`` is EXIF's, 1 to 8: 2 to 4 flip the image, 5 to 8 also exchange x and y.
    """
    width, height = size
    x1, y1, x2, y2 = boxes.T
    if orientation in (2, 3, 7, 8):  # mirror x; for 7 and 8, x becomes the upright y below
        x1, x2 = width - x2, width - x1
    if orientation in (3, 4, 6, 7):
        y1, y2 = height - y2, height - y1
    corners = (y1, x1, y2, x2) if orientation >= 5 else (x1, y1, x2, y2)
    return np.stack(corners, axis=1).astype(np.float32)
