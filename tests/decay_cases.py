"""A small transformer and every regularizer on it, for the tests that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import quietvit
from quietvit.decay import Regularizer

WIDTH, HIDDEN, HEADS, TOKENS = 8, 12, 2, 5


class Block(nn.Module):
    """A transformer block: fused qkv, two heads, a norm before each half."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class Tower(nn.Module):
    """Two blocks and a head over the mean of tokens; input (N, 5, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x)).mean(1))


def tower(dtype: torch.dtype = torch.float64) -> Tower:
    torch.manual_seed(1)
    made = Tower()
    for name, parameter in made.named_parameters():
        if "norm" in name and name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 2.0)
    return made.to(dtype)


def images(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


Maker = Callable[..., Any]
_S2D = {"threshold": 0.2, "refresh": 2, "strength": 0.05}

MAKERS: dict[str, Maker] = {
    "cd": lambda model, x, **o: quietvit.ColinearityDecay(model, x, **{"strength": 2.0, **o}),
    "norm_gains": lambda model, x, **o: quietvit.NormGainDecay(model, x, **{"strength": 3.0, **o}),
    "weight": lambda model, x, **o: quietvit.PairWeightDecay(model, x, **{"strength": 2.0, **o}),
    "s2d": lambda model, x, **o: quietvit.SpectralDecay(model, x, **{**_S2D, **o}),
    "s2d_decoupled": lambda model, x, **o: quietvit.SpectralDecay(
        model, x, **{**_S2D, "coupled": False, **o}
    ),
    "kure": lambda model, x, **o: quietvit.KurtosisRegularization(model, x, **o),
    "kure_decoupled": lambda model, x, **o: quietvit.KurtosisRegularization(
        model, x, **{"coupled": False, **o}
    ),
    "tweo": lambda model, x, **o: quietvit.TWEO(model, x, **{"strength": 0.1, "threshold": 1, **o}),
}
ON_WEIGHTS = [name for name in MAKERS if name != "tweo"]
COUPLED = ["s2d", "kure"]


def backward(
    model: nn.Module, regularizer: Regularizer | None = None, seed: int = 0, factor: float = 1.0
) -> None:
    """One forward and backward pass, with the part of the loss that a regularizer adds."""
    dtype = next(model.parameters()).dtype
    loss = model(images(dtype, seed)).square().mean()
    if isinstance(regularizer, quietvit.TWEO):
        loss = loss + regularizer.loss()
    (loss * factor).backward()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    regularizer: Regularizer | None = None,
    steps: range = range(4),
) -> None:
    for step in steps:
        backward(model, regularizer, step)
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of the parameters that differ from ``before``."""
    return {
        name
        for name, p in model.named_parameters()
        if not torch.equal(p.detach().nan_to_num(), before[name].nan_to_num())
    }


def still(model: nn.Module, lr: float = 0.01) -> torch.optim.SGD:
    """An optimizer whose own step changes nothing: all gradients are zero."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return torch.optim.SGD(model.parameters(), lr=lr)


@contextmanager
def process_group(folder: Path, rank: int = 0, size: int = 1) -> Iterator[None]:
    """A process group of so many processes, of which this is one."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
