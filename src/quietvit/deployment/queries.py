"""Detectors that choose their queries by score (RT-DETR, D-FINE): watch the choice, pair queries.

``outputs`` and ``comparing`` use it.
"""

from __future__ import annotations

from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.overrides import TorchFunctionMode

TIE = 1e-5
"""Two scores tie if they differ by less than this times the largest score: float32 rounding."""
TOPK = (torch.topk, Tensor.topk)


class Choosing(TorchFunctionMode):
    """Watch each ``topk`` of floating-point scores: how many it takes, and how many of them tie."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: set[int] = set()
        self.chosen = self.tied = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in TOPK and result.values.is_floating_point():
            dim = kwargs.get("dim", -1) if kwargs and "dim" in kwargs else (*args, -1, -1)[2]
            self._watch(args[0], result.values, dim)
        return result

    def _watch(self, scores: Tensor, values: Tensor, dim: int) -> None:
        count = values.shape[dim]
        with torch._C.DisableTorchFunction():
            ordered = scores.detach().float().movedim(dim, -1).sort(descending=True).values
            ordered = ordered[..., : count + 1]  # a tie with the first that is left out counts
            gaps = ordered[..., :-1] - ordered[..., 1:]
            tied = gaps <= TIE * ordered.abs().amax(-1, keepdim=True)
            self.tied += int(tied.sum())
        self.taken.add(count)
        self.chosen += tied.numel()


def paired(theirs: Tensor, own: Tensor) -> tuple[Tensor, float]:
    """Return ``theirs`` (B, queries, channels) with each image's queries in the order of ``own``.

    The pairs have the least sum of L2 distances. Also returns the share of queries that moved.
    """
    ordered, moved = [], 0
    for there, here in zip(theirs, own, strict=True):
        _, order = linear_sum_assignment(torch.cdist(here, there).numpy())
        places = torch.from_numpy(order)
        ordered.append(there[places])
        moved += int((places != torch.arange(len(places))).sum())
    return torch.stack(ordered), moved / max(1, own.shape[0] * own.shape[1])
