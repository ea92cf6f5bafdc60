"""Strength schedules: their values at the corners, what is refused, and one for each kind."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from decay_cases import images, still, tower, weights
from quietvit import ColinearityDecay, NormGainDecay, QuietvitError
from quietvit.decay import StrengthSchedule


def test_constant_is_one_from_the_start() -> None:
    assert [StrengthSchedule()(step) for step in (0, 1, 10**9)] == [1.0, 1.0, 1.0]


def test_nothing_before_start_then_a_line_up() -> None:
    schedule = StrengthSchedule(start=10, warmup=4)
    assert [schedule(step) for step in (0, 9, 10, 11, 12, 13, 14, 100)] == [
        *(0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0)
    ]
    assert [StrengthSchedule(start=3)(step) for step in (2, 3)] == [0.0, 1.0]


@pytest.mark.parametrize(("shape", "quarter"), [("linear", 0.75), ("cosine", 0.5 + 0.125**0.5)])
def test_down_to_final_at_total_and_kept(shape: str, quarter: float) -> None:
    schedule = StrengthSchedule(shape, start=2, warmup=2, total=12, final=0.2)
    assert [schedule(step) for step in (1, 3, 4)] == [0.0, 0.5, 1.0]
    assert schedule(6) == pytest.approx(0.2 + 0.8 * quarter)
    assert schedule(8) == pytest.approx(0.6)
    assert schedule(11) > 0.2
    assert [schedule(step) for step in (12, 13, 10**6)] == pytest.approx([0.2, 0.2, 0.2])


def test_final_may_be_above_one() -> None:
    schedule = StrengthSchedule("linear", total=4, final=3.0)
    assert [schedule(step) for step in range(6)] == [1.0, 1.5, 2.0, 2.5, 3.0, 3.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "cosin"}, "did you mean 'cosine'"),
        ({"start": -1}, "start=-1"),
        ({"warmup": 1.5}, "warmup=1.5"),
        ({"warmup": True}, "warmup=True"),
        ({"total": 0}, "total=0"),
        ({"final": -0.1}, "final=-0.1"),
        ({"final": math.nan}, "final=nan"),
        ({"shape": "linear"}, "total=None"),
        ({"shape": "cosine", "start": 3, "warmup": 4, "total": 7}, "above start"),
    ],
)
def test_bad_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(QuietvitError, match=message):
        StrengthSchedule(**options)


def test_each_kind_of_pair_follows_its_own_schedule() -> None:
    """Two kinds whose schedules are constant are two strengths."""
    factors = {"mlp": 0.5, "value_output": 0.0, "norm_linear": 2.0}
    one, other = tower(), tower()
    by_schedule = {kind: lambda step, f=factor: f for kind, factor in factors.items()}
    optimizer = still(one)
    ColinearityDecay(one, images(), strength=3.0, schedule=by_schedule).attach(optimizer)
    optimizer.step()
    optimizer = still(other)
    strengths = {kind: 3.0 * factor for kind, factor in factors.items()}
    ColinearityDecay(other, images(), strength=strengths).attach(optimizer)
    optimizer.step()
    for name, value in weights(one).items():
        torch.testing.assert_close(value, weights(other)[name], rtol=1e-14, atol=0)


def test_kinds_whose_schedule_has_not_begun_stay() -> None:
    model = tower()
    later = {"mlp": StrengthSchedule(start=1), "norm_linear": StrengthSchedule(start=2)}
    optimizer = still(model)
    ColinearityDecay(
        model, images(), strength=3.0, kinds=("mlp", "norm_linear"), schedule=later
    ).attach(optimizer)
    start = weights(model)
    optimizer.step()
    assert all(torch.equal(value, start[name]) for name, value in weights(model).items())
    optimizer.step()
    first = weights(model)
    assert torch.equal(first["blocks.0.norm1.weight"], start["blocks.0.norm1.weight"])
    assert not torch.equal(first["blocks.0.fc1.weight"], start["blocks.0.fc1.weight"])
    optimizer.step()
    assert not torch.equal(model.blocks[0].norm1.weight, start["blocks.0.norm1.weight"])


def test_a_state_with_another_schedule_for_a_kind_is_refused() -> None:
    def made(warmup: int) -> ColinearityDecay:
        schedules = {"mlp": StrengthSchedule(), "norm_linear": StrengthSchedule(warmup=warmup)}
        return ColinearityDecay(tower(), images(), kinds=tuple(schedules), schedule=schedules)

    made(3).load_state_dict(made(3).state_dict())
    with pytest.raises(QuietvitError, match="saved with schedule="):
        made(4).load_state_dict(made(3).state_dict())


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"mlp": StrengthSchedule()}, "have no schedule"),
        ({"mlp": 3}, r"schedule\['mlp'\]=3"),
        (
            dict.fromkeys(("mlp", "value_output", "norm_linear", "norm_line"), StrengthSchedule()),
            "did you mean 'norm_linear'",
        ),
    ],
)
def test_bad_mappings_are_refused(schedule: Any, message: str) -> None:
    with pytest.raises(QuietvitError, match=message):
        ColinearityDecay(tower(), images(), schedule=schedule)


def test_a_bad_factor_of_one_kind_is_named() -> None:
    model = tower()
    optimizer = still(model)
    schedule = {"mlp": lambda step: -1.0}
    ColinearityDecay(model, images(), kinds=("mlp",), schedule=schedule).attach(optimizer)
    with pytest.raises(QuietvitError, match=r"schedule\['mlp'\]\(0\) returned -1"):
        optimizer.step()


def test_a_mapping_is_refused_where_there_are_no_kinds() -> None:
    with pytest.raises(QuietvitError, match="takes one function"):
        NormGainDecay(
            tower(),
            images(),
            strength=1.0,
            schedule={"mlp": StrengthSchedule()},  # type: ignore[arg-type]
        )
