from __future__ import annotations

import inspect
import json

import pytest
from pydantic import ValidationError

from quietvit.decay import ColinearityDecay
from quietvit.decay.colinearity import ColinearityConfig
from quietvit.errors import QuietvitError
from quietvit.train import list_recipes, load_recipe
from quietvit.train.recipe import known_keys, parse_config

MINIMAL = {"model": {"name": "vit_tiny_patch16_224"}, "data": {"dataset": "embedded:digits"}}


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_every_recipe_that_comes_along_is_valid_by_name_and_by_path(name):
    assert load_recipe(name) == load_recipe(list_recipes()[name])


def test_the_provisional_strength_stands_in_the_demo_recipe():
    default = inspect.signature(ColinearityDecay).parameters["strength"].default
    assert load_recipe("digits").decay.cd.strength == ColinearityConfig().strength == default


def test_overrides_reach_any_depth_and_type():
    config = load_recipe(
        "digits",
        [
            "optimizer.lr=3e-4",
            "model.kwargs.depth=2",
            "decay.cd.strength={ mlp = 1.0, value_output = 2 }",
            "decay.norm_gains.strength=2",
            "precision=bf16",
            "output = /tmp/some place",
            "ema.decay=0.99",
            "data.train_images=none",
            "tensorboard=false",
        ],
    )
    assert config.optimizer.lr == 3e-4
    assert config.model.kwargs["depth"] == 2
    assert config.model.kwargs["img_size"] == load_recipe("digits").model.kwargs["img_size"]
    assert config.decay.cd.strength == {"mlp": 1.0, "value_output": 2.0}
    assert config.decay.norm_gains.strength == 2.0
    assert config.precision == "bf16"
    assert str(config.output) == "/tmp/some place"
    assert config.ema.decay == 0.99
    assert config.data.train_images is None
    assert not config.tensorboard
    assert load_recipe("digits", ["decay.cd=none"]).decay.cd is None


def test_a_runs_config_is_a_recipe(tmp_path):
    config = load_recipe("digits", ["seed=7"])
    (tmp_path / "config.json").write_text(config.model_dump_json())
    assert load_recipe(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.weight_decy=1", "no key 'optimizer.weight_decy'; did you mean 'optimizer.wei"),
        ("epoch=1", "no key 'epoch'; did you mean 'epochs'"),
        ("decay.cd.strenght=1", "did you mean 'decay.cd.strength'"),
        ("decay.cd.strength=-1", r"decay\.cd\.strength: .*greater than or equal to 0"),
        ("decay.cd.penalty=enery", r"decay\.cd\.penalty: .*'energy'.*given: 'enery'"),
        ("epochs=0", r"epochs: .*greater than or equal to 1 \(given: 0\)"),
        ("epochs.x=0", "needs a section 'epochs', but that is a value"),
        ("epochs", "not of the form key=value"),
        ("precision=int8", "precision: .*'bf16'"),
        ("schedule.warmup_epochs=1000", r"warmup_epochs \(1000\) must be below epochs"),
        ("schedule.min_lr=1", r"min_lr \(1\) is above"),
        ("schedule.milestones=[9, 3]", r"milestones \(9, 3\) must ascend"),
        ("schedule.milestones=[10000]", r"and before epochs"),
        ("optimizer.betas=[0.9, 1.0]", r"optimizer\.betas\.1: .*less than 1 \(given: 1\.0\)"),
        ("optimizer.betas=[-0.1, 0.9]", r"optimizer\.betas\.0: .*greater than or equal to 0"),
        ("optimizer.betas=[nan, 0.9]", r"optimizer\.betas\.0: .*\(given: nan\)"),
        ("data.augmentation.scale=[-1, 2]", r"scale\.0: .*greater than 0 .*scale\.1: .*equal to 1"),
        ("data.augmentation.scale=[0, 1]", r"data\.augmentation\.scale\.0: .*greater than 0"),
        ("data.augmentation.scale=[nan, 1]", r"data\.augmentation\.scale\.0: .*\(given: nan\)"),
        ("optimizer.lr=inf", r"optimizer\.lr: .*finite number \(given: inf\)"),
        ("optimizer.weight_decay=inf", r"optimizer\.weight_decay: .*finite number"),
        ("decay.cd.strength=inf", r"decay\.cd\.strength: .*finite number"),
        ("decay.cd.strength={mlp=inf}", r"decay\.cd\.strength\.mlp: .*finite number"),
        ("data.augmentation.color_jitter=inf", r"color_jitter: .*finite number"),
        (
            "data.augmentation.scale=[1.0, 0.08]",
            r"augmentation\.scale: the lower number .* write \[0\.08, 1\] \(given: \[1\.0, 0\.08",
        ),
    ],
)
def test_mistakes_are_named_with_the_nearest_known_key(override, message):
    with pytest.raises(QuietvitError, match=message) as caught:
        load_recipe("digits", [override])
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("strength=-1", "strength: input should be greater than or equal to 0 (given: -1)"),
        ("strength={mlp=-1}", "strength.mlp: input should be greater than or equal to 0"),
        ("strength={mlp=[]}", "strength.mlp: input should be a valid number (given: [])"),
        ("schedule={shape='cosin'}", "schedule.shape: input should be 'constant', 'linear'"),
        ("schedule={warmup_epochs=-1}", "schedule.warmup_epochs: input should be greater"),
        ("schedule={mlp={shape='x'}}", "schedule.mlp.shape: input should be 'constant', 'linear'"),
        ("schedule=3", "schedule: this is a section; set its keys, such as schedule.shape"),
        ("schedule={mlp={}, value_output=1}", "schedule.value_output: input should be a valid"),
        ("schedule={mlp={shap='x'}}", "there is no key 'decay.cd.schedule.mlp.shap'; did you"),
    ],
)
def test_a_wrong_value_where_several_types_are_taken_is_told_once(override, told):
    with pytest.raises(QuietvitError) as caught:
        load_recipe("digits", [f"decay.cd.{override}"])
    assert told in str(caught.value)
    assert str(caught.value).count(told) == 1


