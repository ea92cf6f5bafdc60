"""One table of cases through which every registered method goes, on tiny random models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import quietvit
import zoo
from method_cases import METHODS, configured
from quietvit.errors import QuietvitError
from quietvit.measure.sqnr import sqnr
from quietvit.quantization import get_method, method_rows
from quietvit.quantization.quantizers import Quantizer
from quietvit.tracing import intercept


class TinyCNN(nn.Module):
    """Convolutions with BatchNorm, one of them depthwise, a residual, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.norm2 = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8)
        self.wide, self.norm3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.norm1(self.stem(x)))
        y = torch.nn.functional.silu(self.norm2(self.deep(x)))
        x = x + self.norm3(self.wide(y))
        return self.head(x.mean((2, 3)))


def tiny_cnn():
    torch.manual_seed(0)
    model = TinyCNN()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval(), torch.randn(1, 3, 32, 32)


def built(name):
    """Model, example and six calibration images."""
    model, example = tiny_cnn() if name == "cnn" else zoo.build(name)
    shape = (example["pixel_values"] if isinstance(example, dict) else example).shape[1:]
    images = torch.randn(6, *shape, generator=torch.Generator().manual_seed(3))
    return model, example, images


def quantized(model, name, images, example=None, **fields):
    torch.manual_seed(11)
    method = configured(name, **fields)
    return quietvit.quantize(model, method, images, example=example, progress=False)


def logits(model, images):
    with torch.no_grad():
        return zoo.outputs(model(images))[0]


MODELS = ["timm-vit", "timm-swin", "hf-vit", "tv-vit", "timm-hybrid", "cnn"]


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_at_eight_bits_all_products_are_quantized_and_the_outputs_are_close(name, model_name):
    model, example, images = built(model_name)
    whole = quantized(model, name, images, example)
    assert whole.coverage.quantized_macs == whole.trace.macs, str(whole.coverage)
    wanted, got = logits(model, images), logits(whole, images)
    assert float((wanted - got).norm() / wanted.norm()) < 0.15
    assert name in whole.report()


@pytest.mark.parametrize("model_name", ["timm-vit", "tv-swin", "cnn"])
@pytest.mark.parametrize("name", METHODS)
def test_at_eight_bits_no_site_is_far_off(name, model_name):
    model, example, images = built(model_name)
    noise = sqnr(model, quantized(model, name, images, example), images, local=True)
    assert min(noise.values()) > 12, {site: db for site, db in noise.items() if db <= 12}


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_saved_and_loaded_it_computes_the_same_bit_for_bit(name, model_name, tmp_path):
    model, example, images = built(model_name)
    whole = quantized(model, name, images, example, weight_bits=4, activation_bits=6)
    loaded = quietvit.load(whole.save(tmp_path / "a.qvit"), model=copy.deepcopy(whole.model))
    assert torch.equal(logits(whole, images), logits(loaded, images))
    assert loaded.method == whole.method


@pytest.mark.parametrize("name", METHODS)
def test_weights_are_stored_as_codes(name, tmp_path):
    model, example, images = built("timm-vit")
    path = quantized(model, name, images, example, weight_bits=4).save(tmp_path / "a.qvit")
    from safetensors.torch import load_file

    stored = load_file(path / "model.safetensors")
    coded = {key.removeprefix("codes.") for key in stored if key.startswith("codes.")}
    wide = {n for n, p in model.named_parameters() if p.dim() > 1 and "weight" in n}
    assert wide <= coded


@pytest.mark.parametrize("name", METHODS)
def test_quantizing_what_is_quantized_changes_nothing(name):
    model, example, images = built("timm-vit")
    whole = quantized(model, name, images, example, weight_bits=3, activation_bits=4)
    checked = []

    def handler(site, operands, run):
        for index, operand in enumerate(operands):
            key = next((s.key for s in whole.slots() if s.site == site and s.index == index), None)
            if key is not None:
                quantizer = whole.quantizers[key]
                assert isinstance(quantizer, Quantizer)
                once = quantizer(operand)
                assert torch.equal(quantizer(once), once), key
                checked.append(key)
        return run(*operands)

    with torch.no_grad(), intercept(whole.trace, handler, kinds=whole.method.kinds):
        whole.model(images)
    assert set(checked) == {slot.key for slot in whole.slots()}


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_model_and_the_global_generator_is_left_alone(name):
    model, example, images = built("timm-vit")
    first = quantized(model, name, images, example, weight_bits=4, activation_bits=4)
    state = torch.get_rng_state()
    torch.manual_seed(11)
    assert torch.equal(state, torch.get_rng_state())
    second = quantized(model, name, images, example, weight_bits=4, activation_bits=4)
    assert torch.equal(logits(first, images), logits(second, images))


