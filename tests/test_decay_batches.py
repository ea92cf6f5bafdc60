"""Batches of pairs: what is read together is what each view reads, and written back in place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quietvit.decay.batches import batches
from quietvit.pairs import MatrixPair
from quietvit.tracing import WeightView


def model() -> nn.Module:
    made = nn.Module()
    for block in range(2):
        made.add_module(f"qkv{block}", nn.Linear(6, 18))
        made.add_module(f"proj{block}", nn.Linear(6, 6))
    made.add_module("fc1", nn.Linear(6, 2))
    made.add_module("fc2", nn.Linear(2, 6))
    made.add_module("norm", nn.LayerNorm(6))
    return made


def heads(block: int, order: tuple[int, ...] = (0, 1, 2)) -> list[MatrixPair]:
    return [
        MatrixPair(
            WeightView(f"qkv{block}", rows=range(12 + 2 * h, 14 + 2 * h)),
            WeightView(f"proj{block}", cols=range(2 * h, 2 * h + 2)),
            "value_output",
            head=h,
        )
        for h in order
    ]


MIXED = [
    MatrixPair(WeightView("norm", diagonal=True), WeightView("qkv0"), "norm_linear"),
    *heads(0),
    MatrixPair(WeightView("fc1"), WeightView("fc2"), "mlp"),
    *heads(1, (2, 0, 1)),
    MatrixPair(
        WeightView("qkv0", rows=(1, 5)), WeightView("qkv0", rows=range(2), transposed=True), "x"
    ),
    MatrixPair(WeightView("qkv1", rows=(3, 4)), WeightView("proj1", cols=(0, 5)), "value_output"),
]


def test_every_pair_is_in_one_batch_and_read_as_its_views_read() -> None:
    parameters = {name: p.detach() for name, p in model().named_parameters()}
    plan = batches(MIXED, parameters)
    assert sorted(i for batch in plan for i in batch.members) == list(range(len(MIXED)))
    for batch in plan:
        operands = batch.read(parameters)
        A, B = operands.A, operands.B
        assert len(A) == len(B) == len(batch.members)
        for i, position in enumerate(batch.members):
            pair = MIXED[position]
            assert torch.equal(A[i], pair.first.select(parameters[pair.first.parameter_name]))
            assert torch.equal(B[i], pair.second.select(parameters[pair.second.parameter_name]))


def test_writing_a_run_is_writing_each_view() -> None:
    parameters = {name: p.detach() for name, p in model().named_parameters()}
    once = {name: torch.zeros_like(p) for name, p in parameters.items()}
    each = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for batch in batches(MIXED, parameters):
        read = batch.read(parameters)
        for runs, entries, side in zip(
            (batch.firsts, batch.seconds), (read.A, read.B), ("first", "second"), strict=True
        ):
            for run in runs:
                part = entries[run.start : run.start + run.count]
                run.scatter_add_(once[run.view.parameter_name], part)
            for i, pair in enumerate(batch.pairs):
                view = getattr(pair, side)
                view.scatter_add_(each[view.parameter_name], entries[i])
    for name, whole in once.items():
        assert torch.equal(whole, each[name]), name


def test_heads_of_a_fused_weight_are_one_run() -> None:
    parameters = {name: p.detach() for name, p in model().named_parameters()}
    (batch,) = batches([*heads(0), *heads(1)], parameters)
    assert [run.count for run in batch.firsts] == [3, 3]
    assert [run.count for run in batch.seconds] == [3, 3]
    (batch,) = batches(heads(0, (2, 0, 1)), parameters)
    assert [run.count for run in batch.firsts] == [1, 2]


def test_batches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = {name: p.detach() for name, p in model().named_parameters()}
    monkeypatch.setattr("quietvit.decay.batches.LARGEST_BATCH", 2 * (2 * 6 + 6 * 2))
    found = batches([*heads(0), *heads(1)], parameters)
    assert [len(batch.members) for batch in found] == [2, 2, 2]
