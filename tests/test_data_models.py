from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import save_file

from quietvit.data import (
    calibration_images,
    create_model,
    data_config,
    evaluate,
    evaluation_loader,
    evaluation_transform,
    load_dataset,
    subset,
    training_transform,
)
from quietvit.data.transforms import Augmentation
from quietvit.errors import QuietvitError

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
NAME = "vit_tiny_patch16_224"


def tiny(**changes):
    return create_model(NAME, **{"num_classes": 10, **TINY, **changes})


@pytest.fixture
def weights(tmp_path):
    state = tiny().state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "w.pt")
    return tmp_path / "w.safetensors"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_come_back_exactly(weights, suffix):
    saved = tiny(weights=weights).state_dict()
    for key, value in tiny(weights=weights.with_suffix(suffix)).state_dict().items():
        assert torch.equal(value, saved[key])
    assert create_model(NAME, weights=weights, **TINY).num_classes == 10


def test_another_number_of_classes_starts_a_new_head_and_says_so(weights, caplog):
    caplog.set_level(logging.WARNING, "quietvit")
    model = tiny(num_classes=3, weights=weights)
    assert "the head 'head' has 10 classes, but 3 are requested" in caplog.text
    old = tiny(weights=weights).state_dict()
    new = model.state_dict()
    assert new["head.weight"].shape == (3, 32)
    assert all(torch.equal(new[k], old[k]) for k in old if not k.startswith("head."))


def test_another_image_size_resamples_the_position_table_and_says_so(weights, caplog):
    caplog.set_level(logging.WARNING, "quietvit")
    model = tiny(img_size=64, weights=weights)
    assert "pos_embed is (1, 17, 32) in the file and (1, 65, 32) in the model" in caplog.text
    old = tiny(weights=weights)
    assert torch.equal(model.pos_embed[:, 0], old.pos_embed[:, 0])
    mean = old.pos_embed[:, 1:].mean(1)
    assert torch.allclose(model.pos_embed[:, 1:].mean(1), mean, atol=0.05)
    assert torch.equal(model.blocks[1].mlp.fc2.weight, old.blocks[1].mlp.fc2.weight)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


def test_weights_of_another_architecture_name_the_first_differences(weights):
    with pytest.raises(QuietvitError) as caught:
        tiny(depth=1, weights=weights)
    assert "the model lacks blocks.1.attn.proj.bias (32,)" in str(caught.value)
    with pytest.raises(QuietvitError) as caught:
        tiny(embed_dim=64, weights=weights)
    assert "cls_token is (1, 1, 32) in the file and (1, 1, 64) in the model" in str(caught.value)
    with pytest.raises(QuietvitError, match="another architecture than SwinTransformer"):
        create_model("swin_tiny_patch4_window7_224", weights=weights, depths=(1, 1, 1, 1))