@pytest.mark.parametrize("name", METHODS)
def test_the_users_model_is_untouched(name):
    model, example, images = built("timm-vit")
    model.blocks[0].mlp.fc1.weight.requires_grad_(False)
    model.train()
    before = copy.deepcopy(model)
    whole = quantized(model, name, images, example)
    assert model.training
    for (key, one), other in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other), key
        assert one.requires_grad == other.requires_grad
        assert one.grad is None
    flags = [p.requires_grad for p in whole.model.parameters()]
    assert flags == [p.requires_grad for p in before.parameters()]
    for owned in (model, whole.model):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in owned.modules())
    assert any("training mode" in note for note in whole.notes)


@pytest.mark.parametrize("name", METHODS)
def test_an_interrupt_while_calibrating_leaves_the_model_as_it_was(name):
    model, example, images = built("timm-vit")
    before = copy.deepcopy(model.state_dict())

    class Interrupted:
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield images[:3]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantized(model, name, Interrupted(), example)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bits", [(4, None), (None, 8), (None, None)])
def test_either_side_may_stay_float(name, bits):
    model, example, images = built("timm-vit")
    whole = quantized(model, name, images, example, weight_bits=bits[0], activation_bits=bits[1])
    for slot in whole.slots():
        assert (bits[0] if slot.is_weight else bits[1]) is not None, slot.key
    if bits == (None, None):
        torch.testing.assert_close(
            logits(whole, images), logits(model, images), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bits", [2, 16])
def test_the_ends_of_the_range_of_bits_work_or_are_refused_by_the_config(name, bits):
    model, example, images = built("timm-vit")
    refusal = None
    try:
        configured(name, weight_bits=bits, activation_bits=bits)
    except QuietvitError as error:
        refusal = str(error)
    if refusal is not None:
        assert str(bits) in refusal
        return
    whole = quantized(model, name, images, example, weight_bits=bits, activation_bits=bits)
    assert torch.isfinite(logits(whole, images)).all()


def broken(kind):
    model, example, images = built("timm-vit")
    with torch.no_grad():
        if kind == "zero gain":
            model.blocks[0].norm1.weight[5] = 0
            model.blocks[1].norm2.weight[2] = 0
        elif kind == "zero gain and bias":
            model.blocks[0].norm1.weight[5] = 0
            model.blocks[0].norm1.bias[5] = 0
        elif kind == "dead channel":
            model.blocks[0].mlp.fc1.weight[3] = 0
            model.blocks[0].mlp.fc1.bias[3] = 0
            model.blocks[0].mlp.fc2.weight[:, 3] = 0
        elif kind == "constant images":
            images = torch.full_like(images, 0.25)
        elif kind == "zero images":
            images = torch.zeros_like(images)
        elif kind == "one image":
            images = images[:1]
        elif kind == "zero weights":
            model.blocks[1].mlp.fc2.weight.zero_()
            model.blocks[1].mlp.fc2.bias.zero_()
        elif kind == "large outlier":
            model.blocks[0].norm2.weight[7] = 60.0
    return model, example, images


CASES = (
    *("zero gain", "zero gain and bias", "dead channel", "constant images", "zero images"),
    *("one image", "zero weights", "large outlier"),
)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", CASES)
def test_odd_models_and_images_are_survived(name, kind):
    model, example, images = broken(kind)
    whole = quantized(model, name, images, example)
    assert whole.coverage.quantized_macs == whole.trace.macs
    shown = built("timm-vit")[2]
    wanted, got = logits(model, images), logits(whole, images)
    assert torch.isfinite(logits(whole, shown)).all()
    assert float((wanted - got).norm() / wanted.norm()) < 0.25


@pytest.mark.parametrize("name", METHODS)
def test_a_generator_is_enough_or_the_second_pass_is_refused(name):
    model, example, images = built("timm-vit")
    refusal, whole = None, None
    try:
        whole = quantized(model, name, (batch for batch in images.split(2)), example)
    except QuietvitError as error:
        refusal = str(error)
    if whole is None:
        assert "generator" in str(refusal)
    else:
        assert torch.isfinite(logits(whole, images)).all()


@pytest.mark.parametrize("name", METHODS)
def test_excluded_sites_stay_float(name):
    model, example, images = built("timm-vit")
    whole = quantized(model, name, images, example, exclude=("blocks.1.*", "head"))
    left = {site for site, _ in whole.coverage.untouched}
    assert {"blocks.1.attn.qkv", "blocks.1.mlp.fc2", "head"} <= left
    assert not any(slot.site.name.startswith("blocks.1.") for slot in whole.slots())


@pytest.mark.parametrize("name", METHODS)
def test_overrides_decide_the_bits_of_every_operand(name, tmp_path):
    model, example, images = built("timm-vit")
    overrides = {
        "post_softmax": 7,
        "post_gelu": "W5A6",
        "blocks.1.attn.proj": "float",
        "blocks.0.*.qkv": "W6A7",
        "blocks.1.mlp.fc1:weight": 4,
    }
    whole = quantized(model, name, images, example, overrides=overrides)
    expected = {
        ("blocks.0.attn.qkv", "input"): 7,
        ("blocks.0.attn.qkv", "weight"): 6,
        ("blocks.1.attn.qkv", "weight"): 8,
        ("blocks.1.mlp.fc1", "input"): 8,
        ("blocks.1.mlp.fc1", "weight"): 4,
        ("blocks.0.mlp.fc2", "input"): 6,
        ("blocks.0.mlp.fc2", "weight"): 5,
        ("blocks.0.mlp.fc1", "weight"): 8,
    }
    for (site, operand), bits in expected.items():
        assert whole.quantizer(site, operand).bits == bits
    assert whole.quantizer("blocks.1.attn.proj", "input") is None
    assert whole.quantizer("blocks.1.attn.proj", "weight") is None
    maps = [slot for slot in whole.slots() if slot.role == "post_softmax"]
    assert [whole.quantizers[slot.key].bits for slot in maps] == [7, 7]
    for slot in whole.slots():
        assert whole.quantizers[slot.key].bits == whole.method.slot_bits(slot)
    loaded = quietvit.load(whole.save(tmp_path / "a.qvit"), model=copy.deepcopy(whole.model))
    assert (
        loaded.method.overrides
        == whole.method.overrides
        == quietvit.RTN(overrides=overrides).overrides
    )
    assert {k: q.bits for k, q in loaded.quantizers.items()} == {
        k: q.bits for k, q in whole.quantizers.items()
    }
    assert torch.equal(logits(whole, images), logits(loaded, images))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(0, 3, 32, 32),
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(3, 32, 32),
        torch.zeros(2, 1, 32, 32),
        torch.full((2, 3, 32, 32), float("nan")),
    ],
    ids=["none", "integers", "one without batch", "one channel", "nan"],
)
def test_images_that_do_not_fit_are_refused(name, images):
    model, example, _ = built("timm-vit")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(QuietvitError):
        quantized(model, name, images, example)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "fields", [{"weight_bits": 1}, {"activation_bits": 17}, {"wieght_bits": 4}, {"exclude": 3}]
)
def test_a_config_that_makes_no_sense_is_refused(name, fields):
    with pytest.raises(QuietvitError, match=next(iter(fields)).replace("wieght", "weight")):
        configured(name, **fields)


@pytest.mark.parametrize("name", METHODS)
def test_a_config_is_frozen_and_comes_back_from_json(name):
    method = configured(name, weight_bits=5)
    with pytest.raises((TypeError, ValueError)):
        method.weight_bits = 4
    assert type(method)(**method.model_dump(mode="json")) == method


def test_every_method_declares_what_it_needs_and_where_it_comes_from():
    for row in method_rows():
        assert all(row[key] for key in row), row
        assert row["kernels"] in ("deployable", "simulated", "as its base")
        assert "labels" not in row["needs"]


@pytest.mark.parametrize("name", METHODS)
def test_what_is_called_deployable_has_uniform_codes(name):
    model, example, images = built("timm-vit")
    whole = quantized(model, name, images, example)
    if not get_method(name).deployable:
        assert not whole.deployable
    elif whole.deployable:
        assert all(q.kind == "affine" for q in whole.quantizers.values())
