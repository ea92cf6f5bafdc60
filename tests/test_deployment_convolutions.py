"""Integer convolutions of exported files: which there are, that they are right, what is told."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quietvit
from quietvit import QuietvitError
from quietvit.deployment import open_runtime
from quietvit.deployment.parity import Agreement, agreements
from quietvit.deployment.proof import prove
from quietvit.quantization import QuantizedModel

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


class Hybrid(nn.Module):
    """Strided, depthwise, pointwise and full convolutions, then a linear on tokens, and a head.

    Behind them stand BatchNorm with ReLU6, SiLU, an addition, and a reshape.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8))
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8))
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.full = nn.Conv2d(8, 8, 3, 1, 1)
        self.tokens = nn.Conv2d(8, 6, 3, 2, 1)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 5, bias=False)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
                module.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.stem(x))
        x = nn.functional.relu6(self.depthwise(x))
        x = nn.functional.silu(self.pointwise(x))
        x = x + nn.functional.relu(self.full(x))
        x = self.mix(self.tokens(x).flatten(2).transpose(1, 2))
        return self.head(x.mean(1))  # type: ignore[no-any-return]


def compared_with(artifact: Any, own: QuantizedModel, x: Tensor) -> list[Agreement]:
    return agreements(open_runtime(artifact.path), artifact.facts, own, x)


def images(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@cache
def quantized(**fields: Any) -> QuantizedModel:
    torch.manual_seed(0)
    return quietvit.quantize(Hybrid().eval(), quietvit.RTN(**fields), images(), progress=False)


def convolved(path: Path) -> dict[str, str]:
    """Operator of the runtime for each convolution of a file."""
    runtime = open_runtime(path, threads=1)
    ran = prove(runtime, runtime.facts).ran
    kinds = {product.name: product.kind for product in runtime.facts.products}
    return {r.product: r.operator for r in ran if kinds[r.product] == "conv"}


def test_only_what_is_quantized_anyway_is_an_integer_convolution(tmp_path: Path) -> None:
    own = quantized()
    artifact = quietvit.export(own, tmp_path / "model.onnx")
    operators = convolved(artifact.path)
    assert operators.pop("full") in ("Conv", "FusedConv")
    assert operators.pop("pointwise") == "MatMulIntegerToFloat"
    assert set(operators.values()) == {"QLinearConv"}
    assert len(operators) == 3
    assert "conv_output_bits=8" in str(artifact.facts.product("full").why_float)
    found = artifact.check(own, images(8, seed=1), seconds=0, threads=1)
    assert found.ok, found.failures
    left = {node.op_type for node in onnx.load(artifact.path).graph.node}
    assert not left & {"BatchNormalization", "Clip"}


@pytest.mark.parametrize(
    "fields",
    [
        {"conv_output_bits": 8},
        {"conv_output_bits": 8, "weight_bits": 4},
        {
            "conv_output_bits": 6,
            "weight_bits": 4,
            "activation_bits": 5,
            "weight_symmetric": False,
            "patch_embed_bits": 7,
        },
    ],
    ids=str,
)
def test_quantized_outputs_make_every_convolution_an_integer_one(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    own = quantized(**fields)
    added = [slot for slot in own.slots() if slot.is_output]
    assert [slot.site.kind for slot in added] == ["activation"]  # the ReLU behind ``full``
    loaded = quietvit.load(own.save(tmp_path / "model.qvit"), model=Hybrid())
    with torch.no_grad():
        assert torch.equal(loaded(images()), own(images()))
    artifact = quietvit.export(loaded, tmp_path / "model.onnx")
    proof = prove(open_runtime(artifact.path, threads=1), artifact.facts)
    assert proof.integer_share == 1
    assert proof.counts["QLinearConv"] == 4
    compared = compared_with(artifact, own, images(2, seed=3))
    assert len(compared) == len(own.trace.matmuls)
    assert all(each.equal and each.sums > 0 for each in compared)
    assert sum(each.ties for each in compared) < 0.01 * sum(each.sums for each in compared)


def test_a_range_beyond_that_of_relu6_is_cut_off_in_the_codes(tmp_path: Path) -> None:
    own = copy.deepcopy(quantized())
    wide: Any = own.quantizer("depthwise.0", "input")
    wide.scale.mul_(16 / 255 / wide.scale)
    artifact = quietvit.export(own, tmp_path / "model.onnx")
    assert convolved(artifact.path)["stem.0"] == "QLinearConv"
    assert "Clip" in {node.op_type for node in onnx.load(artifact.path).graph.node}
    many = 5 * images(2, seed=3)
    assert all(each.equal for each in compared_with(artifact, own, many))


def test_inputs_in_the_middle_between_codes_are_no_wrong_outputs(tmp_path: Path) -> None:
    """torch multiplies by 1/scale, onnxruntime divides: both may round such a value apart."""
    own = quantized(conv_output_bits=8)
    given: Any = own.quantizer("stem.0", "input")
    codes = given.codes(images(8, seed=5)) - given.zero_point
    middles = (codes + 0.5).float() * given.scale
    artifact = quietvit.export(own, tmp_path / "model.onnx")
    assert all(each.equal for each in compared_with(artifact, own, middles))


@pytest.mark.parametrize(("size", "integer"), [(1000.0, True), (1e6, False)])
def test_a_bias_and_a_mean_that_cancel_are_allowed_for(
    size: float, integer: bool, tmp_path: Path
) -> None:
    """float32 keeps little of their difference, the int32 bias all of it."""
    torch.manual_seed(0)
    model = Hybrid().eval()
    conv: Any = nn.Conv2d(3, 8, 3, 2, 1)
    norm: Any = nn.BatchNorm2d(8)
    nn.init.constant_(conv.bias, size)
    norm.running_mean.fill_(size)
    model.stem = nn.Sequential(conv, norm).eval()
    own = quietvit.quantize(model, quietvit.RTN(), images(), progress=False)
    artifact = quietvit.export(own, tmp_path / "model.onnx")
    stem = artifact.facts.product("stem.0")
    assert (stem.why_float is None) is integer
    assert integer or "off by up to" in str(stem.why_float)
    compared = compared_with(artifact, own, images(16, seed=3))
    assert all(each.equal for each in compared)


@pytest.mark.parametrize("spoilt", ["full:weight:spread", "full:bias"])
def test_one_wrong_integer_of_a_convolution_is_found(spoilt: str, tmp_path: Path) -> None:
    own = quantized(conv_output_bits=8)
    path = quietvit.export(own, tmp_path / "model.onnx").path
    content = onnx.load(path)
    (entry,) = (i for i in content.graph.initializer if i.name == spoilt)
    array = onnx.numpy_helper.to_array(entry).copy()
    array.flat[0] = np.int64(array.flat[0]) * -1 if "weight" in spoilt else array.flat[0] + 2000
    entry.CopyFrom(onnx.numpy_helper.from_array(array, entry.name))
    onnx.save(content, path)
    runtime = open_runtime(path)
    wrong = [a for a in agreements(runtime, runtime.facts, own, images(2)) if not a.equal]
    assert [(a.product, a.wrong, a.off > 0) for a in wrong] == [("full", 0, True)]
    bare = quantized()
    with pytest.raises(QuietvitError, match=r"full.*no quantizer"):
        agreements(runtime, runtime.facts, bare, images(2))
