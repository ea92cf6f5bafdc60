"""Saving and loading: the same outputs bit for bit, small files, refusals that name the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import quietvit
from quietvit import RTN, QuietvitError
from quietvit.quantization import get_method, quantize
from test_quantization_model import MODELS, images, make


def named_vit(**arguments: Any) -> nn.Module:
    torch.manual_seed(2)
    return timm.create_model("test_vit", **{"num_classes": 7, "img_size": 64} | arguments).eval()


@torch.no_grad()
def same(a: nn.Module, b: nn.Module, x: torch.Tensor) -> bool:
    return torch.equal(a(x), b(x))


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("method_name", ["rtn"])
def test_round_trip_of_every_method(method_name: str, model_name: str, tmp_path: Path) -> None:
    model, x = make(model_name), images()
    quantized = quantize(model, get_method(method_name)(weight_bits=4), x)
    folder = quantized.save(tmp_path / "model.qvit")
    given = make(model_name)
    nn.init.zeros_(next(given.parameters()))
    loaded = quietvit.load(folder, model=given)
    assert same(loaded, quantized, x)
    assert same(loaded, quantized, images(3, seed=5))
    assert loaded.method == quantized.method
    assert loaded.coverage == quantized.coverage
    assert float(next(given.parameters()).detach().abs().sum()) == 0
    again = loaded.save(tmp_path / "again.qvit")
    assert same(quietvit.load(again, model=given), quantized, x)


@pytest.mark.parametrize(
    "fields",
    [
        {"weight_bits": 12, "activation_bits": 10},
        {"weight_symmetric": False, "weight_range": "omse"},
        {"weight_granularity": "per_tensor", "exclude": "*.fc1"},
        {"weight_bits": None},
        {"activation_bits": None, "head_bits": None},
        {"activation_granularity": "per_channel", "activation_symmetric": True},
    ],
)
def test_round_trip_of_settings(fields: dict[str, Any], tmp_path: Path) -> None:
    model, x = make("vit"), images()
    quantized = quantize(model, RTN(**fields), x)
    loaded = quietvit.load(quantized.save(tmp_path / "model.qvit"), model=make("vit"))
    assert same(loaded, quantized, x)
    assert loaded.method == quantized.method


def test_bfloat16_round_trip(tmp_path: Path) -> None:
    model, x = make("vit").bfloat16(), images().bfloat16()
    quantized = quantize(model, RTN(), x)
    loaded = quietvit.load(quantized.save(tmp_path / "model.qvit"), model=make("vit"))
    assert same(loaded, quantized, x)


class Shifted(nn.Module):
    """Adds a table that is not in the state dict to what a linear reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(-1, 1, 48), persistent=False)
        self.head = nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1) + self.table)


