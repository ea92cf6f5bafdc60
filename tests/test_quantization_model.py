"""``quantize``: coverage, policy, calibration in every form, gradients, refusals, each method."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import quietvit
from quietvit import RTN, QuietvitError
from quietvit.quantization import get_method, list_methods, method_rows, quantize
from quietvit.quantization.calibration import Calibration, ImageStream, run_model
from quietvit.tracing import MATMUL_KINDS, trace

FLOAT = {"weight_bits": None, "activation_bits": None}
SIXTEEN = {
    "weight_bits": 16,
    "activation_bits": 16,
    "patch_embed_bits": "same",
    "head_bits": "same",
}


def tiny_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=10,
    )


def tiny_swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        embed_dim=16,
        depths=(1, 1),
        num_heads=(2, 2),
        num_classes=10,
    )


def tiny_torchvision() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10)


class TinyEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 8, 8)
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classify = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return self.classify(self.encoder(tokens).mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": tiny_vit,
    "swin": tiny_swin,
    "torchvision": tiny_torchvision,
    "encoder": TinyEncoder,
}


def make(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return model


def images(count: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def off(model: nn.Module, quantized: nn.Module, x: torch.Tensor) -> float:
    wanted = model(x)
    return float((quantized(x) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("method_name", ["rtn"])
def test_every_method_on_every_model(method_name: str, model_name: str) -> None:
    model, x = make(model_name), images()
    before = copy.deepcopy(model.state_dict())
    method = get_method(method_name)()
    quantized = quantize(model, method, x, progress=False)
    assert quantized.coverage.fraction == 1
    assert quantized.coverage.untouched == ()
    assert quantized.coverage.quantized_macs == quantized.trace.macs > 0
    assert 0 < off(model, quantized, x) < 0.1
    again = quantize(model, method, x, progress=False)
    with torch.no_grad():
        assert torch.equal(quantized(x), again(x))
        assert torch.equal(quantized(x[:1]), quantized(x)[:1]) or torch.allclose(
            quantized(x[:1]), quantized(x)[:1], rtol=0.1, atol=0.1
        )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.requires_grad for p in quantized.model.parameters() if p.is_floating_point())


@pytest.mark.parametrize("model_name", MODELS)
def test_float_passthrough_is_exact(model_name: str) -> None:
    model, x = make(model_name), images()
    quantized = quantize(model, RTN(**FLOAT), x)
    with torch.no_grad():
        assert torch.equal(quantized(x), model(x))
    assert quantized.coverage.fraction == 0
    assert len(quantized.coverage.untouched) == len(quantized.trace.matmuls)


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_sixteen_bits_are_nearly_float(model_name: str, symmetric: bool) -> None:
    model, x = make(model_name), images()
    method = RTN(**SIXTEEN, activation_symmetric=symmetric, weight_symmetric=symmetric)
    assert off(model, quantize(model, method, x), x) < 1e-3


@pytest.mark.parametrize("activation_range", ["minmax", "percentile", "omse"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_all_settings_of_rtn(activation_range: Any, granularity: Any, symmetric: bool) -> None:
    model, x = make("vit"), images(8)
    errors = []
    for bits in (3, 5, 8):
        method = RTN(
            weight_bits=bits,
            activation_bits=bits,
            weight_range=activation_range,
            activation_range=activation_range,
            weight_granularity=granularity,
            activation_granularity=granularity,
            weight_symmetric=symmetric,
            activation_symmetric=symmetric,
        )
        quantized = quantize(model, method, x)
        assert quantized.coverage.fraction == 1
        errors.append(off(model, quantized, x))
    assert errors[2] < 0.1
    assert errors == sorted(errors, reverse=True)


def test_first_and_last_layer_policy() -> None:
    model, x = make("vit"), images()
    quantized = quantize(model, RTN(weight_bits=4, activation_bits=3), x)
    bits = {
        site: (quantized.quantizer(site, "input").bits, quantized.quantizer(site, "weight").bits)
        for site in ("patch_embed.proj", "blocks.0.mlp.fc1", "head")
    }
    assert bits == {"patch_embed.proj": (8, 8), "blocks.0.mlp.fc1": (3, 4), "head": (8, 8)}
    report = str(quantized)
    assert "W4A3" in report
    assert "patch embedding at 8 bits, head at 8 bits" in report
    same = quantize(model, RTN(weight_bits=4, patch_embed_bits=None, head_bits="same"), x)
    assert same.quantizer("head", "weight").bits == 4
    assert same.quantizer("patch_embed.proj", "weight") is None
    assert "patch embedding float, head at the working bits" in str(same)
    ((site, reason),) = same.coverage.untouched
    assert site == "patch_embed.proj"
    assert "patch_embed_bits=None" in reason


def test_all_four_attention_operands_are_quantized() -> None:
    quantized = quantize(make("vit"), RTN(), images())
    attention = [
        s.name for s in quantized.trace.sites if s.role in ("query_key", "attention_value")
    ]
    assert len(attention) == 4
    for site in attention:
        assert quantized.quantizer(site, "left") is not None
        assert quantized.quantizer(site, "right") is not None
    value = next(n for n in attention if n.endswith("attention_value"))
    probabilities = quantized.quantizer(value, "left")
    assert int(probabilities.zero_point) == 0


def test_excluded_sites_stay_float_and_are_reported() -> None:
    model, x = make("vit"), images()
    quantized = quantize(model, RTN(exclude=("*.fc1", "head")), x)
    reasons = dict(quantized.coverage.untouched)
    assert set(reasons) == {"blocks.0.mlp.fc1", "blocks.1.mlp.fc1", "head"}
    assert "excluded by '*.fc1'" in reasons["blocks.0.mlp.fc1"]
    left = sum(quantized.trace[name].macs for name in reasons)
    assert quantized.coverage.quantized_macs == quantized.trace.macs - left
    listed = quantized.coverage.to_dict()
    assert [entry["site"] for entry in listed["untouched"]] == list(reasons)
    assert sum(entry["macs"] for entry in listed["untouched"]) == left
    assert "blocks.1.mlp.fc1" in str(quantized.coverage)
    with pytest.raises(QuietvitError, match=r"exclude='blocks.0.mlp.fc9' .*did you mean"):
        quantize(model, RTN(exclude=("blocks.0.mlp.fc9",)), x)


def test_deployable_says_what_integer_kernels_can_do() -> None:
    model, x = make("vit"), images()
    assert quantize(model, RTN(), x).deployable
    assert not quantize(model, RTN(activation_granularity="per_channel"), x).deployable
    assert not quantize(model, RTN(**SIXTEEN), x).deployable
    assert not quantize(model, RTN(**FLOAT), x).deployable


def test_every_form_of_calibration_gives_the_same_quantizers() -> None:
    model, x = make("vit"), images(40)
    labels = torch.zeros(40, dtype=torch.long)
    data = torch.utils.data.TensorDataset(x, labels)
    forms: list[Any] = [
        x,
        [x[:7], x[7:]],
        torch.utils.data.DataLoader(data, batch_size=8),
        [{"pixel_values": x[:20], "labels": labels}, {"images": x[20:]}],
        (batch for batch in x.split(5)),
        [[x, labels]],
    ]
    states = [quantize(model, RTN(activation_range="omse"), form).state_dict() for form in forms]
    for state in states[1:]:
        for name, tensor in states[0].items():
            assert torch.equal(tensor, state[name]), name


def test_gradients_reach_the_weights_and_training_follows_them() -> None:
    model, x = make("vit"), images()
    quantized = quantize(model, RTN(), x)
    with torch.no_grad():
        kept = quantized(x)
    loss = quantized(x).square().mean()
    loss.backward()
    grads = {n: p.grad for n, p in quantized.model.named_parameters()}
    assert all(g is not None and torch.isfinite(g).all() for g in grads.values())
    assert float(grads["blocks.0.mlp.fc1.weight"].norm()) > 0
    torch.optim.SGD(quantized.parameters(), lr=0.1).step()
    with torch.no_grad():
        moved = quantized(x)
        assert not torch.equal(moved, kept)
        quantized.refresh()
        assert torch.equal(quantized(x), moved)
        quantized.model.load_state_dict(model.state_dict(), assign=True)
        assert torch.equal(quantized(x), kept)


def test_kept_weights_change_nothing() -> None:
    model, x = make("swin"), images()
    quantized = quantize(model, RTN(weight_bits=4), x)
    with torch.no_grad():
        first, second = quantized(x), quantized(x)
    assert torch.equal(first, second)
    torch.testing.assert_close(quantized(x).detach(), first, rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(quantized)(x), first)


@torch.no_grad()
def test_kept_weights_follow_replaced_data_and_quantizers() -> None:
    model, x = make("vit"), images()
    quantized = quantize(model, RTN(), x)
    first = quantized(x)
    weight = quantized.model.blocks[0].mlp.fc1.weight
    original = weight.data
    weight.data = torch.zeros_like(original)
    assert not torch.equal(quantized(x), first)
    weight.data = original
    assert torch.equal(quantized(x), first)
    quantizer = quantized.quantizer("blocks.0.mlp.fc1", "weight")
    assert quantizer is not None
    quantizer.scale.mul_(16)
    assert not torch.equal(quantized(x), first)
    quantizer.scale.div_(16)
    quantized.model.double()
    assert quantized(x.double()).dtype == torch.float64
    quantized.model.float()
    assert torch.equal(quantized(x), first)


@torch.no_grad()
def test_copies_do_not_inherit_kept_weights() -> None:
    model, x = make("vit"), images()
    quantized = quantize(model, RTN(), x)
    quantized.model.blocks[0].mlp.fc1.weight.mul_(1)
    first = quantized(x)
    assert quantized._kept
    copied = copy.deepcopy(quantized)
    assert not copied._kept
    copied.model.blocks[0].mlp.fc1.weight.zero_()
    assert not torch.equal(copied(x), first)
    assert torch.equal(quantized(x), first)


def test_weights_of_transposed_convolutions_have_a_range_an_output_channel() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ConvTranspose2d(8, 5, 2, 2)).eval()
    with torch.no_grad():
        model[1].weight.mul_(torch.tensor([1.0, 10, 100, 1000, 10000])[None, :, None, None])
        quantized = quantize(model, RTN(weight_bits=4, patch_embed_bits="same"), images())
        quantizer = quantized.quantizer("1", "weight")
        assert quantizer is not None
        wanted = model[1].weight
        error = (quantizer(wanted) - wanted).abs().amax((0, 2, 3)) / wanted.abs().amax((0, 2, 3))
    assert error.max() <= 0.5 / 7 + 1e-6


class WithTable(nn.Module):
    """A product of weights alone, as the position tables of Swin v2 are."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 4))
        self.position = nn.Linear(4, 32)
        self.vit = make("encoder")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.vit.embed(x).flatten(2).transpose(1, 2)
        return self.vit.classify((tokens + self.position(self.table)).mean(1))


