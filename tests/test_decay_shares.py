"""Law: strength keeps its units however a layer is split, fused or shared between heads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import quietvit
from quietvit.pairs import MatrixPair, WeightView

RATE, STRENGTH = 0.01, 2.0


class Layers(nn.Module):
    """A norm, and linears that read it."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6, dtype=torch.float64)
        self.out = nn.Linear(8, 5, dtype=torch.float64)
        for name, weight in weights.items():
            layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
            layer.weight.data = weight.clone()
            self.add_module(name, layer)


def stepped(model: nn.Module, pairs: list[MatrixPair], penalty: str = "energy") -> nn.Module:
    """The model after one optimizer step without gradients: the decay alone."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    decay = quietvit.ColinearityDecay(model, pairs=pairs, strength=STRENGTH, penalty=penalty)
    decay.attach(optimizer)
    optimizer.step()
    return model


def norm_pair(layer: str, rows: range | None = None) -> MatrixPair:
    gain = WeightView("norm", diagonal=True)
    return MatrixPair(gain, WeightView(layer, rows=rows), "norm_linear")


@pytest.mark.parametrize("penalty", ["energy", "peak", "cosine", "top"])
def test_a_gain_read_by_equal_linears_moves_as_with_one(penalty: str) -> None:
    weight = torch.randn(8, 6, dtype=torch.float64)
    model = Layers({"q": weight, "k": weight, "v": weight})
    nn.init.uniform_(model.norm.weight, 0.5, 2.0)
    three = stepped(model, [norm_pair(name) for name in "qkv"], penalty)
    one = stepped(model, [norm_pair("q")], penalty)
    assert not torch.equal(one.norm.weight, model.norm.weight)
    torch.testing.assert_close(three.norm.weight, one.norm.weight, rtol=1e-13, atol=0)
    torch.testing.assert_close(three.k.weight, one.q.weight, rtol=1e-13, atol=0)


def test_values_shared_by_query_heads_move_by_the_mean_over_heads() -> None:
    model = Layers({"v": torch.randn(4, 6, dtype=torch.float64)})

    def pair(head: int) -> MatrixPair:
        columns = range(4 * head, 4 * head + 4)
        return MatrixPair(WeightView("v"), WeightView("out", cols=columns), "value_output", head)

    both = stepped(model, [pair(0), pair(1)])
    moves = [stepped(model, [pair(head)]).v.weight - model.v.weight for head in (0, 1)]
    expected = (moves[0] + moves[1]) / 2
    torch.testing.assert_close(both.v.weight - model.v.weight, expected, rtol=1e-10, atol=0)


def test_sides_shared_by_some_pairs_only_get_each_its_own_share() -> None:
    model = Layers({"v": torch.randn(8, 6, dtype=torch.float64)})
    first, second = range(4), range(4, 8)
    shared = WeightView("v", rows=first)
    pairs = [
        MatrixPair(shared, WeightView("out", cols=range(4)), "value_output", 0),
        MatrixPair(shared, WeightView("out", cols=range(4, 8)), "value_output", 1),
        MatrixPair(
            WeightView("v", rows=second), WeightView("out", cols=range(4)), "value_output", 2
        ),
    ]
    moved = stepped(model, pairs).v.weight - model.v.weight
    alone = [stepped(model, [pair]).v.weight - model.v.weight for pair in pairs]
    torch.testing.assert_close(moved[:4], (alone[0] + alone[1])[:4] / 2, rtol=1e-10, atol=0)
    torch.testing.assert_close(moved[4:], alone[2][4:], rtol=1e-10, atol=0)
