"""SmoothQuant, RepQ-ViT and DopQ-ViT: what they move behind norms, and what comes of it."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import quietvit
import zoo
from quietvit.errors import QuietvitError
from quietvit.quantization.companding import TanQuantizer
from quietvit.quantization.fitting.postnorm import (
    percentile_range,
    quantiles,
)
from quietvit.quantization.methods.dopq_vit import DopQViT
from quietvit.quantization.methods.repq_vit import RepQViT
from quietvit.quantization.methods.rtn import RTN
from quietvit.quantization.methods.smoothquant import SmoothQuant, smoothing_scale
from quietvit.quantization.nonuniform import LogQuantizer, squared_error
from quietvit.quantization.quantizers import AffineQuantizer, affine_fake
from quietvit.quantization.reparametrize import norm_links
from quietvit.tracing import call

METHODS = [SmoothQuant, RepQViT, DopQViT]
FLOAT = {"weight_bits": None, "activation_bits": None}
FOUR = {"weight_bits": 4, "activation_bits": 4, "head_bits": "same"}
MODELS = ["timm-vit", "timm-swin", "timm-eva-swiglu", "timm-dinov2-layerscale", "timm-qk-norm"]
MODELS += ["hf-vit", "hf-swin", "hf-siglip", "hf-yolos", "tv-vit", "tv-swin"]


def images(example, count=4):
    pixels = example["pixel_values"] if isinstance(example, dict) else example
    return torch.randn(count, *pixels.shape[1:], generator=torch.Generator().manual_seed(3))


def quantized(model, method, calibration, **kwargs):
    return quietvit.quantize(model, method, calibration, progress=False, **kwargs)


def vit():
    """A ViT of larger weights than a fresh one, so that its blocks matter."""
    model, example = zoo.build("timm-vit")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return model, images(example)


def outlying():
    """A ViT whose norms hand on four channels forty times as large; its function is that of vit."""
    model, x = vit()
    with torch.no_grad():
        for block in model.blocks:
            for norm, reader in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                norm.weight[3:7] *= 40
                norm.bias[3:7] *= 40
                reader.weight[:, 3:7] /= 40
    return model, x


@torch.no_grad()
def off(model, quantized, x):
    wanted = model(x)
    return float((quantized(x) - wanted).norm() / wanted.norm())


def inputs_of(model, module, x):
    """What enters a module while the model runs."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


# All three.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_moved_is_exact_in_float(method, name):
    model, example = zoo.build(name)
    result = quantized(model, method(**FLOAT), images(example), example=example)
    with torch.no_grad():
        wanted, got = zoo.outputs(call(model, example)), zoo.outputs(call(result, example))
    for one, other in zip(wanted, got, strict=True):
        assert float((one - other).abs().max() / one.abs().max()) < 1e-5
    before = dict(model.named_parameters())
    moved = [n for n, p in result.model.named_parameters() if not torch.equal(p, before[n])]
    links = norm_links(model, result.trace).links
    heads = [link for link in links if any(site.role == "head" for site in link.consumers)]
    kept = [] if method is SmoothQuant else heads
    assert len(moved) >= len(links) - len(kept) > 0
    shifted = [link.norm.name for link in links if link not in kept]
    assert set(shifted) <= set(result.adjusted())


@pytest.mark.parametrize("method", METHODS)
def test_norms_without_a_link_are_named_and_everything_is_quantized_still(method):
    model, example = zoo.build("hf-detr")
    result = quantized(model, method(), images(example), example=example)
    assert result.coverage.fraction == 1
    assert not result.adjustments
    skipped = norm_links(model, result.trace).skipped
    assert len(skipped) == 9
    note = next(note for note in result.notes if "skipped 9 norms" in note)
    assert all(name in note and reason in note for name, reason in skipped)


def test_planted_outliers_harm_rtn_and_not_the_others():
    (model, x), (plain, _) = outlying(), vit()
    torch.testing.assert_close(model(x), plain(x))
    rtn = off(model, quantized(model, RTN(**FOUR), x), x)
    for method in (RepQViT, DopQViT):
        assert off(model, quantized(model, method(**FOUR), x), x) < 0.75 * rtn
    assert off(model, quantized(model, SmoothQuant(), x), x) < 0.75 * off(
        model, quantized(model, RTN(), x), x
    )


