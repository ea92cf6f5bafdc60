"""Weights that are no parameter, or a part of a map: parametrized ones, weight norm, LoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from decay_cases import MAKERS, WIDTH, Tower, changed, images, still, tower, weights
from quietvit import QuietvitError
from quietvit.pairs import KINDS, find_pairs

ON_LAYERS = ("cd", "weight", "s2d", "kure")
on_layers = pytest.mark.parametrize("name", ON_LAYERS)


class Doubled(nn.Module):
    def forward(self, W: Tensor) -> Tensor:
        return 2 * W


def doubled(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", Doubled())


HOW = {
    "parametrized": doubled,
    "weight norm": parametrizations.weight_norm,
    "weight norm by a hook": nn.utils.weight_norm,
}


class LoRA(nn.Module):
    """W x + B A x, W frozen, as adapters are added to a trained linear."""

    def __init__(self, base: nn.Linear, rank: int = 2, how: str = "layers") -> None:
        super().__init__()
        self.base, self.how = base.requires_grad_(False), how
        self.A = nn.Linear(base.in_features, rank, bias=False, dtype=base.weight.dtype)
        self.B = nn.Linear(rank, base.out_features, bias=False, dtype=base.weight.dtype)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "products":
            return (self.dropout(x) @ self.A.weight.T @ self.B.weight.T) * 0.5 + self.base(x)
        return self.base(x) + self.B(self.A(self.dropout(x))) * 0.5


def with_lora(*layers: str, how: str = "layers") -> Tower:
    model = tower()
    for block in model.blocks:
        for name in layers:
            setattr(block, name, LoRA(getattr(block, name), how=how))
    return model


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "quietvit"]


@on_layers
def test_of_plain_weights_nothing_is_said(name: str, caplog: pytest.LogCaptureFixture) -> None:
    MAKERS[name](tower(), images())
    assert not told(caplog)


@on_layers
@pytest.mark.parametrize("how", HOW)
def test_computed_weights_are_counted_and_the_first_is_named(
    name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tower()
    HOW[how](model.blocks[1].fc1)
    made = MAKERS[name](model, images())
    (line,) = told(caplog)
    count, first = (2, "blocks.1.norm2 -> ") if name in ("cd", "weight") else (1, "")
    assert f"{type(made).__name__} leaves out, or sees in part, {count} layers or pairs" in line
    assert f"(first {first}blocks.1.fc1.linear: a weight is computed in the forward pass" in line
    optimizer = still(model)
    before = weights(model)
    made.attach(optimizer)
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    optimizer.step()
    touched = changed(model, before) | {
        n for n, p in model.named_parameters() if not torch.equal(p.grad, grads[n])
    }
    assert any(key.startswith("blocks.0.fc1") for key in touched) or name == "s2d"
    assert not any(key.startswith("blocks.1.fc1") for key in touched)


def test_a_gain_that_only_a_computed_weight_reads_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = tower()
    doubled(model.blocks[1].fc1)
    made = MAKERS["norm_gains"](model, images())
    (line,) = told(caplog)
    assert "NormGainDecay leaves out, or sees in part, 1 layers or pairs" in line
    assert "(first blocks.1.norm2 -> blocks.1.fc1.linear" in line
    assert "blocks.1.norm2.weight" not in {view.parameter_name for view in made.gains}


def test_gains_that_something_else_reads_are_all_there_and_nothing_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert len(MAKERS["norm_gains"](with_lora("fc1", "qkv"), images()).gains) == 4
    assert not told(caplog)


@pytest.mark.parametrize("kind", ["residual", "query_key"])
def test_pairs_of_computed_weights_are_listed_by_kind(kind: str) -> None:
    plain, model = tower(), tower()
    doubled(model.blocks[1].qkv)
    kinds = (kind,)
    found = find_pairs(model, images(), kinds=kinds)
    assert 0 < len(found) < len(find_pairs(plain, images(), kinds=kinds))
    assert found.skipped
    assert all("blocks.1.qkv.linear" in name for name, _ in found.skipped)
    assert not find_pairs(model, images(), kinds=("mlp",)).skipped, "not asked for"


@on_layers
def test_where_every_weight_is_computed_nothing_is_built(name: str) -> None:
    model = tower()
    for layer in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        doubled(layer)
    with pytest.raises(QuietvitError, match=r"has no (matrix pair|linear)"):
        MAKERS[name](model, images())


@pytest.mark.parametrize("how", ["layers", "products"])
def test_no_pair_takes_a_map_of_an_adapter_for_the_whole(how: str) -> None:
    plain = find_pairs(tower(), images(), kinds=KINDS)
    model = with_lora("qkv", "proj", "fc1", "fc2", how=how)
    found = find_pairs(model, images(), kinds=KINDS)
    names = {view.parameter_name for pair in found for view in (pair.first, pair.second)}
    assert not {name for name in names if name.endswith(("A.weight", "B.weight"))}
    kinds = ("norm_linear", "residual")
    before = {(p.kind, p.first.parameter_name, p.second.parameter_name) for p in plain}
    after = {
        (p.kind, *(v.parameter_name.replace("base.", "") for v in (p.first, p.second)))
        for p in found
    }
    assert after == {pair for pair in before if pair[0] in kinds}
    adapted = [f"blocks.{i}.{n}.base" for i in (0, 1) for n in ("qkv", "proj", "fc1", "fc2")]
    assert sorted(name for name, _ in found.skipped) == sorted(adapted)


def test_a_linear_with_an_adapter_is_second_in_its_pair_and_first_in_none() -> None:
    found = find_pairs(with_lora("fc2"), images(), kinds=("mlp",))
    assert [p.second.parameter_name for p in found] == [
        f"blocks.{i}.fc2.base.weight" for i in (0, 1)
    ]
    with pytest.raises(QuietvitError, match=r"Left out: blocks\.0\.fc1\.base: an adapter adds"):
        find_pairs(with_lora("fc1"), images(), kinds=("mlp",))


def test_two_adapters_one_after_another_and_one_of_the_head() -> None:
    model = with_lora("fc1")
    for block in model.blocks:
        block.fc1 = Second(block.fc1)
    model.head = LoRA(model.head, rank=1)
    found = find_pairs(model, images(), kinds=KINDS)
    names = {view.parameter_name for pair in found for view in (pair.first, pair.second)}
    assert not {name for name in names if name.endswith(("A.weight", "B.weight"))}
    assert [name for name, _ in found.skipped] == ["blocks.0.fc1.of.base", "blocks.1.fc1.of.base"]


class Second(nn.Module):
    def __init__(self, of: LoRA) -> None:
        super().__init__()
        self.of = of
        own = LoRA(of.base)
        self.A, self.B = own.A, own.B

    def forward(self, x: Tensor) -> Tensor:
        return self.of(x) + self.B(self.A(x))


@pytest.mark.parametrize("name", ["cd", "weight"])
def test_adapters_are_told_at_construction(name: str, caplog: pytest.LogCaptureFixture) -> None:
    MAKERS[name](with_lora("qkv", "fc1"), images())
    (line,) = told(caplog)
    assert "sees in part, 4 layers or pairs" in line
    assert "(first blocks.0.qkv.base: an adapter adds to its output" in line


def test_an_mlp_beside_a_linear_is_no_adapter() -> None:
    """Only what is linear in x makes one map with W x."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.W = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
            self.down, self.up = nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)
            self.head = nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            h = self.W(h) + self.up(nn.functional.gelu(self.down(h)))
            return self.head(nn.functional.gelu(h).mean(1))

    torch.manual_seed(0)
    found = find_pairs(Beside(), images(torch.float32), kinds=KINDS)
    assert {pair.name for pair in found} == {
        "norm_linear: norm.weight -> W.weight",
        "norm_linear: norm.weight -> down.weight",
        "mlp: down.weight -> up.weight",
    }
    assert not found.skipped