@pytest.mark.parametrize(
    "cd",
    [
        {"strength": 2.0, "schedule": {"shape": "linear", "warmup_epochs": 1}},
        {"strength": {"mlp": 1.0}, "schedule": {"mlp": {"shape": "linear"}}},
        {"schedule": {}},
    ],
)
def test_one_value_or_one_for_each_kind_is_read_and_written_alike(cd):
    config = parse_config({**MINIMAL, "decay": {"cd": cd}})
    assert parse_config(json.loads(config.model_dump_json())) == config
    schedule = config.decay.cd.schedule
    assert isinstance(schedule, dict) == ("mlp" in cd["schedule"])
    assert len(list(config.decay.schedules())) == 1


def test_none_is_a_crop_of_its_own():
    changed = load_recipe("finetune_imagefolder", ["data.augmentation.crop=none"])
    assert changed.data.augmentation.crop == "none"
    assert parse_config(json.loads(changed.model_dump_json())) == changed


def test_the_ends_of_what_betas_and_areas_may_be_are_taken():
    changes = ["optimizer.betas=[0, 0.9999]", "data.augmentation.scale=[1, 1]"]
    config = load_recipe("digits", changes)
    assert config.optimizer.betas == (0, 0.9999)
    assert config.data.augmentation.scale == (1, 1)


def test_files_that_are_no_recipe_are_refused(tmp_path):
    with pytest.raises(QuietvitError, match="did you mean 'digits'"):
        load_recipe("digit")
    path = tmp_path / "a.toml"
    for text, message in (
        ("recipe = ", "could not be read"),
        ("epochs = 1", "states no version"),
        ("recipe = 2", "is of version 2"),
        ("recipe = 1", "key 'model' is missing; the key 'data' is missing"),
    ):
        path.write_text(text)
        with pytest.raises(QuietvitError, match=message):
            load_recipe(path)


def test_mixing_needs_an_even_batch():
    with pytest.raises(QuietvitError, match="even batch_size, not 7"):
        parse_config({**MINIMAL, "batch_size": 7, "mix": {"mixup": 0.8}})


def test_the_configuration_cannot_be_changed_in_place():
    config = parse_config(MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        config.epochs = 3
    assert json.loads(config.model_dump_json())["epochs"] == config.epochs


def test_known_keys_reach_into_optional_sections():
    assert {"decay.cd.strength", "data.augmentation.flip", "ema.decay"} <= set(known_keys())


@pytest.mark.parametrize("key", ["decay.cd", "ema", "decay.tweo", "decay.cd.schedule"])
def test_false_leaves_a_section_out_as_none_does(key):
    name = "imagenet1k_deit_small"
    assert load_recipe(name, [f"{key}=false"]) == load_recipe(name, [f"{key}=none"])


NUMBERS = ["epochs", "optimizer.lr", "seed", "decay.cd.strength", "threads", "checkpoint.every",
           "data.augmentation.flip", "optimizer.clip_grad", "mix.probability"]  # fmt: skip


@pytest.mark.parametrize("value", ["true", "false"])
@pytest.mark.parametrize("key", NUMBERS)
def test_true_and_false_are_no_numbers(key, value):
    with pytest.raises(QuietvitError, match=rf"{key}: give a value, not {value}"):
        load_recipe("digits", [f"{key}={value}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.betas=[true, 0.9]", "give a value, not true"),
        ("decay.cd.strength={ mlp = true }", "give a value, not true"),
        ("data.augmentation.scale=[false, true]", "give a value, not false"),
        ("decay.cd=true", r"this is a section; set its keys, such as cd\.strength; none leaves"),
        ("decay.cd=2", r"set its keys, such as cd\.strength"),
        ("mix=false", r"set its keys, such as mix\.mixup \(given"),
        ("model.kwargs.in_chans=1", "in_chans is 1, but every image is read with three"),
    ],
)
def test_what_a_value_cannot_be_is_said_with_the_key(override, message):
    with pytest.raises(QuietvitError, match=message):
        load_recipe("digits", [override])


def test_what_may_be_true_or_hold_it_may_still():
    config = load_recipe("digits", ["tensorboard=true", "compile=false", "model.kwargs.x=true"])
    assert (config.tensorboard, config.compile) == (True, False)
    assert config.model.kwargs["x"] is True


def test_a_recipe_with_a_byte_order_mark_is_read_and_another_encoding_is_named(tmp_path):
    text = list_recipes()["digits"].read_text("utf-8")
    path = tmp_path / "marked.toml"
    path.write_text(text, encoding="utf-8-sig")
    assert load_recipe(path) == load_recipe("digits")
    path = tmp_path / "config.json"
    path.write_text(load_recipe("digits").model_dump_json(), encoding="utf-8-sig")
    assert load_recipe(path) == load_recipe("digits")
    (tmp_path / "wide.toml").write_text(text, encoding="utf-16")
    with pytest.raises(QuietvitError, match=r"is not in UTF-8 .*save it as UTF-8"):
        load_recipe(tmp_path / "wide.toml")


@pytest.mark.parametrize("key", ["output", "data.dataset", "model.weights", "model.name"])
def test_what_cannot_be_written_as_utf_8_is_refused_with_its_key(key):
    with pytest.raises(
        QuietvitError, match=rf"^{key}: the name imagefolder:x.* has bytes that are not UTF-8"
    ):
        load_recipe("digits", [f"{key}=imagefolder:x\udcff"])
