"""Computed diagonal maps: the channel factors of BatchNorms and depthwise convolutions, by name.

Each read computes it from the model's present state. ``record`` finds the links that pass them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quietvit.tensors import gathered, wide
from quietvit.tracing.wrappers import plain_model

# "stage.bn.channel_scale()" names the scale of "stage.bn". No module has such an attribute.
SCALE = "channel_scale()"
_TIMES = " * "


def scale_name(modules: Sequence[str]) -> tuple[str, str]:
    """Return the module and attribute that name the product of the scales of ``modules``."""
    return f".{SCALE}{_TIMES}".join(modules), SCALE


def is_scale(name: str) -> bool:
    """Whether a name stands for a computed scale."""
    return name.endswith(f".{SCALE}")


def read_entry(model: nn.Module, name: str) -> Tensor:
    """Return the present value of the parameter or computed scale of this name.

    Raises AttributeError if the model has no such module or parameter.
    """
    model = plain_model(model)
    if not is_scale(name):
        module, _, attribute = name.rpartition(".")
        entry = getattr(model.get_submodule(module), attribute)
        assert isinstance(entry, Tensor)
        return entry
    parts = [part.removesuffix(f".{SCALE}") for part in name.split(_TIMES)]
    scales = [_scale(plain_model(model.get_submodule(part))) for part in parts]
    return torch.stack(scales).prod(0) if len(scales) > 1 else scales[0]


def has_scale(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm that uses stored statistics in eval mode."""
    module = plain_model(module)
    return (
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.running_var is not None
        and module.weight is not None
    )


def _scale(module: nn.Module) -> Tensor:
    """Return the factor of each channel, (channels,), detached, at least float32.

    BatchNorm: gamma / sqrt(running_var + eps), as in eval mode. Depthwise convolution: the
    Euclidean norm of each kernel, which is its gain for white input.
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        assert module.running_var is not None
        variance = wide(gathered(module.running_var))
        return wide(gathered(module.weight)) * (variance + module.eps).rsqrt()
    weight = module.weight
    assert isinstance(weight, Tensor)
    return wide(gathered(weight)).flatten(1).norm(dim=1)
