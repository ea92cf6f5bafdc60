"""Exported files of models that are written in uncommon ways: computed weights, odd attention."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import quietvit
from quietvit import QuietvitError
from quietvit.deployment import open_runtime
from quietvit.deployment.for_onnx.capture import _register_constants
from quietvit.deployment.for_onnx.file import float_onnx, write_onnx
from quietvit.deployment.for_onnx.runtime import OnnxRuntime

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)


class Computed(nn.Module):
    """Weights that are normalized, parametrized, or a product; the last product is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(16, 48))
        self.spectral = parametrizations.spectral_norm(nn.Linear(16, 16))
        self.orthogonal = parametrizations.orthogonal(nn.Linear(16, 16))
        self.up, self.down = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(3, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(F.linear(x.flatten(1), F.normalize(self.rows)))
        x = self.orthogonal(F.gelu(self.spectral(x)))
        return x @ (self.up @ self.down).T


class Windowed(nn.Module):
    """Attention of five dims, as in Hiera, and with keys that two queries share."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1).reshape(len(x), 2, 3, 8, 1).expand(-1, -1, -1, -1, 16)
        q, k, v = self.qkv(tokens).reshape(len(x), 2, 3, 8, 48).chunk(3, dim=-1)
        x = F.scaled_dot_product_attention(q, k, v)
        shared = F.scaled_dot_product_attention(x[:, 0], k[:, 0, :1], v[:, 0, :1], enable_gqa=True)
        return self.out(shared.mean((1, 2)))  # type: ignore[no-any-return]


class Limited(nn.Module):
    """Products without bias whose outputs are clamped or rectified, as in gemma4_vit."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.down, self.out = nn.Linear(16, 8, bias=False), nn.Linear(8, 5, bias=False)
        self.register_buffer("low", torch.tensor(-torch.inf))
        self.register_buffer("high", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1).reshape(len(x), 3, 16).clamp(self.low, self.high)
        q, k = F.relu(self.q(x)), self.k(x).clamp(self.low, self.high)
        x = F.relu6(q @ k.mT) @ x
        x = self.out(self.down(x).clamp(max=0.5))
        return x.mean(1).relu()  # type: ignore[no-any-return]


class OneByOne(nn.Module):
    """Takes the batch apart and puts it together, so that torch.export fixes its size."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.stack(x.unbind()).flatten(1))  # type: ignore[no-any-return]


class Checked(nn.Module):
    """Checks values as transformers' detectors do, by operators that ONNX does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        from transformers.utils import torch_compilable_check

        torch_compilable_check(x.sum() < torch.inf, "the images are not finite")
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


def images(count: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("model", "bits", "integer"),
    [(Computed, 8, 4), (Windowed, 8, 6), (Limited, 8, 6), (Limited, 6, 6)],
)
def test_the_file_computes_what_the_simulated_model_computes(
    model: Any, bits: int, integer: int, tmp_path: Path
) -> None:
    method = quietvit.RTN(weight_bits=4, activation_bits=bits)
    own = quietvit.quantize(model().eval(), method, images(), progress=False)
    artifact = quietvit.export(own, tmp_path / "model.onnx")
    found = artifact.check(own, images(seed=1), seconds=0.01, threads=1, batches=(1,))
    assert found.ok, found.failures
    assert sum(ran.integer for ran in found.proof.ran) == integer
    left = [ran.reason or "" for ran in found.proof.ran if not ran.integer]
    assert all("does not depend on the images" in reason for reason in left)


def test_a_float_file_has_explicit_attention_where_torch_writes_none(tmp_path: Path) -> None:
    model, x = Windowed().eval(), images(3)
    with torch.no_grad():
        wanted = model(x).numpy()
    write_onnx(float_onnx(model, (3, 4, 4)), tmp_path / "float.onnx")
    found = OnnxRuntime(tmp_path / "float.onnx")(x.numpy())
    assert np.allclose(found, wanted, atol=1e-5)


def test_checks_of_values_stay_out_of_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "0")
    model, x = Checked().eval(), images(3)
    write_onnx(float_onnx(model, (3, 4, 4)), tmp_path / "float.onnx")
    found = OnnxRuntime(tmp_path / "float.onnx")(x.numpy())
    assert np.allclose(found, model(x).detach().numpy(), atol=1e-5)
    assert os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] == "0"


def test_a_batch_that_cannot_be_free_is_told_and_gone_through(tmp_path: Path) -> None:
    own = quietvit.quantize(OneByOne().eval(), quietvit.RTN(), images(1), progress=False)
    artifact = quietvit.export(own, tmp_path / "model.onnx")
    assert any("one image at a time" in note for note in artifact.facts.notes)
    runtime = open_runtime(artifact.path, threads=1)
    assert runtime.input_shape[0] == 1
    x = images(3, seed=1)
    rows = [runtime(image[None].numpy()) for image in x]
    assert np.array_equal(runtime(x.numpy()), np.concatenate(rows))


def test_constants_that_the_exporter_lost_are_put_back() -> None:
    import onnx_ir as ir

    def constant(value: float) -> Any:
        tensor = ir.tensor(np.array(value, dtype=np.float32))
        return ir.Value(name="low", const_value=tensor, type=ir.TensorType(tensor.dtype))

    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    kept, lost = constant(-1), constant(-2)
    nodes = [ir.node("Max", [x, kept]), ir.node("Max", [x, lost])]
    graph = ir.Graph([x], [n.outputs[0] for n in nodes], nodes=nodes, initializers=[kept])
    _register_constants(graph)
    assert sorted(graph.initializers) == ["low", "low:again"]
    assert graph.initializers["low"] is kept


def test_weights_of_hooks_are_refused_with_what_to_do() -> None:
    model = nn.Sequential(nn.Flatten(), torch.nn.utils.weight_norm(nn.Linear(48, 5)))
    with pytest.raises(QuietvitError, match=r"1\.weight .*parametrizations\.weight_norm"):
        quietvit.quantize(model, quietvit.RTN(), images(), progress=False)
