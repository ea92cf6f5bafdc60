"""Augmentation by timm's policies, with the versions of timm, torchvision and Pillow at hand."""

from __future__ import annotations

import itertools
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from torchvision.transforms import InterpolationMode

from quietvit.data import load_dataset, training_transform
from quietvit.data.policies import mend, posterize
from quietvit.data.transforms import Augmentation
from quietvit.train import list_recipes, load_recipe

RECIPES = {name: load_recipe(name).data.augmentation for name in list_recipes()}
POLICIES = ["rand-m9", "rand-m9-inc1", "rand-t3a", "rand-t3aw", "rand-tweights", "augmix-m5", "3a",
            "original", "originalr", "v0", "v0r"]  # fmt: skip


def model() -> torch.nn.Module:
    """What a transform asks of a model: the size of its images."""
    found = torch.nn.Identity()
    found.pretrained_cfg = {"input_size": (3, 32, 32)}  # type: ignore[assignment]
    return found


def images(count: int):
    """Photographs of many classes where there are some, else digits."""
    folder = Path(os.environ.get("QUIETVIT_TEST_DATA") or "/nowhere")
    table = folder / "imagenette_calibration_1024.parquet"
    named = f"table:{table},{table}" if table.is_file() else "embedded:digits"
    data = load_dataset(named, "train")
    for index in np.linspace(0, len(data) - 1, count).astype(int):
        image = data[int(index)][0]
        yield image.resize((96, 80)) if image.width > 96 else image


@pytest.mark.parametrize(
    "augmentation",
    [
        pytest.param(augmentation, id=str(augmentation.auto_augment or augmentation.crop))
        for augmentation in dict.fromkeys(RECIPES.values())
        if augmentation != Augmentation(crop="none", flip=0.0)
    ],
)
def test_hundreds_of_images_pass_the_augmentation_of_every_recipe(augmentation):
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(3)  # 0 bits are drawn with it
    transform = pickle.loads(pickle.dumps(training_transform(model(), augmentation)))
    for image in images(400):
        drawn = transform(image)
        assert drawn.shape == (3, 32, 32)
        assert bool(drawn.isfinite().all())


def operations(policy: str):
    """Each operation of a policy in a training transform, to be run for sure and as strong as said.

    The transform is one of the two that there are, by turns.
    """
    crop = ("resized", "shift")[POLICIES.index(policy) % 2]
    transform = training_transform(model(), Augmentation(crop=crop, auto_augment=policy))
    for step in transform.transforms:
        for part in getattr(step, "ops", None) or itertools.chain(*getattr(step, "policy", ())):
            part.prob, part.hparams = 1.0, {**part.hparams, "magnitude_max": 30}
            part.magnitude_std, part.magnitude_max = 0, 30
            yield part


def test_every_operation_takes_every_magnitude_and_size():
    """Each that timm has, at every level of the published scale and up to 30 (``mmax30``)."""
    seen = {}
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    sizes = [(1, 1), (1, 9), (64, 48)]
    pictures = [Image.fromarray(noise[:high, :wide].copy()) for wide, high in sizes]
    for policy in POLICIES:
        for operation in operations(policy):
            if seen.setdefault(operation.name, policy) != policy:
                continue
            for image, magnitude in itertools.product(pictures, [*np.arange(0, 11, 0.5), 15, 30]):
                operation.magnitude = float(magnitude)
                changed = operation(image)
                assert (changed.size, changed.mode) == (image.size, "RGB")
    unused = {"TranslateX", "TranslateY", "GaussianBlurRand"}  # no policy of timm's has them
    assert set(seen) | unused >= set(auto_augment.NAME_TO_OP)


@pytest.mark.parametrize("bits", range(-8, 9))
def test_posterize_keeps_the_highest_bits_and_is_black_without_any(bits):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([values] * 3, axis=-1))
    kept = values & (0xFF & ~(2 ** (8 - bits) - 1))
    assert np.array_equal(np.asarray(posterize(image, bits))[..., 1], kept)


def test_what_is_mended_is_the_transform_given_and_not_timm():
    before = auto_augment.NAME_TO_OP["Posterize"]
    policy = auto_augment.rand_augment_transform("rand-m9-inc1", {"img_mean": (0, 0, 0)})
    changed = [op.name for op in mend([policy])[0].ops if op.aug_fn is posterize]
    assert changed == ["PosterizeIncreasing"]
    assert auto_augment.NAME_TO_OP["Posterize"] is before
    assert mend(InterpolationMode.BICUBIC) is InterpolationMode.BICUBIC
