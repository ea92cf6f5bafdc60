"""Laws: boxes come back in the pixels of the image given; AP is pycocotools' to six digits."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import torch
from torch import nn

from detection_cases import annotated, coco
from quietvit.data import create_model, data_config
from quietvit.detection import (
    Canvas,
    box_ap,
    detection_calibration,
    detection_loader,
    evaluate_detector,
    faster_rcnn,
    fcos,
    open_coco,
    predict_all,
    predictors,
    retinanet,
)
from quietvit.detection.average_precision import coco_files
from quietvit.errors import QuietvitError
from quietvit.normalization import warn_unless_normalized

VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": (64, 96)}


def vit(**kwargs):
    return create_model("vit_tiny_patch16_224", 0, **(VIT | kwargs))


def small(kind=faster_rcnn, **options):
    torch.manual_seed(0)
    given = {"channels": 32, "scales": (2, 1, 0.5)} | options
    if kind is faster_rcnn:
        given["box_channels"] = 32
    return kind(vit(), 3, **given)


@pytest.fixture(scope="module")
def model():
    return small().eval()


def judged(seed=0, images=6):
    """Random boxes, and predictions near to them, some lost and some made up."""
    draw = np.random.default_rng(seed)
    found = []
    for id_ in range(1, images + 1):
        count = int(draw.integers(0, 6))
        corner = draw.uniform(0, 150, (count, 2))
        sides = draw.uniform(4, 120, (count, 2))
        boxes = np.concatenate([corner, corner + sides], axis=1)
        labels = draw.integers(1, 4, count)
        there = {
            "image_id": id_, "size": (300, 300), "boxes": boxes.tolist(), "labels": labels.tolist(),
            "area": sides.prod(1).tolist(),
            "iscrowd": (draw.random(count) < 0.2).astype(int).tolist(),
        }  # fmt: skip
        near = np.concatenate([boxes + draw.normal(0, 4, boxes.shape), draw.uniform(0, 99, (2, 4))])
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        predicted = {
            "boxes": near.tolist(),
            "labels": [*labels.tolist(), 1, 2],
            "scores": draw.random(count + 2).tolist(),
        }
        found.append((there, predicted))
    return found


def test_ap_is_that_of_pycocotools():
    pytest.importorskip("faster_coco_eval")
    pycocotools = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    found = judged()
    own = box_ap(found)
    truth, results = coco_files(found)
    with contextlib.redirect_stdout(io.StringIO()):
        reference = pycocotools.COCO()
        reference.dataset = truth
        reference.createIndex()
        counted = COCOeval(reference, reference.loadRes(results), "bbox")
        counted.evaluate()
        counted.accumulate()
        counted.summarize()
    expected = [100 * value if value >= 0 else -1 for value in counted.stats[:6]]
    values = [own.ap, own.ap50, own.ap75, own.small, own.medium, own.large]
    assert values == pytest.approx(expected, abs=1e-4)
    assert 0 < own.ap < own.ap50 < 100


def test_perfect_boxes_have_an_ap_of_100_and_none_has_0():
    pytest.importorskip("faster_coco_eval")
    found = [(there, {**there, "scores": [1.0] * len(there["boxes"])}) for there, _ in judged()]
    assert box_ap(found).ap == pytest.approx(100)
    nothing = {"boxes": [], "labels": [], "scores": []}
    assert box_ap([(there, nothing) for there, _ in found]).ap == 0
    with pytest.raises(QuietvitError, match="hold no boxes at all"):
        box_ap([({**there, "boxes": [], "labels": [], "area": [], "iscrowd": []}, nothing)
                for there, _ in found])  # fmt: skip


@pytest.mark.parametrize("kind", [faster_rcnn, retinanet, fcos], ids=lambda kind: kind.__name__)
def test_a_detector_takes_images_of_any_size_with_and_without_boxes(kind):
    model = small(kind)
    images = [torch.rand(3, 48, 64), torch.rand(3, 100, 30)]
    targets = [
        {"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    losses = model.train()(images, targets)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert len(predictors(model)) >= 2
    with torch.no_grad():
        found = model.eval()(images)
    for image, one in zip(images, found, strict=True):
        assert set(one) == {"boxes", "labels", "scores"}
        bounds = torch.tensor([image.shape[2], image.shape[1]] * 2)
        assert bool((one["boxes"] >= 0).all() & (one["boxes"] <= bounds + 1e-3).all())


def test_the_canvas_keeps_the_shape_of_objects_and_gives_boxes_back():
    canvas = Canvas((64, 96), (0.5, 0.25, 0.0), (0.2, 0.2, 0.2)).eval()
    image = torch.rand(3, 120, 60)
    boxes = torch.tensor([[6.0, 12.0, 30.0, 60.0]])
    given, targets = canvas([image], [{"boxes": boxes}])
    assert given.tensors.shape == (1, 3, 64, 96)
    assert given.image_sizes == [(64, 32)]
    assert targets[0]["boxes"].tolist() == [pytest.approx([3.2, 6.4, 16.0, 32.0])]
    back = canvas.postprocess([{"boxes": targets[0]["boxes"]}], given.image_sizes, [(120, 60)])
    assert torch.allclose(back[0]["boxes"], boxes)
    whole = canvas.fit(image)
    assert torch.equal(whole[:, 0, -1], torch.tensor([0.5, 0.25, 0.0]))
    again, _ = canvas([whole])
    assert torch.allclose(again.tensors, given.tensors, atol=1e-6)


@pytest.mark.parametrize("filled", [(64, 96), (16, 96), (64, 10)])
def test_boxes_are_pooled_by_the_strides_whatever_fills_the_canvas(model, filled):
    """torchvision guesses the strides from the images before they are padded."""
    pool = model.roi_heads.box_roi_pool
    maps = {str(n): torch.rand(1, 32, 64 // s, 96 // s) for n, s in enumerate((4, 8, 16))}
    box = [torch.tensor([[2.0, 2.0, 14.0, 9.0]])]
    assert pool.scales == [1 / 4, 1 / 8, 1 / 16]
    assert torch.equal(pool(maps, box, [filled]), pool(maps, box, [(64, 96)]))


@pytest.mark.parametrize(
    ("name", "kwargs", "strides"),
    [
        ("vit_small_patch14_dinov2", {"img_size": (56, 84), "depth": 2, "embed_dim": 32,
                                      "num_heads": 2}, (7, 14, 28)),
        ("beit_base_patch16_224", {"img_size": 64, "depth": 2, "embed_dim": 32, "num_heads": 2},
         (4, 8, 16, 32)),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2, "embed_dim": 8,
         "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}, (4, 8, 16, 32)),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}, (4, 8, 16, 32)),
    ],
)  # fmt: skip
def test_pyramids_stand_on_plain_and_hierarchical_backbones(name, kwargs, strides):
    size = None if "img_size" in kwargs else (64, 96)
    model = faster_rcnn(create_model(name, 0, **kwargs), 2, channels=16, box_channels=16, size=size)
    height, width = model.transform.size
    maps = model.backbone(torch.rand(1, 3, height, width))
    assert model.backbone.strides == strides
    shapes = [(1, 16, height // s, width // s) for s in strides]
    assert [tuple(x.shape) for x in maps.values()][:-1] == shapes
    assert data_config(model)["input_size"] == (3, height, width)


def test_a_last_norm_behind_the_pooling_comes_before_the_maps():
    body = vit(global_pool="avg", class_token=False)
    norm = body.fc_norm
    model = faster_rcnn(body, 2, channels=16, box_channels=16)
    assert isinstance(norm, nn.LayerNorm)
    assert model.backbone.body.norm is norm


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: faster_rcnn(vit(), 2, size=(60, 96)), "multiples of 16, such as 64 x 96"),
        (lambda: faster_rcnn(vit(), 2, scales=(3,)), "the scale 3 does not fit"),
        (lambda: faster_rcnn(create_model("resnet18", 0), 2, scales=(1,)), "leave scales out"),
        (lambda: faster_rcnn(vit(), 2, box_scor_thresh=3), "no option .* mean 'box_score_thresh'"),
        (lambda: fcos(vit(), 2, channels=16), "torchvision could not build a FCOS"),
        (lambda: faster_rcnn(nn.Linear(2, 2), 2, size=(64, 64)), "gives no feature maps"),
        (lambda: faster_rcnn(vit(), 2, class_names=("a",)), "1 names were given for the 2"),
    ],
)
def test_what_does_not_fit_is_refused(make, told):
    with pytest.raises(QuietvitError, match=told):
        make()


def test_a_detector_is_evaluated_and_calibrated_on_its_own_images(tmp_path, model, caplog):
    pytest.importorskip("faster_coco_eval")
    path = coco(tmp_path, [annotated(1, 1, (10, 20, 30, 15))])
    data = open_coco(path, class_names=("disc", "square", "star"))
    images = detection_calibration(data, 2, model.transform.fit)
    assert images.shape == (2, 3, 64, 96)
    assert not warn_unless_normalized(images, model, "calibration")
    with pytest.raises(QuietvitError, match="ask for 1 to 2"):
        detection_calibration(data, 3, model.transform.fit)
    assert 0 <= evaluate_detector(model, detection_loader(data, 2)).ap <= 100
    with pytest.raises(QuietvitError, match=r"3 classes, but .* has 2"):
        evaluate_detector(model, detection_loader(open_coco(path), 2))
    with pytest.raises(QuietvitError, match="not a list with the boxes"):
        predict_all(nn.Identity(), detection_loader(data, 2))
