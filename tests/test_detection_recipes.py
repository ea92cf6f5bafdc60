"""Recipes of detectors of the papers' size: their settings, and that each builds, made small."""

from __future__ import annotations

import json

import pytest

from detection_cases import coco, outlined
from quietvit.detection.windows import Windows
from quietvit.train import list_recipes, load_recipe
from quietvit.train.estimate import estimate
from quietvit.train.setup import build

SWIN = {"window_size": 2, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
VIT = {"embed_dim": 32, "depth": 12, "num_heads": 2}
COCO_RECIPES = {
    "detect_coco_swin_tiny_1x": (12, (8, 11), 16, 0.05, None, "43.7/39.8"),
    "detect_coco_swin_tiny_3x": (36, (27, 33), 16, 0.05, None, "46.0/41.6"),
    "detect_coco_swin_small_3x": (36, (27, 33), 16, 0.05, None, "48.5/43.3"),
    "detect_coco_vitdet_base": (100, (88.68, 96.07), 64, 0.1, 0.7, "51.6/45.9"),
}
WHOLE = {"detect_rtdetrv2": (4 * 4, "53.4"), "detect_dfine": (8 * 4, "54.0")}
COCO_IMAGES = 118_287


def made_small(name, folder, *more):
    """The recipe with a tiny model and two images; every other setting stays."""
    boxes = [outlined(i, i, [10, 10, 30, 20], 3 + 4 * (i % 2)) for i in (1, 2)]
    path = coco(folder, boxes)
    shared = (f"data.dataset=coco:{path},{path}", "device=cpu", "threads=1", "num_workers=0",
              "batch_size=1", "accumulation=1", "precision=no", "task_settings.size=[64, 64]",
              f"output={folder / 'run'}", *more)  # fmt: skip
    if name in WHOLE:
        return load_recipe(name, shared)
    recipe = load_recipe(name)
    kwargs = recipe.model.kwargs | (SWIN if "swin" in name else VIT)
    given = [f"model.kwargs.{key}={json.dumps(value)}" for key, value in kwargs.items()]
    tiny = ("model.weights=none", "task_settings.channels=16", *given,
            "task_settings.options={box_channels = 16, mask_channels = 16}")  # fmt: skip
    # 4 x 4 tokens; windows of 14 would hold them all
    windows = ("task_settings.windows=3",) if "vitdet" in name else ()
    return load_recipe(name, (*shared, *tiny, *windows))


@pytest.mark.parametrize("name", COCO_RECIPES)
def test_the_settings_are_the_published_ones(name):
    recipe = load_recipe(name)
    epochs, milestones, batch, weight_decay, layer_decay, ap = COCO_RECIPES[name]
    assert (recipe.epochs, recipe.schedule.milestones) == (epochs, milestones)
    assert (recipe.optimizer.lr, recipe.optimizer.lr_batch) == (1e-4, batch)
    chosen = recipe.optimizer
    assert (chosen.weight_decay, chosen.layer_decay) == (weight_decay, layer_decay)
    text = list_recipes()[name].read_text()
    assert f"{ap}." in text
    assert "arXiv 2" in text
    assert "What differs" in text
    steps = COCO_IMAGES // batch
    warm = recipe.schedule.warmup_epochs * steps
    assert warm == pytest.approx(500 if "swin" in name else 250, rel=0.01)
    if "vitdet" in name:
        drops = [epoch * steps for epoch in recipe.schedule.milestones]
        assert drops == pytest.approx([163_889, 177_546], rel=1e-3)
        assert recipe.epochs * steps == pytest.approx(184_375, rel=0.01)


@pytest.mark.parametrize("name", COCO_RECIPES)
def test_each_recipe_builds_with_its_model_made_small(name, tmp_path):
    run = build(made_small(name, tmp_path))
    plain, groups = run.training.models.plain, run.training.optim.inner.param_groups
    settings = {id(p): group for group in groups for p in group["params"]}
    for key, parameter in plain.named_parameters():
        table = key.endswith(("pos_embed", "cls_token", "relative_position_bias_table"))
        spared = table or parameter.ndim == 1
        decay = settings[id(parameter)]["weight_decay"]
        assert (decay == 0) == spared, key
    image, target = run.images[0, 0]
    assert image.shape[1:] == (64, 64)
    assert set(target) >= {"boxes", "labels", "masks"}
    if "vitdet" not in name:
        return
    blocks = plain.backbone.body.blocks
    windowed = [
        any(isinstance(getattr(h, "__self__", None), Windows)
            for h in block.attn._forward_pre_hooks.values())
        for block in blocks
    ]  # fmt: skip
    assert [place for place, on in enumerate(windowed) if not on] == [2, 5, 8, 11]
    scales = {key: settings[id(p)]["lr_scale"] for key, p in plain.named_parameters()}
    assert scales["rpn.head.cls_logits.weight"] == scales["backbone.neck.levels.0.0.weight"] == 1
    assert scales["backbone.body.blocks.11.mlp.fc1.weight"] == pytest.approx(0.7)
    assert scales["backbone.body.pos_embed"] == pytest.approx(0.7**13)


def test_a_dry_run_tells_memory_and_time(tmp_path):
    told = str(estimate(made_small("detect_coco_vitdet_base", tmp_path)))
    assert "peak memory" in told
    assert "time of a step" in told


@pytest.mark.parametrize(
    ("name", "tiny"), [("detect_rtdetrv2", "rt_detr_v2"), ("detect_dfine", "d_fine")]
)
def test_a_recipe_for_a_folder_builds_with_a_small_folder(name, tiny, tmp_path, folders):
    batch, ap = WHOLE[name]
    recipe = load_recipe(name)
    assert (recipe.optimizer.lr_batch, recipe.batch_size * 4) == (batch, batch)
    assert ap in list_recipes()[name].read_text()
    small = made_small(name, tmp_path, f"model.name=hf:{folders[tiny]}", "optimizer.lr_batch=1")
    parts = build(small).training
    rates = []
    for step in (1, 2 * small.epochs - 1):
        parts.optim.scheduler.step_update(step)
        rates.append(max(group["lr"] for group in parts.optim.inner.param_groups))
    assert rates == pytest.approx([1e-4, 1e-4])
