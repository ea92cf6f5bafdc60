"""Tiny models and calls that the tests of methods on blocks share."""

from __future__ import annotations

import torch
from torch import nn

import quietvit
import zoo


def built(name, count=8):
    model, example = zoo.build(name)
    example = example["pixel_values"] if isinstance(example, dict) else example
    generator = torch.Generator().manual_seed(3)
    return model, torch.randn(count, *example.shape[1:], generator=generator)


def quantize(model, method, images):
    return quietvit.quantize(model, method, images, progress=False)


class Doubling(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)
        self.blocks = nn.ModuleList([Residual(), Residual()])
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.conv(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.linear(x)


class Narrowing(nn.Module):
    """A convolution, a residual block that halves the sides, one that keeps them, a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.ModuleList([Convolutions(4, 8, 2), Convolutions(8, 8, 1)])
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Convolutions(nn.Module):
    def __init__(self, width, out, stride):
        super().__init__()
        self.conv = nn.Conv2d(width, out, 3, stride, 1)
        self.skip = nn.Conv2d(width, out, 1, stride)

    def forward(self, x):
        return self.skip(x) + torch.relu(self.conv(x))
