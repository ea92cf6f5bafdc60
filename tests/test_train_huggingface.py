"""Fine-tuning a transformers model from a local folder, and what can be done with the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import quietvit
from huggingface_cases import classifier, saved
from quietvit.cli import app
from quietvit.data import calibration_images, evaluation_transform, load_dataset
from quietvit.train import TrainResult, load_recipe, train

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
    from quietvit.data import create_model

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
