"""A regularizer of one's own: one class and one row, then recipes, runs and resumes know it."""

from __future__ import annotations

import inspect
import json
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import quietvit
from decay_cases import tower, weights
from quietvit.decay import (
    BaseRegularizer,
    Regularizer,
    RegularizerConfig,
    WeightRegularizerConfig,
    WholeUpdate,
    register_regularizer,
    registered_regularizers,
    registry,
)
from quietvit.errors import QuietvitError
from quietvit.train import load_recipe, parse_config
from quietvit.train.config import decay_config
from quietvit.train.recipe import known_keys
from test_train_loop import assert_same, interrupt, run


class L1Config(WeightRegularizerConfig):
    """L1 decay of matrices."""

    strength: float = 0.01
    """In units of the learning rate."""


class L1Decay(WholeUpdate):
    """w <- w - lr strength sign(w), never through zero."""

    def __init__(self, model: Any, example: Any = None, **options: Any) -> None:
        super().__init__(model, **options)

    def parameter_names(self) -> tuple[str, ...]:
        return tuple(n for n, p in self.model.named_parameters() if p.ndim > 1)

    def changes(
        self, parameters: Mapping[str, Tensor], rates: Mapping[str, float]
    ) -> dict[str, Tensor]:
        def change(w: Tensor, step: float) -> Tensor:
            return -w.sign() * w.abs().clamp_max(step)

        return {name: change(parameters[name], self.strength * rates[name]) for name in rates}

    def penalties(self) -> dict[str, float]:
        return {name: float(w.abs().sum()) for name, w in self.parameters().items()}


class L2Term(BaseRegularizer):
    """A term of the loss: half the squares of all parameters."""

    def __init__(self, model: Any, example: Any, *, strength: float, schedule: Any = None) -> None:
        super().__init__(model, schedule=schedule)
        self.strength = strength

    def attach(self, optimizer: torch.optim.Optimizer) -> L2Term:
        return self

    def settings(self) -> dict[str, Any]:
        return {"strength": self.strength}

    def loss(self) -> Tensor:
        terms = [p.square().sum() for p in self.model.parameters()]
        return torch.stack(terms).sum() * (self.strength / 2)

    def penalties(self) -> dict[str, float]:
        return {"all": float(self.loss()) / self.strength}


class L2Config(RegularizerConfig):
    """A term of the loss."""

    strength: float = 0.1


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers both, until the test ends."""
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    quietvit.register_regularizer("l1", L1Config)(L1Decay)
    register_regularizer("l2", L2Config)(L2Term)


@pytest.mark.usefixtures("own")
def test_a_recipe_sets_it_and_a_run_trains_logs_and_resumes_with_it(tmp_path, monkeypatch):
    recipe = load_recipe("digits", ["decay.l1.strength=0.5", "decay.l1.every=2"])
    assert recipe.decay.l1 == L1Config(strength=0.5, every=2)
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert "decay.l1.every" in known_keys()
    changes = {"epochs": 1, "decay": {"l1": {"strength": 5.0}, "l2": {}}}
    whole = run(tmp_path / "whole", **changes)
    interrupt(tmp_path / "run", monkeypatch, 3, **changes)
    with pytest.raises(QuietvitError, match=r"decay\.l1\.strength was 5\.0 and is 6\.0"):
        run(tmp_path / "run", resume=True, epochs=1, decay={"l1": {"strength": 6.0}, "l2": {}})
    assert_same(run(tmp_path / "run", resume=True, **changes), whole)
    logged = [json.loads(line) for line in (whole.output / "metrics.jsonl").open()]
    penalties = [line["penalty_l1"] for line in logged if "penalty_l1" in line]
    assert penalties == sorted(penalties, reverse=True)
    assert len(penalties) == 7
    assert all(line["penalty_l2"] > 0 for line in logged if "penalty_l1" in line)


@pytest.mark.usefixtures("own")
def test_it_does_what_its_class_says() -> None:
    model = tower()
    made = L1Decay(model, strength=0.5)
    assert isinstance(made, Regularizer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made.attach(optimizer)
    before = weights(model)
    optimizer.step()
    for name, parameter in model.named_parameters():
        old = before[name]
        new = old - old.sign() * old.abs().clamp_max(0.05) if parameter.ndim > 1 else old
        torch.testing.assert_close(parameter.detach(), new)
    with pytest.raises(QuietvitError, match="saved with strength="):
        L1Decay(model, strength=0.6).load_state_dict(made.state_dict())


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"l1": {"strenght": 1}}, r"no key 'decay\.l1\.strenght'; did you mean .*l1\.strength"),
        ({"l3": {}}, r"no key 'decay\.l3'"),
        ({"l1": 3}, r"decay\.l1: this is a section"),
        ({"cd": {"strength": {"mlp": -1}}}, r"decay\.cd\.strength\.mlp: .*greater than or equal"),
    ],
)
def test_mistakes_in_sections_are_told_by_their_keys(section: Any, message: str) -> None:
    with pytest.raises(QuietvitError, match=message):
        parse_config({"model": {"name": "x"}, "data": {"dataset": "y"}, "decay": section})


@pytest.mark.parametrize(
    ("name", "config_class", "message"),
    [
        ("cd", L1Config, r"belongs to quietvit\.decay\.colinearity\.ColinearityDecay"),
        ("l 1", L1Config, "cannot name a section"),
        ("watch_every", L1Config, "cannot name a section"),
        ("l1", dict, r"subclass of quietvit\.decay\.RegularizerConfig"),
    ],
)
def test_a_row_that_cannot_be_is_refused(name: str, config_class: Any, message: str) -> None:
    with pytest.raises(QuietvitError, match=message):
        register_regularizer(name, config_class)(L1Decay)
    assert "l1" not in decay_config().model_fields


def test_every_section_has_the_arguments_and_defaults_of_its_class() -> None:
    for entry in registered_regularizers():
        arguments = inspect.signature(entry.make).parameters
        for key, field in entry.config.model_fields.items():
            if (entry.name, key) == ("cd", "total"):  # it becomes a strength
                continue
            assert key in arguments, f"{entry.name}.{key}"
            default = arguments[key].default
            if key not in ("images", "strength") or entry.name == "cd":
                assert default == field.default, f"{entry.name}.{key}"
            assert field.description, f"{entry.name}.{key} says nothing"


def test_signatures_show_plain_types() -> None:
    shown = str(inspect.signature(quietvit.ColinearityDecay))
    assert "strength: float | Mapping[str, float] = 1.0" in shown
    for entry in registered_regularizers():
        for signature in (inspect.signature(entry.make), inspect.signature(entry.config)):
            assert not any(part in str(signature) for part in ("'nn.", "Annotated", "Validator"))
