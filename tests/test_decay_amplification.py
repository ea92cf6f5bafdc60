"""The amplification of a pair is what white input does to its worst output channel."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import quietvit
from decay_cases import images, tower
from quietvit import QuietvitError
from quietvit.decay import amplifications, worst_amplification
from quietvit.pairs import KINDS, MatrixPair
from quietvit.tracing import WeightView


def chain() -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(6), nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 4)
    ).double()


PAIR = MatrixPair(WeightView("1"), WeightView("3"), "mlp")


def test_it_is_the_largest_standard_deviation_under_white_input() -> None:
    model = chain()
    white = torch.linalg.qr(torch.randn(400, 6).double()).Q * 20  # second moment: the identity
    y = white @ model[1].weight.mT @ model[3].weight.mT
    wanted = float(y.detach().square().mean(0).sqrt().max())
    assert amplifications(model, [PAIR])[PAIR.name] == pytest.approx(wanted, rel=1e-12)


def test_gains_count_as_diagonal_matrices() -> None:
    model = chain()
    for norm in (model[0], model[2]):
        nn.init.uniform_(norm.weight, -2, 2)
    gains = WeightView("0", diagonal=True), WeightView("2", diagonal=True)
    A, B, g, h = (model[i].weight.detach() for i in (1, 3, 0, 2))
    both = MatrixPair(PAIR.first, PAIR.second, "residual", before=gains[0], between=gains[1])
    between = MatrixPair(PAIR.first, PAIR.second, "residual", between=gains[1])
    norm_linear = MatrixPair(gains[1], PAIR.second, "norm_linear")
    for pair, product in (
        (both, B @ h.diag() @ A @ g.diag()),
        (between, B @ h.diag() @ A),
        (norm_linear, B @ h.diag()),
    ):
        wanted = float(product.norm(dim=1).max())
        assert amplifications(model, [pair])[pair.name] == pytest.approx(wanted, rel=1e-12)


def test_a_planted_alignment_is_the_worst_pair() -> None:
    model = tower()
    pairs = quietvit.find_pairs(model, images(), kinds=KINDS)
    block = model.blocks[1]
    with torch.no_grad():
        u = torch.linalg.svd(block.fc1.weight).U[:, 0]
        block.fc2.weight[3] = 50 * u
    name, value = worst_amplification(model, pairs)
    assert name == "mlp: blocks.1.fc1.weight -> blocks.1.fc2.weight"
    assert value == pytest.approx(50 * float(torch.linalg.svdvals(block.fc1.weight.detach())[0]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_infinite_and_name_the_pair(bad: float) -> None:
    model = tower()
    pairs = quietvit.find_pairs(model, images(), kinds=("mlp", "value_output"))
    with torch.no_grad():
        model.blocks[1].fc1.weight[2, 2] = bad
    found = amplifications(model, pairs)
    assert worst_amplification(model, pairs) == (
        "mlp: blocks.1.fc1.weight -> blocks.1.fc2.weight",
        math.inf,
    )
    assert sum(map(math.isinf, found.values())) == 1


def test_low_precision_is_read_in_float32_and_nothing_moves() -> None:
    model = chain()
    low = chain().bfloat16()
    model.load_state_dict(low.state_dict())
    wanted = amplifications(model, [PAIR])[PAIR.name]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = amplifications(torch.compile(low, backend="eager"), [PAIR])[PAIR.name]
    assert found == pytest.approx(wanted, rel=1e-6)


def test_no_pairs_are_refused() -> None:
    with pytest.raises(QuietvitError, match="at least one pair"):
        amplifications(chain(), [])


@pytest.mark.usefixtures("process")
def test_sharded_parameters_are_gathered() -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    model = chain()
    wanted = amplifications(model, [PAIR])
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert amplifications(model, [PAIR]) == wanted