def test_buffers_outside_the_state_dict_get_their_dtype_back(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    quantized = quantize(Shifted().bfloat16(), RTN(), x)
    loaded = quietvit.load(quantized.save(tmp_path / "model.qvit"), model=Shifted())
    assert same(loaded, quantized, x)


def test_timm_architectures_are_rebuilt_by_name(tmp_path: Path) -> None:
    model, x = named_vit(), torch.randn(2, 3, 64, 64)
    quantized = quantize(model, RTN(), x)
    folder = quantized.save(tmp_path / "model.qvit")
    assert same(quietvit.load(folder), quantized, x)
    facts = json.loads((folder / "quantization.json").read_text())
    assert facts["architecture"]["name"] == "test_vit"
    assert facts["preprocessing"]["mean"] == list(
        timm.data.resolve_data_config(model=model)["mean"]
    )
    assert facts["coverage"]["fraction"] == 1


def test_saving_and_loading_leave_the_random_generator_alone(tmp_path: Path) -> None:
    quantized = quantize(named_vit(), RTN(), torch.randn(2, 3, 64, 64))
    before = torch.get_rng_state()
    quietvit.load(quantized.save(tmp_path / "model.qvit"))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_timm_does_not_build_by_name_needs_the_model(tmp_path: Path) -> None:
    model, x = named_vit(act_layer=nn.ReLU), torch.randn(2, 3, 64, 64)
    quantized = quantize(model, RTN(), x)
    folder = quantized.save(tmp_path / "model.qvit")
    with pytest.raises(QuietvitError, match="model=my_model"):
        quietvit.load(folder)
    assert same(quietvit.load(folder, model=named_vit(act_layer=nn.ReLU)), quantized, x)


@pytest.mark.parametrize(("bits", "share"), [(8, 0.32), (4, 0.32), (12, 0.57)])
def test_files_are_small(bits: int, share: float, tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)
    method = RTN(weight_bits=bits, patch_embed_bits="same", head_bits="same")
    folder = quantize(model, method, images()).save(tmp_path / "model.qvit")
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    assert (folder / "model.safetensors").stat().st_size < share * whole
    codes = load_file(folder / "model.safetensors")["codes.blocks.0.mlp.fc1.weight"]
    assert codes.dtype == (torch.int8 if bits <= 8 else torch.int16)
    assert codes.unique().numel() <= 2**bits


def test_sites_that_share_or_compute_weights(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 8, 8)
            self.tied = nn.Linear(8, 8)
            self.scaled = nn.Linear(8, 8)
            self.packed = nn.Parameter(torch.randn(16, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).flatten(2).mT
            x = self.tied(self.tied(x).relu())
            x = nn.functional.linear(x, self.scaled.weight * 0.5 + 0.1)
            left, right = self.packed.chunk(2)
            x = nn.functional.linear(x, left).relu()
            return nn.functional.linear(x, right) @ self.packed.mT[:, :3]

    model, x = Odd().eval(), images()
    quantized = quantize(model, RTN(weight_bits=5, activation_bits=6), x)
    loaded = quietvit.load(quantized.save(tmp_path / "odd.qvit"), model=Odd())
    assert same(loaded, quantized, x)


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    model, x = make("vit"), images()
    first, second = quantize(model, RTN(), x), quantize(model, RTN(weight_bits=4), x)
    folder = first.save(tmp_path / "model.qvit")
    modes = {entry.stat().st_mode for entry in folder.iterdir()}
    assert len(modes) == 1  # no file for its owner alone
    with pytest.raises(QuietvitError, match="exists already"):
        second.save(folder)
    assert same(quietvit.load(folder, model=model), first, x)
    second.save(folder, force=True)
    assert same(quietvit.load(folder, model=model), second, x)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.qvit"]
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_text("cat")
    with pytest.raises(QuietvitError, match=r"cat\.jpg"):
        second.save(other, force=True)
    assert (other / "cat.jpg").read_text() == "cat"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_replacement_that_fails_leaves_the_earlier_save(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = make("vit"), images()
    first = quantize(model, RTN(), x)
    folder = first.save(tmp_path / "model.qvit")
    rename, calls = Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise error("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else QuietvitError):
        quantize(model, RTN(weight_bits=4), x).save(folder, force=True)
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.qvit"]
    assert same(quietvit.load(folder, model=model), first, x)


def test_a_place_that_cannot_be_written_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(QuietvitError, match="could not write"):
        quantize(make("vit"), RTN(), images()).save(tmp_path / "file" / "model.qvit")


def test_another_architecture_is_refused_by_name_of_the_first_keys(tmp_path: Path) -> None:
    folder = quantize(named_vit(), RTN(), torch.randn(2, 3, 64, 64)).save(tmp_path / "a.qvit")
    with pytest.raises(QuietvitError, match=r"another architecture.*head\.weight.*\(9, 64\)"):
        quietvit.load(folder, model=named_vit(num_classes=9))
    with pytest.raises(QuietvitError, match="keys differ"):
        quietvit.load(folder, model=make("swin"))


def test_same_weights_in_another_order_of_products_is_refused(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)
            self.times = times

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(self.times):
                x = self.layer(x)
            return x

    folder = quantize(Twice(1), RTN(), images()).save(tmp_path / "a.qvit")
    with pytest.raises(QuietvitError, match="1 matrix products, this one has 2"):
        quietvit.load(folder, model=Twice(2))


def damaged(folder: Path, how: str) -> Path:
    tensors, facts = folder / "model.safetensors", folder / "quantization.json"
    if how == "missing":
        return folder / "nowhere"
    if how == "no tensors":
        tensors.unlink()
    elif how == "truncated tensors":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif how == "header only":
        tensors.write_bytes(tensors.read_bytes()[:20])
    elif how == "truncated facts":
        facts.write_text(facts.read_text()[:200])
    elif how == "foreign facts":
        facts.write_text(json.dumps({"model_type": "vit"}))
    elif how == "newer":
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"version": 99}))
    elif how == "binary facts":
        facts.write_bytes(b"\xff\xfe\x00PK")
    else:
        content = json.loads(facts.read_text())
        del content["quantizers"][0]
        content["coded_weights"] = {"nothing": []}
        facts.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "how",
    [
        *("missing", "no tensors", "truncated tensors", "header only", "truncated facts"),
        *("foreign facts", "newer", "binary facts", "inconsistent"),
    ],
)
def test_damaged_files_are_refused(how: str, tmp_path: Path) -> None:
    folder = quantize(make("vit"), RTN(), images()).save(tmp_path / "model.qvit")
    with pytest.raises(QuietvitError, match=r"model\.qvit"):
        quietvit.load(damaged(folder, how), model=make("vit"))
