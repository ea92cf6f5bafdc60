"""Checkpoints as other trainers write them: which weights are taken, and what is said of it."""

from __future__ import annotations

import argparse
import logging
import pathlib

import pytest
import torch
from safetensors.torch import save_file

from quietvit.data import create_model, load_weights
from quietvit.errors import QuietvitError

NAME = "vit_tiny_patch16_224"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def tiny(**changes):
    return create_model(NAME, **{"num_classes": 5, **TINY, **changes})


def state(value: float, **changes):
    return {k: torch.full_like(v, value) for k, v in tiny(**changes).state_dict().items()}


def under(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


LAST, AVERAGE = state(1.0), state(2.0)
BACKBONE = {key: value for key, value in AVERAGE.items() if not key.startswith("head.")}
ARGUMENTS = argparse.Namespace(model=NAME, lr=1e-3)


@pytest.mark.parametrize(
    ("content", "taken", "told"),
    [
        # timm's and DeiT's trainers, arguments beside the weights
        ({"state_dict": LAST, "state_dict_ema": AVERAGE, "args": ARGUMENTS, "epoch": 3}, 2.0,
         "under 'state_dict_ema', the moving average, are used; left out: state_dict"),
        ({"model": LAST, "model_ema": AVERAGE, "optimizer": {"state": {0: LAST}}}, 2.0,
         "under 'model_ema', the moving average, are used; left out: model"),
        ({"state_dict": LAST, "state_dict_ema": None}, 1.0, ""),
        ({"model_state_dict": LAST}, 1.0, ""),
        ({"state_dict": {"model": under("module.", LAST)}}, 1.0, ""),
        # Lightning, with a metric and a loss beside the model
        ({"state_dict": under("model.", LAST) | {"loss.weight": torch.ones(5)},
          "pytorch-lightning_version": "2.5", "callbacks": {}}, 1.0,
         "below 'model.' are used; left out: loss.weight"),
        ({"state_dict": under("net.", LAST) | under("ema_model.module.", AVERAGE)}, 2.0,
         "below 'ema_model.module.' are used"),
        # wrappers of torch.compile, DDP and FSDP, also inside
        (under("_orig_mod.module.", LAST), 1.0, ""),
        ({k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in LAST.items()}, 1.0, ""),
        (under("_fsdp_wrapped_module.backbone.vit.", LAST), 1.0, ""),
        # MAE, DINO and DINOv2: no head of ours, but parts that only pre-training uses
        ({"model": BACKBONE | {"mask_token": torch.ones(1), "decoder_pred.bias": torch.ones(3)}},
         2.0, "it has no head 'head': it starts anew"),
        ({"student": under("module.backbone.", LAST),
          "teacher": under("backbone.", BACKBONE) | {"head.mlp.0.weight": torch.ones(2, 2)}},
         2.0, "under 'teacher' are used; left out: student"),
        ({"model": under("student.backbone.", LAST) | under("teacher.backbone.", BACKBONE)},
         2.0, "below 'teacher.backbone.' are used"),
    ],
)  # fmt: skip
def test_the_weights_that_are_meant_are_taken_and_named(tmp_path, caplog, content, taken, told):
    caplog.set_level(logging.WARNING, "quietvit")
    torch.save(content, tmp_path / "w.pth")
    found = create_model(NAME, 5, tmp_path / "w.pth", **TINY).state_dict()
    assert all((v == taken).all() for k, v in found.items() if not k.startswith("head."))
    assert told in caplog.text
    assert bool(told) == bool(caplog.text)
    headless = "no head 'head'" in caplog.text
    assert headless != bool((found["head.weight"] == taken).all())


def test_classes_are_counted_below_a_prefix_and_a_head_may_be_left_out(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "quietvit")
    torch.save({"state_dict": under("model.", LAST)}, tmp_path / "w.ckpt")
    assert create_model(NAME, weights=tmp_path / "w.ckpt", **TINY).num_classes == 5
    assert not caplog.text
    bare = create_model(NAME, 0, tmp_path / "w.ckpt", **TINY)
    assert (bare.norm.weight == 1).all()
    assert "left out: head.weight, head.bias, which this model does not have" in caplog.text
    load_weights(bare, under("backbone.", BACKBONE))
    assert (bare.norm.weight == 2).all()


class Marked:
    """What no weights file may hold."""


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"online": LAST, "target": AVERAGE}, "state dicts under 'online', 'target', none of wh"),
        (under("first.", LAST) | under("second.", AVERAGE), "below 'first.', 'second.'; save"),
        ({"epoch": 3, "args": ARGUMENTS}, r"no tensors by name, but 'epoch' \(int\), 'args'"),
        ({"norm.weight": torch.ones(3), "epoch": 3}, "holds int under 'epoch' where a tensor"),
        ({"state_dict": LAST, "hyper_parameters": {"path": pathlib.Path("x"), "b": Marked}},
         r"it holds objects that are not tensors: .*Marked.*; it must be safetensors"),
        ({"state_dict": under("model.", state(1.0, embed_dim=32))},
         r"below 'model\.' weights of another .* is \(1, 1, 32\) in the file and \(1, 1, 16\) in"),
        ({"vit.embeddings.patch_embeddings.projection.weight": torch.ones(3)},
         r"the model lacks vit\.emb.*the file lacks cls_token.*names of transformers.*'hf:"),
        (under("model.net.", {"weight": torch.ones(3)}),
         r"the model lacks model\.net\.weight .*All names in the file begin with 'model\.'"),
        (LAST | {"blocks.0.ls1.gamma": torch.ones(16)}, "the model lacks blocks.0.ls1.gamma"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_both_sides(tmp_path, content, told):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(QuietvitError, match=told):
        create_model(NAME, 5, tmp_path / "w.pth", **TINY)


def test_folders_and_lists_of_parts_are_no_weights(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(QuietvitError, match=r"name the file in it.*'hf:"):
        tiny(weights=tmp_path)
    with pytest.raises(QuietvitError, match="stored in several files"):
        tiny(weights=tmp_path / "model.safetensors.index.json")


def test_a_transformers_model_takes_wrapped_weights_too(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1}
    other = {"num_attention_heads": 2, "intermediate_size": 32, "num_labels": 3}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **other))
    model.config.save_pretrained(tmp_path)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save({"state_dict": under("model.", own)}, tmp_path / "w.ckpt")
    save_file(own, tmp_path / "plain.safetensors")
    for name in ("w.ckpt", "plain.safetensors"):
        found = create_model(f"hf:{tmp_path}", weights=tmp_path / name).state_dict()
        assert all(torch.equal(found[key], value) for key, value in own.items())
