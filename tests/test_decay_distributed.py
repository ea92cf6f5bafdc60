"""Regularizers in several processes (gloo, CPU): the same weights on all, and as in one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import quietvit
from decay_cases import MAKERS, images, process_group, tower
from processes import run_in_processes

STEPS, RATE, EACH = 4, 0.01, 4
KINDS = ("mlp", "value_output", "norm_linear", "residual")
CD: dict[str, dict[str, Any]] = {
    "cd": {},
    "cd-sharded": {"sharded": True},
    "cd-sharded-residual": {"sharded": True, "kinds": KINDS},
    "cd-residual": {"kinds": KINDS},
    "cd-peak-sharded": {"sharded": True, "penalty": "peak"},
    "cd-top-sharded": {"sharded": True, "penalty": "top"},
}
SINGLE = ("cd", "cd-sharded")  # trained in float32 under FSDP2, the others in float64
REGULARIZERS = (*CD, "s2d", "kure", "tweo")


def make(name: str, model: nn.Module, dtype: torch.dtype, batch: int) -> Any:
    """A regularizer; the images of S2D are the same in every process, whatever its batch."""
    x = images(dtype)
    if name in CD:
        return quietvit.ColinearityDecay(model, x, strength=2.0, products="float32", **CD[name])
    return MAKERS[name](model, x)


def whole_batch(step: int, dtype: torch.dtype, world: int) -> Tensor:
    return torch.cat([images(dtype, 100 * step + rank) for rank in range(world)])


def train(
    name: str, model: nn.Module, run: nn.Module, dtype: torch.dtype, ranks: range, world: int
) -> None:
    """``STEPS`` steps on the images of ``ranks``; the regularizer is made by the caller."""
    made = model.made
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    made.attach(optimizer)
    for step in range(STEPS):
        x = whole_batch(step, dtype, world)[ranks.start * EACH : ranks.stop * EACH]
        loss = run(x).square().mean()
        if name == "tweo":
            loss = loss + made.loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert made.steps == STEPS
    if name in CD:
        assert made.penalty() > 0


def alone(name: str, dtype: torch.dtype, world: int) -> dict[str, Tensor]:
    model = tower(dtype)
    model.made = make(name, model, dtype, world)
    train(name, model, model, dtype, range(world), world)
    return {key: p.detach() for key, p in model.named_parameters()}


def same_everywhere(parameters: Iterator[tuple[str, Tensor]]) -> bool:
    for _, parameter in parameters:
        first = parameter.detach().clone()
        dist.broadcast(first, 0)
        if not torch.equal(first, parameter.detach()):
            return False
    return True


def refuses_nan(world: int) -> None:
    """Divided work raises in every process, and changes nothing."""
    model = tower()
    made = make("cd-sharded", model, torch.float64, world)
    with torch.no_grad():
        model.blocks[1].fc1.weight[2, 3] = float("nan")
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    with pytest.raises(quietvit.QuietvitError, match=r"blocks\.1\.fc1"):
        made.step(torch.optim.SGD(model.parameters(), lr=RATE))
    for key, p in model.named_parameters():
        assert torch.equal(p.nan_to_num(), before[key].nan_to_num())


def in_ddp(rank: int, world: int, folder: str) -> None:
    found: dict[str, Any] = {}
    with process_group(Path(folder), rank, world):
        for name in REGULARIZERS:
            model = tower()
            model.made = make(name, model, torch.float64, world)
            run = nn.parallel.DistributedDataParallel(model)
            train(name, model, run, torch.float64, range(rank, rank + 1), world)
            flags = torch.tensor([float(same_everywhere(model.named_parameters()))])
            dist.all_reduce(flags, dist.ReduceOp.MIN)
            weights = {key: p.detach() for key, p in model.named_parameters()}
            found[name] = (bool(flags), weights)
        refuses_nan(world)
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")


def in_fsdp(rank: int, world: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    found: dict[str, Any] = {}
    with process_group(Path(folder), rank, world):
        for name in (*CD, "tweo"):
            dtype = torch.float32 if name in SINGLE else torch.float64
            model = tower(dtype)
            model.made = make(name, model, dtype, world)
            mesh = init_device_mesh("cpu", (world,))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            train(name, model, model, dtype, range(rank, rank + 1), world)
            found[name] = {key: p.full_tensor().detach() for key, p in model.named_parameters()}
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")


worlds = pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])


@worlds
def test_under_ddp_all_processes_hold_the_same_bits_and_those_of_one_process(
    world: int, tmp_path: Path
) -> None:
    run_in_processes(in_ddp, world, str(tmp_path), count=world)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found.keys() == set(REGULARIZERS)
    for name, (same, weights) in found.items():
        assert same, f"{name}: the processes differ"
        for key, value in alone(name, torch.float64, world).items():
            error = (weights[key] - value).norm() / value.norm().clamp_min(1e-30)
            assert float(error) < 1e-9, (name, key)
    for sharded, plain in (("cd-sharded", "cd"), ("cd-sharded-residual", "cd-residual")):
        for key, value in found[plain][1].items():
            torch.testing.assert_close(found[sharded][1][key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@worlds
def test_under_fsdp2_the_weights_are_those_of_one_process(world: int, tmp_path: Path) -> None:
    run_in_processes(in_fsdp, world, str(tmp_path), count=world)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found.keys() == {*CD, "tweo"}
    for name, weights in found.items():
        dtype, tolerance = (torch.float32, 1e-6) if name in SINGLE else (torch.float64, 1e-9)
        for key, value in alone(name, dtype, world).items():
            error = (weights[key] - value).norm() / value.norm().clamp_min(1e-30)
            assert float(error) < tolerance, (name, key)


def test_sharded_in_a_single_process_is_the_plain_update() -> None:
    for name, twin in (("cd-sharded", "cd"), ("cd-sharded-residual", "cd-residual")):
        for one, other in zip(
            alone(name, torch.float64, 1).values(),
            alone(twin, torch.float64, 1).values(),
            strict=True,
        ):
            assert torch.equal(one, other)
