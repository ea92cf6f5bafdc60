"""OpenVINO: the file it is given, what it multiplies in integers, and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from quietvit import RTN, QuietvitError
from quietvit.deployment import export, open_runtime
from quietvit.deployment.facts import facts_of
from quietvit.deployment.for_onnx.file import quantized_onnx
from quietvit.deployment.for_onnx.session import open_session
from quietvit.deployment.for_openvino.file import write_openvino
from quietvit.deployment.for_openvino.graph import without_zero_points
from quietvit.deployment.for_openvino.kernels import ATTENTION
from quietvit.deployment.grids import grids_of
from quietvit.deployment.parity import agreements
from quietvit.deployment.proof import prove
from quietvit.quantization import quantize

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

SEVEN = {"weight_bits": 7, "patch_embed_bits": 7, "head_bits": 7}
SAME: dict[str, Any] = {"patch_embed_bits": "same", "head_bits": "same"}


TWO_FILES = """
import os, signal
import numpy as np, openvino
from openvino import opset13 as ops
from quietvit.deployment.for_openvino.parts import compiled

def opened():
    x = ops.parameter([1, 4], np.float32)
    return compiled(openvino.Model([ops.relu(x)], [x], "tiny"))

signal.signal(signal.SIGUSR1, lambda *_: print("caught"))
first, second = opened(), opened()
del first, second
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_signal_after_two_files_does_not_kill_the_process():
    """Several ``openvino.Core`` would leave it a stack for signals that is freed already."""
    ran = subprocess.run([sys.executable, "-c", TWO_FILES], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "caught\n"), ran.stderr


def tiny_vit() -> nn.Module:
    torch.manual_seed(1)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=1,
        num_heads=2,
        num_classes=10,
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return model.eval()


class OneLinear(nn.Module):
    """Logits that are one product, so that its sums can be seen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.head = nn.Linear(192, 24)
        nn.init.normal_(self.head.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1))


def images(count: int = 4, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def exported(model: nn.Module, folder: Path, x: torch.Tensor, **fields: Any) -> tuple[Any, Path]:
    quantized = quantize(model, RTN(**fields), x, progress=False)
    return quantized, export(quantized, folder / "model.xml").path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return exported(tiny_vit(), tmp_path_factory.mktemp("ir"), images(), **SEVEN)


class Convolutions(nn.Module):
    """OpenVINO gives these convolutions the name of the BatchNorm's product behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.branch = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.norm2(self.second(x)).relu()
        return self.head(self.branch(x).mean((2, 3)))


def test_a_layer_that_openvino_renames_is_found_by_the_codes_it_reads(tmp_path: Path) -> None:
    """Its integer product was reported as float before, or as fused into another layer."""
    x = images(4, 16)
    _, path = exported(Convolutions().eval(), tmp_path, x, **SEVEN)
    runtime = open_runtime(path)
    runtime(x.numpy())
    found = {
        ran.product: (ran.operator.split()[0], ran.integer)
        for ran in prove(runtime, runtime.facts).ran
    }
    layers = dict.fromkeys(("stem", "second", "branch"), ("Convolution", True))
    assert found == layers | {"head": ("FullyConnected", True)}


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (7, True)])
def test_the_sums_of_a_product_are_the_simulated_models(
    bits: int, symmetric: bool, tmp_path: Path
) -> None:
    x = images(64, 8)
    fields = {"weight_bits": bits, **SAME, "activation_bits": 8 if bits == 7 else bits}
    model = OneLinear()
    quantized, path = exported(model, tmp_path, x, weight_symmetric=symmetric, **fields)
    with torch.no_grad():
        wanted = quantized(x).numpy()
    runtime = open_runtime(path)
    found = runtime(x.numpy())
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
    (ran,) = prove(runtime, runtime.facts).ran
    assert ran.integer
    assert ran.operator.lower().endswith("_i8")
    (compared,) = agreements(runtime, runtime.facts, quantized, 3 * x)
    assert compared.equal
    assert compared.codes == x.numel()


def test_a_changed_weight_is_found(written: tuple[Any, Path], tmp_path: Path) -> None:
    quantized, path = written
    binary = bytearray(path.with_suffix(".bin").read_bytes())
    codes = quantized.quantizer("head", "weight").codes(quantized.model.head.weight.detach())
    row = codes.T.to(torch.int8).contiguous().numpy().tobytes()
    start = bytes(binary).index(row)
    binary[start] ^= 2
    (tmp_path / "model.xml").write_bytes(path.read_bytes())
    (tmp_path / "model.bin").write_bytes(binary)
    runtime = open_runtime(tmp_path / "model.xml")
    found = agreements(runtime, runtime.facts, quantized, images(2))
    assert [a.product for a in found if not a.equal] == ["head"]


