"""Laws: a detector trains, resumes and is judged as every task, and CD finds its pairs."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import quietvit
from detection_cases import BACKBONE, SETTINGS, annotated, coco
from quietvit.compare import CompareConfig, compare
from quietvit.detection import detection_loader, evaluate_detector
from quietvit.detection.detectors import DETECTORS
from quietvit.errors import QuietvitError
from quietvit.tasks import Detection
from quietvit.train import TrainResult, load_recipe, parse_config, train
from quietvit.train.estimate import estimate
from test_train_loop import StoppedError, assert_same, loop

pytest.importorskip("faster_coco_eval")


def config(output, spec="", **changes):
    content = {
        "task": "detection",
        "task_settings": SETTINGS,
        "model": BACKBONE,
        "data": {"dataset": spec, "train_images": 8, "test_images": 4},
        "optimizer": {"lr": 4e-3, "clip_grad": 1.0, "lr_scale": {"backbone.body.*": 0.5}},
        "decay": {"cd": {"strength": 1.0}},
        "epochs": 2,
        "batch_size": 2,
        "log_every": 1,
        "tensorboard": False,
        "device": "cpu",
        "threads": 1,
        "checkpoint": {"every": 3, "keep": 2},
        "output": str(output),
    }
    return parse_config(content | changes)


@pytest.fixture(scope="module")
def blood(request):
    folder = request.getfixturevalue("test_data") / "bccd"
    return f"coco:{folder}/train.json,{folder}/test.json"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, blood):
    return train(config(tmp_path_factory.mktemp("whole") / "run", blood), progress=False)


def test_a_detector_trains_on_real_images_with_cd(trained):
    logged = [json.loads(line) for line in (trained.output / "metrics.jsonl").open()]
    losses = [line["loss"] for line in logged if "loss" in line]
    assert len(losses) == 8
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert all(line["penalty_cd"] > 0 for line in logged if "loss" in line)
    content = json.loads((trained.output / "result.json").read_text())
    assert content["task"] == "detection"
    assert content["ap"] == trained.score >= 0
    assert content["class_names"] == ["RBC", "WBC", "Platelets"]


def test_an_interrupted_detector_resumes_bit_for_bit(trained, tmp_path, blood, monkeypatch):
    after_step = loop._Loop._after_step

    def stop(self, batch):
        if self.step == 5:
            raise StoppedError
        return after_step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_after_step", stop)
        with pytest.raises(StoppedError):
            train(config(tmp_path / "run", blood), progress=False)
    again = train(config(tmp_path / "run", blood), resume=True, progress=False)
    assert_same(again, trained)


def test_a_trained_detector_is_loaded_judged_and_traced(trained):
    model = TrainResult.read(trained.output).load_model()
    assert model.class_names == ("RBC", "WBC", "Platelets")
    task = trained.task
    _, test = task.open_data()
    found = evaluate_detector(model, detection_loader(test, 2))
    assert found.ap == pytest.approx(trained.score, abs=1e-9)
    weights = load_file(trained.weights)
    assert set(weights) == set(model.state_dict())
    images = task.calibration(model, test, 1, seed=0)
    kinds = {pair.kind for pair in quietvit.find_pairs(model, images)}
    assert {"mlp", "value_output"} <= kinds or len(kinds) >= 2


def test_a_dry_run_measures_a_detector_without_data(tmp_path):
    found = estimate(config(tmp_path / "run", f"coco:{tmp_path}/none.json,b.json"))
    assert found.images is None
    assert "none.json" in found.missing
    assert found.step_seconds > 0
    assert found.trainable == found.parameters


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing belongs to classification"),
        ({"data": {"dataset": "embedded:digits"}}, "no data set with boxes is named"),
        ({"model": {"name": "hf:/folder"}}, "is a whole detector with its own weights"),
        ({"data": {"num_classes": 5}}, r"data\.num_classes is 5, but .* has 2"),
        ({"task_settings": SETTINGS | {"size": [60, 64]}}, "do not divide into the strides"),
    ],
)
def test_what_is_no_detection_is_refused(tmp_path, changes, told):
    path = coco(tmp_path, [annotated(1, 1, (10, 20, 30, 15))])
    data = {"dataset": f"coco:{path},{path}"} | changes.get("data", {})
    with pytest.raises(QuietvitError, match=told):
        train(config(tmp_path / "run", **changes | {"data": data}), progress=False)


def test_a_class_beyond_the_training_images_is_refused(tmp_path):
    train_file = coco(tmp_path / "a", [annotated(1, 1, (1, 2, 30, 15))],
                      categories=[{"id": 7, "name": "square"}])  # fmt: skip
    test_file = coco(tmp_path / "b", [annotated(1, 1, (1, 2, 30, 15), 3)])
    settings = SETTINGS | {"max_bad_boxes": 0}
    given = config(tmp_path / "run", f"coco:{train_file},{test_file}", task_settings=settings)
    with pytest.raises(QuietvitError, match="'disc', which the training images do not have"):
        Detection(given).open_data()


def test_weights_of_the_other_kind_are_refused_or_told(trained, caplog):
    from quietvit.data import create_model, load_weights

    classifier = create_model(BACKBONE["name"], 3, img_size=64, **BACKBONE["kwargs"])
    with pytest.raises(QuietvitError, match="weights of another architecture than FasterRCNN"):
        load_weights(trained.load_model(), classifier.state_dict())
    load_weights(classifier, trained.weights)
    assert "the weights below 'backbone.body.' are used" in caplog.text
    assert "it has no head 'head': it starts anew" in caplog.text


def test_the_recipe_is_a_detectors():
    found = load_recipe("detect_bccd_deit")
    assert found.task == "detection"
    settings = Detection(found).own
    assert (settings.size, settings.channels) == ((256, 320), 128)
    assert torch.tensor(settings.size).remainder(32).eq(0).all()


@pytest.mark.parametrize("detector", DETECTORS)
def test_reports_name_the_detector_and_its_backbone(tmp_path, detector):
    name = Detection(config(tmp_path, task_settings={"detector": detector})).model_name
    found, backbone = name.split(" on ")
    assert found.lower().replace(" ", "_").replace("-", "") == detector
    assert backbone == "vit_tiny_patch16_224"


def test_detectors_are_compared_in_ap(tmp_path):
    boxes = [annotated(i, i, [10, 10, 30, 20], 3 + 4 * (i % 2)) for i in (1, 2)]
    path = coco(tmp_path, boxes)
    spec = f"coco:{path},{path}"
    recipe = config(tmp_path / "x", spec, data={"dataset": spec}, epochs=1, checkpoint={})
    settings = {"bits": ("W4A4+repq-vit-detection",), "methods": ("repq-vit",)}
    images = {"calibration_images": 2, "diagnosed_images": 1}
    wanted = CompareConfig(recipe=recipe, seeds=(0,), **settings, **images)
    found = compare(wanted, tmp_path / "out", say=lambda _: None)
    scores = [run.score(setting) for run in found.results.runs for setting in run.quantized]
    assert all(0 <= score <= 100 for score in scores)
    assert "box AP" in found.verdict
    page = found.page.read_text()
    assert "<title>quietvit: Faster R-CNN on vit_tiny_patch16_224 with" in page
    assert "box AP in percent" in page
    assert "top-1" not in page
    assert "Accuracy" not in page
    assert (tmp_path / "out" / "results.csv").read_text().startswith("seed,arm,setting,ap,")


def test_commands_speak_ap_of_a_detector(trained, tmp_path, blood):
    from typer.testing import CliRunner

    from quietvit.cli import app

    def run(*arguments):
        return CliRunner().invoke(app, list(map(str, arguments)))

    told = run("evaluate", trained.output, "--images", blood, "--batch", 8)
    assert told.exit_code == 0, told.output
    assert "box AP" in told.output
    assert "on 72 images" in told.output
    saved = tmp_path / "mine.qvit"
    told = run("quantize", trained.output, "--calibration", blood, "--count", 4, "-o", saved)
    assert told.exit_code == 0, told.output
    told = run("evaluate", saved, "--model", trained.output, "--images", "imagefolder:x")
    assert told.exit_code == 2
    assert "no data set with boxes is named" in told.stderr
