"""Images that were not normalized are told with the numbers; good ones never are."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import timm
import torch
from torch import nn

import quietvit
from quietvit.data import calibration_images, evaluation_transform, load_dataset
from quietvit.normalization import warn_unless_normalized

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5,) * 3, (0.5,) * 3
PLAIN = (0.0,) * 3, (1.0,) * 3
BYTES = (0.0,) * 3, (1 / 255,) * 3


def model_with(mean, std):
    model = nn.Linear(1, 1)
    model.pretrained_cfg = {"mean": mean, "std": std}
    return model


def normalized(pixels, mean, std):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (pixels - mean) / std


def photographs():
    """Smooth pictures in 0..1 with black and white in them, (8, 3, 32, 32)."""
    coarse = torch.rand(8, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.3
    return nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(0, 1)


PIXELS = {
    "photographs": photographs(),
    "one photograph": photographs()[:1],
    "grey photographs": photographs().mean(1, keepdim=True).expand(-1, 3, -1, -1),
    "flat grey": torch.full((2, 3, 8, 8), 0.5),
    "a bright sky": 0.6 + 0.08 * photographs(),
    "black": torch.zeros(1, 3, 8, 8),
    "white": torch.ones(1, 3, 8, 8),
    "strokes": (photographs() > 0.8).float(),
}
CONFIGS = {"imagenet": IMAGENET, "half": HALF, "plain": PLAIN, "bytes": BYTES}


@pytest.mark.parametrize("config", CONFIGS)
def test_normalized_images_are_never_told(config, caplog):
    for name, pixels in PIXELS.items():
        x = normalized(pixels, *CONFIGS[config])
        assert not warn_unless_normalized(x, model_with(*CONFIGS[config]), "given"), name
    assert not caplog.text


@pytest.mark.parametrize(
    ("config", "given", "told"),
    [
        ("imagenet", lambda p: p, "scaled to 0..1, but not normalized"),
        ("half", lambda p: p, "scaled to 0..1, but not normalized"),
        ("bytes", lambda p: p, "the model takes 0 to 255"),
        ("imagenet", lambda p: 255 * p, "pixels of 0 to 255"),
        ("half", lambda p: 255 * p, "pixels of 0 to 255"),
        ("plain", lambda p: 255 * p, "pixels of 0 to 255"),
        ("imagenet", lambda p: normalized(p, *HALF), "mean 0.5 and std 0.5"),
        ("plain", lambda p: normalized(p, *IMAGENET), "another mean and std"),
        ("imagenet", lambda p: normalized(normalized(p, *IMAGENET), *IMAGENET), "twice"),
    ],
)
def test_other_images_are_told_with_the_numbers(config, given, told, caplog):
    model, x = model_with(*CONFIGS[config]), given(photographs())
    for wrapped in (model, nn.DataParallel(model), torch.compile(model)):
        caplog.clear()
        assert warn_unless_normalized(x, wrapped, "calibration")
        assert told in caplog.text
        assert f"from {x.min():.3g} to {x.max():.3g}" in caplog.text
        assert f"mean {x.mean():.3g}, std " in caplog.text
        assert f"std {', '.join(f'{s:.3g}' for s in CONFIGS[config][1])}" in caplog.text
    assert warn_unless_normalized({"mask": torch.ones(8, 4), "pixel_values": x}, model, "given")


def test_models_without_known_preprocessing_and_other_inputs_are_left_alone(caplog):
    for model in (nn.Linear(1, 1), model_with(None, None), model_with((0.5,), (0.0,))):
        assert not warn_unless_normalized(255 * photographs(), model, "given")
    for images in (torch.randn(4, 3, 32, 32), torch.ones(3, 8), [1], None, {}):
        for config in (IMAGENET, HALF):
            assert not warn_unless_normalized(images, model_with(*config), "given")
    assert not caplog.text


def test_quantize_diagnose_and_sqnr_tell_once_and_digits_are_silent(caplog):
    caplog.set_level(logging.WARNING, "quietvit")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32).eval()
    digits = load_dataset("embedded:digits", "test")
    good = calibration_images(digits, 8, evaluation_transform(model))
    bad = (
        torch.from_numpy(
            np.stack([np.array(digits[i][0].resize((32, 32))) for i in range(8)])
        ).permute(0, 3, 1, 2)
        / 255
    )
    calls = {
        "calibration": lambda x: quietvit.quantize(model, quietvit.RTN(), [x, x]),
        "given": lambda x: quietvit.diagnose(model, [x, x], pairs=()),
    }
    for what, call in calls.items():
        caplog.clear()
        call(good)
        assert not caplog.text
        call(bad)
        assert caplog.text.count(f"the {what} images have values from 0 to ") == 1
        assert caplog.text.count("not normalized") == 1
