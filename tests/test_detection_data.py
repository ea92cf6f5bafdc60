"""Laws: boxes lie on what they mark, in every form; wrong annotations are counted, then refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torchvision.tv_tensors import BoundingBoxes

from detection_cases import CATEGORIES, annotated, coco, picture
from quietvit.detection import (
    BoxAugmentation,
    TrainingTransform,
    collate,
    load_detection_dataset,
    open_coco,
    open_voc,
    subset,
)
from quietvit.errors import QuietvitError

BOX = (10, 20, 30, 15)


def white(image, box):
    """Mean of the picture inside a box, and of all outside it."""
    pixels = np.asarray(image.convert("L"), np.float32) / 255
    x1, y1, x2, y2 = (round(float(value)) for value in box)
    inside = pixels[y1:y2, x1:x2].mean()
    return inside, (pixels.sum() - pixels[y1:y2, x1:x2].sum()) / pixels.size


def test_real_boxes_are_read_with_their_classes(test_data):
    blood = load_detection_dataset(f"coco:{test_data}/bccd/train.json,{test_data}/bccd/test.json")
    assert len(blood) == 205
    assert blood.class_names == ("RBC", "WBC", "Platelets")
    image, target = blood[0]
    assert image.size == (640, 480)
    assert target["size"] == (480, 640)
    boxes = target["boxes"]
    assert isinstance(boxes, BoundingBoxes)
    assert boxes.dtype == torch.float32
    assert boxes[0].tolist() == [68.0, 315.0, 286.0, 480.0]
    assert int(target["labels"][0]) == int(target["category_ids"][0]) == 2
    found = open_coco(test_data / "coco256" / "instances_val2017.json")
    assert len(found) == 128
    assert (found.num_classes, found.category_ids[-1]) == (80, 90)
    assert int(sum(found[index][1]["iscrowd"].sum() for index in range(8))) >= 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_turned_with_a_stored_image(tmp_path, orientation):
    path = coco(tmp_path, [annotated(1, 1, BOX)], pictures=1)
    picture(tmp_path / "images" / "1.png", box=BOX, orientation=orientation)
    image, target = open_coco(path)[0]
    assert image.size == ((80, 60) if orientation < 5 else (60, 80))
    assert white(image, target["boxes"][0]) == (1.0, 0.0)
    assert target["boxes"].canvas_size == target["size"] == image.size[::-1]


def test_boxes_of_an_upright_image_are_known_by_its_stated_size(tmp_path):
    path = coco(tmp_path, [annotated(1, 1, (25, 10, 15, 30))], pictures=1, size=(60, 80))
    picture(tmp_path / "images" / "1.png", (80, 60), BOX, orientation=6)
    image, target = open_coco(path)[0]
    assert white(image, target["boxes"][0]) == (1.0, 0.0)


def test_category_ids_become_labels_by_name(tmp_path):
    annotations = [annotated(1, 1, BOX), annotated(2, 1, BOX, 3, iscrowd=1)]
    found = open_coco(coco(tmp_path, annotations))
    assert found.class_names == ("disc", "square")
    assert found[0][1]["labels"].tolist() == [2, 1]
    assert found[0][1]["category_ids"].tolist() == [7, 3]
    assert found[0][1]["iscrowd"].tolist() == [0, 1]
    assert found[1][1]["boxes"].shape == (0, 4)
    other = open_coco(tmp_path / "boxes.json", class_names=("square", "disc", "star"))
    assert other[0][1]["labels"].tolist() == [1, 2]
    assert other.category_ids == (7, 3, 10)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (annotated(9, 1, (10, 10, 0, 5)), r"annotation 9 of 1\.png has no area"),
        (annotated(9, 1, (90, 10, 5, 5)), r"annotation 9 of 1\.png has no area"),
        (annotated(9, 1, (70, 10, 30, 5)), r"annotation 9 of 1\.png exceeds 80 x 60 pixels"),
        (annotated(9, 1, (float("nan"), 1, 5, 5)), r"annotation 9 of 1\.png has no area"),
        (annotated(9, 1, BOX, category=8), r"annotation 9 of image 1 has the category 8"),
        (annotated(9, 5, BOX), r"annotation 9 is of image 5, which is not listed"),
    ],
)
def test_wrong_annotations_are_counted_and_then_refused(tmp_path, caplog, wrong, told):
    path = coco(tmp_path, [annotated(1, 1, BOX), wrong])
    with pytest.raises(QuietvitError, match=f"1 wrong annotations: .*{told}.*max_bad_boxes"):
        open_coco(path, max_bad_boxes=0)
    found = open_coco(path, max_bad_boxes=1)
    assert "1 wrong annotations" in caplog.text
    boxes = found[0][1]["boxes"]
    assert len(boxes) == 1 + ("exceeds" in told)
    assert bool((boxes[:, 2] <= 80).all())


def test_a_pixel_of_rounding_is_clipped_silently(tmp_path, caplog):
    found = open_coco(coco(tmp_path, [annotated(1, 1, (-0.6, 5, 81, 10))]), max_bad_boxes=0)
    assert found[0][1]["boxes"].tolist() == [[0, 5, 80, 15]]
    assert not caplog.text


def test_annotations_of_another_folder_are_refused(tmp_path):
    path = coco(tmp_path, [annotated(1, 1, BOX)])
    (tmp_path / "images" / "2.png").unlink()
    with pytest.raises(QuietvitError, match=r"images/2\.png \(id 2\) does not exist"):
        open_coco(path, max_bad_boxes=0)
    assert len(open_coco(path)) == 1
    picture(tmp_path / "images" / "1.png", (64, 64))
    with pytest.raises(QuietvitError, match=r"64 x 64 pixels, but its annotations .* 80 x 60"):
        open_coco(path)[0]
    (tmp_path / "images" / "1.png").unlink()
    with pytest.raises(QuietvitError, match=r"none of these folders .*boxes\.json@/folder"):
        open_coco(path)
    with pytest.raises(QuietvitError, match="does not exist"):
        load_detection_dataset(f"coco:{path}@{tmp_path}/nowhere")


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"categories": {}}, "needs lists under images, annotations, categories"),
        ({"images": [{"id": 1}]}, "entry 0 of images has no 'file_name'"),
        ({"categories": CATEGORIES * 2}, "categories has the id 3 more than once"),
        ({"annotations": [annotated(1, 1, (1, 2, 3, 4)) | {"bbox": [1]}]}, r"bbox of \[1\]"),
    ],
)
def test_what_is_not_cocos_format_is_refused(tmp_path, parts, told):
    with pytest.raises(QuietvitError, match=told):
        open_coco(coco(tmp_path, **({"annotations": []} | parts)))


def test_a_spec_names_its_parts(tmp_path):
    path = coco(tmp_path / "train", [annotated(1, 1, BOX)])
    other = coco(tmp_path / "test", [annotated(1, 1, BOX, 3)], pictures=1)
    spec = f"coco:{path},{other}@{tmp_path}/test/images"
    assert len(load_detection_dataset(spec, "train")) == 2
    assert len(load_detection_dataset(spec, "test")) == 1
    with pytest.raises(QuietvitError, match="names no test annotations"):
        load_detection_dataset(f"coco:{path}", "test")
    with pytest.raises(QuietvitError, match="no data set with boxes is named 'coca:x'; did you"):
        load_detection_dataset("coca:x")
    chosen = subset(load_detection_dataset(spec, "train"), 1)
    assert len(chosen) == 1
    with pytest.raises(QuietvitError, match="ask for 1 to 2"):
        subset(load_detection_dataset(spec, "train"), 3)


def voc(folder, name, box, kind="square", difficult=0, stated=None):
    picture(folder / "JPEGImages" / f"{name}.png", box=BOX)
    xmin, ymin, xmax, ymax = box
    corners = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
    (folder / "Annotations").mkdir(exist_ok=True)
    (folder / "Annotations" / f"{name}.xml").write_text(
        f"<annotation><filename>{stated or name}.png</filename><size><width>80</width><height>60"
        f"</height><depth>3</depth></size><object><name>{kind}</name><difficult>{difficult}"
        f"</difficult><bndbox>{corners}</bndbox></object></annotation>"
    )


def test_pascal_voc_counts_its_pixels_from_one(tmp_path):
    voc(tmp_path, "a", (11, 21, 40, 35))
    voc(tmp_path, "b", (11, 21, 40, 35), "disc", difficult=1, stated="elsewhere")
    found = load_detection_dataset(f"voc:{tmp_path}")
    assert found.class_names == ("disc", "square")
    image, target = found[0]
    assert white(image, target["boxes"][0]) == (1.0, 0.0)
    assert float(target["area"][0]) == BOX[2] * BOX[3]
    assert [int(found[index][1]["iscrowd"][0]) for index in (0, 1)] == [0, 1]
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\n")
    (lists / "val.txt").write_text("b 1\n")
    train = load_detection_dataset(f"voc:{tmp_path}", "train")
    assert [record.path for record in train.records] == [found.records[0].path]
    with pytest.raises(QuietvitError, match="the class 'disc', which is unknown"):
        open_voc(tmp_path, "test", train.class_names, max_bad_boxes=0)
    (lists / "val.txt").write_text("c\n")
    with pytest.raises(QuietvitError, match="lists 1 images, and 1 have no annotations"):
        open_voc(tmp_path, "test")
    (tmp_path / "Annotations" / "a.xml").write_text("<annotation><size/></annotation>")
    with pytest.raises(QuietvitError, match=r"a\.xml lacks <width>"):
        open_voc(tmp_path)


@pytest.mark.parametrize(
    ("scale", "crop"), [((1.0, 1.0), 0.0), ((0.4, 2.0), 0.0), ((1.0, 1.0), 1.0)]
)
def test_boxes_move_with_the_image(tmp_path, scale, crop):
    path = coco(tmp_path, [annotated(1, 1, BOX), annotated(2, 1, (0, 0, 80, 60), iscrowd=1)])
    picture(tmp_path / "images" / "1.png", box=BOX)
    dataset = open_coco(path)
    chosen = BoxAugmentation(crop=crop, flip=0.5, scale=scale)
    change = TrainingTransform((64, 64), (0.0, 0.0, 0.0), chosen)
    places = set()
    for seed in range(12):
        torch.manual_seed(seed)
        image, target = change(*dataset[0])
        assert target["size"] == tuple(image.shape[1:])
        assert not crop or all(384 <= side <= 600 for side in target["size"])
        if not len(target["boxes"]):  # the crop has lost it
            continue
        assert target["labels"].tolist() == [2]
        assert target["iscrowd"].tolist() == [0]
        seen = Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy())
        inside, outside = white(seen, target["boxes"][0])
        assert inside > 0.8
        assert outside < 0.02
        places.add(tuple(target["boxes"][0].tolist()))
    assert len(places) > 1
    images, targets = collate([change(*dataset[0]), change(*dataset[1])])
    assert [len(images), len(targets)] == [2, 2]
    assert targets[1]["boxes"].shape == (0, 4)


def test_exif_is_read_as_decoding_reads_it(tmp_path):
    """A damaged orientation leaves image and boxes as they are stored."""
    path = coco(tmp_path, [annotated(1, 1, BOX)], pictures=1)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 99
    Image.new("RGB", (80, 60)).save(tmp_path / "images" / "1.png", exif=exif)
    assert open_coco(path)[0][1]["boxes"].tolist() == [[10, 20, 40, 35]]
    assert json.loads(path.read_text())["annotations"][0]["bbox"] == list(BOX)
