"""Decay at the rate an optimizer really uses, of the weights it really keeps.

The optimizers of packages that are not installed are played by small ones with their interface.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import timm.optim
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quietvit.decay import (
    ColinearityDecay,
    KurtosisRegularization,
    NormGainDecay,
    PairWeightDecay,
    SpectralDecay,
)
from quietvit.errors import QuietvitError
from quietvit.pairs import MatrixPair
from quietvit.tracing import WeightView

PAIRS = [MatrixPair(WeightView("0"), WeightView("1"), "mlp")]
STEPS = 60


class Prodigy(Optimizer):
    """As prodigyopt: a step by the d it had, at which it finds the next one."""

    def __init__(self, params: Any, lr: float = 1.0, use_bias_correction: bool = False) -> None:
        options = {"lr": lr, "d": 1e-4, "d0": 1e-4, "k": 0, "betas": (0.9, 0.999)}
        super().__init__(params, options | {"use_bias_correction": use_bias_correction})
        self.rates: list[float] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            rate, k = group["d"] * group["lr"], group["k"] + 1
            if group["use_bias_correction"]:
                rate *= math.sqrt(1 - 0.999**k) / (1 - 0.9**k)
            self.rates.append(rate)
            group["d"] *= 1.05
            group["k"] = k
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=rate)


class ScheduleFree(Optimizer):
    """As schedulefree's SGD with a warm-up: the weight is y between z and the average x."""

    def __init__(self, params: Any, lr: float = 0.05, warmup_steps: int = 0) -> None:
        options = {"lr": lr, "momentum": 0.9, "k": 0, "scheduled_lr": 0.0, "weight_sum": 0.0}
        super().__init__(params, options | {"warmup_steps": warmup_steps, "train_mode": False})
        self.rates: list[float] = []

    def _to(self, train: bool, weight: float) -> None:
        for group in self.param_groups:
            for parameter in group["params"] if group["train_mode"] is not train else ():
                if "z" in self.state[parameter]:
                    parameter.data.lerp_(end=self.state[parameter]["z"], weight=weight)
            group["train_mode"] = train

    def train(self) -> None:
        self._to(True, 1 - 0.9)

    def eval(self) -> None:
        self._to(False, 1 - 1 / 0.9)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            assert group["train_mode"]
            warm = min(1.0, (group["k"] + 1) / max(1, group["warmup_steps"]))
            rate = group["scheduled_lr"] = group["lr"] * warm
            self.rates.append(rate)
            group["k"] += 1
            group["weight_sum"] += rate**2
            share = rate**2 / group["weight_sum"]
            for parameter in group["params"]:
                z = self.state[parameter].setdefault("z", parameter.detach().clone())
                parameter.lerp_(end=z, weight=share)
                parameter.add_(parameter.grad, alpha=rate * (0.9 * (1 - share) - 1))
                z.sub_(parameter.grad, alpha=rate)


def foreign(module: str, name: str, **options: Any) -> Any:
    """An optimizer of a package that need not be there."""

    def make(parameters: Any) -> Optimizer:
        found = pytest.importorskip(module)
        made: Optimizer = getattr(found, name)(parameters, **options)
        return made

    return make


def adafactor(**options: Any) -> Any:
    return lambda parameters: importlib.import_module("transformers.optimization").Adafactor(
        parameters, **options
    )


TESTED: dict[str, Any] = {
    "prodigy": Prodigy,
    "prodigy, corrected": lambda p: Prodigy(p, use_bias_correction=True),
    "schedule-free": ScheduleFree,
    "schedule-free, warm-up": lambda p: ScheduleFree(p, warmup_steps=40),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0),
    "lr tensor": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.05, dtype=torch.float64)),
    "torch adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
    "torch muon": lambda p: torch.optim.Muon(p, lr=0.05, weight_decay=0),
    "timm muon": lambda p: timm.optim.Muon(p, lr=0.05, weight_decay=0),
    "timm adafactor": timm.optim.Adafactor,
    "transformers adafactor": adafactor(),
    "transformers adafactor, scaled lr": adafactor(lr=0.05, relative_step=False),
    "madgrad": lambda p: timm.optim.MADGRAD(p, lr=0.05),
    "lookahead": lambda p: timm.optim.Lookahead(torch.optim.SGD(p, lr=0.05)),
    "lamb": lambda p: timm.optim.Lamb(p, lr=0.05, weight_decay=0),
    "schedulefree AdamW": foreign("schedulefree", "AdamWScheduleFree", lr=0.05, warmup_steps=9),
    "schedulefree RAdam": foreign("schedulefree", "RAdamScheduleFree", lr=0.05),
    "schedulefree SGD": foreign("schedulefree", "SGDScheduleFree", lr=0.05),
    "schedulefree reference": foreign("schedulefree", "AdamWScheduleFreeReference", lr=0.05),
    "prodigyopt": foreign("prodigyopt", "Prodigy", lr=1.0),
    "dadaptation Adam": foreign("dadaptation", "DAdaptAdam", lr=1.0),
    "dadaptation Adan": foreign("dadaptation", "DAdaptAdan", lr=1.0),
    "dadaptation Lion": foreign("dadaptation", "DAdaptLion", lr=1.0),
    "dadaptation AdaGrad": foreign("dadaptation", "DAdaptAdaGrad", lr=1.0),
    "prodigy-plus": foreign("prodigyplus.prodigy_plus_schedulefree", "ProdigyPlusScheduleFree"),
}  # fmt: skip


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 18, bias=False), nn.Linear(18, 20, bias=False)).double()


