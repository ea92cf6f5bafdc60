"""What a method changes beside operands: a site's output (``Adjustment``), a block's output.

Both are small modules kept with the quantized model and saved with it. Who decides on them lives in
``methods``; where they act while the model runs, in ``quantized``.
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
"""Activations with f(s x) = s f(x) for which the standard deviation behind them is known here."""
SCALED_THROUGH = HOMOGENEOUS | {"pooled"}
"""What a link may lead through for the scale of a channel to arrive at its end."""
ADJUSTMENTS: dict[str, type[Adjustment]] = {}
A = TypeVar("A", bound="type[Adjustment]")


def register_adjustment(name: str) -> Callable[[A], A]:
    """Class decorator: make an adjustment known under ``name``, as saved models name it."""
    return registering(ADJUSTMENTS, name, "an adjustment")


def build_adjustment(kind: str, config: dict[str, Any]) -> Adjustment:
    """Rebuild an adjustment from ``kind`` and ``config()``; its buffers are loaded afterwards."""
    return rebuild(ADJUSTMENTS, kind, config, "adjustment")  # type: ignore[no-any-return]


class Adjustment(nn.Module, ABC):
    """Base class: ``adjustment(operands, run)`` is the site's new output.

    ``run(*operands)`` executes the site. What is learnt from calibration lies in buffers, what is
    chosen beforehand in ``config``. ``deployable`` says whether standard integer kernels can do it,
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
    """Which dim of a linear's, convolution's or norm's output its channels run along.

    Counted from behind where the site is a linear or convolution, so that an unbatched call counts.
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
    """y -> gain * y + bias, each (channels,) along ``axis``, float32.

    What re-parametrization makes of a norm (it folds into the norm's own gain and bias), and, with
    gain 1, the correction of a linear's or convolution's bias, also where it had none.
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
        """Along the channels of a site, gain 1 and bias 0 where none is given."""
        like = gain if gain is not None else bias
        if like is None:
            raise QuietvitError(f"an adjustment of {site.name} needs a gain or a bias.")
        gain = torch.ones_like(like) if gain is None else gain
        return cls(gain, torch.zeros_like(gain) if bias is None else bias, channel_axis(site))

    def then(self, later: ChannelAffine) -> ChannelAffine:
        """Both in one, this one first."""
        return ChannelAffine(later.gain * self.gain, later.gain * self.bias + later.bias, self.axis)

    def apply_to(self, y: Tensor) -> Tensor:
        shape = [1] * y.dim()
        shape[self.axis] = -1
        wide = y.to(torch.promote_types(y.dtype, torch.float32))  # a gain may overflow float16
        gain, bias = self.gain.to(wide.dtype).view(shape), self.bias.to(wide.dtype).view(shape)
        return torch.addcmul(bias, wide, gain).to(y.dtype)

    def at(self, channels: Sequence[int], axis: int) -> ChannelAffine:
        """The same for some of the channels, along another axis."""
        chosen = list(channels)
        return ChannelAffine(self.gain[chosen], self.bias[chosen], axis)

    def inverse(self) -> ChannelAffine:
        """What undoes this one; a gain of zero cannot be undone and gives inf."""
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

    ``weight``: (out, in), ``bias``: (out,). ``positions`` is the number of channel vectors of one
    image, for counting multiply-accumulates. It runs in float, beside the quantized block.
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
        """JSON-able arguments of ``from_config``."""
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
    """A name as a ModuleDict takes it: no dots, and none of a module's own attributes."""
    return f"{name.replace('.', '/')}:"
