"""Laws: a whole detector is quantized by every kind of method, and its AP is measured as before."""

from __future__ import annotations

import math
from fnmatch import fnmatch

import pytest
import torch

import quietvit
import zoo
from detection_cases import CATEGORIES, annotated, coco
from method_cases import METHODS, configured
from quietvit.detection import (
    detection_calibration,
    detection_loader,
    evaluate_detector,
    open_coco,
    predictors,
)
from quietvit.measure import sqnr
from quietvit.quantization.blocks import find_blocks
from quietvit.quantization.settings import parse_method
from test_detection_models import small

JUDGED = [
    quietvit.RTN(weight_bits=8, activation_bits=8),
    quietvit.RepQViT(weight_bits=6, activation_bits=6),
    quietvit.SmoothQuant(weight_bits=8, activation_bits=8),
    quietvit.GPTQ(weight_bits=4, activation_bits=8),
]


@pytest.fixture(scope="module")
def model():
    return small(rpn_post_nms_top_n_test=20, box_score_thresh=0.0).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    boxes = [annotated(1, 1, (10, 20, 30, 15)), annotated(2, 2, (5, 5, 50, 40), 3)]
    third = [*CATEGORIES, {"id": 9, "name": "star"}]
    return open_coco(coco(tmp_path_factory.mktemp("boxes"), boxes, categories=third))


@pytest.fixture(scope="module")
def images(model, data):
    noise = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    return torch.cat([detection_calibration(data, 2, model.transform.fit), noise])


@pytest.mark.parametrize("method", JUDGED, ids=lambda method: method.name)
def test_a_whole_detector_is_quantized_and_judged_by_ap(model, images, data, method):
    pytest.importorskip("faster_coco_eval")
    own = quietvit.quantize(model, method, images, progress=False)
    assert own.coverage.fraction == 1
    found = evaluate_detector(own, detection_loader(data, 2))
    assert 0 <= found.ap <= 100


OTHERS = [name for name in METHODS if name not in {method.name for method in JUDGED}]


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_method_runs_on_a_detector(name):
    given = {"iterations": 1} if name in ("brecq", "qdrop") else {}
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    own = quietvit.quantize(zoo.detector(), configured(name, **given), images, progress=False)
    assert own.coverage.fraction > 0.8  # QwT adds products in float
    assert len(own([images[0]])) == 1


def test_the_blocks_of_the_backbone_are_reconstructed(model, images):
    blocks = find_blocks(quietvit.trace(model, images[:1]))
    residual = {block.name for block in blocks if block.residual}
    assert {"backbone.body.blocks.0", "backbone.body.blocks.1"} <= residual


def test_predictors_and_stem_keep_the_bits_of_the_edges(model, images):
    last = predictors(model)
    for given, kept_at in (({}, 8), ({"head_bits": "same"}, 4), ({"overrides": {"head": 6}}, 6)):
        method = quietvit.RTN(weight_bits=4, activation_bits=4, **given)
        own = quietvit.quantize(model, method, images, progress=False)
        bits = {slot.site.name: own.quantizers[slot.key].bits for slot in own.slots()}
        kept = {name for name in bits if any(fnmatch(name, pattern) for pattern in last)}
        assert len(kept) >= 4
        assert {bits[name] for name in kept} == {kept_at}
        assert bits.pop("backbone.body.patch_embed.proj") == 8
        assert {b for name, b in bits.items() if name not in kept} == {4}


def test_the_policy_of_repq_vits_detection_code_by_name(model, images):
    method = parse_method("rtn", "W4A4+repq-vit-detection")
    own = quietvit.quantize(model, method, images, progress=False)
    found = {slot.key: own.quantizers[slot.key].bits for slot in own.slots()}
    assert found.pop("backbone/body/patch_embed/proj:input") == 8
    assert set(found.values()) == {4}
    traced = quietvit.trace(model, images[:1])
    transposed = {site.name for site in traced.sites if site.function == "conv_transpose2d"}
    assert transposed
    assert transposed == dict(own.coverage.untouched).keys()


def test_a_saved_detector_is_read_back_though_other_boxes_are_traced(model, images, tmp_path):
    own = quietvit.quantize(model, JUDGED[0], images, progress=False)
    again = quietvit.load(own.save(tmp_path / "mine.qvit"), model=model)
    with torch.no_grad():
        expected, found = own([images[0]]), again([images[0]])
    assert torch.equal(expected[0]["boxes"], found[0]["boxes"])


def test_noise_is_not_told_where_other_boxes_are_proposed(model, images):
    own = quietvit.quantize(model, quietvit.RTN(weight_bits=2, activation_bits=2), images)
    found = sqnr(model, own, images)
    assert all(math.isfinite(db) for name, db in found.items() if name.startswith("backbone"))
    changed = [name for name, db in found.items() if math.isnan(db)]
    assert all(name.startswith("roi_heads") for name in changed)