def test_products_that_do_not_depend_on_the_images_are_noted() -> None:
    quantized = quantize(WithTable().eval(), RTN(), images())
    assert "1 products do not depend on the images (position)" in str(quantized)
    assert "do not depend" not in str(quantize(make("vit"), RTN(), images()))
    excluded = quantize(WithTable().eval(), RTN(exclude="position"), images())
    assert [name for name, _ in excluded.coverage.untouched] == ["position"]


def test_model_in_training_mode_is_left_so_and_noted() -> None:
    model = make("vit").train()
    quantized = quantize(model, RTN(), images())
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in quantized.modules())
    assert "training mode" in str(quantized)


def test_half_precision_models() -> None:
    model, x = make("vit").bfloat16(), images()
    quantized = quantize(model, RTN(), x)
    with torch.no_grad():
        assert quantized(x.bfloat16()).dtype == torch.bfloat16
    assert off(model, quantized, x.bfloat16()) < 0.15


def test_one_image_dead_channels_and_constant_images() -> None:
    model = make("vit")
    with torch.no_grad():
        model.blocks[0].norm1.weight[3] = 0
        model.blocks[0].mlp.fc1.weight[5] = 0
        model.blocks[1].mlp.fc2.weight.zero_()
    for x in (images(1), torch.zeros(2, 3, 32, 32)):
        for activation_range in ("minmax", "percentile", "omse"):
            method = RTN(activation_range=activation_range, activation_granularity="per_channel")
            quantized = quantize(model, method, x)
            assert off(model, quantized, x) < 0.1