def test_a_weight_of_8_bits_with_zero_points_is_an_integer_product(tmp_path: Path) -> None:
    x = images(64, 8).abs()  # small codes: 255 * 127 twice would not fit 16 bits without VNNI
    model = OneLinear()
    with torch.no_grad():
        model.head.weight.mul_(0.02).add_(0.1)
        model.head.weight[:, ::48] = 1.5
    x[:, :, 0, 0] = 20.0
    quantized, path = exported(model, tmp_path, x, weight_symmetric=False)
    assert bool((quantized.quantizer("head", "weight").zero_point != 128).any())
    runtime = open_runtime(path)
    assert any("1 weights have 8 bits" in note and "VNNI" in note for note in runtime.facts.notes)
    (ran,) = prove(runtime, runtime.facts).ran
    assert ran.integer
    x[:, :, 0, 0] = 1.0
    with torch.no_grad():
        wanted = quantized(x).numpy()
    np.testing.assert_allclose(runtime(x.numpy()), wanted, atol=1e-5 * np.abs(wanted).max())


def test_linears_run_in_integers_and_attention_is_not_claimed(written: tuple[Any, Path]) -> None:
    quantized, path = written
    runtime = open_runtime(path)
    proof = prove(runtime, runtime.facts)
    kinds = {site.name: site.kind for site in quantized.trace.matmuls}
    assert {ran.product for ran in proof.ran} == set(kinds)
    for ran in proof.ran:
        if kinds[ran.product] in ("linear", "conv"):
            assert ran.integer, ran
        else:
            assert ran.product not in proof.claimed
            assert ran.integer or ran.reason
    assert proof.broken == ()
    compared = agreements(runtime, runtime.facts, quantized, 2 * images(2))
    assert [a.product for a in compared] == [r.product for r in proof.ran if r.integer]
    assert all(a.equal and a.codes > 0 and a.sums > 0 for a in compared)
    linear = sum(s.macs for s in quantized.trace.matmuls if s.kind in ("linear", "conv"))
    assert proof.integer_share >= linear / quantized.trace.macs
    with torch.no_grad():
        wanted = quantized(images()).numpy()
    assert np.linalg.norm(runtime(images().numpy()) - wanted) < 0.02 * np.linalg.norm(wanted)


def test_a_float_kernel_is_not_taken_for_integers(tmp_path: Path) -> None:
    """OpenVINO calls the precision of such a layer i8: its weights are, and are decompressed."""
    x = images(64, 8)
    quantized = quantize(OneLinear(), RTN(weight_symmetric=False, **SEVEN), x, progress=False)
    path = export(quantized, tmp_path / "model.onnx").path
    runtime = open_runtime(path, "openvino")
    (broken,) = prove(runtime, runtime.facts).broken
    assert not broken.integer
    assert "zero points" in (broken.reason or "")


