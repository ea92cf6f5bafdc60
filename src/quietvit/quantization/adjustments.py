"""What a method changes besides operands: a site's output (``Adjustment``), or a block's output.

Both are small modules that are kept and saved with the quantized model. ``methods`` creates them;
``quantized`` applies them while the model runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.quantization.registry import rebuild, registering
from quietvit.tracing import Site
from quietvit.tracing.ops import norm_channel_dim

HOMOGENEOUS = frozenset({"relu"})
"""Activations with f(s x) = s f(x) whose output standard deviation is known here."""
SCALED_THROUGH = HOMOGENEOUS | {"pooled"}
"""Operations that a channel's scale passes through unchanged on the way to the link's end."""
ADJUSTMENTS: dict[str, type[Adjustment]] = {}
A = TypeVar("A", bound="type[Adjustment]")


def register_adjustment(name: str) -> Callable[[A], A]:
    """Class decorator: register an adjustment under ``name``, which saved models refer to."""
    return registering(ADJUSTMENTS, name, "an adjustment")


def build_adjustment(kind: str, config: dict[str, Any]) -> Adjustment:
    """Rebuild an adjustment from ``kind`` and ``config()``; its buffers are loaded afterwards."""
    return rebuild(ADJUSTMENTS, kind, config, "adjustment")  # type: ignore[no-any-return]


class Adjustment(nn.Module, ABC):
    """Base class: ``adjustment(operands, run)`` returns the site's new output.

    ``run(*operands)`` executes the site. Values learnt from calibration are buffers; values chosen
    beforehand are in ``config``. ``deployable`` says whether standard integer kernels can do it,
    for example because it folds into a bias.
    """

    kind: ClassVar[str] = ""
    deployable: ClassVar[bool] = False

    @abstractmethod
    def forward(self, operands: tuple[Tensor, ...], run: Callable[..., Tensor]) -> Tensor: ...

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON-able arguments from which ``from_config`` rebuilds it without buffers."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> Adjustment:
        """Inverse of ``config``; the buffers hold placeholders of the right shape."""


def channel_axis(site: Site) -> int:
    """Return the channel dim of the output of a linear, convolution or norm.

    It is negative for linears and convolutions, so that it also fits a call without a batch dim.
    """
    if site.kind == "linear":
        return -1
    if site.kind == "conv" and site.weight_shape is not None:
        return 1 - len(site.weight_shape)
    if site.kind == "norm":
        return norm_channel_dim(site.function)
    raise QuietvitError(f"{site.name} is a {site.kind}; it has no channels to adjust.")


@register_adjustment("channel_affine")
class ChannelAffine(Adjustment):
    """y -> gain * y + bias, both (channels,) along ``axis``, float32.

    A re-parametrization puts it behind a norm, where it folds into the norm's gain and bias. With
    gain 1 it corrects the bias of a linear or convolution, or adds one.
    """

    deployable: ClassVar[bool] = True
    gain: Tensor
    bias: Tensor

    def __init__(self, gain: Tensor, bias: Tensor, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("gain", gain.detach().float())
        self.register_buffer("bias", bias.detach().float())

    @classmethod
    def of(
        cls, site: Site, *, gain: Tensor | None = None, bias: Tensor | None = None
    ) -> ChannelAffine:
        """Make one for a site's channels. A missing gain is 1, a missing bias 0."""
        like = gain if gain is not None else bias
        if like is None:
            raise QuietvitError(f"an adjustment of {site.name} needs a gain or a bias.")
        gain = torch.ones_like(like) if gain is None else gain
        return cls(gain, torch.zeros_like(gain) if bias is None else bias, channel_axis(site))

    def then(self, later: ChannelAffine) -> ChannelAffine:
        """Combine both into one: first this one, then ``later``."""
        return ChannelAffine(later.gain * self.gain, later.gain * self.bias + later.bias, self.axis)

    def apply_to(self, y: Tensor) -> Tensor:
        shape = [1] * y.dim()
        shape[self.axis] = -1
        wide = y.to(torch.promote_types(y.dtype, torch.float32))  # a gain may overflow float16
        gain, bias = self.gain.to(wide.dtype).view(shape), self.bias.to(wide.dtype).view(shape)
        return torch.addcmul(bias, wide, gain).to(y.dtype)

    def at(self, channels: Sequence[int], axis: int) -> ChannelAffine:
        """Return the part for some of the channels, along another axis."""
        chosen = list(channels)
        return ChannelAffine(self.gain[chosen], self.bias[chosen], axis)

    def inverse(self) -> ChannelAffine:
        """Return the inverse; a gain of zero has none and gives inf."""
        return ChannelAffine(1 / self.gain, -self.bias / self.gain, self.axis)

    def forward(self, operands: tuple[Tensor, ...], run: Callable[..., Tensor]) -> Tensor:
        return self.apply_to(run(*operands))

    def config(self) -> dict[str, Any]:
        return {"channels": self.gain.numel(), "axis": self.axis}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ChannelAffine:
        channels = config["channels"]
        return cls(torch.ones(channels), torch.zeros(channels), config["axis"])


class Compensation(nn.Module):
    """y -> y + x Wᵀ + b for the input x and output y of a block, along the channel dim ``axis``.

    ``weight``: (out, in), ``bias``: (out,). ``positions``: channel vectors per image, to count
    multiply-accumulates. It runs in float, beside the quantized block.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, *, axis: int = -1, positions: int) -> None:
        super().__init__()
        self.axis, self.positions = axis, positions
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", bias.detach())

    @property
    def macs(self) -> int:
        return self.weight.numel() * self.positions

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        extra = x.movedim(self.axis, -1) @ weight.mT + bias
        return y + extra.movedim(-1, self.axis).to(y.dtype)

    def config(self) -> dict[str, Any]:
        return {"shape": list(self.weight.shape), "axis": self.axis, "positions": self.positions}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Compensation:
        out, width = config["shape"]
        return cls(
            torch.zeros(out, width),
            torch.zeros(out),
            axis=config["axis"],
            positions=config["positions"],
        )


def module_key(name: str) -> str:
    """Turn a name into a ModuleDict key: no dots, and unlike any attribute of a module."""
    return f"{name.replace('.', '/')}:"
