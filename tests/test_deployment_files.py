"""The file itself: IR version, signed codes, weights beside large graphs, preprocessing, names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.models import ViT_B_16_Weights

import quietvit
from deployment_cases import exported, pictures, quantized
from quietvit import QuietvitError
from quietvit.deployment import open_runtime, paths
from quietvit.deployment.for_onnx.file import float_onnx, write_onnx
from quietvit.deployment.preprocessing import plain_preprocessing, transform_of
from quietvit.deployment.proof import prove

onnx = pytest.importorskip("onnx")
SYMMETRIC = {"activation_symmetric": True}


def graph_of(path: Path) -> Any:
    return onnx.load(path, load_external_data=False).graph


@pytest.mark.parametrize(("opset", "version"), [(20, 9), (21, 10)])
def test_the_ir_version_belongs_to_the_opset(opset: int, version: int, tmp_path: Path) -> None:
    """A runtime of an opset refuses files of a later IR version."""
    model = onnx.load(exported("vit", opset=opset).path)
    assert model.ir_version == version
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == opset
    floating = float_onnx(quantized("vit").model, (3, 32, 32), opset=opset)
    assert floating.ir_version == version


def zero_points(path: Path) -> list[tuple[np.dtype[Any], bool]]:
    """Type and whether all are zero, of every zero point in a file, where none may be left out."""
    graph = graph_of(path)
    stored = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
    names = {
        node.input[2]
        for node in graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    }
    return [(stored[name].dtype, not stored[name].any()) for name in names]


def test_signed_codes_are_the_same_integers_without_zero_points(tmp_path: Path) -> None:
    own, x = quantized("vit", **SYMMETRIC), pictures("vit")
    with pytest.raises(QuietvitError, match=r"codes are unsigned.*--as symmetric"):
        quietvit.export(own, tmp_path / "never.onnx", signed=True)  # the softmax's
    assert any(not zero for _, zero in zero_points(exported("vit", **SYMMETRIC).path))
    fields = SYMMETRIC | {"exclude": ("*attention_value", "*attn*", "*query_key")}
    linears = quantized("vit", **fields)
    artifact = quietvit.export(linears, tmp_path / "signed.onnx", signed=True)
    assert set(zero_points(artifact.path)) == {(np.dtype(np.int8), True)}
    assert {node.op_type for node in graph_of(artifact.path).node}.isdisjoint({"Cast"})
    found = artifact.check(linears, x, seconds=0)
    assert found.ok, found.failures
    unsigned = exported("vit", **fields)
    assert len(found.agreements) == sum(p.why_float is None for p in unsigned.facts.products)
    assert not found.proof.broken


def test_asymmetric_codes_are_made_symmetric_only_on_request(tmp_path: Path) -> None:
    own, x = quantized("vit", weight_bits=4, weight_symmetric=False), pictures("vit")
    with pytest.raises(QuietvitError, match="have a zero point"):
        quietvit.export(own, tmp_path / "never.onnx", signed=True)
    artifact = quietvit.export(own, tmp_path / "signed.onnx", as_="symmetric")
    assert set(zero_points(artifact.path)) == {(np.dtype(np.int8), True)}
    assert "Cast" not in {node.op_type for node in graph_of(artifact.path).node}
    assert artifact.replaced
    assert all(entry.lost > 0 for entry in artifact.replaced)
    assert prove(open_runtime(artifact.path), artifact.facts).integer_share == 1
    found = artifact.check(own, x, seconds=0)  # against the replaced quantizers
    assert all(agreement.equal for agreement in found.agreements)
    with pytest.raises(QuietvitError, match="leave out signed"):
        quietvit.export(own, tmp_path / "folder", to="torchao", signed=True)


def test_convolutions_of_a_signed_file_are_not_claimed(tmp_path: Path) -> None:
    """Their codes would be clipped between QuantizeLinear and DequantizeLinear."""
    first, last = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 8 * 8, 3)
    model = nn.Sequential(first, nn.ReLU(), nn.Conv2d(4, 4, 2, 2), nn.Flatten(), last).eval()
    own = quietvit.quantize(model, quietvit.RTN(**SYMMETRIC), x := torch.randn(4, 3, 16, 16))
    artifact = quietvit.export(own, tmp_path / "signed.onnx", as_="symmetric")
    assert [product.why_float is None for product in artifact.facts.products] == [False, True, True]
    found = artifact.check(own, x, seconds=0)
    assert found.ok, found.failures
    assert [ran.integer for ran in found.proof.ran] == [False, True, True]
    assert "signed codes" in str(found.proof.ran[0].reason)
    assert "clip" not in {node.op_type.lower() for node in graph_of(artifact.path).node}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file as if its weights were more than 2 GB."""
    monkeypatch.setattr(paths, "LIMIT", 10_000)


