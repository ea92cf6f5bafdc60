"""Bits of each site under a budget: the best choice, the budget, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import quietvit
import zoo
from quietvit import cli
from quietvit.advice import bits as module
from quietvit.advice.sizes import average_bits, weight_size
from quietvit.compare.config import CompareConfig
from quietvit.errors import QuietvitError
from quietvit.quantization.settings import parse_method
from quietvit.train.qat import QATConfig
from quietvit.train.recipe import load_recipe

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


def operand_costs_of(net, method, images, bits):
    """The costs of all operands alone, scaled to that of their kind together, summed by site."""
    method = module.with_bits(method, bits, bits)
    quantized = quietvit.quantize(net, method, images, progress=False)
    wanted = net(images).detach().double().log_softmax(-1)

    def kl(slots):
        with torch.no_grad(), quantized.only(slots):
            outputs = quantized(images).double().log_softmax(-1)
            return float((wanted.exp() * (wanted - outputs)).sum(-1).mean())

    kinds = {}
    for slot in quantized.slots():
        kinds.setdefault((slot.role, slot.site.role), []).append(slot)
    costs = dict.fromkeys(quantized.trace.matmuls, 0.0)
    for slots in kinds.values():
        alone = [kl([slot]) for slot in slots]
        for slot, cost in zip(slots, alone, strict=True):
            costs[slot.site] += cost * kl(slots) / sum(alone)
    return costs


@pytest.mark.parametrize("budget", [{"average": 6.0}, {"weight_bytes": 1000.0}])
def test_the_choice_is_the_best_of_all_within_the_budget(net, images, budget):
    method = quietvit.RTN(patch_embed_bits="same", head_bits="same")
    choice = quietvit.choose_bits(
        net, method, images, choices=CHOICES, estimate=False, progress=False, **budget
    )
    costs = {bits: operand_costs_of(net, method, images, int(bits[1])) for bits in CHOICES}
    trace = quietvit.trace(net, images[:1])
    names = [site.name for site in trace.matmuls]

    def used(bits: tuple[str, ...]) -> float:
        overrides = dict(zip(names, bits, strict=True))
        tried = module.with_bits(method, 4, 4, overrides)
        measure = average_bits if "average" in budget else weight_size
        return measure(trace, tried)

    allowed = [
        (sum(costs[b][site] for site, b in zip(trace.matmuls, bits, strict=True)), bits)
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
    for slot in quantized.slots():
        names = (f"{slot.site.name}:{slot.operand}", slot.site.name)
        chosen = next((choice.overrides[name] for name in names if name in choice.overrides), None)
        if slot.site.role not in ("patch_embed", "head"):
            assert quantized.quantizers[slot.key].bits == int(chosen[1 if slot.is_weight else 3])
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
    maps = [name for name in choice.overrides if "attention_value" in name]
    assert maps
    assert all(name.endswith(":right") for name in maps)
    kept = dict(choice.method.overrides)
    assert kept["post_softmax"] == (8, 8)
    assert kept["blocks.0.mlp.fc1"] == (None, None)
    on_top = module.with_bits(quietvit.GPTQ(base="repq-vit", damp=0.02), 4, 6, {"head": 8})
    assert (on_top.damp, on_top.weight_bits, on_top.activation_bits) == (0.02, 4, 6)
    assert on_top.base.overrides == quietvit.RTN(overrides={"head": 8}).overrides


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """One entry for each choice whose costs are measured. Ctrl-C comes at the third."""
    measured, calls = module.operand_costs, []

    def interrupted(*given, **fields):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measured(*given, **fields)

    monkeypatch.setattr(module, "operand_costs", interrupted)
    return calls


def test_ctrl_c_chooses_among_what_was_measured(net, images, calls):
    choice = quietvit.choose_bits(net, "rtn", images, average=7, progress=False)
    assert not choice.complete
    assert set(choice.overrides.values()) <= {"W4A4", "W4A8"}
    calls[:] = [1, 1]
    with pytest.raises(KeyboardInterrupt):
        quietvit.choose_bits(net, "rtn", images, average=7, progress=False)


@pytest.mark.usefixtures("calls")
def test_after_ctrl_c_the_fewest_bits_can_meet_the_budget(net, images):
    choices = ("W8A8", "W6A6", "W4A4")
    choice = quietvit.choose_bits(net, "rtn", images, average=5, choices=choices, progress=False)
    assert not choice.complete
    assert "W4A4" in choice.overrides.values()


def test_a_file_of_bits_stands_for_overrides_everywhere(net, images, tmp_path):
    method = quietvit.RTN(overrides={"third": [3, None], "head": "float"})
    choice = quietvit.choose_bits(net, method, images, average=30, progress=False)
    path = str(choice.to_toml(tmp_path / "bits.toml"))
    wanted = choice.method.overrides
    assert wanted["third"] == (3, None)
    assert wanted["head"] == (None, None)
    assert "second" in wanted
    assert quietvit.RTN(overrides=path).overrides == wanted
    assert parse_method("rtn", "W4A4", keep=[path]).overrides == wanted
    assert parse_method("rtn", f"W4A4+{path}").overrides == wanted
    assert QATConfig(bits="W4A4", overrides=path).configured().overrides == wanted
    with pytest.raises(ValueError, match="overrides = '"):
        QATConfig(bits=f"W4A4+{path}")
    recipe = load_recipe("digits")
    compared = CompareConfig(recipe=recipe, bits=(f"W4A4+{path}",), methods=("rtn",))
    assert compared.settings == (f"W4A4+{path} rtn",)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "could not read the overrides"),
        ("overrides = 3", "is not a file of overrides"),
        ("[model]\nname = 'x'", "holds 'model'"),
        ("[overrides", "is not a TOML file"),
        ("[overrides]\n'first' = 99", "bits are an integer from 2 to 16"),
        ("[overrides]\n'first' = [4, 4, 4]", "bits are an integer from 2 to 16"),
    ],
)
def test_a_file_that_holds_no_bits_is_refused(tmp_path, content, text):
    path = tmp_path / "bits.toml"
    if content is not None:
        path.write_text(content)
    for build in (
        lambda: quietvit.RTN(overrides=str(path)),
        lambda: parse_method("rtn", keep=[str(path)]),
    ):
        with pytest.raises(QuietvitError, match=text):
            build()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([], "give one budget: --average"),
        (["--average", "6", "--bytes", "9"], "give one budget: --average"),
        (["--average", "3"], "the least possible is 4."),
        (["--average", "-1"], "Give a positive number"),
        (["--average", "nan"], "Give a positive number"),
        (["--average", "6", "--count", "15"], "needs at least 16 images, and there are 15"),
        (["--average", "6", "--choices", "W4A4"], "at least two choices"),
        (["--average", "6", "--choices", "W4A4,W1A4"], "outside 2..16"),
        (["--average", "6", "--method", "gptq"], "changes weights or outputs to compensate"),
        (["--average", "6", "--keep", "post_sofmax=8"], "did you mean"),
        (["--average", "6", "--keep", "*=8"], "nothing to choose"),
        (["--average", "6", "-o", "bits.json"], "Name it bits.toml"),
        (["--average", "6", "-o", "there.toml"], "exists already"),
    ],
)
def test_what_the_command_refuses(given, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("there.toml").touch()
    output = [] if "-o" in given else ["-o", "bits.toml"]
    command = ["choose-bits", "test_vit", "--size", "32", "--images", "embedded:digits"]
    done = CliRunner().invoke(cli.app, [*command, *output, *given])
    assert done.exit_code == 2, done.output
    assert text in " ".join(done.stderr.split())
    assert not Path("bits.toml").exists()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "give one budget"),
        ({"average": 5, "weight_bytes": 9}, "give one budget"),
        ({"average": 3.0}, "the least possible is 4"),
        ({"weight_bytes": 10}, "bytes of weights: the least possible is"),
        ({"average": "6"}, "the budget is '6'"),
        ({"average": 6, "choices": ("W4A4", "w4a4")}, "at least two choices"),
        ({"average": 6, "choices": "W4A4,W8A8"}, "choices is the text"),
        ({"average": 6, "choices": ("W4A4", "W99A4")}, "outside 2..16"),
    ],
)
def test_bad_budgets_are_refused(net, images, fields, text):
    with pytest.raises(QuietvitError, match=text):
        quietvit.choose_bits(net, "rtn", images, progress=False, **fields)