@pytest.mark.parametrize("method", [RepQViT, DopQViT])
def test_codes_behind_norms_do_not_know_of_planted_outliers(method):
    """The method undoes a scaling of norm against linear, so the result is that without."""
    (model, x), (plain, _) = outlying(), vit()
    with torch.no_grad():
        one = quantized(model, method(**FOUR), x)(x)
        other = quantized(plain, method(**FOUR), x)(x)
    assert float((one - other).norm() / other.norm()) < 0.02


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", ["gain", "channel", "norm", "model", "one"])
def test_constant_and_dead_channels_and_one_image(method, case):
    model, x = vit()
    with torch.no_grad():
        norm = model.blocks[0].norm2
        if case in ("gain", "channel"):
            norm.weight[5] = 0
            norm.bias[5] = 3.0 if case == "gain" else 0.0
        elif case == "norm":
            norm.weight.zero_()
        elif case == "model":
            for parameter in (model.pos_embed, model.cls_token, model.patch_embed.proj.weight):
                parameter.fill_(0.25)
            x = torch.zeros_like(x)
    x = x[:1] if case == "one" else x
    for bits in ({}, FLOAT):
        result = quantized(model, method(**bits), x)
        limit = 1e-5 if bits is FLOAT else 0.1
        assert off(model, result, x) < limit


