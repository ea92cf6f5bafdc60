"""Freezing and parameter groups: what trains, with which weight decay, at which rate."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

from quietvit.errors import QuietvitError
from quietvit.train.config import OptimizerConfig
from quietvit.train.finetune import block_depths, freeze, parameter_groups

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "num_classes": 5}


def vit(depth: int = 3) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", depth=depth, **TINY)


def swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=64,
        embed_dim=16,
        depths=(1, 2),
        num_heads=(2, 4),
        window_size=4,
    )


def hf_swin() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=64, embed_dim=16, depths=[1, 2], num_heads=[2, 4], window_size=4, patch_size=4
    )
    model = transformers.SwinForImageClassification(config)
    model.pretrained_cfg = {"input_size": (3, 64, 64)}
    return model


def hf_vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    model = transformers.ViTForImageClassification(config)
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": vit,
    "swin": swin,
    "hf-vit": hf_vit,
    "hf-swin": hf_swin,
}


def grouped(model: nn.Module, **settings: object) -> dict[str, dict[str, object]]:
    """Name -> its group without the parameters; fails where a parameter is in two groups."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, dict[str, object]] = {}
    for group in parameter_groups(model, OptimizerConfig(**settings)):
        rest = {key: value for key, value in group.items() if key != "params"}
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = rest
    return found


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layer_decay", [None, 0.5])
@pytest.mark.parametrize("everywhere", [False, True])
def test_every_trainable_parameter_is_in_exactly_one_group(model, layer_decay, everywhere):
    built = MODELS[model]()
    frozen = freeze(built, ["*bias"], 1)
    found = grouped(built, layer_decay=layer_decay, decay_norms_and_biases=everywhere)
    assert set(found) == {name for name, _ in built.named_parameters()} - set(frozen)


@pytest.mark.parametrize("model", MODELS)
def test_a_layer_decay_of_one_is_none(model):
    built = MODELS[model]()
    assert grouped(built, layer_decay=1.0) == grouped(built)
    assert all("lr_scale" not in group for group in grouped(built).values())


def test_rates_are_scaled_by_the_first_wildcard_that_matches():
    built = vit()
    found = grouped(built, lr_scale={"blocks.0.*": 0.5, "blocks.*": 0.2}, layer_decay=0.5)
    plain = grouped(built, layer_decay=0.5)
    for name, group in found.items():
        factor = 0.5 if ".0." in name else 0.2
        factor = factor if name.startswith("blocks.") else 1.0
        assert group["lr_scale"] == pytest.approx(factor * plain[name]["lr_scale"])
        assert group["weight_decay"] == plain[name]["weight_decay"]
    with pytest.raises(QuietvitError, match=r"lr_scale: 'block\.\*' matches no parameter"):
        grouped(built, lr_scale={"block.*": 0.5})


@pytest.mark.parametrize("model", MODELS)
def test_layer_decay_changes_no_weight_decay(model):
    built = MODELS[model]()
    plain, decayed = grouped(built), grouped(built, layer_decay=0.5)
    assert {n: g["weight_decay"] for n, g in plain.items()} == {
        n: g["weight_decay"] for n, g in decayed.items()
    }


@pytest.mark.parametrize("model", ["vit", "swin"])
def test_scales_and_weight_decay_are_timms_where_timm_has_a_matcher(model):
    from timm.optim import param_groups_layer_decay

    built = MODELS[model]()
    names = {id(p): name for name, p in built.named_parameters()}
    groups = param_groups_layer_decay(
        built, 0.05, no_weight_decay_list=built.no_weight_decay(), layer_decay=0.7
    )
    wanted = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    found = grouped(built, layer_decay=0.7, weight_decay=0.05)
    assert {n: (g["lr_scale"], g["weight_decay"]) for n, g in found.items()} == wanted
    assert len({scale for scale, _ in wanted.values()}) > 3


