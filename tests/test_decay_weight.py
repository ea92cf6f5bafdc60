"""The control: weight decay of the pairs' entries is AdamW's own, and each entry decays once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from decay_cases import images, still, tower, weights
from quietvit import ColinearityDecay, PairWeightDecay, QuietvitError
from quietvit.decay import StrengthSchedule
from quietvit.pairs import MatrixPair
from quietvit.pairs.pair import KINDS
from quietvit.tracing import WeightView


def zero_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strength", [0.05, 3.0, 49.0])
def test_it_is_decoupled_weight_decay_of_adamw_bit_for_bit(
    strength: float, dtype: torch.dtype
) -> None:
    ours, theirs = tower(dtype), tower(dtype)
    decay = PairWeightDecay(ours, images(dtype), strength=strength)
    names = {name.parameter_name for name in decay.views}
    assert {f"blocks.{i}.{n}.weight" for i in (0, 1) for n in ("fc1", "fc2", "norm2")} <= names
    chosen = [p for n, p in theirs.named_parameters() if n in names]
    rest = [p for n, p in theirs.named_parameters() if n not in names]
    one = torch.optim.AdamW(ours.parameters(), lr=0.01, weight_decay=0.0)
    other = torch.optim.AdamW(
        [{"params": chosen, "weight_decay": strength}, {"params": rest, "weight_decay": 0.0}],
        lr=0.01,
    )
    decay.attach(one)
    before = weights(ours)
    for _ in range(5):
        zero_gradients(ours)
        zero_gradients(theirs)
        one.step()
        other.step()
    for name, value in weights(ours).items():
        assert torch.equal(value, weights(theirs)[name]), name
        if name not in names or dtype != torch.bfloat16:  # there, small steps round away
            assert torch.equal(value, before[name]) == (name not in names)


def test_entries_of_several_pairs_decay_once_and_others_not() -> None:
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(4))).double()
    model[3].weight = model[2].weight
    pairs = [
        MatrixPair(WeightView("0", rows=range(3)), WeightView("1", cols=range(3)), "mlp"),
        MatrixPair(WeightView("0", rows=range(2, 4)), WeightView("1", cols=range(2, 4)), "mlp"),
        MatrixPair(
            WeightView("1", rows=(0, 5), transposed=True), WeightView("2", rows=(1,)), "mlp"
        ),
        MatrixPair(WeightView("3", rows=(1, 2)), WeightView("3", cols=(1,)), "mlp"),
    ]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = still(model, lr=0.1)
    decay = PairWeightDecay(model, strength=2.0, pairs=pairs)
    penalties = decay.penalties()
    decay.attach(optimizer)
    optimizer.step()
    kept = {"0": torch.ones(6, 6), "1": torch.ones(6, 6), "2": torch.ones(6, 6)}
    kept["0"][:4] = 0.8
    kept["1"][:, :4] = kept["1"][[0, 5]] = 0.8
    kept["2"][[1, 2]] = kept["2"][:, 1] = 0.8
    for name, factor in kept.items():
        wanted = before[f"{name}.weight"] * factor
        torch.testing.assert_close(model[int(name)].weight, wanted, rtol=1e-7, atol=0)
        square = (before[f"{name}.weight"][factor < 1] ** 2).sum() / 2
        assert penalties[f"{name}.weight"] == pytest.approx(float(square))
    assert set(penalties) == {"0.weight", "1.weight", "2.weight"}
    assert model[3].weight is model[2].weight


def test_kinds_choose_the_pairs() -> None:
    model = tower()
    decay = PairWeightDecay(model, images(), strength=1.0, kinds=("mlp",))
    assert {view.parameter_name.split(".")[-2] for view in decay.views} == {"fc1", "fc2"}
    again = PairWeightDecay(
        model,
        strength=1.0,
        kinds=("mlp",),
        pairs=PairWeightDecay(model, images(), strength=1.0).pairs,
    )
    assert again.views == decay.views


EACH = dict.fromkeys(KINDS, StrengthSchedule())
MLP = MatrixPair(WeightView("blocks.0.fc1"), WeightView("blocks.0.fc2"), "mlp")


@pytest.mark.parametrize(
    ("options", "without"),
    [
        ({}, ""),
        ({"kinds": ("mlp", "value_output")}, ""),
        ({"kinds": ("mlp", "gated_mlp")}, "gated_mlp"),
        ({"strength": {"mlp": 1, "gated_mlp": 1, "norm_linear": 1}}, "gated_mlp"),
        ({"strength": {"mlp": 1, "gated_mlp": 0}}, ""),
        ({"strength": {"mlp": 1, "gated_mlp": 1}, "kinds": ("mlp",)}, ""),
        ({"schedule": EACH}, "gated_mlp, residual, query_key"),
        ({"schedule": EACH, "kinds": ("mlp",)}, ""),
        ({"schedule": EACH, "pairs": [MLP]}, ""),
    ],
)
def test_a_kind_that_is_named_and_has_no_pair_is_told_once(
    options: dict[str, Any], without: str, caplog: pytest.LogCaptureFixture
) -> None:
    one_for_all = options.keys() <= {"kinds"}
    for decay in (ColinearityDecay, PairWeightDecay) if one_for_all else (ColinearityDecay,):
        caplog.clear()
        decay(tower(), images(), **{"strength": 1.0, **options})
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == bool(without)
        for line in told:
            named, rest = line.split(", only of ")
            assert named == f"{decay.__name__} acts on no pair of kind {without}"
            assert "mlp" in rest.split(", so what")[0].split(", ")


def test_no_entry_changes_sign_at_any_strength() -> None:
    model = tower()
    optimizer = still(model)
    PairWeightDecay(model, images(), strength=1e6).attach(optimizer)
    optimizer.step()
    assert (model.blocks[0].fc1.weight == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs an example"),
        ({"pairs": []}, "no pairs"),
        ({"kinds": "mlp"}, "kinds='mlp'"),
        ({"kinds": (), "example": images()}, "no kind is left"),
        ({"kinds": ("mpl",), "example": images()}, "did you mean 'mlp'"),
        (
            {"kinds": ("mpl",), "pairs": [MatrixPair(WeightView("a"), WeightView("b"), "mlp")]},
            "did you mean 'mlp'",
        ),
    ],
)
def test_bad_choices_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(QuietvitError, match=message):
        PairWeightDecay(tower(), strength=1.0, **options)  # type: ignore[arg-type]