def test_a_zero_gain_costs_nothing_at_four_bits():
    """Its value, however large, goes into the bias and spoils nobody's range."""
    model, x = vit()
    with torch.no_grad():
        model.blocks[0].norm2.weight[5] = 0
        model.blocks[0].norm2.bias[5] = 0.1
        plain = off(model, quantized(model, RepQViT(**FOUR), x), x)
        model.blocks[0].norm2.bias[5] = 1000.0
        model.blocks[0].mlp.fc1.bias -= 999.9 * model.blocks[0].mlp.fc1.weight[:, 5]
        assert off(model, quantized(model, RepQViT(**FOUR), x), x) == pytest.approx(plain, rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_a_generator_will_do_and_gives_the_same(method):
    model, x = vit()
    one = quantized(model, method(**FOUR), x)
    other = quantized(model, method(**FOUR), (part for part in x.split(1)))
    with torch.no_grad():
        torch.testing.assert_close(one(x), other(x))


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_models_stay_so(method):
    model, x = vit()
    model, x = model.bfloat16(), x.bfloat16()
    result = quantized(model, method(), x)
    with torch.no_grad():
        assert result(x).dtype == torch.bfloat16
    assert off(model, result, x) < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_it_computes_the_same(method, tmp_path):
    model, x = vit()
    result = quantized(model, method(**FOUR), x)
    result.save(tmp_path / "saved")
    loaded = quietvit.quantization.load(tmp_path / "saved", copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(loaded(x), result(x))
    assert loaded.method == result.method


@pytest.mark.parametrize("method", METHODS)
def test_excluded_consumers_are_left_as_they_are(method):
    model, x = vit()
    result = quantized(model, method(exclude=("blocks.0.*",), **FOUR), x)
    for name, parameter in result.model.blocks[0].named_parameters():
        assert torch.equal(parameter, model.blocks[0].get_parameter(name))
    assert not torch.equal(result.model.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)


@pytest.mark.parametrize("method", METHODS)
def test_activations_that_overflow_name_their_site_and_change_nothing(method):
    model, x = vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight.fill_(3e38)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(QuietvitError, match=r"^(blocks\.1|head)"):
        quantized(model, method(), x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# RepQ-ViT and DopQ-ViT.


def test_each_operand_gets_its_quantizer():
    model, x = vit()
    result = quantized(model, RepQViT(weight_bits=4, activation_bits=5), x)
    found = {}
    for slot_key, quantizer in result.quantizers.items():
        site, operand = slot_key.replace("/", ".").split(":")
        index = {"input": 0, "left": 0, "right": 1}.get(operand)
        role = "weight" if index is None else result.trace[site].operands[index].role
        found.setdefault(role, []).append(quantizer)
    assert all(isinstance(q, LogQuantizer) and q.bits == 5 for q in found.pop("post_softmax"))
    weights = found.pop("weight")
    assert all(q.axis == 0 and not q.signed for q in weights)
    assert sorted(q.bits for q in weights) == [4] * 9 + [8]
    assert all(q.axis is None and not q.signed for each in found.values() for q in each)
    assert {q.bits for q in found.pop("patch_embed")} == {8}
    assert {q.bits for each in found.values() for q in each} == {5}
    assert not result.deployable


def test_later_ranges_are_those_of_the_quantized_model():
    """In order: the attention output's quantizer fits what the quantized attention hands on."""
    model, x = vit()
    result = quantized(model, RepQViT(weight_bits=2, activation_bits=2), x)
    seen = inputs_of(result, result.model.blocks[0].attn.proj, x)
    quantizer = result.quantizers["blocks/0/attn/proj:input"]
    wanted = AffineQuantizer.from_range(*percentile_range(seen, 2), bits=2, symmetric=False)
    torch.testing.assert_close(quantizer.scale, wanted.scale, rtol=1e-3, atol=0)


def test_attention_scales_have_the_least_error_among_percentiles():
    maps = (8 * torch.randn(4, 3, 40, 40)).softmax(-1)
    chosen = RepQViT().attention_quantizer(maps, 4)
    tails = [high[0] for _, high in quantiles(maps.reshape(1, -1))]
    errors = [float(squared_error(LogQuantizer.sqrt2(d, bits=4), maps)) for d in tails]
    assert float(squared_error(chosen, maps)) == min(errors) < max(errors)


def test_the_curvature_follows_the_attention_maps():
    flat = torch.rand(2, 2, 40, 40)
    peaky = (6 * torch.randn(2, 2, 40, 40)).softmax(-1)
    of_flat, of_peaky = (DopQViT().attention_quantizer(maps, 4) for maps in (flat, peaky))
    assert isinstance(of_peaky, TanQuantizer)
    assert of_peaky.curvature > of_flat.curvature
    uniform = affine_fake(peaky, peaky.max() / 15, torch.tensor(0), 0, 15)
    assert squared_error(of_peaky, peaky) < 0.8 * (uniform - peaky).square().sum()
    assert DopQViT().attention_quantizer(torch.zeros(2, 3, 3), 4)(torch.zeros(3)).eq(0).all()


def test_without_its_parts_dopq_is_repq():
    model, x = vit()
    with torch.no_grad():
        repq = quantized(model, RepQViT(**FOUR), x)(x)
        both, median, tangent = (
            quantized(model, DopQViT(mosf=m, tanq=t, **FOUR), x)(x)
            for m, t in ((False, False), (True, False), (False, True))
        )
    assert torch.equal(both, repq)
    assert not torch.equal(median, repq)
    assert not torch.equal(tangent, repq)


@pytest.mark.parametrize("method", [RepQViT, DopQViT])
def test_mixed_attention_maps_with_negative_values_are_uniform_and_noted(method):
    model = timm.create_model(
        "cait_xxs24_224", img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2
    )
    model.blocks[0].attn.proj_w.weight.data = -torch.eye(2)
    result = quantized(model.eval(), method(), torch.randn(2, 3, 16, 16))
    notes = [note for note in result.notes if "negative values" in note]
    assert len(notes) == 1
    site = notes[0].split(":")[0].replace(".", "/")
    assert isinstance(result.quantizers[f"{site}:left"], AffineQuantizer)


# SmoothQuant.


def test_the_smoothing_scale_is_the_papers():
    inputs = torch.tensor([4.0, 9.0, 0.0, 1e-12])
    columns = torch.tensor([0.25, 0.0, 1.0, 1e4])
    scale = smoothing_scale(inputs, columns, 0.5)
    wanted = torch.tensor([4.0, 3 / 1e-5**0.5, 1.0, 1e-5], dtype=torch.float64)
    torch.testing.assert_close(scale, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(smoothing_scale(inputs, columns, 1.0)[0].item(), 4.0)


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit"])
@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_inputs_and_columns_share_the_outliers_as_alpha_says(name, alpha):
    """After it max|X_j'| = (max|X_j| max|W_j|)^(1-α), max over all consumers of the norm."""
    model, example = zoo.build(name)
    x = images(example)
    result = quantized(model, SmoothQuant(alpha=alpha, **FLOAT), x, example=example)

    link = norm_links(model, result.trace).links[1]
    module = link.consumers[0].module

    def largest(of, inner):
        inputs = inputs_of(of, inner.get_submodule(module), x).abs().flatten(0, -2).amax(0)
        columns = [site.weight.read(inner).detach() for site in link.consumers]
        return inputs, torch.cat(columns).abs().amax(0)

    x_before, w_before = largest(model, model)
    x_after, w_after = largest(result, result.model)
    torch.testing.assert_close(x_after, (x_before * w_before) ** (1 - alpha), rtol=1e-4, atol=0)
    torch.testing.assert_close(w_after, (x_before * w_before) ** alpha, rtol=1e-4, atol=0)


def test_ranges_are_those_of_the_smoothed_model():
    model, x = outlying()
    result = quantized(model, SmoothQuant(activation_range="minmax"), x)
    smoothed = quantized(model, SmoothQuant(**FLOAT), x)
    inputs = inputs_of(smoothed, smoothed.model.blocks[0].mlp.fc1, x)
    spread = inputs.max() - inputs.min()
    scale = result.quantizers["blocks/0/mlp/fc1:input"].scale
    torch.testing.assert_close(scale, spread / 255, rtol=1e-4, atol=0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, 1.5])
def test_alpha_outside_zero_to_one_is_refused(alpha):
    with pytest.raises(QuietvitError, match="alpha"):
        SmoothQuant(alpha=alpha)