@pytest.mark.parametrize(
    ("model", "depths"),
    [
        (
            "hf-vit",
            {
                "cls_token$": 0,
                "position_embeddings$": 0,
                "patch_embeddings.projection.weight$": 0,
                r"layers?\.0\.": 1,
                r"layers?\.2\.": 3,
                r"^vit\.layernorm.weight$": 4,
                r"^classifier\.": 4,
            },
        ),
        (
            "hf-swin",
            {
                "patch_embeddings.projection.bias$": 0,
                r"layers\.0\.blocks\.0\.": 1,
                r"layers\.0\.downsample\.reduction": 2,
                r"layers\.1\.blocks\.0\.": 2,
                r"layers\.1\.blocks\.1\.": 3,
                r"^classifier\.": 4,
            },
        ),
    ],
)
def test_scales_of_other_models_are_powers_of_the_distance_in_blocks(model, depths):
    built = MODELS[model]()
    found = grouped(built, layer_decay=0.5)
    for pattern, depth in depths.items():
        scales = {group["lr_scale"] for name, group in found.items() if re.search(pattern, name)}
        assert scales == {0.5 ** (4 - depth)}, pattern
    assert block_depths(built)[1] == 3


def test_norms_biases_and_what_timm_names_have_no_weight_decay_unless_told():
    model = vit()
    found = grouped(model, weight_decay=0.3)
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim <= 1 or name in ("pos_embed", "cls_token")
        assert found[name]["weight_decay"] == (0.0 if exempt else 0.3), name
    told = grouped(model, weight_decay=0.3, decay_norms_and_biases=True)
    assert {group["weight_decay"] for group in told.values()} == {0.3}


def test_timms_scheduler_applies_the_scales():
    from timm.scheduler.cosine_lr import CosineLRScheduler

    groups = parameter_groups(vit(), OptimizerConfig(layer_decay=0.5))
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    CosineLRScheduler(optimizer, t_initial=10, t_in_epochs=False).step_update(0)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(group["lr_scale"])


@pytest.mark.parametrize("model", MODELS)
def test_first_blocks_and_all_before_them_get_no_gradient(model):
    built = MODELS[model]()
    side = built.pretrained_cfg["input_size"][1] if "hf" in model else (64, 32)[model == "vit"]
    frozen = freeze(built, (), 2)
    output = built(torch.randn(2, 3, side, side))
    getattr(output, "logits", output).sum().backward()
    got = {name for name, p in built.named_parameters() if p.grad is not None}
    assert got
    assert not got & set(frozen)
    depths, _ = block_depths(built)
    assert 3 in {depths[name] for name in got}
    assert set(frozen) == {name for name, depth in depths.items() if depth <= 2}


def test_patterns_freeze_what_they_match_and_nothing_else():
    model = vit()
    assert freeze(model, ["patch_embed.*", "*.mlp.fc1.bias"]) == [
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        *(f"blocks.{i}.mlp.fc1.bias" for i in range(3)),
    ]
    assert not model.patch_embed.proj.weight.requires_grad
    assert model.head.weight.requires_grad
    assert freeze(vit()) == []


@pytest.mark.parametrize(
    ("patterns", "blocks", "message"),
    [
        (["head.*", "patch_embd.*"], 0, r"'patch_embd\.\*' matches no .*'patch_embed\.\*'"),
        (["Head.weight"], 0, "did you mean 'head.weight'"),
        ((), 4, "freeze_blocks is 4, but VisionTransformer has 3"),
        (["*"], 0, "freeze_blocks freeze all"),
        (["head.*", "norm.*"], 3, "freeze_blocks freeze all"),
    ],
)
def test_mistakes_are_refused_and_change_nothing(patterns, blocks, message):
    model = vit()
    with pytest.raises(QuietvitError, match=message):
        freeze(model, patterns, blocks)
    assert all(parameter.requires_grad for parameter in model.parameters())
