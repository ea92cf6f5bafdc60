"""Whole detectors of torchvision: lists of images, varying numbers of boxes, images without any."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import quietvit
from quietvit import QuietvitError, detection
from quietvit.tracing import intercept
from test_detection_models import small
from zoo import detector

KINDS = ("faster_rcnn", "retinanet")
BOX_PREDICTORS = {f"roi_heads.box_predictor.{name}" for name in ("cls_score", "bbox_pred")}
FCOS_REGRESSION = {f"head.regression_head.{name}" for name in ("bbox_reg", "bbox_ctrness")}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return detector(request.param)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def finding_nothing() -> Any:
    """A detector whose region proposals are all too small, so that its box head gets no rows."""
    model: Any = detector()
    model.rpn.min_size = 1e6
    return model


@pytest.mark.parametrize("method", [quietvit.RepQViT(), quietvit.SmoothQuant()], ids=str)
def test_a_whole_detector_is_quantized_and_takes_images_of_any_size(
    model: Any, images: Tensor, method: Any
) -> None:
    own = quietvit.quantize(model, method, images, progress=False)
    assert own.coverage.fraction == 1
    with torch.no_grad():
        found = own([torch.rand(3, 64, 64), torch.rand(3, 48, 80)])
    assert [set(each) for each in found] == [{"boxes", "labels", "scores"}] * 2


def test_only_products_and_norms_are_the_same_in_every_pass(model: Any, images: Tensor) -> None:
    traced = quietvit.trace(model, [images[0]])
    assert traced.matmuls[0].operands[0].shape[1] == 3
    seen: list[str] = []

    def handler(site: Any, operands: tuple[Tensor, ...], run: Any) -> Tensor:
        seen.append(site.name)
        return run(*operands)  # type: ignore[no-any-return]

    with torch.no_grad(), intercept(traced, handler, kinds=quietvit.tracing.SITE_KINDS):
        model([*images, torch.rand(3, 48, 80)])
    assert len(set(seen)) == len(seen)
    assert {site.name for site in traced.matmuls} <= set(seen)


PREDICTORS = {
    "faster_rcnn": {"rpn.head.cls_logits", "rpn.head.bbox_pred", *BOX_PREDICTORS},
    "retinanet": {"head.classification_head.cls_logits", "head.regression_head.bbox_reg"},
    "fcos": {"head.classification_head.cls_logits", *FCOS_REGRESSION},
}


@pytest.mark.parametrize("kind", PREDICTORS)
def test_predictors_are_heads_whether_or_not_boxes_are_found(kind: str) -> None:
    """FCOS and RetinaNet of random weights find nothing above their own threshold."""
    models = [small(getattr(detection, kind))]
    models += [detector(), finding_nothing()] if kind == "faster_rcnn" else []
    for model in models:
        traced = quietvit.trace(model, [torch.rand(3, 64, 96)])
        heads = {site.name.partition("#")[0] for site in traced.sites if site.role == "head"}
        assert heads == PREDICTORS[kind]
        assert sum(site.role == "patch_embed" for site in traced.sites) == 1
    maps = quietvit.trace(models[0].backbone, torch.rand(1, 3, 64, 96))
    assert all(site.role != "head" for site in maps.sites)


def test_what_got_no_boxes_is_traced_told_and_left_out(images: Tensor) -> None:
    model = finding_nothing()
    traced = quietvit.trace(model, [images[0]])
    assert traced["roi_heads.box_head.fc6"].macs == 0
    found = quietvit.diagnose(model, images, pairs=())
    unmeasured = {site for site, reason in found.skipped if "no image gave it a value" in reason}
    assert "roi_heads.box_head.fc6" in unmeasured
    assert unmeasured.isdisjoint(site.site for site in found.sites)
    with pytest.raises(QuietvitError, match=r"no calibration image gave .*box_head\.fc6"):
        quietvit.quantize(model, quietvit.RTN(), images, progress=False)
    excluded = quietvit.RTN(exclude=("roi_heads.*",))
    own = quietvit.quantize(model, excluded, images, progress=False)
    assert own.quantizer("roi_heads.box_head.fc6", "input") is None
