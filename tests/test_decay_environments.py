"""The decay under compilation, sharded parameters, and on pairs found in a real architecture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn

from quietvit import QuietvitError
from quietvit.decay import PENALTIES, ColinearityDecay, NormGainDecay
from quietvit.decay.penalties import Energy
from quietvit.pairs import MatrixPair
from quietvit.tracing import WeightView

PAIRS = [
    MatrixPair(WeightView("0", diagonal=True), WeightView("1"), "norm_linear"),
    *(
        MatrixPair(
            WeightView("1", rows=range(4 * head, 4 * head + 4)),
            WeightView("3", cols=range(4 * head, 4 * head + 4)),
            "value_output",
            head=head,
        )
        for head in range(4)
    ),
]


def mlp() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        model(torch.randn(5, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def reference() -> dict[str, Tensor]:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ColinearityDecay(model, strength=2.0, pairs=PAIRS).attach(optimizer)
    train(model, optimizer)
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_close(model: nn.Module, wanted: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        assert torch.allclose(whole, wanted[name], atol=1e-6), name


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_fully_sharded_parameters_move_as_whole_ones() -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    model = mlp()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    decay = ColinearityDecay(model, strength=2.0, pairs=PAIRS).attach(optimizer)
    train(model, optimizer)
    assert decay.steps == 4
    assert_close(model, reference())


@pytest.mark.parametrize("what", ["model", "step"])
def test_compiled_training_decays_the_same(what: str) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    decay = ColinearityDecay(model, strength=2.0, pairs=PAIRS).attach(optimizer)
    run: nn.Module = torch.compile(model, backend="aot_eager") if what == "model" else model
    if what == "step":
        optimizer.step = torch.compile(optimizer.step, backend="aot_eager")  # type: ignore[method-assign]
    train(run, optimizer)
    assert decay.steps == 4
    assert_close(model, reference())


def test_missed_steps_are_seen_under_a_compiled_model() -> None:
    model = mlp()
    decay = ColinearityDecay(model, strength=2.0, pairs=PAIRS)
    decay.attach(torch.optim.AdamW(model.parameters(), lr=0.01))
    other = torch.optim.AdamW(model.parameters(), lr=0.01)
    with pytest.raises(QuietvitError, match="between backward passes without a call"):
        train(torch.compile(model, backend="aot_eager"), other, 5)


@pytest.fixture(scope="module")
def tiny_vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=5
    )


@pytest.mark.parametrize("penalty", PENALTIES)
def test_one_line_in_the_loop_of_a_vision_transformer(tiny_vit: nn.Module, penalty: str) -> None:
    example = torch.randn(1, 3, 32, 32)
    optimizer = torch.optim.AdamW(tiny_vit.parameters(), lr=1e-3, weight_decay=0.05)
    strength = {"mlp": 1.0, "value_output": 1.0, "norm_linear": 0.5}
    decay = ColinearityDecay(tiny_vit, example, strength=strength, penalty=penalty)
    assert {pair.kind for pair in decay.pairs} == set(strength)
    decay.attach(optimizer)
    for _ in range(3):
        tiny_vit(torch.randn(2, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    decay.detach()
    assert decay.steps == 3


def test_one_step_on_a_vision_transformer_is_energy_of_every_pair_found(
    tiny_vit: nn.Module,
) -> None:
    example = torch.randn(1, 3, 32, 32)
    decay = ColinearityDecay(tiny_vit, example, strength=2.0)
    wanted = {name: p.detach().clone() for name, p in tiny_vit.named_parameters()}
    for pair in decay.pairs:
        A, B = pair.first.read(tiny_vit).detach(), pair.second.read(tiny_vit).detach()
        for view, direction in zip(
            (pair.first, pair.second), Energy().directions(A[None], B[None]), strict=True
        ):
            view.scatter_add_(wanted[view.parameter_name], -2e-3 * direction[0])
    before = decay.penalty()
    decay.step(torch.optim.SGD(tiny_vit.parameters(), lr=1e-3))
    assert decay.penalty() < before
    assert_close(tiny_vit, wanted)


def test_norm_gains_of_a_vision_transformer_are_found(tiny_vit: nn.Module) -> None:
    decay = NormGainDecay(tiny_vit, torch.randn(1, 3, 32, 32), strength=1.0)
    names = {str(view) for view in decay.gains}
    assert {f"diag(blocks.{i}.norm{j}.weight)" for i in (0, 1) for j in (1, 2)} <= names
