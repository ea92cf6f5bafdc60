"""Small data sets with boxes, and a small detector, for the tests of detection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

CATEGORIES = [{"id": 3, "name": "disc"}, {"id": 7, "name": "square"}]
SETTINGS = {
    "size": [64, 64],
    "channels": 16,
    "scales": [2, 1, 0.5],
    "options": {"box_channels": 32, "rpn_post_nms_top_n_test": 50, "rpn_post_nms_top_n_train": 50},
}
BACKBONE = {
    "name": "vit_tiny_patch16_224",
    "kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
}


def picture(path: Path, size=(80, 60), box=None, orientation=1):
    """Write a black picture with a white rectangle (x, y, width, height)."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    if box is not None:
        x, y, width, height = box
        pixels[y : y + height, x : x + width] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, exif=exif)


def annotated(id_: int, image: int, box: Any, category: int = 7, **more: Any) -> dict[str, Any]:
    area = box[2] * box[3]
    given = {"id": id_, "image_id": image, "bbox": list(box), "category_id": category, "area": area}
    return given | {"iscrowd": 0} | more


def coco(folder: Path, annotations: Any, pictures: int = 2, size=(80, 60), **parts: Any) -> Path:
    """Write so many pictures and a file of annotations; returns the file."""
    listed = []
    for index in range(1, pictures + 1):
        name = f"{index}.png"
        picture(folder / "images" / name, size)
        listed.append({"id": index, "file_name": name, "width": size[0], "height": size[1]})
    content = {"images": listed, "annotations": annotations, "categories": CATEGORIES} | parts
    path = folder / "boxes.json"
    path.write_text(json.dumps(content))
    return path


def outlined(id_: int, image: int, box: Any, category: int = 7, **more: Any) -> dict[str, Any]:
    """Return an annotation whose mask is a polygon around the whole box."""
    x, y, width, height = box
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    return annotated(id_, image, box, category, **{"segmentation": [corners]} | more)
