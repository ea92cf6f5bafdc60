"""Strength times the sum of learning rates: of torch's schedulers, and of a recipe."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import quietvit
from quietvit.decay.colinearity import ColinearityConfig
from quietvit.errors import QuietvitError
from quietvit.train import train
from test_train_loop import config, interrupt, lines, run

STEPS = 12
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "constant": lambda o: lr_scheduler.ConstantLR(o, 1.0),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=STEPS + 1),
    "warm-up": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1, 3), lr_scheduler.CosineAnnealingLR(o, 9)], [3]
    ),
}


def optimizer_and_scheduler(make: Callable[[Any], Any]) -> tuple[torch.optim.Optimizer, Any]:
    layer = nn.Linear(3, 3)
    layer.weight.grad, layer.bias.grad = torch.zeros(3, 3), torch.zeros(3)
    groups = [{"params": [layer.weight]}, {"params": [layer.bias], "lr": 0.5}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    return optimizer, make(optimizer)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_total_is_strength_times_the_rates_that_the_scheduler_gives(name: str) -> None:
    optimizer, scheduler = optimizer_and_scheduler(SCHEDULERS[name])
    before = (scheduler.state_dict(), [group["lr"] for group in optimizer.param_groups])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strength = quietvit.strength_for_total(0.06, scheduler, STEPS)
    assert (scheduler.state_dict(), [g["lr"] for g in optimizer.param_groups]) == before
    summed = 0.0
    for _ in range(STEPS):
        summed += optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
    assert strength * summed == pytest.approx(0.06)


def test_a_sum_that_cannot_be_known_is_refused() -> None:
    optimizer, plateau = optimizer_and_scheduler(lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(QuietvitError, match="ReduceLROnPlateau takes its rates from what only"):
        quietvit.strength_for_total(0.06, plateau, STEPS)
    with pytest.raises(QuietvitError, match=r"takes a scheduler of torch\.optim"):
        quietvit.strength_for_total(0.06, optimizer, STEPS)
    _, zero = optimizer_and_scheduler(lambda o: lr_scheduler.LambdaLR(o, lambda _: 0.0))
    with pytest.raises(QuietvitError, match="rates of 12 steps add up to 0"):
        quietvit.strength_for_total(0.06, zero, STEPS)
    _, constant = optimizer_and_scheduler(SCHEDULERS["constant"])
    for total, steps, text in ((0, 3, "total above 0"), (-1, 3, "total"), (0.06, 0, "steps")):
        with pytest.raises(QuietvitError, match=text):
            quietvit.strength_for_total(total, constant, steps)


def test_a_recipe_with_a_total_has_the_strength_of_its_own_rates(tmp_path, monkeypatch) -> None:
    given = []
    real = ColinearityConfig.arguments

    def kept(self: ColinearityConfig, facts: Any) -> dict[str, Any]:
        given.append(real(self, facts))
        return given[-1]

    monkeypatch.setattr(ColinearityConfig, "arguments", kept)
    asked = config(tmp_path, decay={"cd": {"total": 0.05}}, schedule={"warmup_epochs": 0.5})
    train(asked)
    rates = [line["lr"] for line in lines(tmp_path) if "lr" in line]
    assert len(rates) > 3
    assert "total" not in given[0]
    assert given[0]["strength"] * sum(rates) == pytest.approx(0.05)
    with pytest.raises(ValueError, match=r"strength is 0\.3 and total is 0\.05"):
        ColinearityConfig(strength=0.3, total=0.05)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_run_with_a_total_goes_on_at_a_lower_rate(tmp_path, monkeypatch, quantized) -> None:
    """A run that diverged goes on so. Its strength stays that of its start, also into QAT."""
    kept = []
    real = quietvit.ColinearityDecay.load_state_dict

    def load(self: quietvit.ColinearityDecay, state: Any) -> None:
        real(self, state)
        kept.append((self.strength, state["settings"]["strength"]))

    monkeypatch.setattr(quietvit.ColinearityDecay, "load_state_dict", load)
    given: dict[str, Any] = {"decay": {"cd": {"total": 0.05}}}
    if quantized:
        given["qat"] = {"method": "rtn", "bits": "W4A4", "images": 8, "start_epoch": 1}
    interrupt(tmp_path, monkeypatch, at=5, **given)
    run(tmp_path, resume=True, optimizer={"lr": 1e-4}, **given)
    assert len(kept) == 1 + quantized  # of the checkpoint, and when the model is quantized
    assert len({strength for pair in kept for strength in pair}) == 1
