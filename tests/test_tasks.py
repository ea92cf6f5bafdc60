"""Laws: the loop knows no task by name; a task of one's own trains, resumes and is reported."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from quietvit.errors import QuietvitError
from quietvit.section import Section
from quietvit.tasks import Classification, Metric, register_task, registry, task_named, task_names
from quietvit.train import TrainResult, parse_config, train
from test_train_loop import config, interrupt


class FocalSettings(Section):
    gamma: float = 2.0


class Focal(Classification):
    """Focal loss (arXiv 1708.02002), judged by the mean recall of the classes."""

    name = "focal"
    metric = Metric("recall", "mean recall", "%")
    settings = FocalSettings

    def loss(self, forward, batch):
        images, labels = batch
        nll = F.cross_entropy(forward(images), labels, reduction="none")
        return ((1 - torch.exp(-nll)) ** self.own.gamma * nll).mean()

    def judge(self, model, batches, device="cpu", progress=False):
        counts = torch.zeros(2, 10)
        model.eval()
        for images, labels in batches:
            right = model(images.to(device)).argmax(-1).cpu() == labels
            counts += torch.stack(
                [labels[right].bincount(minlength=10), labels.bincount(minlength=10)]
            )
        return counts

    def score(self, judged):
        right, total = sum(judged)
        return 100 * float((right / total)[total > 0].mean())


@pytest.fixture
def focal(monkeypatch):
    monkeypatch.setattr(registry, "_TASKS", dict(registry._TASKS))
    return register_task(Focal)


@pytest.mark.usefixtures("focal")
def test_a_task_of_ones_own_trains_resumes_exactly_and_names_its_figure(tmp_path, monkeypatch):
    own = {"task": "focal", "task_settings": {"gamma": 1.5}, "evaluate_every": 1}
    whole = train(config(tmp_path / "whole", **own), progress=False)
    assert json.loads((whole.output / "result.json").read_text())["recall"] == whole.score
    logged = [json.loads(line) for line in (whole.output / "metrics.jsonl").open()]
    assert [line["recall"] for line in logged if "recall" in line][-1] == whole.score
    assert not any("top1" in line for line in logged)
    assert TrainResult.read(whole.output) == whole
    with pytest.raises(AttributeError, match="judged by mean recall"):
        _ = whole.top1
    interrupt(tmp_path / "cut", monkeypatch, 5, **own)
    cut = train(config(tmp_path / "cut", **own), resume=True, progress=False)
    assert cut.score == whole.score
    one, other = load_file(cut.weights), load_file(whole.weights)
    assert all(torch.equal(one[name], other[name]) for name in other)
    with pytest.raises(QuietvitError, match=r"task_settings\.gamma was 1\.5 and is 2\.0"):
        train(config(tmp_path / "whole", **own | {"task_settings": {"gamma": 2.0}}), resume=True)
    plain = load_file(train(config(tmp_path / "plain"), progress=False).weights)
    assert not all(torch.equal(plain[name], other[name]) for name in other)


@pytest.mark.usefixtures("focal")
@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"task": "fokal"}, r"no task is named 'fokal'; did you mean 'focal'"),
        ({"task": "focal", "task_settings": {"gama": 1}}, r"task_settings\.gama"),
        ({"task_settings": {"gamma": 1}}, r"task_settings\.gamma"),
    ],
)
def test_a_wrong_task_or_setting_is_refused_with_its_key(tmp_path, own, told):
    content = config(tmp_path).model_dump(mode="json") | own
    with pytest.raises(QuietvitError, match=told):
        parse_config(content, "the recipe")


def test_a_name_is_given_once(focal):
    assert task_names() == ("classification", "detection", "focal")
    assert register_task(focal) is focal
    with pytest.raises(QuietvitError, match="registered already"):
        register_task(type("Other", (Focal,), {}))
    assert task_named("classification") is Classification
