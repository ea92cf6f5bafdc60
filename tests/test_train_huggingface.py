"""Fine-tuning a transformers model from a local folder, and what can be done with the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import quietvit
from huggingface_cases import classifier, saved
from quietvit.cli import app
from quietvit.data import (
    calibration_images,
    create_model,
    evaluation_transform,
    load_dataset,
)
from quietvit.train import TrainResult, load_recipe, loop, train
from test_train_loop import StoppedError

pytest.importorskip("transformers")

FAMILIES = ("ViT", "Dinov2", "Swin")


def run(root: Path, family: str, *more: str) -> TrainResult:
    name = saved(root / "hf", classifier(family, 4))
    overrides = [
        f"model.name={name}",
        "model.kwargs={ image_size = 16 }",
        "model.preprocessing={}",
        "data.train_images=96",
        "data.test_images=48",
        "epochs=1",
        "schedule.warmup_epochs=0",
        "optimizer.layer_decay=0.8",
        f"output={root / 'run'}",
        *more,
    ]
    return train(load_recipe("digits", overrides), progress=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_fine_tuned_read_back_and_quantized(tmp_path, family):
    result = run(tmp_path, family)
    model = result.load_model()
    assert model.pretrained_cfg["input_size"] == (3, 16, 16)
    assert model.pretrained_cfg["mean"] == pytest.approx((0.1, 0.2, 0.3))
    again = TrainResult.read(tmp_path / "run").load_model()
    images = calibration_images(
        load_dataset("embedded:digits", "train"), 8, evaluation_transform(model)
    )
    assert images.shape == (8, 3, 16, 16)
    with torch.no_grad():
        logits = model(images).logits
        assert logits.shape == (8, 10)
        assert torch.equal(again(images).logits, logits)
        quantized = quietvit.quantize(
            model, quietvit.RTN(weight_bits=8, activation_bits=8), calibration=[images]
        )
        found = quantized(images).logits
    assert 0 < (found - logits).abs().max() < 0.1


def test_frozen_blocks_stay_as_they_were_and_the_rest_moves(tmp_path):
    result = run(tmp_path, "ViT", "model.freeze_blocks=1", "decay.cd=none")
    before = create_model(f"hf:{tmp_path / 'hf'}", image_size=16).state_dict()
    after = result.load_model().state_dict()
    still = {key for key in before if torch.equal(before[key], after[key])}
    assert {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"} <= still
    blocks = [key for key in before if ".layer" in key and key.endswith(".weight")]
    for key in blocks:
        assert (key in still) == ("layer.0." in key or "layers.0." in key), key


def test_the_command_line_takes_the_folder_and_the_run(tmp_path):
    from typer.testing import CliRunner

    result = run(tmp_path, "ViT")
    calls = [
        ["evaluate", str(tmp_path / "run"), "--images", "embedded:digits"],
        ["evaluate", f"hf:{tmp_path / 'hf'}", "--classes", "10", "--images", "embedded:digits"],
        [
            *("quantize", str(tmp_path / "run"), "--calibration", "embedded:digits"),
            *("--count", "8", "--output", str(tmp_path / "out.qvit")),
        ],
    ]
    for call in calls:
        done = CliRunner().invoke(app, call)
        assert done.exit_code == 0, done.output
        assert "are random" not in done.output
    loaded = quietvit.load(tmp_path / "out.qvit", model=result.load_model())
    assert loaded(torch.zeros(1, 3, 16, 16)).logits.shape == (1, 10)


def test_train_takes_the_folder_in_place_of_the_recipe_s_model(tmp_path):
    from typer.testing import CliRunner

    name = saved(tmp_path / "hf", classifier("ViT", 10))
    changes = ["data.dataset=embedded:digits", "data.train_images=16", "data.test_images=8"]
    changes += ["epochs=1", "schedule.warmup_epochs=0", "batch_size=8", "num_workers=0"]
    changes += ["precision=no", "threads=1", "decay.cd=none"]  # CD would move weights by its total
    call = ["train", "--recipe", "finetune_hf_folder", "--model", name]
    call += ["--output", str(tmp_path / "run"), *(f"-s{change}" for change in changes)]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    assert "are random" not in done.output
    result = TrainResult.read(tmp_path / "run")
    assert result.steps == 2
    before, after = create_model(name).state_dict(), result.load_model().state_dict()
    assert before.keys() == after.keys()
    moved = [float((after[key] - value).abs().max()) for key, value in before.items()]
    assert 0 < max(moved) < 1e-3, "two steps from the weights of the folder"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_goes_on_without_the_weights_of_its_folder(tmp_path, monkeypatch, family):
    """Classes and image size are others than the folder's: head and position table were made."""
    changes = ("checkpoint.every=1", "model.freeze_blocks=1", "threads=1")
    torch.manual_seed(0)
    expected = run(tmp_path, family, *changes)
    torch.manual_seed(0)
    cut = tmp_path / "cut"
    after_step = loop._Loop._after_step

    def stop(self, images):
        if self.step == 1:
            raise StoppedError
        return after_step(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_after_step", stop)
        with pytest.raises(StoppedError):
            run(tmp_path, family, *changes, f"output={cut}")
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"gone")
    config = load_recipe(cut / "config.json")
    result = train(config, resume=True, progress=False)
    assert result.steps == expected.steps > 1
    one, other = load_file(result.weights), load_file(expected.weights)
    assert list(one) == list(other)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert result.top1 == expected.top1
