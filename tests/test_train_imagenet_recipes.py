"""The recipes at ImageNet scale: what they agree on, and that each trains, made small."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from huggingface_cases import classifier
from quietvit.data import create_model, load_dataset
from quietvit.decay.colinearity import ColinearityConfig
from quietvit.pairs import DEFAULT_KINDS
from quietvit.train import list_recipes, load_recipe, train

FULL = sorted(name for name in list_recipes() if name.startswith("imagenet1k_"))
SMALL = {
    "deit_small_scale": "imagenet1k_deit_small",
    "vit_small_scale": "imagenet1k_vit_small",
    "swin_small_scale": "imagenet1k_swin_tiny",
}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 4],
}
IMAGENET = 1_281_167
FOLDER = Path(__file__).parents[1]


def source() -> tuple[str, str]:
    """Real photographs where they are at hand, else the embedded digits; and the classes."""
    folder = Path(os.environ.get("QUIETVIT_TEST_DATA") or "/nowhere")
    tables = [folder / f"cifar10_{split}.parquet" for split in ("train", "test")]
    if all(table.is_file() for table in tables):
        return "table:" + ",".join(map(str, tables)), "10"
    return "embedded:digits", "10"


def two_steps(name: str, output: Path, *more: str) -> list[str]:
    """Overrides under which an epoch is two steps, with everything else as the recipe says."""
    dataset, classes = source()
    accumulation = load_recipe(name).accumulation
    return [
        f"data.dataset={dataset}",
        f"data.num_classes={classes}",
        f"data.train_images={2 * 8 * accumulation}",
        "data.test_images=8",
        "epochs=1",
        "batch_size=8",
        "schedule.warmup_epochs=0.5",
        "num_workers=0",
        "threads=1",
        "log_every=1",
        "tensorboard=false",
        "device=cpu",
        "checkpoint.every=0",
        f"output={output}",
        *more,
    ]


def made_small(name: str) -> str:
    """The model's own arguments with other sizes, as TOML (which JSON values are too)."""
    kwargs = load_recipe(name).model.kwargs | (SWIN if "swin" in name else VIT)
    values = [f"{key} = {json.dumps(value)}" for key, value in kwargs.items()]
    return "model.kwargs={ " + ", ".join(values) + " }"


def finished(name: str, *overrides: str) -> dict[str, torch.Tensor]:
    config = load_recipe(name, overrides)
    result = train(config, progress=False)
    assert result.steps == 2
    rows = [json.loads(line) for line in (config.output / "metrics.jsonl").open()]
    assert any("penalty_cd" in row for row in rows)
    return load_file(result.weights)


def test_the_issue_s_recipes_are_there():
    families = {
        "deit": ("tiny", "small", "base"),
        "vit": ("small", "base"),
        "swin": ("tiny", "small"),
    }
    assert set(FULL) == {
        f"imagenet1k_{f}_{size}" for f, sizes in families.items() for size in sizes
    }
    assert set(SMALL) <= set(list_recipes())


@pytest.mark.parametrize("name", FULL)
def test_the_rate_is_for_the_batch_that_the_comment_states(name):
    config = load_recipe(name)
    text = list_recipes()[name].read_text()
    effective = config.batch_size * config.accumulation * 8
    assert config.optimizer.lr_batch == effective
    assert f"effective batch of {effective} images" in " ".join(text.replace("#", " ").split())
    assert "arXiv 2" in text
    assert "What differs" in text
    steps = IMAGENET // effective
    assert config.checkpoint.every == pytest.approx(steps, rel=0.01), "about once an epoch"
    if "vit_" in name and "deit" not in name:
        assert config.schedule.warmup_epochs * steps == pytest.approx(10_000, rel=0.01)


TIMM = {
    "label_smoothing": 0.1,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.05,
    "optimizer.lr": 1e-3,
    "optimizer.lr_batch": 1024,
    "schedule.warmup_lr": 1e-6,
    "schedule.min_lr": 1e-5,
    "mix.mixup": 0.8,
    "mix.cutmix": 1.0,
    "mix.probability": 1.0,
    "mix.switch_probability": 0.5,
    "data.augmentation.auto_augment": "rand-m9-mstd0.5-inc1",
    "data.augmentation.erasing": 0.25,
    "epochs": 300,
}
# arXiv 2012.12877, table 9: lr 5e-4 x batch / 512 at 1024 images, warm-up of 5 epochs, repeated
# augmentation of 3 copies, no clipping; and the defaults of the authors' main.py.
DEIT = TIMM | {
    "schedule.warmup_epochs": 5.0,
    "data.repeats": 3,
    "optimizer.clip_grad": None,
    "model.kwargs": {"drop_path_rate": 0.1},
}
# arXiv 2103.14030, appendix A2, and the authors' config.py: 5e-4, 5e-7 and 5e-6 for 512 images.
SWIN_T = TIMM | {
    "schedule.warmup_epochs": 20.0,
    "data.repeats": 1,
    "optimizer.clip_grad": 5.0,
    "model.kwargs": {"drop_path_rate": 0.2},
}
# arXiv 2205.01580 and 2106.10270 with big_vision's configurations: decay 1e-4 beside the rate.
VIT_S = {
    "label_smoothing": 0.0,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.weight_decay": 1e-4 / 1e-3,
    "optimizer.lr": 1e-3,
    "optimizer.lr_batch": 1024,
    "optimizer.clip_grad": 1.0,
    "schedule.min_lr": 0.0,
    "mix.mixup": 0.2,
    "mix.cutmix": 0.0,
    "data.repeats": 1,
    "data.augmentation.auto_augment": "rand-m10-n2",
    "data.augmentation.erasing": 0.0,
    "epochs": 90,
}
PUBLISHED = {
    **{f"imagenet1k_deit_{size}": DEIT for size in ("tiny", "small", "base")},
    "imagenet1k_swin_tiny": SWIN_T,
    "imagenet1k_swin_small": SWIN_T | {"model.kwargs": {"drop_path_rate": 0.3}},
    "imagenet1k_vit_small": VIT_S,
    "imagenet1k_vit_base": VIT_S
    | {
        "optimizer.lr_batch": 4096,
        "mix.mixup": 0.5,
        "data.augmentation.auto_augment": "rand-m15-mmax15-n2",
        "epochs": 300,
    },
}