def noted(decay: Any) -> list[float]:
    """The rates by which the first weight decays, step by step."""
    rates: list[float] = []
    original = decay._rates

    def noting(optimizer: Any, factor: float) -> dict[str, float]:
        found: dict[str, float] = original(optimizer, factor)
        rates.append(found["0.weight"])
        return found

    decay._rates = noting
    return rates


def stepped(optimizer: Any, model: nn.Module, steps: int = STEPS, size: float = 0.0) -> None:
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = size * torch.randn_like(parameter)
        optimizer.step()


@pytest.mark.parametrize("name", TESTED)
@pytest.mark.filterwarnings("ignore")
def test_what_is_left_of_a_weight_is_what_the_rates_say(name: str) -> None:
    """Without a gradient: product of (1 - rate x strength), in what is evaluated and saved."""
    model = layers()
    if name == "prodigy-plus":
        model = model.float()
    optimizer = TESTED[name](model.parameters())
    decay = PairWeightDecay(model, strength=0.8, pairs=PAIRS).attach(optimizer)
    rates, before = noted(decay), model[0].weight.detach().clone()
    if hasattr(optimizer, "train"):
        optimizer.train()
    stepped(optimizer, model)
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    left = math.prod(1 - 0.8 * rate for rate in rates)
    assert len(rates) == STEPS
    assert left < 1
    assert torch.allclose(model[0].weight, before * left, rtol=1e-5)
    own = getattr(optimizer, "rates", None)
    assert own is None or rates == pytest.approx(own)


def test_the_rate_of_an_adafactor_without_lr_is_that_of_its_rule() -> None:
    for make in (timm.optim.Adafactor, adafactor()):
        model = layers()
        optimizer = make(model.parameters())
        rates = noted(PairWeightDecay(model, strength=0.5, pairs=PAIRS).attach(optimizer))
        sizes = []
        for _ in range(3):
            sizes.append(float(model[0].weight.detach().square().mean().sqrt()))
            stepped(optimizer, model, 1)
        assert rates == pytest.approx([0.01 * size for size in sizes], rel=1e-6)


def test_what_muon_leaves_to_adamw_decays_at_the_rate_of_adamw() -> None:
    model = nn.Sequential(layers(), nn.LayerNorm(20)).double()
    groups = [
        {"params": [model[0][0].weight]},
        {"params": [model[0][1].weight], "use_fallback": True},
    ]
    optimizer = timm.optim.Muon(groups, lr=0.05, weight_decay=0, fallback_lr_scale=0.1)
    pairs = [MatrixPair(WeightView("0.0"), WeightView("0.1"), "mlp")]
    decay = PairWeightDecay(model, strength=0.5, pairs=pairs).attach(optimizer)
    stepped(optimizer, model, 1, 1.0)
    rates = decay._rates(optimizer, 1.0)
    assert rates == {"0.0.weight": pytest.approx(0.05), "0.1.weight": pytest.approx(0.005)}


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adagrad(p, lr=0.05, lr_decay=0.5),
        lambda p: torch.optim.ASGD(p, lr=0.05, lambd=20.0, t0=1e9),
        lambda p: timm.optim.Mars(p, lr=0.05, weight_decay=1.0, lr_1d_factor=0.3),
    ],
    ids=["adagrad", "asgd", "mars"],
)
def test_the_rate_is_that_of_the_optimizers_own_step(make: Any) -> None:
    """The first change is the rate times the gradient's sign, or the weight's own decay."""
    model = nn.Sequential(nn.LayerNorm(20), layers()).double()
    optimizer, gain = make(model.parameters()), model[0].weight
    decay = NormGainDecay(model, torch.randn(2, 20).double(), strength=0.0).attach(optimizer)
    for step in range(3):
        gain.data.fill_(1.0)
        before = [*optimizer.state.values()]
        total = 1.0 if not before or "sum" not in before[0] else float(before[0]["sum"][0]) + 1.0
        stepped_gain(model, optimizer)
        moved = float(1.0 - gain.detach()[0])
        rate = decay._rates(optimizer, 1.0)["0.weight"]
        unit = {"Adagrad": total**-0.5, "ASGD": 1.0 + 20.0, "Mars": 2.0}[type(optimizer).__name__]
        assert moved == pytest.approx(rate * unit, rel=1e-6), step