class Lion(torch.optim.Optimizer):
    """W <- W - lr (sign(b1 m + (1 - b1) g) + weight_decay W), then m <- b2 m + (1 - b2) g."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                moved = (0.9 * m + 0.1 * p.grad).sign() + group["weight_decay"] * p
                p.sub_(group["lr"] * moved)
                m.mul_(0.99).add_(p.grad, alpha=0.01)


OPTIMIZERS: dict[str, Any] = {
    "sgd, momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "adam, fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adam, foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "a class of one's own": lambda p: Lion(p, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("which", OPTIMIZERS)
def test_the_update_is_added_to_the_step_of_any_optimizer(which: str) -> None:
    """Each step is the optimizer's own, then lr x strength x direction at the weights it left."""
    model, plain = tower(), tower()
    optimizer, own = (OPTIMIZERS[which](m.parameters()) for m in (model, plain))
    decay = MAKERS["cd"](model, images()).attach(optimizer)
    alone = MAKERS["cd"](plain, images())
    sgd = torch.optim.SGD(plain.parameters(), lr=0.01)
    for step in range(4):
        for m in (model, plain):
            m.zero_grad()
            m(images(seed=step)).square().mean().backward()
        optimizer.step()
        own.step()
        before = weights(plain)
        alone.step(sgd)
        assert changed(plain, before)
        for key, value in weights(model).items():
            torch.testing.assert_close(value, plain.get_parameter(key), rtol=1e-12, atol=1e-14)
    assert decay.steps == 4
