"""Laws of runs with ``qat``: what they train, resume to and save, and what they refuse."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import quietvit
from detection_cases import BACKBONE, SETTINGS
from quietvit import cli
from quietvit.compare import CompareConfig
from quietvit.console import build_model
from quietvit.errors import QuietvitError
from quietvit.quantization import LearnedAffine
from quietvit.train import TrainResult, estimate, loop, parse_config, train
from quietvit.train.setup import build
from test_train_distributed import CD, SHARED, fork, job, ranks
from test_train_loop import EVERYTHING, config, interrupt, lines, run

EACH = {
    "cd": {"strength": 3.0},
    "norm_gains": {"strength": 1.0},
    "weight": {"strength": 0.1},
    "s2d": {"strength": 1e-3, "images": 8},
    "kure": {"strength": 0.1},
    "tweo": {"strength": 0.01},
}


def qat(**changes):
    return {"qat": {"method": "rtn", "bits": "W4A4", "images": 8, **changes}}


def parts(result):
    """Tensors and facts of the saved model."""
    tensors = load_file(result.weights / "model.safetensors")
    return tensors, json.loads((result.weights / "quantization.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    made = {}

    def get(start, **changes):
        key = json.dumps([start, changes], sort_keys=True)
        if key not in made:
            output = tmp_path_factory.mktemp("whole")
            made[key] = run(output, **EVERYTHING, **qat(start_epoch=start, **changes))
        return made[key]

    return get


@pytest.mark.parametrize(("start", "at"), [(0, 3), (1, 7), (1, 9)])
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, monkeypatch, whole, start, at):
    """In float, at the step of the change, and quantized; a step leaves the last checkpoint."""
    changes = {**EVERYTHING, **qat(start_epoch=start)}
    interrupt(tmp_path / "run", monkeypatch, at, **changes)
    result, expected = run(tmp_path / "run", resume=True, **changes), whole(start)
    (mine, my_facts), (theirs, facts) = parts(result), parts(expected)
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert my_facts == facts
    assert result.score == expected.score
    assert lines(result.output) == lines(expected.output)


def test_the_saved_model_is_the_trained_one(tmp_path, whole):
    result = whole(1)
    model = result.load_model()
    assert isinstance(model, quietvit.quantization.QuantizedModel)
    assert model.method == quietvit.RTN(weight_bits=4, activation_bits=4)
    task = result.task
    _, test = task.open_data()
    loader = task.evaluation_loader(model.model, test, 8, 0)
    assert task.score([task.judge(model, loader)]) == result.score
    assert "trained after calibration, with learned steps" in model.report()
    assert model.deployable
    assert not (result.output / "model.safetensors").exists()


def test_commands_take_the_folder_of_a_run_also_after_a_move(tmp_path, whole):
    moved = shutil.copytree(whole(1).output, tmp_path / "moved")
    saved, images = moved / "model.qvit", ["--images", "embedded:digits"]

    def command(*given):
        done = CliRunner().invoke(cli.app, list(map(str, given)))
        told = done.output if done.exit_code else done.stdout  # stderr has the progress
        return done.exit_code, " ".join(told.split())

    code, told = command("evaluate", moved, *images)
    assert (code, "top-1" in told) == (0, True), told
    assert command("evaluate", saved, *images, "--model", moved) == (0, told)
    code, told = command("export", moved)
    assert code == 0, told
    file = moved / "model.onnx"
    assert f"Written: {file}" in told
    code, told = command("check", file, "--against", moved, *images, "--count", 8, "--seconds", 0)
    assert code == 0, told
    for given, remedy in (
        (("quantize", moved, "--calibration", "embedded:digits", "-o", tmp_path / "a.qvit"), "run"),
        (("sensitivity", moved, *images), "Give the run or the weights that it began with"),
        (("sensitivity", saved, *images), "Give the model that it was made from"),
        (("predict", moved, "photo.png"), f"quietvit export {moved}"),
    ):
        code, told = command(*given)
        assert code == 2, told
        assert remedy in told


def test_a_run_is_float_before_its_start_and_then_begins_as_the_quantized_model(
    tmp_path, monkeypatch, caplog
):
    """The first epoch is that of a float run; its weights are then quantized as by ``quantize``."""
    caplog.set_level(logging.WARNING, "quietvit")
    quantize_in_place, seen = loop.quantize_in_place, []

    def watched(training):
        model, images = training.models.plain, training.facts.images(8)
        expected = quietvit.quantize(model, "rtn", images, bits="W4A4", progress=False)
        before = torch.get_rng_state()
        moments = [dict(s) for s in training.optim.inner.state.values()]
        quantize_in_place(training)
        assert torch.equal(torch.get_rng_state(), before)
        now = training.optim.inner.state.values()
        assert [s["step"] for s in now] == [s["step"] for s in moments]
        with torch.no_grad():
            seen.append((expected.eval()(images), training.models.plain.eval()(images)))
        steps = {r.steps for r in training.optim.regularizers.values()}
        assert steps == {training.steps_per_epoch}
        training.models.wrapped.train()

    monkeypatch.setattr(loop, "quantize_in_place", watched)
    changes = {"decay": EACH, "log_every": 1}
    mine = lines(run(tmp_path / "qat", **changes, **qat(start_epoch=1)).output)
    plain = lines(run(tmp_path / "plain", **changes).output)
    assert mine[:7] == plain[:7]
    assert mine[7:] != plain[7:]
    assert len(seen) == 1
    assert torch.equal(*seen[0])
    assert "the run trains in W4A4 rtn from here on, with learned steps" in caplog.text


@pytest.mark.parametrize("steps", ["learned", "fixed"])
def test_steps_are_learned_or_stay_as_calibrated(tmp_path, steps):
    changes = qat(
        steps=steps,
        bits="W4A4+attention-maps-8",
        options={"exclude": ["head"]},
        method="rtn-omse",
    )
    training = build(config(tmp_path / "run", **changes)).training
    before = training.models.plain
    learned = [q for q in before.quantizers.values() if isinstance(q, LearnedAffine)]
    assert (len(learned) == len(before.quantizers)) == (steps == "learned")
    start = {name: q.scale.detach().clone() for name, q in before.quantizers.items()}
    result = run(tmp_path / "run", **changes)
    after = result.load_model()
    same = [torch.equal(q.scale, start[name]) for name, q in after.quantizers.items()]
    assert all(same) if steps == "fixed" else not any(same)
    assert {q.bits for q in after.quantizers.values()} == {4, 8}
    assert after.method.exclude == ("head",)
    assert after.coverage.by_bits == before.coverage.by_bits
    groups = training.optim.inner.param_groups
    assert [g["weight_decay"] for g in groups][2:] == [0.0] * (steps == "learned")


def test_overrides_and_methods_that_change_weights(tmp_path):
    changes = qat(method="smoothquant", overrides={"post_softmax": 8, "*.fc2": "float"})
    result = run(tmp_path / "run", epochs=1, precision="bf16", ema={"decay": 0.5}, **changes)
    report = result.load_model().report()
    assert "post_softmax 8 bits" in report
    assert "float by overrides['*.fc2']" in report


def test_a_dry_run_measures_the_quantized_model(tmp_path):
    assert estimate(config(tmp_path / "run", **qat(start_epoch=1))).step_seconds > 0
    assert not (tmp_path / "run").exists()


def test_a_detector_trains_quantized(tmp_path, test_data):
    pytest.importorskip("faster_coco_eval")
    folder = test_data / "bccd"
    content = {
        "task": "detection",
        "task_settings": SETTINGS,
        "model": BACKBONE,
        "data": {
            "dataset": f"coco:{folder}/train.json,{folder}/test.json",
            "train_images": 4,
            "test_images": 2,
        },
        "epochs": 1,
        "batch_size": 2,
        "device": "cpu",
        "threads": 1,
        "tensorboard": False,
        "output": str(tmp_path / "run"),
        **qat(bits="W8A8", images=2),
    }
    result = train(parse_config(content), progress=False)
    model = result.load_model()
    _, test = result.task.open_data()
    loader = result.task.evaluation_loader(model.model, test, 2, 0)
    assert result.task.score([result.task.judge(model, loader)]) == result.score


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"method": "rtm"}, "there is no method 'rtm'; did you mean 'rtn'"),
        ({"bits": "4"}, "bits are written like W8A8"),
        ({"options": {"alfa": 1}}, "'alfa=1' is not an option of rtn"),
        ({"overrides": {"post_softmax": 77}}, "bits are an integer from 2 to 16"),
        ({"bits": "W4A4+head=8", "overrides": {"head": 4}}, "are given twice"),
        ({"steps": "lsq"}, "qat.steps"),
        ({"start_epoch": 2}, r"qat.start_epoch \(2\) must be below epochs \(2\)"),
        ({"images": 61}, "qat.images is 61, but .* has 60 images for training"),
        ({"start_epoch": 1, "overrides": {"post_softmx": 8}}, "'post_softmx' is not a role"),
        ({"start_epoch": 1, "options": {"exclude": ["haed"]}}, "exclude='haed' matches none"),
        ({"start_epoch": 1, "method": "hptq"}, "hptq with these settings has no step that can be"),
        ({"start_epoch": 1, "options": {"exclude": ["*"]}}, "rtn with these settings has no step"),
        ({"start_epoch": 1, "options": {"number_format": "mx"}}, "rtn with these settings has no"),
    ],
)
def test_bad_settings_are_refused_before_any_training(tmp_path, changes, told):
    with pytest.raises(QuietvitError, match=told):
        run(tmp_path / "run", **qat(**changes))
    assert not list((tmp_path / "run").glob("[!.]*"))


def test_what_does_not_go_together(tmp_path, whole):
    for key, value in (("compile", True), ("parallel", "fsdp2")):
        with pytest.raises(QuietvitError, match=f"qat does not work with {key}={value!r}"):
            config(tmp_path, **qat(), **{key: value})
    with pytest.raises(QuietvitError, match="a comparison quantizes after training"):
        CompareConfig(recipe=config(tmp_path, decay=EACH, **qat()))
    with pytest.raises(QuietvitError, match=r"model.qvit to evaluate, export and check"):
        build_model(str(whole(1).output), None, None, None)
    with pytest.raises(QuietvitError, match=r"qat.bits was 'W4A4' and is 'W8A8'"):
        run(whole(1).output, resume=True, **EVERYTHING, **qat(start_epoch=1, bits="W8A8"))
    with pytest.raises(QuietvitError, match="holds a finished run"):
        run(whole(1).output, **EVERYTHING, **qat(start_epoch=1))


def test_two_processes_train_one_quantized_model(tmp_path):
    """They change to it together, and hold the same weights and steps to the end."""
    fork(tmp_path, job(tmp_path / "run", **SHARED, decay=CD, **qat(start_epoch=1)))
    one, other = ranks(tmp_path / "run")
    assert one.keys() == other.keys()
    assert any(name.endswith("log_ratio") for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one)
    saved = TrainResult.read(tmp_path / "run").load_model()
    scales = {name: q.scale for name, q in saved.quantizers.items()}
    for name, scale in scales.items():
        parts_of_it = one[f"quantizers.{name}.start"], one[f"quantizers.{name}.log_ratio"]
        assert torch.equal(scale, parts_of_it[0] * parts_of_it[1].exp()), name
