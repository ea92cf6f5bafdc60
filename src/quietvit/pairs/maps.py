"""Classify the maps of a trace by their weight shapes, and the steps between two maps."""

from __future__ import annotations

from quietvit.tracing import Site
from quietvit.tracing.ops import norm_channel_dim


def is_matrix(site: Site) -> bool:
    """Whether a site multiplies channels by a matrix: a linear or a 1x1 convolution."""
    shape = site.weight_shape or ()
    if site.kind == "linear":
        return len(shape) == 2
    return site.kind == "conv" and all(size == 1 for size in shape[2:]) and shape[1] > 1


def is_whole(site: Site) -> bool:
    """Whether every output channel reads every input channel; False for grouped convolutions."""
    shape = site.weight_shape or ()
    if site.kind != "conv":
        return True
    return shape[1] == site.operands[0].shape[1 - len(shape)]


def inputs(site: Site) -> int:
    """Return the number of input channels of a matrix; 0 for a site without a weight."""
    return (site.weight_shape or (0, 0))[1]


def outputs(site: Site) -> int:
    """Return the number of output channels of a site with a weight."""
    if site.kind == "norm":
        return site.output_shape[norm_channel_dim(site.function)]
    assert site.weight_shape is not None
    return site.weight_shape[0]


def is_narrow(down: Site, up: Site) -> bool:
    """Whether ``down`` makes fewer channels than it reads and than ``up`` makes."""
    one, other = down.weight_shape or (), up.weight_shape or ()
    return len(one) >= 2 and one[0] < min(one[1], other[0])


def shaping(through: tuple[str, ...]) -> tuple[str, ...]:
    """Return the steps that affect the alignment of the two matrices."""
    neutral = ("offset", "factor", "summed", "beside")
    return tuple(step for step in through if step not in neutral)