def stepped_gain(model: nn.Module, optimizer: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def decays(model: nn.Module, name: str) -> Any:
    image = torch.randn(2, 20).double()
    if name == "cd":
        return ColinearityDecay(model, pairs=PAIRS)
    if name == "gains":
        return NormGainDecay(model, image, strength=3.0)
    if name == "kure":
        return KurtosisRegularization(model, image, coupled=False)
    options = {"images": image, "threshold": 0.0, "refresh": 1}
    return SpectralDecay(model, image, coupled=False, strength=0.1, **options)


class Normed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*layers(), nn.LayerNorm(20), nn.Linear(20, 20), nn.Linear(20, 3))


@pytest.mark.parametrize("name", ["cd", "gains", "s2d", "kure"])
@pytest.mark.parametrize("make", [Prodigy, ScheduleFree])
def test_every_decoupled_regularizer_takes_the_rate_and_moves_the_average(
    make: Any, name: str
) -> None:
    """As beside plain SGD at the same rates: without a gradient nothing else is to be seen."""
    found = []
    for kind in (make, None):
        torch.manual_seed(0)
        model = Normed().double()
        used = make(model.parameters())
        optimizer = used if kind else torch.optim.SGD(model.parameters(), lr=used.defaults["lr"])
        decays(model, name).attach(optimizer)
        if isinstance(optimizer, ScheduleFree):
            optimizer.train()
        for _ in range(5):
            if make is Prodigy and kind is None:
                optimizer.param_groups[0]["lr"] = 1e-4 * 1.05**_
            stepped(optimizer, model, 1)
        if isinstance(optimizer, ScheduleFree):
            optimizer.eval()
        found.append([parameter.detach() for parameter in model.parameters()])
    torch.manual_seed(0)
    start = list(Normed().double().parameters())
    assert any(not torch.equal(one, other) for one, other in zip(found[0], start, strict=True))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)


def test_with_gradients_the_average_decays_as_plain_weight_decay_lets_the_last_weight() -> None:
    """Schedule-free: what is evaluated goes towards zero, and is not drawn back to z."""
    model = layers()
    optimizer = ScheduleFree(model.parameters())
    PairWeightDecay(model, strength=1.0, pairs=PAIRS).attach(optimizer)
    before = model[0].weight.detach().clone()
    optimizer.train()
    stepped(optimizer, model, 100, 1e-3)
    optimizer.eval()
    left = float((model[0].weight.detach() * before).sum() / before.square().sum())
    assert left == pytest.approx(0.95**100, abs=2e-3)  # 0.006, and 0.16 where y alone moves


def unusable(lr: Any) -> Any:
    def make(parameters: Any) -> Optimizer:
        made = torch.optim.SGD(parameters, lr=0.1)
        made.param_groups[0]["lr"] = lr
        return made

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: timm.optim.Lars(p, lr=0.1), r"Lars multiplies its rate \(lr=0\.1\) by a trust"),
        (torch.optim.Rprop, r"Rprop finds a step for each weight .* so its lr=0\.01 is no rate"),
        (
            lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe"),
            "LBFGS finds the size of each step by a line search",
        ),
        (unusable(None), "lr=None, so PairWeightDecay cannot know"),
        (unusable("0.1x"), "lr='0.1x'"),
        (unusable(Tensor([0.1, 0.2])), "one number for each group"),
        (unusable(math.nan), "lr=nan"),
    ],
)
def test_an_unknown_rate_is_refused_before_the_first_step(make: Any, message: str) -> None:
    model = layers()
    optimizer = make(model.parameters())
    with pytest.raises(QuietvitError, match=message):
        PairWeightDecay(model, strength=1.0, pairs=PAIRS).attach(optimizer)
    KurtosisRegularization(model, torch.randn(2, 20).double()).attach(optimizer)  # is coupled
