"""transformers image classifiers from local folders: weights, heads, sizes, preprocessing."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from huggingface_cases import FAMILIES, HIDDEN, PLAIN, classifier, processor, saved
from quietvit.data import adapting, create_model, data_config, evaluate, evaluation_transform
from quietvit.data.image_processor import translated_preprocessing
from quietvit.errors import QuietvitError
from quietvit.quantization import load, quantize

transformers = pytest.importorskip("transformers")


def original(family: str, classes: int = 7) -> nn.Module:
    """A model with every weight random, so that one left at its start would show."""
    model = classifier(family, classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    try:
        logits(model)
    except RuntimeError:
        pytest.skip(f"{family} does not run in transformers {transformers.__version__}")
    return model.eval()


def logits(model: nn.Module, side: int = 32, **kwargs: Any) -> torch.Tensor:
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found: torch.Tensor = model.eval()(images, **kwargs).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_gives_the_model_that_was_saved_there(tmp_path, family, caplog):
    caplog.set_level(logging.WARNING, "quietvit")
    model = original(family)
    loaded = create_model(saved(tmp_path, model))
    assert torch.equal(logits(loaded), logits(model))
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())
    assert not [record for record in caplog.records if record.name == "quietvit"]
    again = create_model(f"hf:{tmp_path}", 7, image_size=32)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_another_number_of_classes_starts_a_new_head_and_says_so(tmp_path, family, caplog):
    model = original(family)
    caplog.set_level(logging.WARNING, "quietvit")
    loaded = create_model(saved(tmp_path, model), 3)
    assert "the head 'classifier' has 7 classes, but 3 are requested" in caplog.text
    old, new = model.state_dict(), loaded.state_dict()
    assert logits(loaded).shape == (2, 3)
    assert all(torch.equal(new[key], old[key]) for key in old if not key.startswith("classifier"))


@pytest.mark.parametrize("family", FAMILIES)
def test_another_size_resamples_the_position_table_as_transformers_does(tmp_path, family, caplog):
    caplog.set_level(logging.WARNING, "quietvit")
    model = original(family)
    loaded = create_model(saved(tmp_path, model), image_size=64)
    assert ("resampled bicubically" in caplog.text) == (family != "Swin")
    told = {} if family == "Dinov2" else {"interpolate_pos_encoding": True}
    assert torch.allclose(logits(loaded, 64), logits(model, 64, **told), atol=1e-5)
    assert data_config(loaded)["input_size"] == (3, 64, 64)
    alias = create_model(f"hf:{tmp_path}", img_size=64)
    assert torch.equal(logits(alias, 64), logits(loaded, 64))


def test_another_window_of_swin_resamples_the_bias_table(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "quietvit")
    model = original("Swin")
    loaded = create_model(saved(tmp_path, model), window_size=8)
    assert "relative_position_bias_table from (49, 2) to (225, 2)" in caplog.text
    old, new = (
        next(v for k, v in m.state_dict().items() if k.endswith("bias_table"))
        for m in (model, loaded)
    )
    assert torch.allclose(new[112], old[24])  # the middle: no displacement
    assert logits(loaded).shape == (2, 7)


def beit(folder: Path, size: list[int]) -> tuple[str, dict[str, torch.Tensor]]:
    """A saved BEiT whose first bias table tells rows apart and the second columns; its weights."""
    config = transformers.BeitConfig(
        **PLAIN | {"image_size": size}, use_relative_position_bias=True, num_labels=7
    )
    model = transformers.BeitForImageClassification(config)
    down, across = (2 * side // 8 - 1 for side in size)
    state = model.state_dict()
    with torch.no_grad():
        for table in (value for key, value in state.items() if key.endswith("bias_table")):
            table.normal_()
        first, second = (value for key, value in state.items() if key.endswith("bias_table"))
        first[:-3].view(down, across, -1).copy_(torch.randn(down, 1, first.shape[1]))
        second[:-3].view(down, across, -1).copy_(torch.randn(1, across, first.shape[1]))
    return saved(folder, model), {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize(
    ("old", "new"), [((32, 32), (32, 64)), ((32, 64), (64, 32)), ((32, 64), (64, 64))]
)
def test_bias_tables_of_beit_are_resampled_by_rows_and_columns(tmp_path, caplog, old, new):
    caplog.set_level(logging.WARNING, "quietvit")
    name, before = beit(tmp_path, list(old))
    loaded = create_model(name, image_size=list(new))
    assert "relative_position_bias_table from" in caplog.text
    keys = [key for key in before if key.endswith("bias_table")]
    after = loaded.state_dict()
    down, across = (2 * side // 8 - 1 for side in new)
    for key in keys:
        assert torch.equal(after[key][-3:], before[key][-3:]), "what the class token adds stays"
    first, second = (after[key][:-3].view(down, across, -1) for key in keys)
    assert torch.allclose(first, first[:, :1].expand_as(first), atol=1e-6)
    assert torch.allclose(second, second[:1].expand_as(second), atol=1e-6)
    middle = [before[key][: len(before[key]) - 3] for key in keys]
    assert torch.allclose(first[down // 2, 0], middle[0][len(middle[0]) // 2], atol=1e-6)
    assert torch.allclose(second[0, across // 2], middle[1][len(middle[1]) // 2], atol=1e-6)
    with torch.no_grad():
        assert loaded.eval()(torch.randn(1, 3, *new)).logits.shape == (1, 7)


def test_a_table_that_cannot_be_resampled_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(adapting, "_displacements", lambda config: None)
    name, _ = beit(tmp_path, [32, 32])
    with pytest.raises(QuietvitError, match=r"cannot be loaded.*relative_position_bias_table is"):
        create_model(name, image_size=[32, 64])


def test_as_many_patches_that_lie_otherwise_are_resampled_too(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "quietvit")
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(**PLAIN | {"image_size": [32, 64]}, num_labels=7)
    )
    old = model.vit.embeddings.position_embeddings
    with torch.no_grad():  # tells rows apart alone
        old[:, 1:].view(1, 4, 8, -1).copy_(torch.randn(1, 4, 1, old.shape[-1]))
    loaded = create_model(saved(tmp_path, model), image_size=[64, 32])
    assert "position_embeddings from (1, 33, 32) to (1, 33, 32)" in caplog.text
    new = loaded.vit.embeddings.position_embeddings
    rows = new[:, 1:].view(1, 8, 4, -1)
    assert torch.equal(new[:, 0], old[:, 0])
    assert torch.allclose(rows, rows[:, :, :1].expand_as(rows), atol=1e-6)


def test_images_have_the_size_the_processor_makes(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "quietvit")
    model = original("Dinov2")
    loaded = create_model(
        saved(
            tmp_path,
            model,
            image_processor_type="BitImageProcessor",
            size={"shortest_edge": 20},
            do_center_crop=True,
            crop_size={"height": 16, "width": 16},
        )
    )
    assert data_config(loaded)["input_size"] == (3, 16, 16)
    assert "position_embeddings from (1, 17, 32) to (1, 5, 32)" in caplog.text
    assert torch.allclose(logits(loaded, 16), logits(model, 16), atol=1e-6)


def test_only_a_config_is_a_random_start_and_says_so(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "quietvit")
    original("ViT").config.save_pretrained(tmp_path)
    torch.manual_seed(5)
    first = create_model(f"hf:{tmp_path}", 4)
    assert "holds no weights: the model's weights are random" in caplog.text
    assert "holds no preprocessor_config.json" in caplog.text
    torch.manual_seed(5)
    assert torch.equal(logits(first), logits(create_model(f"hf:{tmp_path}", 4)))
    assert logits(first).shape == (2, 4)


def test_a_backbone_gets_a_new_head_and_says_so(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "quietvit")
    model = original("ViT")
    loaded = create_model(saved(tmp_path, model.vit), 3)
    assert "has no head: 'classifier' starts anew, so its classes mean nothing" in caplog.text
    ours = loaded.vit.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in model.vit.state_dict().items())


def test_a_state_dict_goes_into_the_same_architecture(tmp_path):
    from safetensors.torch import save_file

    name = saved(tmp_path / "hf", original("ViT"))
    torch.manual_seed(1)
    trained = create_model(name, 3, image_size=48)
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    torch.manual_seed(2)
    again = create_model(name, 3, tmp_path / "w.safetensors", image_size=48)
    assert torch.equal(logits(again, 48), logits(trained, 48))
    with pytest.raises(QuietvitError, match=r"position_embeddings is \(1, 37, 32\) in the file"):
        create_model(name, 3, tmp_path / "w.safetensors")


PROCESSORS = {
    "squash": {"size": {"height": 40, "width": 24}},
    "bicubic": {"resample": 3},
    "center": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 37},
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "resample": 3,
    },
    "deit": {
        "image_processor_type": "DeiTImageProcessor",
        "size": {"height": 37, "width": 37},
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
    },
    "convnext": {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_pct": 0.875,
    },
    "not-normalized": {"do_normalize": False},
    "other-scale": {"rescale_factor": 1 / 127.5},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_evaluation_transform_is_the_processor(tmp_path, name):
    model = create_model(saved(tmp_path, original("ViT"), **PROCESSORS[name]))
    rows, columns = np.mgrid[0:53, 0:71]
    waves = [np.sin(rows / 9 + k) * np.cos(columns / 7 - k) for k in range(3)]
    pixels = (127.5 + 120 * np.stack(waves, -1)).astype(np.uint8)
    image = Image.fromarray(pixels)
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    wanted = torch.as_tensor(np.asarray(theirs(image, return_tensors="pt")["pixel_values"][0]))
    found = evaluation_transform(model)(image)
    assert found.shape == wanted.shape
    step = 1 / 255 / min(data_config(model)["std"])
    assert (found - wanted).abs().max() < 2.5 * step, "but for rounding of resampled pixels"


@pytest.mark.parametrize(
    ("processor", "settings"),
    [
        ("Levit", {"size": {"shortest_edge": 32}, "do_center_crop": True}),
        ("PoolFormer", {"size": {"shortest_edge": 32}, "crop_pct": 0.9, "do_center_crop": True}),
        ("EfficientNet", {"include_top": True}),
        ("Perceiver", {"size": {"height": 24, "width": 24}, "do_center_crop": True}),
    ],
)
def test_a_processor_that_does_more_than_its_settings_say_is_refused(tmp_path, processor, settings):
    more = {"image_processor_type": f"{processor}ImageProcessor", **settings}
    more.setdefault("crop_size", {"height": 32, "width": 32})
    folder = saved(tmp_path, original("ViT"), **more)
    with pytest.raises(QuietvitError, match=f"{processor}ImageProcessor.* does more than its sett"):
        create_model(folder)


@pytest.mark.parametrize("edge", range(25, 520, 7))
def test_the_crop_is_taken_from_the_very_size(edge):
    settings = processor(
        size={"shortest_edge": edge}, do_center_crop=True, crop_size={"height": 24, "width": 24}
    )
    config = translated_preprocessing(settings, (3, 32, 32))
    assert int(24 / config["crop_pct"]) == edge


def test_overrides_go_into_the_data_config(tmp_path):
    model = create_model(
        saved(tmp_path, original("ViT")), preprocessing={"mean": (0.5,) * 3, "crop_pct": 0.9}
    )
    config = data_config(model)
    assert config["mean"] == (0.5,) * 3
    assert config["std"] == (0.5, 0.6, 0.7)
    assert config["crop_pct"] == 0.9
    assert config["interpolation"] == "bilinear"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_sise": 64}, "no key 'image_sise'; did you mean 'image_size'"),
        ({"num_labels": 3}, r"num_labels is not allowed; set data\.num_classes"),
        ({"hidden_size": 64}, "cannot be loaded into ViTForImageClassification"),
        ({"num_attention_heads": 5}, "cannot be loaded into|is not a multiple of"),
        ({"preprocessing": {"crop_pc": 1.0}}, "did you mean 'crop_pct'"),
    ],
)
def test_mistakes_are_refused_with_the_remedy(tmp_path, settings, message):
    with pytest.raises(QuietvitError, match=message):
        create_model(saved(tmp_path, original("ViT")), **settings)


def test_folders_that_are_none_are_refused(tmp_path):
    with pytest.raises(QuietvitError, match=r"does not exist; give 'hf:'"):
        create_model(f"hf:{tmp_path}/none")
    with pytest.raises(QuietvitError, match=r"holds no config\.json \(it holds nothing\)"):
        create_model(f"hf:{tmp_path}")
    name = saved(tmp_path, original("ViT"))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:900])
    with pytest.raises(QuietvitError, match=r"the weights in .* could not be read"):
        create_model(name)
    weights.unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(QuietvitError, match=r"as pytorch_model\.bin and not as safetensors"):
        create_model(name)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(QuietvitError, match=r"config\.json in .* could not be read"):
        create_model(name)


ENCODERS = {"Aimv2": "Aimv2Vision", "CLIP": "CLIPVision", "SigLIP": "SiglipVision", "ViT": "ViT"}


def bare(family):
    config = getattr(transformers, f"{ENCODERS[family]}Config")(**PLAIN)
    return getattr(transformers, f"{ENCODERS[family]}Model")(config).eval()


@pytest.mark.parametrize("family", ENCODERS)
def test_a_folder_of_an_encoder_gives_the_encoder(tmp_path, family, caplog):
    encoder, x = bare(family), torch.randn(2, 3, 32, 32)
    loaded = create_model(saved(tmp_path, encoder)).eval()
    assert type(loaded) is type(encoder)
    assert not caplog.records
    assert torch.equal(loaded(x).pooler_output, encoder(x).pooler_output)
    assert data_config(loaded)["mean"] == (0.1, 0.2, 0.3)
    with pytest.raises(QuietvitError, match="not logits"):
        evaluate(loaded, [(x, torch.tensor([0, 1]))])


def test_zero_classes_leave_the_encoder_of_a_classifier(tmp_path, caplog):
    from safetensors.torch import save_file

    classifier, x = original("ViT").eval(), torch.randn(2, 3, 32, 32)
    name = saved(tmp_path, classifier)
    assert type(create_model(name)) is type(classifier)
    loaded = create_model(name, 0).eval()
    assert "no weights of a pooler" in caplog.text
    tokens = classifier.vit(x).last_hidden_state
    given = create_model(name, 0, untrained=True)
    assert given.pooler is not None
    save_file(classifier.state_dict(), tmp_path / "run.safetensors")
    given = create_model(name, 0, tmp_path / "run.safetensors").eval()
    assert torch.equal(given(x).last_hidden_state, tokens)
    assert torch.equal(loaded(x).last_hidden_state, tokens)
    file = quantize(loaded, "rtn", x).save(tmp_path / "vit.qvit")
    assert load(file).model.pooler is None


def test_two_towers_give_the_tower_of_the_images(tmp_path):
    text = HIDDEN | {"intermediate_size": 32, "vocab_size": 50}
    both = transformers.CLIPModel(transformers.CLIPConfig(vision_config=PLAIN, text_config=text))
    x = torch.randn(2, 3, 48, 48)
    loaded = create_model(saved(tmp_path, both.eval()), image_size=48).eval()
    expected = both.vision_model(x, interpolate_pos_encoding=True).pooler_output
    assert torch.allclose(loaded(x).pooler_output, expected, atol=1e-5)


def test_an_encoder_that_no_classifier_is_built_on_names_the_remedy(tmp_path):
    with pytest.raises(QuietvitError, match="To quantize an encoder, give 0 classes"):
        create_model(saved(tmp_path, bare("Aimv2")), 3)


def test_code_in_a_folder_is_not_run(tmp_path):
    name = saved(tmp_path, original("ViT"))
    content = json.loads((tmp_path / "config.json").read_text())
    content |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    with pytest.raises(QuietvitError, match=r"config\.json in .* needs no code of its own"):
        create_model(name)
    assert not (tmp_path / "ran").exists()


def test_weights_that_lack_a_layer_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    name = saved(tmp_path, original("ViT"))
    state = load_file(tmp_path / "model.safetensors")
    gone = next(key for key in state if "layernorm_before.weight" in key)
    del state[gone]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(QuietvitError, match=r"lacks the weights .*layernorm_before\.weight"):
        create_model(name)


def test_what_cannot_be_translated_is_refused():
    with pytest.raises(QuietvitError, match="do_flip_channel_order"):
        translated_preprocessing(processor(do_flip_channel_order=True), (3, 32, 32))
    with pytest.raises(QuietvitError, match="longest_edge"):
        translated_preprocessing(processor(size={"longest_edge": 9}), (3, 32, 32))


def test_a_name_goes_to_the_hub_and_says_what_to_do_without_one(monkeypatch):
    def refuse(name: str, **kwargs: Any) -> Any:
        assert kwargs == {"trust_remote_code": False, "local_files_only": False}
        raise OSError(f"no connection while looking for {name}\nmore")

    monkeypatch.setattr(transformers.PretrainedConfig, "get_config_dict", refuse)
    with pytest.raises(QuietvitError, match=r"'some/vit' is not a folder here.*hf:/path") as caught:
        create_model("hf:some/vit")
    assert "no connection while looking for some/vit" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_transformers_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(QuietvitError, match=r"quietvit\[transformers\]"):
        create_model(f"hf:{tmp_path}")
