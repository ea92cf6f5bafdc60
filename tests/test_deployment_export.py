"""Exported ONNX files: integers in every product, the same integers, small, refusals."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import quietvit
from deployment_cases import exported, pictures, quantized
from quietvit import QuietvitError
from quietvit.deployment import open_runtime
from quietvit.deployment.for_onnx.file import float_onnx, write_onnx
from quietvit.deployment.parity import agreements
from quietvit.deployment.proof import prove

onnx = pytest.importorskip("onnx")

QUICK = ["timm-vit", "tv-vit", "hf-vit"]
SLOW = ["timm-swin", "tv-swin", "hf-dinov2", "timm-deit-distilled", "timm-beit", "timm-eva-swiglu"]
MODELS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def codes_of(path: Path, name: str) -> np.ndarray:
    (found,) = (i for i in onnx.load(path).graph.initializer if i.name == name)
    return np.asarray(onnx.numpy_helper.to_array(found))


@pytest.mark.usefixtures("sessions")
@pytest.mark.parametrize("model", MODELS)
def test_every_product_runs_in_integers_and_they_are_the_simulated_ones(model: str) -> None:
    artifact, own = exported(model), quantized(model)
    runtime = open_runtime(artifact.path, threads=1)
    proof = prove(runtime, artifact.facts)
    assert proof.integer_share == 1
    assert [ran.product for ran in proof.ran] == [site.name for site in own.trace.matmuls]
    assert proof.total_macs == own.trace.macs
    found = agreements(runtime, artifact.facts, own, pictures(model, 2, seed=3))
    assert len(found) == len(own.trace.matmuls)
    assert all(agreement.equal for agreement in found)
    assert sum(agreement.ties for agreement in found) <= 2
    assert all(agreement.codes > 0 and agreement.sums > 0 for agreement in found)


@pytest.mark.parametrize("model", MODELS)
def test_any_batch_size(model: str) -> None:
    artifact, x = exported(model), pictures(model, 5, seed=4).numpy()
    runtime = open_runtime(artifact.path, threads=1)
    assert runtime.input_shape == (None, *x.shape[1:])
    whole = runtime(x)
    for rows in (x[:1], x[1:4]):
        part = runtime(rows)
        start = 0 if len(rows) == 1 else 1
        wanted = whole[start : start + len(rows)]
        assert np.linalg.norm(part - wanted) < 0.05 * np.linalg.norm(wanted)


@pytest.mark.usefixtures("sessions")
@pytest.mark.parametrize(
    ("fields", "method"),
    [
        ({"weight_bits": 4}, "rtn"),
        ({"weight_bits": 6, "activation_bits": 6, "weight_symmetric": False}, "rtn"),
        ({"activation_bits": 4, "activation_symmetric": True}, "rtn"),
        ({"weight_granularity": "per_tensor", "weight_bits": 3}, "rtn"),
        ({}, "smoothquant"),
        ({}, "hptq"),
        ({"weight_bits": 4}, "gptq"),
    ],
    ids=str,
)
def test_integers_of_every_setting(fields: dict[str, Any], method: str) -> None:
    artifact, own = exported("vit", method, **fields), quantized("vit", method, **fields)
    assert prove(open_runtime(artifact.path), artifact.facts).integer_share == 1
    found = agreements(open_runtime(artifact.path), artifact.facts, own, pictures("vit", 2, seed=3))
    assert found
    assert all(agreement.equal for agreement in found)


def test_weights_are_stored_as_their_codes() -> None:
    own, four = quantized("vit", weight_bits=4), exported("vit", weight_bits=4)
    site = next(s for s in own.trace.matmuls if s.kind == "linear" and s.role != "head")
    quantizer = own.quantizer(site.name, "weight")
    assert quantizer is not None
    wanted = quantizer.codes(site.weight.read(own.model)).numpy()  # type: ignore[union-attr]
    stored = codes_of(four.path, f"{site.name}:weight:codes4").astype(np.int32)
    assert np.array_equal(stored, wanted.T)
    assert np.abs(wanted).max() <= 8
    eight = exported("vit")
    assert codes_of(eight.path, f"{site.name}:weight:codes").dtype == np.int8
    old = exported("vit", weight_bits=4, opset=20)
    assert codes_of(old.path, f"{site.name}:weight:codes").dtype == np.int8
    assert four.size < eight.size


def test_a_file_is_about_a_quarter_of_the_float_one(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=32, patch_size=8)
    x = torch.randn(4, 3, 32, 32)
    own = quietvit.quantize(model, quietvit.RTN(), x)
    artifact = quietvit.export(own, tmp_path / "model.onnx")
    size = write_onnx(float_onnx(own.model, own.input_shape), tmp_path / "float.onnx")
    assert 3.3 < size / artifact.size < 4


def test_weight_only_runs_in_the_kernel_for_it_and_is_not_called_integer() -> None:
    fields: dict[str, Any] = {"weight_bits": 4, "activation_bits": None}
    artifact, own = exported("vit", **fields), quantized("vit", **fields)
    proof = prove(open_runtime(artifact.path), artifact.facts)
    assert proof.integer_share == 0
    assert not proof.broken
    assert proof.counts["MatMulNBits"] >= 8
    x = pictures("vit", 4, seed=2)
    with torch.no_grad():
        wanted = own(x).numpy()
    found = open_runtime(artifact.path)(x.numpy())
    assert np.linalg.norm(found - wanted) < 0.03 * np.linalg.norm(wanted)


def test_what_the_method_left_in_float_is_told() -> None:
    fields: dict[str, Any] = {"head_bits": None, "exclude": "*fc1"}
    artifact = exported("vit", **fields)
    proof = prove(open_runtime(artifact.path), artifact.facts)
    in_float = {ran.product: ran.reason or "" for ran in proof.ran if not ran.integer}
    assert all("fc1" in name or "head" in name for name in in_float)
    assert any("excluded by" in reason for reason in in_float.values())
    assert proof.integer_share == pytest.approx(quantized("vit", **fields).coverage.fraction)
    assert not proof.broken


@pytest.mark.parametrize("method", ["repq-vit", "smoothquant", "hptq"])
def test_adjustments_cost_no_operator(method: str) -> None:
    plain = operators(exported("timm-vit").path)
    as_ = "uniform" if method == "repq-vit" else None
    moved = operators(exported("timm-vit", method, as_=as_).path)
    for operator in ("Mul", "LayerNormalization", "MatMul"):
        assert moved[operator] == plain[operator]
    # A bias is corrected behind the patches' (B, C, H, W) and behind the head's (B, classes).
    assert moved["Add"] - plain["Add"] == (2 if method == "hptq" else 0)


def test_colinearity_decay_leaves_no_trace_in_the_graph(tmp_path: Path) -> None:
    """Node for node the graph of a model trained with it is that of one trained without."""
    x, graphs = torch.randn(4, 3, 32, 32), []
    for strength in (None, 1.0):
        torch.manual_seed(0)
        model = timm.create_model(
            "vit_tiny_patch16_224", depth=2, img_size=32, patch_size=8, embed_dim=32, num_heads=2
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if strength is not None:
            quietvit.ColinearityDecay(model, x[:1], strength=strength).attach(optimizer)
        for _ in range(2):
            model(x).square().mean().backward()
            optimizer.step()
        own = quietvit.quantize(model.eval(), quietvit.RTN(), x)
        written = quietvit.export(own, tmp_path / f"{strength}.onnx").path
        floating = tmp_path / f"{strength}.float.onnx"
        write_onnx(float_onnx(model, (3, 32, 32)), floating)
        graphs.append([onnx.load(path).graph for path in (written, floating)])
    for without, with_it in zip(*graphs, strict=True):
        assert [str(node) for node in without.node] == [str(node) for node in with_it.node]
        shapes = [
            [(i.name, i.data_type, tuple(i.dims)) for i in graph.initializer]
            for graph in (without, with_it)
        ]
        assert shapes[0] == shapes[1]
        assert any(
            a.raw_data != b.raw_data
            for a, b in zip(without.initializer, with_it.initializer, strict=True)
        )


def test_simulated_codes_are_refused_and_made_uniform_on_request() -> None:
    own = quantized("vit", "repq-vit")
    with pytest.raises(QuietvitError, match=r"attention_value \(left\).*--as uniform"):
        quietvit.export(own, "never.onnx")
    artifact = exported("vit", "repq-vit", as_="uniform")
    softmaxes = [site for site in own.trace.matmuls if site.role == "attention_value"]
    assert {entry.site for entry in artifact.replaced} == {site.name for site in softmaxes}
    assert all(entry.operand == "left" and entry.lost > 0 for entry in artifact.replaced)
    assert any("levels fall together" in note for note in artifact.facts.notes)
    assert prove(open_runtime(artifact.path), artifact.facts).integer_share == 1
    found = quietvit.check(artifact.path, own, pictures("vit"), seconds=0)
    assert found.ok, found.failures
    assert all(
        type(q).__name__ == "LogQuantizer"
        for q in [
            own.quantizers[
                next(s.key for s in own.slots() if s.site is softmaxes[0] and s.index == 0)
            ]
        ]
    )


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"weight_bits": 12}, "at most 8 bits"),
        ({"activation_granularity": "per_channel"}, "one scale for the tensor"),
    ],
)
def test_codes_without_kernels_name_the_site(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(QuietvitError, match=reason):
        quietvit.export(quantized("vit", **fields), "never.onnx")


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, path = quantized("vit"), tmp_path / "model.onnx"
    with pytest.raises(QuietvitError, match=r"VisionTransformer is not quantized"):
        quietvit.export(own.model, path)  # type: ignore[arg-type]
    path.write_bytes(b"mine")
    with pytest.raises(QuietvitError, match="exists already"):
        quietvit.export(own, path)
    assert path.read_bytes() == b"mine"
    for name, to in (("model.pt", None), ("model.onnx", "openvino"), ("model", "tensorrt")):
        with pytest.raises(QuietvitError, match=r"model\.onnx"):
            quietvit.export(own, tmp_path / name, to=to)
    with pytest.raises(QuietvitError, match="opset 23"):
        quietvit.export(own, tmp_path / "new.onnx", opset=23)
    with pytest.raises(QuietvitError, match="'uniform'"):
        quietvit.export(own, tmp_path / "new.onnx", as_="int8")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(QuietvitError, match=r"pip install 'quietvit\[onnx\]'"):
        quietvit.export(own, tmp_path / "new.onnx")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


def test_a_model_that_was_never_calibrated_is_refused(tmp_path: Path) -> None:
    import copy

    own = copy.deepcopy(quantized("vit"))
    for slot in own.slots():
        old: Any = own.quantizers[slot.key]
        own.quantizers[slot.key] = type(old).from_config(old.config())
    with pytest.raises(QuietvitError, match="never calibrated"):
        quietvit.export(own, tmp_path / "model.onnx")
    bare = quantized("vit", weight_bits=None, activation_bits=None)
    with pytest.raises(QuietvitError, match="no quantizers"):
        quietvit.export(bare, tmp_path / "model.onnx")


def test_a_model_that_torch_cannot_export_says_why(tmp_path: Path) -> None:
    class Deciding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.head(x.flatten(1))
            return out if float(out.detach().sum()) > 1e9 else out + 0 * out

    own = quietvit.quantize(Deciding(), quietvit.RTN(), torch.randn(4, 3, 2, 2))
    with pytest.raises(QuietvitError, match=r"could not export Deciding"):
        quietvit.export(own, tmp_path / "model.onnx")
