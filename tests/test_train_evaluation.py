"""A copy without weights computes as the model does, and never holds more than a block of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from decay_cases import Tower, images, tower
from quietvit.train.evaluation import filled, without_memory

BLOCKS = ("blocks.0", "blocks.1")


def held(model: nn.Module) -> set[str]:
    """Names of the parameters that have memory."""
    return {name for name, p in model.named_parameters() if p.device.type != "meta"}


class Counting(Tower):
    """A tower with tied weights and a running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.norm.weight = self.blocks[1].norm2.weight
        self.register_buffer("mean", torch.full((3,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.mean


def test_a_copy_without_memory_has_no_weights_and_the_model_keeps_its_own() -> None:
    model = tower()
    copied = without_memory(model)
    assert held(copied) == set()
    assert held(model) == {name for name, _ in model.named_parameters()}
    assert copied.blocks[0].fc1.weight.shape == model.blocks[0].fc1.weight.shape


def test_filled_it_computes_the_same_with_one_block_at_a_time() -> None:
    torch.manual_seed(0)
    model = Counting().double()
    copied = without_memory(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
        model.mean.add_(1)
    outside = {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    seen = []
    for block in BLOCKS:
        inner = copied.get_submodule(block).fc1
        inner.register_forward_hook(lambda *_: seen.append(held(copied) - outside))
    with filled(copied, model, BLOCKS), torch.no_grad():
        assert held(copied) == outside
        for _ in range(2):
            assert torch.equal(copied(images()), model(images()))
    assert held(copied) == set()
    expected = [{n for n, _ in model.named_parameters() if n.startswith(b + ".")} for b in BLOCKS]
    assert seen == 2 * expected
    with pytest.raises(RuntimeError, match="meta"):
        copied(images()).sum().item()


def test_it_is_emptied_where_the_pass_fails() -> None:
    model = tower()
    copied = without_memory(model)
    with pytest.raises(RuntimeError, match="shape"), filled(copied, model, BLOCKS):
        copied(images()[..., :3])
    assert held(copied) == set()


@pytest.mark.usefixtures("process")
def test_it_takes_the_weights_of_a_model_in_parts_and_leaves_that_in_parts() -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor, init_device_mesh

    model = tower(torch.float32)
    wanted = model(images(torch.float32)).detach()
    copied = without_memory(model)
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    mesh = init_device_mesh("cpu", (1,))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=low)
    with filled(copied, model, BLOCKS), torch.no_grad():
        assert torch.equal(copied(images(torch.float32)), wanted)
    assert all(isinstance(p, DTensor) for p in model.parameters())