def test_what_cannot_be_built_or_read_is_refused_with_the_remedy(tmp_path, weights):
    with pytest.raises(QuietvitError, match="did you mean 'deit_tiny_patch16_224'"):
        create_model("deit_tiny_patch16_22")
    with pytest.raises(QuietvitError, match=r"could not build .* wrong=1"):
        tiny(wrong=1)
    with pytest.raises(QuietvitError, match="did you mean 'crop_pct'"):
        tiny(preprocessing={"crop_pc": 1.0})
    with pytest.raises(QuietvitError, match="do not exist"):
        tiny(weights=tmp_path / "none.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(QuietvitError, match="could not be read as weights"):
        tiny(weights=damaged)


def test_code_in_a_weights_file_is_not_run(tmp_path):
    torch.save({"a": print}, tmp_path / "evil.pt")
    with pytest.raises(QuietvitError, match="weights_only"):
        tiny(weights=tmp_path / "evil.pt")


def test_one_config_decides_the_preprocessing_of_training_and_evaluation():
    model = tiny(preprocessing={"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "crop_pct": 1.0})
    config = data_config(model)
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == (0.1, 0.2, 0.3)
    image = load_dataset("embedded:digits", "test")[7][0]
    plain = Augmentation(crop="none", flip=0.0)
    difference = training_transform(model, plain)(image) - evaluation_transform(model)(image)
    assert difference.abs().max() < 1e-6
    black = evaluation_transform(model)(image.point(lambda _: 0))
    assert torch.allclose(black[:, 0, 0], -torch.tensor([0.1, 0.2, 0.3]) / config_std(config))


def config_std(config):
    return torch.tensor(config["std"])


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(),
        Augmentation(crop="resized", scale=(0.3, 1.0), erasing=0.5, color_jitter=0.4),
        Augmentation(auto_augment="rand-m9-mstd0.5-inc1", erasing=0.5, color_jitter=0.2),
        Augmentation(crop="resized", auto_augment="rand-m9-mstd0.5-inc1"),
    ],
)
def test_augmentations_vary_and_keep_the_shape(augmentation):
    image = load_dataset("embedded:digits", "test")[7][0]
    transform = training_transform(tiny(), augmentation)
    drawn = [transform(image) for _ in range(8)]
    assert all(one.shape == (3, 32, 32) and bool(one.isfinite().all()) for one in drawn)
    assert any(not torch.equal(drawn[0], one) for one in drawn[1:])


def test_settings_of_another_crop_are_known_to_do_nothing():
    assert not Augmentation().idle()
    assert not Augmentation(crop="resized", scale=(0.3, 1.0)).idle()
    assert not Augmentation(crop="shift", shift=0.3).idle()
    (told,) = Augmentation(crop="none", scale=(0.3, 1.0)).idle()
    assert told == "scale ((0.3, 1.0)) belongs to crop 'resized'; with crop 'none' it does nothing"
    assert len(Augmentation(crop="none", scale=(0.3, 1.0), shift=0.3).idle()) == 2


@pytest.mark.parametrize("crop", ["none", "shift", "resized"])
@pytest.mark.parametrize("policy", [None, "rand-m9-mstd0.5-inc1"])
def test_color_jitter_acts_whatever_stands_beside_it(crop, policy):
    for strength, present in ((0.4, True), (0.0, False)):
        augmentation = Augmentation(crop=crop, auto_augment=policy, color_jitter=strength)
        steps = training_transform(tiny(), augmentation).transforms
        found = [step for step in steps if type(step).__name__ == "ColorJitter"]
        assert any(step.brightness for step in found) is present


@pytest.mark.parametrize("crop", ["shift", "resized"])
def test_an_unknown_augmentation_policy_is_refused(crop):
    with pytest.raises(QuietvitError, match="does not know the augmentation policy 'wild-m9'"):
        training_transform(tiny(), Augmentation(crop=crop, auto_augment="wild-m9"))


class Answers(torch.nn.Module):
    """Answers class 1 always; its mode must survive."""

    def __init__(self, classes=10):
        super().__init__()
        self.classes = classes
        self.inner = torch.nn.Dropout()

    def forward(self, images):
        assert not self.training
        return torch.nn.functional.one_hot(torch.ones(len(images), dtype=torch.long), self.classes)


def test_top1_is_the_share_of_right_answers_in_percent():
    dataset = subset(load_dataset("embedded:digits", "test"), 100)
    loader = evaluation_loader(dataset, evaluation_transform(tiny()), batch_size=32)
    model = Answers()
    model.inner.eval()
    assert evaluate(model, loader) == pytest.approx(100 * (dataset.labels == 1).mean())
    assert model.training
    assert not model.inner.training
    with pytest.raises(QuietvitError, match="label 9, but the model has only 5 classes"):
        evaluate(Answers(5), loader)
    with pytest.raises(QuietvitError, match="not one image"):
        evaluate(model, [])
    broken = tiny()
    torch.nn.init.constant_(broken.norm.weight, float("nan"))
    with pytest.raises(QuietvitError, match="logits are NaN"):
        evaluate(broken, loader)


def test_calibration_images_are_drawn_by_seed_without_repeats():
    dataset, transform = load_dataset("embedded:digits", "train"), evaluation_transform(tiny())
    first = calibration_images(dataset, 16, transform, seed=1)
    assert first.shape == (16, 3, 32, 32)
    assert torch.equal(first, calibration_images(dataset, 16, transform, seed=1))
    assert not torch.equal(first, calibration_images(dataset, 16, transform, seed=2))
    small = subset(dataset, 5)
    everything = calibration_images(small, 5, transform, seed=3)
    expected = torch.stack([transform(small[i][0]) for i in range(5)])
    assert torch.equal(everything.sum((1, 2, 3)).sort()[0], expected.sum((1, 2, 3)).sort()[0])
    with pytest.raises(QuietvitError, match=r"0 .*requested, but .*ask for 1 to"):
        calibration_images(dataset, 0, transform)
    with pytest.raises(QuietvitError, match="holds 5"):
        calibration_images(small, 6, transform)