def loader_of_nothing() -> Any:
    return torch.utils.data.DataLoader([], batch_size=2)


BAD_IMAGES: dict[str, tuple[Any, str]] = {
    "none": (images()[:0], "zero calibration images"),
    "empty list": ([], "zero calibration images"),
    "empty loader": (loader_of_nothing(), "zero calibration images"),
    "one image": (images()[0], "batch dimension"),
    "grey": (images()[:, :1], "does not run"),
    "another size": ([images(), torch.randn(2, 3, 48, 48)], r"\(3, 48, 48\), earlier ones"),
    "pixels": ((images() * 255).to(torch.uint8), "uint8"),
    "dict": ([{"picture": images()}], "picture"),
    "path": ("images/", "str"),
    "number": (32, "int"),
    "nan": (images().index_fill(0, torch.tensor([2]), float("nan")), "image 2 holds NaN"),
    "late nan": (
        torch.cat([images(17), torch.full((1, 3, 32, 32), float("inf"))]),
        "image 17 holds NaN or inf",
    ),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
@pytest.mark.parametrize("method_name", ["rtn"])
def test_bad_calibration_is_refused_and_the_model_unchanged(method_name: str, case: str) -> None:
    model = make("vit")
    before = copy.deepcopy(model.state_dict())
    calibration, message = BAD_IMAGES[case]
    with pytest.raises(QuietvitError, match=message):
        quantize(model, get_method(method_name)(), calibration)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


class TwoInputs(nn.Module):
    """A classifier that adds a bias, which its forward pass takes as a second argument."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make("vit")

    def forward(self, images: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return self.model(images) + bias


@pytest.mark.parametrize("name", ["rtn", "repq-vit", "brecq", "qdrop", "qwt"])
def test_a_model_with_more_arguments_is_told_to_be_wrapped(name: str) -> None:
    model, x, bias = TwoInputs(), images(), torch.ones(len(images()), 10)
    told = r"called with one tensor of images.*whose forward\(images\) calls it with them"
    for given in (x, [(x, bias)], {"images": x, "bias": bias}):
        with pytest.raises(QuietvitError, match=told) as raised:
            quantize(model, name, given)
        assert "as a tuple" not in str(raised.value)
        with pytest.raises(QuietvitError, match=told):
            quantize(model, name, given, example=(x, bias))


def test_a_wrapped_model_with_more_arguments_is_quantized() -> None:
    class Wrapped(TwoInputs):
        def forward(self, images: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(images, torch.ones(10))

    assert quantize(Wrapped(), "rtn", images()).coverage.fraction == 1


def test_lack_of_memory_is_not_blamed_on_the_images() -> None:
    class Full(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        run_model(Full(), images())


def test_nan_weights_name_their_site() -> None:
    model = make("vit")
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(QuietvitError, match=r"blocks.1.mlp.fc1 \(weight\).*NaN"):
        quantize(model, RTN(), images())


def test_wrong_models_and_methods_are_refused() -> None:
    model, x = make("vit"), images()
    quantized = quantize(model, RTN(), x)
    with pytest.raises(QuietvitError, match="quantized already"):
        quantize(quantized, RTN(), x)
    with pytest.raises(QuietvitError, match="quantized already"):
        quantize(nn.Sequential(quantized), RTN(), x)
    with pytest.raises(QuietvitError, match="class RTN"):
        quantize(model, RTN, x)  # type: ignore[arg-type]
    with pytest.raises(QuietvitError, match="Module"):
        quantize("vit", RTN(), x)  # type: ignore[arg-type]
    with pytest.raises(QuietvitError, match="no matrix products"):
        quantize(nn.ReLU(), RTN(), x)
    with pytest.raises(QuietvitError, match="operands left, right"):
        quantized.quantizer("blocks.0.attn.query_key", "weight")


BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"weight_bits": 1}, "weight_bits=1: bits are an integer from 2 to 16"),
    ({"activation_bits": 17}, "activation_bits=17"),
    ({"activation_bits": 8.0}, "activation_bits=8.0"),
    ({"head_bits": True}, "or 'same'"),
    ({"patch_embed_bits": "some"}, "or 'same'"),
    ({"wieght_bits": 4}, "did you mean 'weight_bits'"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_CONFIGS)
@pytest.mark.parametrize("method_name", ["rtn"])
def test_bad_configs_are_refused_when_built(
    method_name: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(QuietvitError, match=message):
        get_method(method_name)(**fields)


def test_bad_fields_of_rtn() -> None:
    with pytest.raises(QuietvitError, match="'minmax', 'percentile' or 'omse'"):
        RTN(weight_range="mse")  # type: ignore[arg-type]
    with pytest.raises(QuietvitError, match=r"percentile=0\.5"):
        RTN(percentile=0.5)
    with pytest.raises(QuietvitError, match="exclude=3: give a pattern"):
        RTN(exclude=3)  # type: ignore[arg-type]
    with pytest.raises(Exception, match="frozen"):
        RTN().weight_bits = 4  # type: ignore[misc]


def test_registry() -> None:
    assert "rtn" in list_methods()
    assert "rtn" in list_methods("R*")
    assert list_methods("nothing*") == []
    assert get_method("RTN") is RTN
    assert quietvit.list_methods is list_methods
    with pytest.raises(QuietvitError, match="did you mean 'rtn'"):
        get_method("rnt")
    for row in method_rows():
        assert all(row[key] for key in ("method", "summary", "needs", "cost", "kernels", "source"))


@pytest.mark.parametrize("fields", [{"activation_bits": None}, {"weight_bits": None}])
def test_where_one_side_is_float_everywhere_nothing_is_called_deployable(fields):
    half = quantize(make("vit"), RTN(**fields, exclude="*attn*"), images(), progress=False)
    assert not half.deployable
    assert "nothing computes in integers" in half.report()


def test_a_single_pass_shows_its_progress_site_by_site() -> None:
    steps: list[int] = []

    class Watched(Calibration):
        def track(self, batches, total, label):  # type: ignore[no-untyped-def]
            assert (label, total) == ("one pass", len(self.trace.matmuls))
            for step in batches:
                steps.append(step)
                yield step

    model, x = make("vit"), images()
    watched = Watched(model, trace(model, x), ImageStream(x, model))
    with torch.no_grad():
        got = watched.run(x, lambda s, o, run: run(*o), kinds=MATMUL_KINDS, label="one pass")
        torch.testing.assert_close(got, model(x))
    assert steps == list(range(len(watched.trace.matmuls)))
