"""torchao: linears that compute the simulated model's integers, what is left out, the folder."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from quietvit import RTN, FQViT, QuietvitError, QwT, RepQViT, SmoothQuant, load
from quietvit.deployment import export, load_torchao, open_runtime, to_torchao
from quietvit.deployment.for_torchao.model import IntegerLinear, TorchAO
from quietvit.quantization import QuantizedModel, quantize
from quietvit.tracing import intercept

pytest.importorskip("torchao")

CASES: dict[str, Any] = {
    "w8a8": RTN(),
    "symmetric": RTN(activation_symmetric=True),
    "zero points": RTN(weight_symmetric=False),
    "w4a4 zero points": RTN(weight_bits=4, activation_bits=4, weight_symmetric=False),
    "per tensor": RTN(weight_granularity="per_tensor", weight_bits=6, activation_bits=6),
    "smoothquant": SmoothQuant(),
    "repq-vit": RepQViT(),
}


def tiny_vit(**changes: Any) -> nn.Module:
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 10,
    }
    return randomized(timm.create_model("vit_tiny_patch16_224", **settings | changes))


def tiny_torchvision() -> nn.Module:
    torch.manual_seed(1)
    return randomized(torchvision.models.VisionTransformer(32, 8, 1, 2, 32, 64, num_classes=10))


def randomized(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model.eval()


def images(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def simulated_linears(quantized: QuantizedModel, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Input before it is quantized, and output, bias and all, of every linear."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def handler(site: Any, operands: Any, run: Any) -> Tensor:
        output = quantized._handle(site, operands, run)
        if site.kind == "linear":
            seen[site.name] = operands[0].clone(), output.clone()
        return output

    with torch.no_grad(), intercept(quantized.trace, handler, kinds=quantized._kinds):
        quantized.model(x)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_every_converted_linear_computes_the_simulated_sums(name: str) -> None:
    quantized = quantize(tiny_vit(), CASES[name], images(8), progress=False)
    made = to_torchao(quantized)
    linears = [site for site in quantized.trace.matmuls if site.kind == "linear"]
    assert made.integer == tuple(site.name for site in linears)
    share = sum(site.macs for site in linears) / quantized.trace.macs
    assert made.integer_share == pytest.approx(share)
    for x in (images(3, 5), 4 * images(2, 6)):  # also far outside of what was calibrated
        for site, (given, wanted) in simulated_linears(quantized, x).items():
            module = made.model.get_submodule(quantized.trace[site].module)
            assert module.weight.qdata.dtype == torch.int8
            found = module(given)
            # Zero points are taken off in float32 behind the integers: their part sets the error.
            room = 1e-6 * (wanted.abs().max() + _before_zero_points(quantized, site))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=float(room))


def _before_zero_points(quantized: QuantizedModel, site: str) -> float:
    """Size that sums may have before zero points are taken off."""
    x, w = (quantized.quantizer(site, operand) for operand in ("input", "weight"))
    assert x is not None
    assert w is not None
    width = quantized.trace[site].weight_shape[1]
    return float(255 * x.scale * width**0.5 * (128 * w.scale.max()))


@torch.no_grad()
def test_the_law_can_fail() -> None:
    quantized = quantize(tiny_vit(), RTN(), images(8), progress=False)
    made = to_torchao(quantized)
    module = made.model.head
    module.weight.qdata[0, 0] += 1
    given, wanted = simulated_linears(quantized, images(3, 5))["head"]
    assert not torch.allclose(module(given), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_whole_model_is_near_and_the_original_untouched() -> None:
    quantized = quantize(tiny_vit(), RTN(), images(8), progress=False)
    before = copy.deepcopy(quantized.state_dict())
    made = to_torchao(quantized)
    wanted = quantized(images())
    assert float((made.model(images()) - wanted).norm() / wanted.norm()) < 0.1
    assert all(torch.equal(t, before[name]) for name, t in quantized.state_dict().items())
    assert type(quantized.model.head) is nn.Linear


def test_what_is_left_in_float_is_listed() -> None:
    quantized = quantize(tiny_vit(), RTN(exclude=("*.fc1",)), images(8), progress=False)
    made = to_torchao(quantized)
    left = dict(made.left_float)
    assert {*left, *made.integer} == {site.name for site in quantized.trace.matmuls}
    assert not {*left} & {*made.integer}
    assert "convolution" in left["patch_embed.proj"]
    assert "two activations" in left["blocks.0.attn.query_key"]
    assert "excluded by" in left["blocks.0.mlp.fc1"]
    assert f"{100 * made.integer_share:.2f} %" in str(made)
    assert "float: patch_embed.proj" in str(made)


def test_linears_that_are_never_called_stay_float() -> None:
    quantized = quantize(tiny_torchvision(), RTN(), images(8), progress=False)
    made = to_torchao(quantized)
    left = dict(made.left_float)
    attention = "encoder.layers.encoder_layer_0.self_attention"
    assert "not the call of an nn.Linear" in left[f"{attention}.in_proj_weight"]
    assert "not the call of an nn.Linear" in left[f"{attention}.out_proj"]
    assert "encoder.layers.encoder_layer_0.mlp.0" in made.integer
    with torch.no_grad():
        wanted = quantized(images())
        assert float((made.model(images()) - wanted).norm() / wanted.norm()) < 0.1


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.twice, self.head = nn.Linear(192, 192), nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(1)[:, :192]
        return self.head(self.twice(self.twice(rows).relu()))


def test_a_shared_weight_stays_float() -> None:
    made = to_torchao(quantize(Shared().eval(), RTN(), images(8), progress=False))
    assert made.integer == ("head",)
    assert len(made.left_float) == 2


@torch.no_grad()
def test_weights_alone_are_int8_and_not_called_integer() -> None:
    quantized = quantize(tiny_vit(), RTN(activation_bits=None), images(8), progress=False)
    made = to_torchao(quantized)
    assert made.integer == ()
    assert made.integer_share == 0
    assert "only its weight" in dict(made.left_float)["head"]
    assert made.model.head.weight.qdata.dtype == torch.int8
    torch.testing.assert_close(made.model(images()), quantized(images()), rtol=1e-4, atol=1e-5)


def test_a_learnt_adjustment_is_refused_and_operands_of_norms_are_named() -> None:
    quantized = quantize(tiny_vit(depth=1), FQViT(), images(8), progress=False)
    with pytest.raises(QuietvitError, match="adjusted by integer_softmax"):
        to_torchao(quantized)
    quantized._adjusted.clear()
    left = dict(to_torchao(quantized).left_float)
    assert "rounded in the simulated model, not here" in left["blocks.0.norm1"]


def test_a_compensation_is_refused() -> None:
    quantized = quantize(tiny_vit(depth=1), QwT(base=RTN(weight_bits=4)), images(8), progress=False)
    assert quantized.compensated()
    with pytest.raises(QuietvitError, match="compensated in float"):
        to_torchao(quantized)


def test_a_float_model_is_refused() -> None:
    with pytest.raises(QuietvitError, match="is not quantized"):
        to_torchao(tiny_vit())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizedModel, Path, TorchAO]:
    """RepQ-ViT has all there is: folded norms and biases, zero points, fewer bits."""
    method = RepQViT(weight_bits=4, activation_bits=6)
    quantized = quantize(tiny_vit(), method, images(8), progress=False)
    path = tmp_path_factory.mktemp("torchao") / "model"
    export(quantized, path, to="torchao")
    return quantized, path, to_torchao(quantized)


@torch.no_grad()
def test_the_folder_reads_back_bit_for_bit(written: tuple[QuantizedModel, Path, TorchAO]) -> None:
    _, path, made = written
    assert any(isinstance(module, IntegerLinear) for module in made.model.modules())
    again = load_torchao(path, tiny_vit())
    assert torch.equal(again.model(images(5, 9)), made.model(images(5, 9)))
    assert again.left_float == made.left_float
    assert again.integer == made.integer
    assert again.integer_share == made.integer_share
    assert {entry.name for entry in path.iterdir()} == {"model.safetensors", "torchao.json"}


@torch.no_grad()
def test_timm_builds_what_it_knows_by_name(
    written: tuple[QuantizedModel, Path, TorchAO], tmp_path: Path
) -> None:
    model = randomized(timm.create_model("test_vit", img_size=32))
    quantized = quantize(model, RTN(weight_bits=4), images(8), progress=False)
    made = to_torchao(quantized)
    export(quantized, tmp_path / "model", to="torchao")
    products = open_runtime(tmp_path / "model").facts.products
    assert {p.name for p in products if p.why_float is None} == set(made.integer)
    for path in (tmp_path / "model", made.save(tmp_path / "saved")):
        assert torch.equal(load_torchao(path).model(images()), made.model(images()))
    with pytest.raises(QuietvitError, match=r"load_torchao.*model=my_model"):
        load_torchao(written[1])


class Colon(nn.Module):
    """Modules whose names hold what separates the parts of a weight in the file."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("layer:1", nn.Linear(3 * 32 * 32, 8))
        self.add_module("layer:2", nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.get_submodule("layer:1")(x.flatten(1))
        return self.get_submodule("layer:2")(hidden.relu())


@torch.no_grad()
def test_names_with_a_colon_are_read_back(tmp_path: Path) -> None:
    model, method = randomized(Colon()), RTN(exclude=("layer:2",))
    made = to_torchao(quantize(model, method, images(8), progress=False))
    assert len(made.integer) == 1
    again = load_torchao(made.save(tmp_path / "model"), Colon())
    assert torch.equal(again.model(images()), made.model(images()))


@torch.no_grad()
def test_memory_and_qvit_give_the_same_model(
    written: tuple[QuantizedModel, Path, TorchAO], tmp_path: Path
) -> None:
    quantized, _, made = written
    again = to_torchao(load(quantized.save(tmp_path / "model.qvit"), tiny_vit()))
    assert torch.equal(again.model(images()), made.model(images()))


def test_linears_take_a_byte_an_entry(written: tuple[QuantizedModel, Path, TorchAO]) -> None:
    quantized, path, made = written
    whole = sum(parameter.numel() for parameter in quantized.model.parameters())
    sites = [quantized.trace[name] for name in made.integer]
    entries = sum(site.weight_shape[0] * site.weight_shape[1] for site in sites)
    size = (path / "model.safetensors").stat().st_size
    assert size < 4 * (whole - entries) + 1.2 * entries + 20_000


def test_paths_in_use_are_refused(
    written: tuple[QuantizedModel, Path, TorchAO], tmp_path: Path
) -> None:
    quantized, path, _ = written
    with pytest.raises(QuietvitError, match="exists already"):
        export(quantized, path, to="torchao")
    before = (path / "model.safetensors").read_bytes()
    export(quantized, path, to="torchao", force=True)
    assert (path / "model.safetensors").read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(QuietvitError, match="not an earlier export"):
        export(quantized, tmp_path, to="torchao", force=True)
    assert (tmp_path / "mine").read_text() == "mine"
    with pytest.raises(QuietvitError, match=r"model\.onnx with to='torchao'"):
        export(quantized, tmp_path / "model.onnx", to="torchao")


@pytest.mark.parametrize("what", ["missing", "cut", "foreign", "version", "inconsistent", "other"])
def test_damaged_and_foreign_folders_are_refused(
    what: str, written: tuple[QuantizedModel, Path, TorchAO], tmp_path: Path
) -> None:
    _, path, _ = written
    tensors, facts = (path / n for n in ("model.safetensors", "torchao.json"))
    whole, content = tensors.read_bytes(), json.loads(facts.read_text())
    model = tiny_vit(embed_dim=16) if what == "other" else tiny_vit()
    changed = {
        "foreign": {"format": "something else"},
        "version": content | {"version": 99},
        "inconsistent": content | {"int8": {"head.weight": ["codes"], "nothing.weight": []}},
    }
    (tmp_path / tensors.name).write_bytes(whole[: len(whole) // 2] if what == "cut" else whole)
    if what != "missing":
        (tmp_path / facts.name).write_text(json.dumps(changed.get(what, content)))
    messages = {
        "missing": r"holds no torchao\.json",
        "cut": "damaged or cut short",
        "foreign": "was not written by",
        "version": "format version 99",
        "inconsistent": "not consistent|another architecture",
        "other": "another architecture",
    }
    with pytest.raises(QuietvitError, match=messages[what]):
        load_torchao(tmp_path, model)


def test_a_missing_extra_is_named(
    written: tuple[QuantizedModel, Path, TorchAO], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(QuietvitError, match=r"quietvit\[torchao\]"):
        export(written[0], tmp_path / "model", to="torchao")
    with pytest.raises(QuietvitError, match=r"quietvit\[torchao\]"):
        load_torchao(written[1])
    assert list(tmp_path.iterdir()) == []
