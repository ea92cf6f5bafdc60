"""How much each pair amplifies its worst output channel: a number to watch while training.

It only reads weights. ``penalties`` changes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.pairs import MatrixPair
from quietvit.tensors import all_gathered, wide, widest
from quietvit.tracing import WeightView, plain_model
from quietvit.tracing.scales import read_entry


@torch.no_grad()
def amplifications(model: nn.Module, pairs: Sequence[MatrixPair]) -> dict[str, float]:
    """Return max_k |A^T b_k| of each pair by name (the largest of pairs with the same name).

    It is the standard deviation of the worst output channel for white input of unit variance. Of
    all operators between the matrices only the gains ``before`` and ``between`` count. NaN and
    infinity give ``inf``. One device synchronization. Under FSDP2 all processes must call it.
    Raises QuietvitError if there are no pairs. Derived here (docs/method.md).
    """
    if not pairs:
        raise QuietvitError("amplifications: give at least one pair.")
    model = plain_model(model)
    views = [view for pair in pairs for view in pair.views]
    names = dict.fromkeys(view.parameter_name for view in views)
    whole = all_gathered({name: read_entry(model, name) for name in names})
    return amplifications_of(whole, pairs)


@torch.no_grad()
def amplifications_of(
    parameters: Mapping[str, Tensor], pairs: Sequence[MatrixPair]
) -> dict[str, float]:
    """Return ``amplifications`` from whole weights by name, such as a checkpoint's.

    Raises KeyError if a weight of a pair is missing.
    """
    device = next(iter(parameters.values())).device

    def read(view: WeightView) -> Tensor:
        return wide(view.select(parameters[view.parameter_name]))

    with torch.autocast(device.type, enabled=False):
        values = [_worst_channel(pair, *map(read, pair.views)) for pair in pairs]
    result: dict[str, float] = {}
    together = torch.stack([value.to(device, widest(device)) for value in values])
    for pair, value in zip(pairs, together.tolist(), strict=True):
        value = value if math.isfinite(value) else math.inf
        result[pair.name] = max(value, result.get(pair.name, 0.0))
    return result


def worst_amplification(model: nn.Module, pairs: Sequence[MatrixPair]) -> tuple[str, float]:
    """Return the name and value of the pair with the largest amplification."""
    result = amplifications(model, pairs)
    name = max(result, key=result.__getitem__)
    return name, result[name]


def _worst_channel(pair: MatrixPair, A: Tensor, B: Tensor, *gains: Tensor) -> Tensor:
    rest = list(gains)
    if pair.before is not None:
        A = A * rest.pop(0)
    if pair.between is not None:
        B = B * rest.pop(0)
    through = B * A if A.ndim == 1 else B @ A
    return through.norm(dim=1).amax()
