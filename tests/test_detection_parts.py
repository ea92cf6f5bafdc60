"""Laws of the parts of detectors: all products belong to one, and each one's loss is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import quietvit
from detection_cases import annotated, coco
from quietvit import QuietvitError
from quietvit.detection import ap_by_part, sites_by_part
from quietvit.detection.detectors import PREDICTORS
from quietvit.detection.parts import part_of, with_parts
from test_cli import refused, run
from test_detection_masks import masked
from test_detection_models import small

METHOD = quietvit.RTN(weight_bits=4, activation_bits=4)
PARTS = {
    "detr": ["backbone", "encoder", "decoder", "heads"],
    "yolos": ["backbone", "heads"],
    "rt_detr": ["backbone", "encoder", "decoder", "heads"],
    "rf_detr": ["backbone", "neck", "decoder", "heads"],
}


@pytest.fixture(scope="module")
def model() -> Any:
    return small(rpn_post_nms_top_n_test=20, box_score_thresh=0.0).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", PARTS)
def test_all_products_of_a_transformers_detector_belong_to_a_part(
    kind: str,
    folders: dict[str, Path],
) -> None:
    model = quietvit.detection.hf_detector(str(folders[kind])).eval()
    size = model.transform.size
    traced = quietvit.trace(model, torch.rand(1, 3, *size))
    parts = sites_by_part(model, traced)
    assert sorted(parts) == sorted(PARTS[kind])
    assert sum(map(len, parts.values())) == len(traced.matmuls)
    heads = {name for name in parts["heads"] if set(name.split(".")) & set(PREDICTORS)}
    assert heads == set(parts["heads"])


def test_nested_names_do_not_mislead() -> None:
    """A backbone may hold an encoder, and a decoder the predictors (Deformable DETR, D-FINE)."""
    for site, part in {
        "model.model.backbone.model.encoder.stages.0.conv": "backbone",
        "model.model.input_proj.0.0": "encoder",
        "model.model.backbone.backbone.encoder.layer.0.mlp.fc1": "backbone",
        "model.model.backbone.projector.projector_layer.conv1.conv": "neck",
        "model.model.enc_out_class_embed.0#1": "heads",
        "model.model.conv_encoder.spatial_tuning_adapter.conv2.conv": "backbone",
        "model.model.conv_encoder.model.encoder.stages.0.blocks.0.conv": "backbone",
        "model.model.conv_encoder.fusion_proj.0.conv": "encoder",
        "model.model.encoder.aifi.0.layers.0.self_attn.query_key": "encoder",
        "model.model.decoder.layers.0.encoder_attn.value_proj": "decoder",
        "model.model.decoder.bbox_embed.0.layers.1#2": "heads",
        "model.model.decoder.lqe_layers.0.reg_conf.layers.0": "heads",
        "model.model.enc_score_head": "heads",
        "model.model.enc_output.0": "decoder",
        "head.classification_head.conv.0.0": "heads",
        "rpn.head.bbox_pred#3": "rpn",
    }.items():
        assert part_of(site) == part, site
    assert part_of("blocks.0.attn.qkv") is None


def test_a_part_is_kept_in_float_or_at_other_bits_by_its_name(
    model: Any, images: torch.Tensor
) -> None:
    given = quietvit.RTN(overrides={"part:rpn": 8, "post_softmax": 6}, exclude=("part:neck",))
    method = with_parts(quietvit.QwT(base=given), model, images)
    own = quietvit.quantize(model, method.base, images, progress=False)
    bits = {slot.site.name: own.quantizers[slot.key].bits for slot in own.slots()}
    assert {b for name, b in bits.items() if name.startswith("rpn")} == {8}
    assert not [name for name in bits if name.startswith("backbone.neck")]
    assert method.overrides == method.base.overrides
    with pytest.raises(QuietvitError, match=r"no part 'decoder'.*backbone, neck, rpn, box_head"):
        with_parts(quietvit.RTN(overrides={"part:decoder": 8}), model, images)
    assert with_parts(METHOD, model, images) is METHOD


def test_the_loss_of_each_part_alone_and_of_all_but_it_is_measured(
    model: Any, images: torch.Tensor
) -> None:
    found = ap_by_part(model, METHOD, images, progress=False)
    assert [part.name for part in found.parts] == ["backbone", "neck", "rpn", "box_head"]
    for part in found.parts:
        assert part.alone is not None
        assert part.without is not None
        assert 0 < part.alone.error < 2 * found.whole.error
        assert part.alone.ap is None
    assert "without: error" in str(found)
    assert "AP" not in str(found)
    assert found.origins == (None, None)
    assert "generated" not in str(found)
    assert sum(part.macs for part in found.parts) == found.macs


def test_the_mask_head_is_a_part(images: torch.Tensor) -> None:
    """With 2 bits other boxes are found, so the mask head must get those of the float model."""
    model = masked(box_score_thresh=0.0, box_detections_per_img=4).eval()
    found = ap_by_part(model, "rtn", images, bits="W2A8", progress=False)
    assert [part.name for part in found.parts][-2:] == ["box_head", "mask_head"]
    last = found.parts[-1]
    assert last.sites == 6
    assert last.alone is not None
    assert last.without is not None
    assert 0 < last.alone.error < 2 * found.whole.error
    assert "postprocess_detections" not in vars(model.roi_heads)


def test_the_command_prints_and_writes_the_ap_of_each_part(
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    pytest.importorskip("faster_coco_eval")
    given = ("sensitivity", f"hf:{folders['yolos']}", "--by", "part", "--bits", "W4A4")
    boxes = [annotated(1, 1, (10, 20, 30, 15)), annotated(2, 2, (1, 2, 9, 9), 3)]
    spec = f"coco:{coco(tmp_path, boxes)}"
    written = run(*given, "--images", spec, "--count", "2", "--output", tmp_path / "out")
    assert written.exit_code == 0, written.output
    assert "without: AP" in written.output
    content = json.loads((tmp_path / "out" / "parts.json").read_text())
    assert [part["name"] for part in content["parts"]] == ["backbone", "heads"]
    assert all(part[when]["ap"] for part in content["parts"] for when in ("alone", "without"))
    made = run(*given, "--images", "synthetic:2:pink", "--format", "json")
    assert made.exit_code == 0, made.output
    content = json.loads(made.stdout)
    assert content["images"] == 2
    assert [origin["method"] for origin in content["origins"]] == ["pink", "pink"]
    shown = run(*given, "--images", "synthetic:2:pink").stdout
    assert "2 generated images" in shown
    assert "measured on images generated without data: pink, seed 0" in shown
    assert "--by sites does not fit" in refused(run(*given, "--by", "sites", "--images", spec))


def test_a_method_that_changes_weights_and_a_model_without_parts_are_refused(
    model: Any, images: torch.Tensor
) -> None:
    with pytest.raises(QuietvitError, match="gptq changes weights"):
        ap_by_part(model, quietvit.GPTQ(weight_bits=4), images[:1], progress=False)
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 96, 2))
    with pytest.raises(QuietvitError, match="parts of Sequential are unknown"):
        sites_by_part(plain, quietvit.trace(plain, images[:1]))
