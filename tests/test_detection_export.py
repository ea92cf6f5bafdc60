"""Laws of torchvision's detectors as files: the same boxes, proven integers, two files as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import quietvit
from detection_cases import CATEGORIES, annotated, coco, outlined
from quietvit import QuietvitError
from quietvit.data import create_model
from quietvit.deployment import open_runtime
from quietvit.deployment.detected import Detected
from quietvit.deployment.evaluation import FileDetector
from quietvit.deployment.networks import networks_of, timed
from quietvit.deployment.splitting import split
from quietvit.detection import faster_rcnn, fcos, mask_rcnn, retinanet
from quietvit.detection.canvas import PlainCanvas
from quietvit.detection.static_parts import assembled, decoding_of
from test_cli import run
from zoo import detector

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

VIT = {"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 64}
METHOD = {"weight_bits": 8, "activation_bits": 8, "conv_output_bits": 8}
NAMES = ["disc", "square", "star"]
TWO_STAGE = {"box_channels": 16, "rpn_post_nms_top_n_test": 20, "box_score_thresh": 0.0}
MASKED = TWO_STAGE | {"mask_channels": 16, "box_detections_per_img": 5}
ONE_STAGE = {"score_thresh": 0.0, "topk_candidates": 20}


def quantized(kind: Any, bits: dict[str, Any] | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    body = create_model("vit_tiny_patch16_224", 0, **VIT)
    model = kind(body, 3, channels=32, scales=(1,), class_names=NAMES, **options).eval()
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return quietvit.quantize(model, quietvit.RTN(**(METHOD | (bits or {}))), images, progress=False)


@pytest.fixture(scope="module")
def two_stage() -> Any:
    return quantized(faster_rcnn, **TWO_STAGE)


@pytest.fixture(scope="module")
def exported(two_stage: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quietvit.export(two_stage, tmp_path_factory.mktemp("file") / "det.onnx").path


def pictures() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.rand(3, *size, generator=draw) for size in ((60, 80), (64, 64), (90, 30))]


def close(theirs: Any, ours: Any) -> None:
    """The best boxes agree: of close scores, an untrained model may order some otherwise."""
    for there, here in zip(theirs, ours, strict=True):
        torch.testing.assert_close(there["scores"][:3], here["scores"][:3], atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(faster_rcnn, TWO_STAGE), (mask_rcnn, MASKED), (fcos, ONE_STAGE)],
    ids=["two", "masked", "one"],
)
def test_a_detector_assembled_from_its_parts_finds_the_very_same_boxes(
    kind: Any, options: Any
) -> None:
    own = quantized(kind, **options)
    parts, decoding = split(own), decoding_of(own.model)
    canvas = PlainCanvas((64, 64), decoding["mean"], (1.0,) * 3)
    again = assembled(decoding, parts["dense"], parts, canvas)
    assert {s.key for p in parts.values() for s in p.slots()} == {s.key for s in own.slots()}
    dense = {site.name: site.macs for site in parts["dense"].trace.sites}
    assert dense == {site.name: own.trace[site.name].macs for site in parts["dense"].trace.sites}
    if "masks" in parts:
        assert len(expected_masks := parts["masks"].trace.matmuls) == 6
        assert expected_masks[0].macs == 5 * 14 * 14 * 9 * 32 * 16
    if "boxes" in parts:
        assert parts["boxes"].trace["roi_heads.box_head.fc7"].macs == 20 * 16 * 16
    with torch.no_grad():
        expected, found = own(pictures()[1:2]), again(pictures()[1:2])
    assert len(found[0]["boxes"])
    for name, values in expected[0].items():  # only the memory layout of scores differs
        torch.testing.assert_close(found[0][name], values, rtol=1e-5, atol=1e-4)


def test_both_files_of_a_faster_rcnn_are_proven_and_find_its_boxes(
    two_stage: Any, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faster_coco_eval")
    third = [*CATEGORIES, {"id": 9, "name": "star"}]
    boxes = [annotated(i, i, [10, 10, 30, 20], 3 + 4 * (i % 2)) for i in range(1, 3)]
    spec = f"coco:{coco(tmp_path, boxes, categories=third)}"
    assert exported.with_name("det.boxes.onnx").is_file()
    runtime = open_runtime(exported)
    with torch.no_grad():
        close(FileDetector(runtime)(pictures()), two_stage(pictures()))
    monkeypatch.setattr("quietvit.commands.deploying.load_quantized", lambda *given: two_stage)
    told = ("--seconds", "0", "--json", tmp_path / "check.json")
    checked = run("check", exported, "--against", "det.qvit", "--images", spec, *told)
    assert checked.exit_code == 0, checked.output
    assert "box head: output" in checked.output
    content = json.loads((tmp_path / "check.json").read_text())
    assert content["integer_share_of_macs"] == 1
    assert any(a["product"].startswith("roi_heads") for a in content["agreements"])
    assert content["detections"]["images"] == 2
    assert content["detections"]["ap"]["ap"] == content["detections"]["ap_simulated"]["ap"]
    assert content["bytes"] == sum(file.stat().st_size for file in exported.parent.iterdir())
    networks = networks_of(runtime, runtime.facts, two_stage)
    batch = torch.stack(pictures()[1:2] * 2).numpy()
    integer, other = timed(networks, [network.runtime.path for network in networks])
    assert [len(found) for found in (integer(batch), other(batch))] == [2, 2]
    photo = tmp_path / "images" / "1.png"
    seen = run("predict", exported, photo, "--top", "2", "--pictures", tmp_path / "seen")
    assert (seen.exit_code, (tmp_path / "seen" / "1.png").is_file()) == (0, True), seen.output
    measured = run("evaluate", exported, "--images", spec)
    assert measured.output.startswith("box AP"), measured.output


def test_the_three_files_of_a_mask_rcnn_are_proven_and_find_its_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = pytest.importorskip("faster_coco_eval.core.mask")
    own = quantized(mask_rcnn, **MASKED)
    artifact = quietvit.export(own, tmp_path / "files" / "det.onnx")
    names = ["det.boxes.onnx", "det.masks.onnx", "det.onnx"]
    assert sorted(file.name for file in artifact.path.parent.iterdir()) == names
    assert "det.masks.onnx" in str(artifact)
    detect = FileDetector(open_runtime(artifact.path))
    with torch.no_grad():
        theirs, ours = detect(pictures()), own(pictures())
    close(theirs, ours)
    for image, found in zip(pictures(), theirs, strict=True):
        assert found["masks"].shape == (len(found["boxes"]), 1, *image.shape[1:])
    third = [*CATEGORIES, {"id": 9, "name": "star"}]
    given = [outlined(i, i, [10, 10, 30, 20], 3 + 4 * (i % 2)) for i in range(1, 3)]
    spec = f"coco:{coco(tmp_path, given, categories=third)}"
    monkeypatch.setattr("quietvit.commands.deploying.load_quantized", lambda *given: own)
    told = ("--seconds", "0", "--json", tmp_path / "check.json")
    checked = run("check", artifact.path, "--against", "det.qvit", "--images", spec, *told)
    assert checked.exit_code == 0, checked.output
    assert "mask head: output" in checked.output
    content = json.loads((tmp_path / "check.json").read_text())
    floating = {ran["product"]: ran["reason"] for ran in content["products"] if not ran["integer"]}
    assert floating.keys() == {"roi_heads.mask_predictor.conv5_mask"}
    assert "transposed" in floating["roi_heads.mask_predictor.conv5_mask"]
    assert any(a["product"].startswith("roi_heads.mask") for a in content["agreements"])
    assert content["detections"]["ap"]["mask"] == content["detections"]["ap_simulated"]["mask"]
    networks = networks_of(open_runtime(artifact.path), artifact.facts, own)
    _, other = timed(networks, [network.runtime.path for network in networks])
    assert len(other(pictures()[1][None].numpy())[0]["masks"])
    photo = tmp_path / "images" / "1.png"
    seen = tmp_path / "seen"
    shown = run("predict", artifact.path, photo, "--pictures", seen, "--format", "json")
    assert shown.exit_code == 0, shown.output
    (first, *_) = json.loads(shown.output)["images"][0]["boxes"]
    assert mask.decode(first["mask"]).shape == (60, 80)
    assert (seen / "1.png").is_file()
    assert "mask AP" in run("evaluate", artifact.path, "--images", spec).output
    artifact.path.with_name("det.masks.onnx").unlink()
    with pytest.raises(QuietvitError, match=r"det\.masks\.onnx, is missing"):
        FileDetector(open_runtime(artifact.path))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (retinanet, ONE_STAGE),
        # 4 x 4 tokens in windows of 3 with padding; the class token is in each window
        (fcos, ONE_STAGE | {"windows": 3, "global_blocks": ()}),
    ],
    ids=["retinanet", "fcos_with_windows"],
)
def test_a_detector_of_one_stage_is_one_file_that_is_proven(
    kind: Any, options: Any, tmp_path: Path
) -> None:
    own = quantized(kind, **options)
    path = quietvit.export(own, tmp_path / "det.onnx").path
    assert [file.name for file in tmp_path.iterdir()] == ["det.onnx"]
    with torch.no_grad():
        close(FileDetector(open_runtime(path))(pictures()), own(pictures()))
    found = quietvit.check(path, own, torch.stack(pictures()[1:2] * 3), seconds=0)
    assert found.ok, found.failures
    assert (found.proof.integer_share, found.detections.images) == (1, 3)


def test_openvino_files_find_the_boxes_of_the_simulated_detector(tmp_path: Path) -> None:
    """With weights of 7 bits, because openvino saturates on processors without VNNI."""
    pytest.importorskip("openvino")
    bits = {"weight_bits": 7, "patch_embed_bits": 7, "head_bits": 7}
    own = quantized(faster_rcnn, bits, **TWO_STAGE)
    path = quietvit.export(own, tmp_path / "det.xml", to="openvino").path
    names = {"det.xml", "det.bin", "det.boxes.xml", "det.boxes.bin"}
    assert {file.name for file in tmp_path.iterdir()} == names
    with torch.no_grad():
        close(FileDetector(open_runtime(path))(pictures()), own(pictures()))
    found = quietvit.check(path, own, torch.stack(pictures()[1:2] * 2), seconds=0)
    assert found.ok, found.failures
    assert found.proof.integer_share > 0.9
    assert any(a.product.startswith("roi_heads") for a in found.agreements)


def test_the_two_files_stay_together(two_stage: Any, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(QuietvitError, match="exists already"):
        quietvit.export(two_stage, exported)
    moved = tmp_path / "moved.onnx"
    moved.write_bytes(exported.read_bytes())
    with pytest.raises(QuietvitError, match=r"moved\.boxes\.onnx, is missing"):
        FileDetector(open_runtime(moved))
    moved.with_name("moved.boxes.onnx").write_bytes(b"another")
    with pytest.raises(QuietvitError, match="two different exports"):
        quietvit.check(moved, two_stage, torch.rand(2, 3, 64, 64), seconds=0)
    with pytest.raises(QuietvitError, match=r"64 x 64.*Use the preprocessing"):
        quietvit.check(exported, two_stage, torch.rand(2, 3, 32, 32), seconds=0)


def test_what_cannot_be_exported_is_told_before_the_work(
    two_stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(QuietvitError, match="export it to onnx or openvino"):
        quietvit.export(two_stage, tmp_path / "det.torchao")
    heads = two_stage.model.roi_heads
    for name in ("keypoint_roi_pool", "keypoint_head", "keypoint_predictor"):
        monkeypatch.setattr(heads, name, heads.box_head)
    with pytest.raises(QuietvitError, match=r"predicts keypoints.*keypoint_predictor to None"):
        quietvit.export(two_stage, tmp_path / "det.onnx")
    monkeypatch.undo()
    with pytest.raises(QuietvitError, match="leave out output"):
        quietvit.export(two_stage, tmp_path / "det.onnx", output="dense")
    images = torch.rand(2, 3, 64, 64)
    own = quietvit.quantize(detector(), "rtn", images, bits="W8A8", progress=False)
    with pytest.raises(QuietvitError, match="another image size"):
        quietvit.export(own, tmp_path / "det.onnx")
    assert not list(tmp_path.iterdir())


def test_another_model_replaces_both_files_of_a_detector(tmp_path: Path) -> None:
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2)).eval()
    own = quietvit.quantize(plain, "rtn", torch.rand(4, 3, 4, 4), bits="W8A8", progress=False)
    (tmp_path / "det.boxes.onnx").write_bytes(b"earlier")
    with pytest.raises(QuietvitError, match=r"det\.boxes\.onnx exists already"):
        quietvit.export(own, tmp_path / "det.onnx")
    quietvit.export(own, tmp_path / "det.onnx", force=True)
    assert [file.name for file in tmp_path.iterdir()] == ["det.onnx"]


def test_lost_boxes_beyond_chance_fail_a_check() -> None:
    assert Detected(500, 2000, 1980, 2000).failures == ()
    (failure,) = Detected(500, 2000, 1900, 1990).failures
    assert "finds 95.00 % of the 2000 boxes" in failure
    assert Detected(500, 0, 0, 0).failures == ()
