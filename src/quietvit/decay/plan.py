"""How pairs are read in batches of equal shape, and which of them share entries of a weight.

Only indices and copies; what is done with the matrices is in ``penalties`` and ``limits``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quietvit.pairs import MatrixPair
from quietvit.tracing import WeightView
from quietvit.tracing.weights import Index

_LARGEST_BATCH = 2**24


@dataclass(frozen=True)
class Batch:
    """Pairs of equal shape, read together: ``members`` are positions in the list of pairs."""

    members: tuple[int, ...]
    pairs: tuple[MatrixPair, ...]

    def read(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return A: (n, h, d), or (n, h) where diagonal, and B: (n, o, h), in at least float32."""
        return (
            _stack([pair.first for pair in self.pairs], parameters),
            _stack([pair.second for pair in self.pairs], parameters),
        )


def batches(pairs: Sequence[MatrixPair], parameters: Mapping[str, Tensor]) -> list[Batch]:
    """Group pairs of equal shapes, dtype and device; a batch holds at most 2^24 numbers."""
    groups: dict[tuple[object, ...], list[int]] = {}
    sizes: dict[tuple[object, ...], int] = {}
    for position, pair in enumerate(pairs):
        shapes = []
        for view in (pair.first, pair.second):
            entries = view.select(parameters[view.parameter_name])
            shapes.append((tuple(entries.shape), entries.dtype, entries.device))
        key = (*shapes, pair.first.diagonal)
        groups.setdefault(key, []).append(position)
        sizes[key] = sum(torch.Size(shape).numel() for shape, _, _ in shapes)
    found = []
    for key, members in groups.items():
        room = max(1, _LARGEST_BATCH // max(1, sizes[key]))
        for start in range(0, len(members), room):
            chosen = tuple(members[start : start + room])
            found.append(Batch(chosen, tuple(pairs[i] for i in chosen)))
    return found


def overlaps(views: Sequence[WeightView], parameters: Mapping[str, Tensor]) -> list[list[int]]:
    """For each view, the positions of all views (itself too) that share an entry with it.

    Two names of one tied parameter are the same parameter.
    """
    by_parameter: dict[int, list[int]] = {}
    for position, view in enumerate(views):
        by_parameter.setdefault(id(parameters[view.parameter_name]), []).append(position)
    sharing: list[list[int]] = [[] for _ in views]
    for positions in by_parameter.values():
        for i in positions:
            for j in positions:
                if _meet(views[i].rows, views[j].rows) and _meet(views[i].cols, views[j].cols):
                    sharing[i].append(j)
    return sharing


def _stack(views: Sequence[WeightView], parameters: Mapping[str, Tensor]) -> Tensor:
    read = [wide(view.select(parameters[view.parameter_name])) for view in views]
    return read[0].unsqueeze(0) if len(read) == 1 else torch.stack(read)


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float64 if it is, else in float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _meet(one: Index | None, other: Index | None) -> bool:
    if one is None or other is None:
        return True
    if isinstance(one, range) and isinstance(other, range) and one.step == other.step == 1:
        return max(one.start, other.start) < min(one.stop, other.stop)
    return not set(one).isdisjoint(other)