@pytest.mark.usefixtures("small")
def test_weights_of_a_large_model_lie_beside_the_graph(tmp_path: Path) -> None:
    own, x = quantized("vit", weight_bits=7, patch_embed_bits=7, head_bits=7), pictures("vit")
    artifact = quietvit.export(own, tmp_path / "large.onnx")
    data = tmp_path / "large.onnx.data"
    assert {entry.name for entry in tmp_path.iterdir()} == {"large.onnx", data.name}
    assert artifact.size == artifact.path.stat().st_size + data.stat().st_size
    found = artifact.check(own, x, seconds=0.01, batches=(1,))
    assert found.ok, found.failures
    assert found.bytes == artifact.size
    assert found.float_bytes is not None
    assert found.float_bytes > artifact.size
    whole = exported("vit", weight_bits=7, patch_embed_bits=7, head_bits=7)
    assert np.array_equal(
        open_runtime(artifact.path)(x.numpy()), open_runtime(whole.path)(x.numpy())
    )
    data.rename(tmp_path / "lost")
    with pytest.raises(QuietvitError, match=r"cannot load.*large\.onnx"):
        open_runtime(artifact.path)
    data.write_bytes(b"mine")
    artifact.path.unlink()
    with pytest.raises(QuietvitError, match=r"large\.onnx\.data exists already"):
        quietvit.export(own, tmp_path / "large.onnx")
    assert data.read_bytes() == b"mine"


def test_a_small_file_takes_the_place_of_a_large_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = float_onnx(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 20)), (3, 8, 8))
    with monkeypatch.context() as patched:
        patched.setattr(paths, "LIMIT", 1000)
        write_onnx(model, tmp_path / "model.onnx")
        assert (tmp_path / "model.onnx.data").is_file()
    write_onnx(model, tmp_path / "model.onnx")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.usefixtures("small")
