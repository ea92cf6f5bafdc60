"""Laws of Hugging Face data sets with boxes: both layouts give what COCO's JSON gives."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from quietvit.detection import is_detection_spec, load_detection_dataset
from quietvit.detection.sources import has_splits
from quietvit.errors import QuietvitError

datasets = pytest.importorskip("datasets")

NAMES = ["disc", "square"]


def png(value: int) -> dict[str, Any]:
    out = io.BytesIO()
    Image.new("RGB", (80, 60), (value, 0, 0)).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": None}


def saved(folder: Path, named: bool = True, layout: str = "lists", **changes: Any) -> str:
    """Two images: two boxes, then none."""
    label: Any = datasets.ClassLabel(names=NAMES) if named else datasets.Value("string")
    classes: list[Any] = [1, 0] if named else ["square", "disc"]
    boxes = changes.pop("boxes", [[10.0, 20.0, 30.0, 15.0], [0.0, 0.0, 8.0, 4.0]])
    number = datasets.Value("float32")
    if layout == "lists":
        content = [{"bbox": boxes, "category": classes}, {"bbox": [], "category": []}]
        kind: Any = {"bbox": [[number]], "category": [label]}
    else:
        content = [[{"bbox": b, "category": c} for b, c in zip(boxes, classes, strict=True)], []]
        kind = [{"bbox": [number], "category": label}]
    features = datasets.Features({"image": datasets.Image(), "objects": kind})
    data = datasets.Dataset.from_dict({"image": [png(9), png(90)], "objects": content}, features)
    datasets.DatasetDict({"train": data, "validation": data.select([0])}).save_to_disk(folder)
    return f"objects:{folder}"


@pytest.mark.parametrize("layout", ["lists", "dicts"])
@pytest.mark.parametrize("named", [True, False])
def test_both_layouts_give_boxes_labels_and_images(
    tmp_path: Path, named: bool, layout: str
) -> None:
    spec = saved(tmp_path / "data", named, layout)
    assert is_detection_spec(spec)
    assert has_splits(spec)
    found = load_detection_dataset(spec, "train")
    assert (len(found), found.class_names, found.num_classes) == (2, ("disc", "square"), 2)
    image, target = pickle.loads(pickle.dumps(found))[0]  # as worker processes get it
    assert np.asarray(image)[0, 0].tolist() == [9, 0, 0]
    assert target["boxes"].tolist() == [[10, 20, 40, 35], [0, 0, 8, 4]]
    assert target["labels"].tolist() == [2, 1]
    assert target["area"].tolist() == [450, 32]
    assert torch.equal(found[1][1]["boxes"], torch.zeros(0, 4))
    test = load_detection_dataset(spec, "test", class_names=["square", "disc"])
    assert test[0][1]["labels"].tolist() == [1, 2]


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    outside = saved(tmp_path / "a", boxes=[[70.0, 20.0, 30.0, 15.0], [0.0, 0.0, 0.0, 4.0]])
    with pytest.raises(QuietvitError, match=r"2 wrong annotations: .*object 0 of row 0"):
        load_detection_dataset(outside, "train", max_bad_boxes=1)
    with pytest.raises(QuietvitError, match="class 'disc', which is unknown"):
        load_detection_dataset(
            saved(tmp_path / "b"), "train", class_names=["square"], max_bad_boxes=0
        )
    plain = datasets.Dataset.from_dict({"image": [png(1)]}).cast_column("image", datasets.Image())
    plain.save_to_disk(tmp_path / "c")
    with pytest.raises(QuietvitError, match="has no column 'objects' with 'bbox'"):
        load_detection_dataset(f"objects:{tmp_path / 'c'}")
