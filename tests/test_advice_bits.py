"""Bits of each site under a budget: the best choice, the budget, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import quietvit
import zoo
from quietvit.advice import Sensitivity
from quietvit.advice import bits as module
from quietvit.advice.sizes import average_bits
from quietvit.errors import QuietvitError

CHOICES = ("W4A4", "W8A8")


class Net(nn.Module):
    """Three layers: small enough to try every choice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 8), nn.Linear(8, 40), nn.Linear(40, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.flatten(1)).relu()
        return self.head(self.third(self.second(x).relu()).relu())


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(32, 3, 2, 2)


@pytest.mark.parametrize("budget", [{"average": 6.0}, {"weight_bytes": 1000.0}])
def test_the_choice_is_the_best_of_all_within_the_budget(net, images, budget):
    method = quietvit.RTN(patch_embed_bits="same", head_bits="same")
    choice = quietvit.choose_bits(
        net, method, images, choices=CHOICES, estimate=False, progress=False, **budget
    )
    costs = {
        bits: {
            part.name: part.alone.kl
            for part in quietvit.sensitivity(
                net, module.with_bits(method, *map(int, bits[1::2])), images, progress=False
            ).sites
        }
        for bits in CHOICES
    }
    trace = quietvit.trace(net, images[:1])
    names = [site.name for site in trace.matmuls]

    def used(bits: tuple[str, ...]) -> float:
        overrides = dict(zip(names, bits, strict=True))
        tried = module.with_bits(method, 4, 4, overrides)
        measure = average_bits if "average" in budget else module.weight_size
        return measure(trace, tried)

    allowed = [
        (sum(costs[b][n] for n, b in zip(names, bits, strict=True)), bits)
        for bits in itertools.product(CHOICES, repeat=len(names))
        if used(bits) <= next(iter(budget.values()))
    ]
    best = min(allowed)
    assert choice.cost == pytest.approx(best[0], rel=1e-5)
    assert tuple(choice.overrides[name] for name in names) == best[1]
    assert len(set(choice.overrides.values())) == 2
    assert used(best[1]) == getattr(
        choice, "average_bits" if "average" in budget else "weight_bytes"
    )


def test_the_method_quantizes_as_chosen(tmp_path):
    model, example = zoo.build("timm-vit")
    images = torch.randn(8, *example.shape[1:])
    choice = quietvit.choose_bits(model, "rtn-omse", images, average=6.0, progress=False)
    assert choice.average_bits <= 6.0
    quantized = quietvit.quantize(model, choice.method, images, progress=False)
    for name, bits in choice.overrides.items():
        found = {
            q.bits
            for key, q in quantized.quantizers.items()
            if key.startswith(name.replace(".", "/") + ":")
        }
        assert found == {int(bits[1])}
    assert "patch_embed.proj" not in choice.overrides
    assert choice.method.activation_range == "omse"
    assert "bits on average" in str(choice)
    assert choice.to_json(tmp_path / "c.json").is_file()


def test_overrides_of_the_method_stay_and_a_base_gets_the_bits():
    model, example = zoo.build("timm-vit")
    images = torch.randn(4, *example.shape[1:])
    method = quietvit.RTN(overrides={"post_softmax": 8, "blocks.0.mlp.fc1": "float"})
    choice = quietvit.choose_bits(model, method, images, average=9.5, progress=False)
    assert "blocks.0.mlp.fc1" not in choice.overrides
    assert not any(name.endswith("attention_value") for name in choice.overrides)
    kept = dict(choice.method.overrides)
    assert kept["post_softmax"] == (8, 8)
    assert kept["blocks.0.mlp.fc1"] == (None, None)
    on_top = module.with_bits(quietvit.GPTQ(base="repq-vit", damp=0.02), 4, 6, {"head": 8})
    assert (on_top.damp, on_top.weight_bits, on_top.activation_bits) == (0.02, 4, 6)
    assert on_top.base.overrides == quietvit.RTN(overrides={"head": 8}).overrides


def test_ctrl_c_chooses_among_what_was_measured(net, images, monkeypatch):
    measured, calls = module.measured, []

    def interrupted(*given, **fields) -> Sensitivity:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measured(*given, **fields)

    monkeypatch.setattr(module, "measured", interrupted)
    choice = quietvit.choose_bits(net, "rtn", images, average=7, progress=False)
    assert not choice.complete
    assert set(choice.overrides.values()) <= {"W4A4", "W6A6"}
    calls[:] = [1, 1]
    with pytest.raises(KeyboardInterrupt):
        quietvit.choose_bits(net, "rtn", images, average=7, progress=False)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "give one budget"),
        ({"average": 5, "weight_bytes": 9}, "give one budget"),
        ({"average": 3.0}, "the least possible is 4"),
        ({"weight_bytes": 10}, "bytes of weights: the least possible is"),
        ({"average": 6, "choices": ("W4A4", "w4a4")}, "at least two choices"),
        ({"average": 6, "choices": ("W4A4", "W99A4")}, "outside 2..16"),
    ],
)
def test_bad_budgets_are_refused(net, images, fields, text):
    with pytest.raises(QuietvitError, match=text):
        quietvit.choose_bits(net, "rtn", images, progress=False, **fields)