def test_openvino_takes_a_large_model(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    own = quantized("vit", weight_bits=7, patch_embed_bits=7, head_bits=7)
    artifact = quietvit.export(own, tmp_path / "large.xml")
    assert {entry.name for entry in tmp_path.iterdir()} == {"large.xml", "large.bin"}
    found = artifact.check(own, pictures("vit"), seconds=0)
    assert found.ok, found.failures


def test_check_refuses_before_an_image_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would be refused at the end costs no comparison first."""
    own, path = quantized("vit"), exported("vit").path

    def images() -> Any:
        yield pictures("vit")
        raise AssertionError("more images were asked for")

    for options, match in (
        ({"seconds": float("nan")}, "must be finite and not negative"),
        ({"seconds": -1.0}, "must be finite and not negative"),
        ({"batches": (0,)}, "must be batch sizes"),
    ):
        with pytest.raises(QuietvitError, match=match):
            quietvit.check(path, own, images(), **options)

    def full(*_: Any) -> int:
        raise QuietvitError("the disk is full.")

    monkeypatch.setattr(quietvit.deployment.networks, "write_onnx", full)
    with pytest.raises(QuietvitError, match="disk is full"):
        quietvit.check(path, own, images(), seconds=1)
    with pytest.raises(QuietvitError, match="labels from 0 to 99"):
        quietvit.check(path, own, [(pictures("vit", 2), torch.tensor([0, 99]))], seconds=0)


def picture() -> Image.Image:
    coarse = np.random.default_rng(1).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((300, 260))


PRESET = ViT_B_16_Weights.IMAGENET1K_V1.transforms()
TIMM = {"input_size": (3, 224, 224), "mean": (0.5,) * 3, "std": (0.25,) * 3}


@pytest.mark.parametrize(
    "given",
    [
        PRESET,
        ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1.transforms(crop_size=224, resize_size=224),
        timm.data.create_transform(**TIMM, crop_pct=0.9, interpolation="bicubic"),
        transforms.Compose(
            [
                transforms.Resize((224, 224)),
                transforms.ToTensor(),
                transforms.Normalize([0.5] * 3, [0.5] * 3),
            ]
        ),
    ],
    ids=["preset", "whole", "timm", "squash"],
)
def test_preprocessing_as_people_have_it(given: Any) -> None:
    found = plain_preprocessing(given, (3, 224, 224))
    assert json.loads(json.dumps(found)) == found
    again = transform_of(found, Path("x.onnx"))(picture())
    torch.testing.assert_close(again, given(picture()), rtol=0, atol=1e-5)


def test_configs_of_timm_and_processors_of_transformers() -> None:
    model = timm.create_model("test_vit", img_size=32)
    config = plain_preprocessing(model.pretrained_cfg, (3, 32, 32))
    assert config is not None
    assert config["input_size"] == [3, 32, 32]
    assert set(config) <= {"input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"}
    transformers = pytest.importorskip("transformers")
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    found = plain_preprocessing(processor, (3, 32, 32))
    assert found is not None
    assert (found["mean"], found["crop_mode"]) == ([0.5] * 3, "squash")
    assert plain_preprocessing(processor.to_dict(), (3, 32, 32)) == found


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (ViT_B_16_Weights.IMAGENET1K_V1.transforms, r"partial is not understood.*transforms\(\)"),
        (transforms.ToTensor(), "not understood"),
        (transforms.Compose([transforms.ToTensor()]), "ToTensor, which is not understood"),
        (PRESET, r"\(3, 224, 224\), but the model was quantized with images of \(3, 32, 32\)"),
        ({"mean": [0.5] * 3}, "no std"),
        ({"mean": [0.5] * 3, "std": [0.5] * 3, "crop": 1}, "unknown key 'crop'; did you mean"),
        ({"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": object()}, "not a number, text or list"),
        ("bicubic", "str is not understood"),
    ],
)
def test_preprocessing_that_is_not_understood(given: Any, match: str) -> None:
    with pytest.raises(QuietvitError, match=match):
        plain_preprocessing(given, (3, 32, 32))


def test_what_people_print_is_readable(tmp_path: Path) -> None:
    model, x = quantized("timm-vit").model, pictures("timm-vit")
    artifact, own = exported("timm-vit"), quantized("timm-vit")
    runtime = open_runtime(artifact.path)
    found = artifact.check(own, x, seconds=0)
    decay = quietvit.ColinearityDecay(model, x[:1], strength=0.05)
    shown = [artifact, artifact.facts, own, runtime, found, decay, quietvit.TWEO(model, x[:1])]
    shown += [quietvit.trace(model, x[:1]), quietvit.find_pairs(model, x[:1])]
    shown += [quietvit.NormGainDecay(model, x[:1], strength=0.1), quietvit.diagnose(model, x[:2])]
    for thing in shown:
        assert len(repr(thing)) < 300, thing
        assert " at 0x" not in repr(thing) + str(thing)
        assert type(thing).__name__ in repr(thing)
    assert "strength=0.05" in repr(decay)
    assert "not attached" in repr(decay)
    assert "products in integers" in str(artifact)
    assert max(map(len, str(artifact).splitlines())) < 300