class TwoActivations(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(2)
        return (rows.softmax(-1) @ rows.transpose(1, 2)).flatten(1)


def test_two_activations_without_zero_points_run_in_integers(tmp_path: Path) -> None:
    x = images(4, 8)
    _, path = exported(TwoActivations(), tmp_path, x, activation_symmetric=True)
    runtime = open_runtime(path)
    proof = prove(runtime, runtime.facts)
    (ran,) = proof.ran
    assert ran.integer
    assert proof.claimed == frozenset()
    assert proof.integer_share == 1


def test_weights_are_stored_as_integers(written: tuple[Any, Path]) -> None:
    quantized, path = written
    entries = sum(
        site.weight.read(quantized.model).numel()
        for site in quantized.trace.sites
        if site.kind in ("linear", "conv")
    )
    size = path.with_suffix(".bin").stat().st_size
    rest = sum(p.numel() for p in quantized.model.parameters()) - entries
    assert entries < size < entries + 4 * rest + 8000


def test_four_bits_take_half_a_byte(tmp_path: Path) -> None:
    _, path = exported(OneLinear(), tmp_path, images(4, 8), weight_bits=4, **SAME)
    assert path.with_suffix(".bin").stat().st_size < 24 * 192 / 2 + 4 * 24 * 4
    assert set(re.findall(r'element_type="([^"]+)"', path.read_text())) >= {"i4"}


def test_weights_alone_are_not_called_integer(tmp_path: Path) -> None:
    x = images(16, 8)
    fields = {"weight_bits": 4, "activation_bits": None, "weight_symmetric": False, **SAME}
    quantized, path = exported(OneLinear(), tmp_path, x, **fields)
    runtime = open_runtime(path)
    (ran,) = prove(runtime, runtime.facts).ran
    assert not ran.integer
    assert "activation_bits=None" in (ran.reason or "")
    with torch.no_grad():
        wanted = quantized(x).numpy()
    np.testing.assert_allclose(runtime(x.numpy()), wanted, atol=1e-4 * np.abs(wanted).max())


def test_facts_travel_once_and_claim_less(written: tuple[Any, Path]) -> None:
    quantized, path = written
    text = path.read_text()
    assert text.count("quietvit exported model") == 1
    facts = open_runtime(path).facts
    assert facts.input_shape == quantized.input_shape
    assert [p.name for p in facts.products] == [s.name for s in quantized.trace.matmuls]
    assert {p.why_float for p in facts.products if p.kind == "matmul"} == {ATTENTION}
    assert {p.why_float for p in facts.products if p.kind != "matmul"} == {None}
    assert not any("VNNI" in note for note in facts.notes)


def test_zero_points_are_taken_out_without_a_change_of_values(tmp_path: Path) -> None:
    x = images(16, 8)
    for bits in (7, 8):
        fields = {"weight_bits": bits, "weight_symmetric": False}
        quantized = quantize(OneLinear(), RTN(**fields, **SAME), x, progress=False)
        path = export(quantized, tmp_path / f"{bits}.onnx").path
        model = onnx.load(path)
        zeros = [e.name for e in model.graph.initializer if e.name.endswith("weight:zero_point")]
        assert zeros
        assert without_zero_points(model) == frozenset()
        onnx.checker.check_model(model, full_check=True)
        given = {"images": x.numpy()}
        (wanted,) = open_session(path).run(None, given)
        (found,) = open_session(model.SerializeToString()).run(None, given)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


def test_zero_points_of_zero_are_left_out_of_an_ir(tmp_path: Path) -> None:
    quantized = quantize(OneLinear(), RTN(weight_bits=4), images(16, 8), progress=False)
    model = onnx.load(export(quantized, tmp_path / "w4.onnx").path)
    before = [node.op_type for node in model.graph.node]
    assert without_zero_points(model) == frozenset()
    assert [node.op_type for node in model.graph.node] == before  # nothing is subtracted
    for node in model.graph.node:
        assert not any(name.endswith("weight:zero_point") for name in node.input)


@pytest.fixture(scope="module")
def content() -> tuple[Any, Any]:
    """ONNX graph and facts of one linear."""
    quantized = quantize(OneLinear(), RTN(), images(8, 8), progress=False)
    grids = grids_of(quantized)
    facts = facts_of(quantized, grids, preprocessing=None, labels=None)
    return quantized_onnx(quantized, grids, facts)


@pytest.mark.parametrize("name", ["model.xml", "model.bin"])
def test_a_path_in_use_is_refused(name: str, written: tuple[Any, Path], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(QuietvitError, match=rf"{name} exists already"):
        export(written[0], tmp_path / "model.xml")
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_earlier_files_are_replaced_whole(content: tuple[Any, Any], tmp_path: Path) -> None:
    for name in ("model.xml", "model.bin"):
        (tmp_path / name).write_bytes(b"earlier")
    write_openvino(content[0], tmp_path / "model.xml", content[1])
    assert {entry.name for entry in tmp_path.iterdir()} == {"model.xml", "model.bin"}
    assert open_runtime(tmp_path / "model.xml").facts.products == content[1].products


def test_a_failed_write_leaves_the_earlier_files(
    content: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("model.xml", "model.bin"):
        (tmp_path / name).write_bytes(b"earlier")
    rename = Path.rename

    def failing(self: Path, target: Any) -> Path:
        if Path(target) == tmp_path / "model.xml":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(QuietvitError, match="No space left"):
        write_openvino(content[0], tmp_path / "model.xml", content[1])
    assert {e.name: e.read_bytes() for e in tmp_path.iterdir()} == {
        "model.xml": b"earlier",
        "model.bin": b"earlier",
    }


def _damaged(xml: bytes, binary: bytes) -> dict[str, tuple[bytes, bytes | None, str]]:
    return {
        "cut": (xml[: len(xml) // 2], binary, "cannot load .*truncated"),
        "no bin": (xml, None, r"needs its own model\.bin next to it"),
        "short bin": (xml, binary[: len(binary) // 2], "cannot load .*truncated"),
        "foreign": (b"<html><body/></html>", b"", "not an OpenVINO IR"),
        "empty": (b"", b"", "not an OpenVINO IR"),
        "not ours": (xml.replace(b"quietvit value", b"other value"), binary, "not exported by"),
    }


@pytest.mark.parametrize("what", ["cut", "no bin", "short bin", "foreign", "empty", "not ours"])
def test_damaged_and_foreign_files_are_refused(
    what: str, written: tuple[Any, Path], tmp_path: Path
) -> None:
    _, path = written
    xml, binary, message = _damaged(path.read_bytes(), path.with_suffix(".bin").read_bytes())[what]
    (tmp_path / "model.xml").write_bytes(xml)
    if binary is not None:
        (tmp_path / "model.bin").write_bytes(binary)
    with pytest.raises(QuietvitError, match=message):
        _ = open_runtime(tmp_path / "model.xml").facts


def test_a_missing_extra_is_named(
    written: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(QuietvitError, match=r"quietvit\[openvino\]"):
        export(written[0], tmp_path / "model.xml")
    assert list(tmp_path.iterdir()) == []