@pytest.mark.parametrize("name", FULL)
def test_the_settings_are_the_published_ones(name):
    found = flat(load_recipe(name).model_dump(mode="json"))
    assert {key: found[key] for key in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize("name", [name for name in list_recipes() if name.startswith("finetune_")])
def test_the_strength_of_a_finetune_comes_from_a_total(name):
    assert load_recipe(name).decay.cd == ColinearityConfig(total=0.06)


@pytest.mark.parametrize("name", [*FULL, *SMALL])
def test_the_strength_from_scratch_is_the_one_that_was_best_there(name):
    with (FOLDER / "results" / "ablate.csv").open(newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["task"] == "scratch"]
    found = {
        row["setting"]: float(row["val_W4A4-omse"]) + float(row["val_W4A4-repq"])
        for row in rows
        if row["family"] == "cd+norm" and row["stage"] == "search"
    }
    best = json.loads(max(found, key=found.__getitem__))["cd"]["strength"]
    assert load_recipe(name).decay.cd == ColinearityConfig(strength=best["mlp"])
    assert {*best, "gated_mlp"} == set(DEFAULT_KINDS)  # DeiT-Tiny has no gated one


@pytest.mark.parametrize("name", SMALL)
def test_a_small_recipe_differs_from_the_one_it_stands_for_in_scale_only(name):
    scale = {
        *("model.name", "model.kwargs", "model.preprocessing", "data.dataset", "data.num_classes"),
        *("epochs", "optimizer.lr", "optimizer.lr_batch", "schedule.min_lr", "checkpoint.every"),
        *("num_workers", "output"),
    }
    small, full = (
        flat(load_recipe(which).model_dump(mode="json")) for which in (name, SMALL[name])
    )
    differing = {key for key in small.keys() | full.keys() if small.get(key) != full.get(key)}
    assert differing <= scale


def flat(content: dict[str, object], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in content.items():
        if isinstance(value, dict) and prefix + key not in ("model.kwargs", "model.preprocessing"):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


@pytest.mark.parametrize("name", SMALL)
def test_a_small_recipe_trains_as_it_stands(name, tmp_path):
    weights = finished(name, *two_steps(name, tmp_path / "run"))
    assert all(value.isfinite().all() for value in weights.values())
    assert sum(value.numel() for value in weights.values()) > 1e6


@pytest.mark.parametrize("name", FULL)
def test_a_recipe_trains_with_its_model_made_small(name, tmp_path):
    weights = finished(name, *two_steps(name, tmp_path / "run", made_small(name)))
    assert all(value.isfinite().all() for value in weights.values())


def test_fine_tuning_starts_from_the_weights(tmp_path):
    name = "finetune_imagenet1k_deit_small"
    start = create_model("deit_small_patch16_224", 10, **VIT)
    save_file(start.state_dict(), tmp_path / "start.safetensors")
    more = [made_small(name), f"model.weights={tmp_path / 'start.safetensors'}"]
    found = finished(name, *two_steps(name, tmp_path / "run", *more))
    for key, value in start.state_dict().items():
        # Two steps from where it started, and a decay of gains by about the recipe's total of 0.06.
        assert (found[key] - value).abs().max() < 0.01 + 0.1 * ("norm" in key), key
    assert not torch.equal(found["head.weight"], start.head.weight)


def test_fine_tuning_a_transformers_folder(tmp_path):
    classifier("ViT", 4).save_pretrained(tmp_path / "hf")
    name = "finetune_hf_folder"
    found = finished(name, *two_steps(name, tmp_path / "run", f"model.name=hf:{tmp_path / 'hf'}"))
    assert found["classifier.weight"].shape == (10, 32)


def test_the_data_may_be_shards(tmp_path):
    images = load_dataset("embedded:digits", "train")
    for split, count in (("train", 24), ("val", 8)):
        for shard in range(2):
            with tarfile.open(tmp_path / f"{split}-{shard:04d}.tar", "w") as tar:
                for index in range(count):
                    image, label = images[shard * count + index]
                    buffer = io.BytesIO()
                    image.save(buffer, "PNG")
                    members = {"png": buffer.getvalue(), "cls": str(label).encode()}
                    for suffix, content in members.items():
                        entry = tarfile.TarInfo(f"{index:06d}.{suffix}")
                        entry.size = len(content)
                        tar.addfile(entry, io.BytesIO(content))
    name = "imagenet1k_deit_tiny"
    shards = f"shards:{tmp_path}/train-{{0000..0001}}.tar,{tmp_path}/val-{{0000..0001}}.tar"
    more = [made_small(name), "data.shuffle_window=2", f"data.dataset={shards}"]
    finished(name, *two_steps(name, tmp_path / "run", *more))
