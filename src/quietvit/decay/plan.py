"""How pairs are read in batches of equal shape, and which of them share entries of a weight.

Only indices and copies; what is done with the matrices is in ``penalties`` and ``limits``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quietvit.pairs import MatrixPair
from quietvit.tracing import WeightView
from quietvit.tracing.weights import Index

_LARGEST_BATCH = 2**24


@dataclass(frozen=True)
class Run:
    """Views of one parameter that lie side by side (all heads, say), read and written as one.

    ``view`` covers all ``count`` of them, which follow each other along ``axis`` (0: rows, 1:
    columns); ``start`` is the position of the first in its batch.
    """

    view: WeightView
    start: int
    count: int = 1
    axis: int = 0

    def read(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the matrices, shape (count, rows, cols), or gains, (1, h), at least float32."""
        entries = wide(self.view.select(parameters[self.view.parameter_name]))
        if self.count == 1:
            return entries.unsqueeze(0)
        if self.axis == 0:
            return entries.unflatten(0, (self.count, -1))
        return entries.unflatten(1, (self.count, -1)).transpose(0, 1)

    def scatter_add_(self, whole: Tensor, entries: Tensor) -> None:
        """Add entries shaped like ``read``'s into a tensor shaped like the parameter."""
        if self.count == 1:
            entries = entries[0]
        elif self.axis == 0:
            entries = entries.flatten(0, 1)
        else:
            entries = entries.transpose(0, 1).flatten(1, 2)
        self.view.scatter_add_(whole, entries)


@dataclass(frozen=True)
class Batch:
    """Pairs of one kind and equal shape, read together.

    ``members`` are their positions in the list of pairs; ``firsts`` and ``seconds`` cover them in
    order.
    """

    members: tuple[int, ...]
    pairs: tuple[MatrixPair, ...]
    firsts: tuple[Run, ...]
    seconds: tuple[Run, ...]

    def read(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return A: (n, h, d), or (n, h) where diagonal, and B: (n, o, h), in at least float32."""
        return _joined(self.firsts, parameters), _joined(self.seconds, parameters)


def batches(pairs: Sequence[MatrixPair], parameters: Mapping[str, Tensor]) -> list[Batch]:
    """Group pairs of equal shapes, dtype and device; a batch holds at most 2^24 numbers."""
    groups: dict[tuple[object, ...], list[int]] = {}
    sizes: dict[tuple[object, ...], int] = {}
    for position, pair in enumerate(pairs):
        shapes = []
        for view in (pair.first, pair.second):
            entries = view.select(parameters[view.parameter_name])
            shapes.append((tuple(entries.shape), entries.dtype, entries.device))
        key = (*shapes, pair.first.diagonal, pair.kind)
        groups.setdefault(key, []).append(position)
        sizes[key] = sum(math.prod(shape) for shape, _, _ in shapes)
    found = []
    for key, members in groups.items():
        room = max(1, _LARGEST_BATCH // max(1, sizes[key]))
        for start in range(0, len(members), room):
            chosen = tuple(members[start : start + room])
            here = tuple(pairs[i] for i in chosen)
            firsts, seconds = (_runs([getattr(p, s) for p in here]) for s in ("first", "second"))
            found.append(Batch(chosen, here, firsts, seconds))
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


def _runs(views: Sequence[WeightView]) -> tuple[Run, ...]:
    runs: list[Run] = []
    for position, view in enumerate(views):
        longer = _extended(runs[-1], view, views[position - 1]) if runs else None
        if longer is None:
            runs.append(Run(view, position))
        else:
            runs[-1] = longer
    return tuple(runs)


def _extended(run: Run, view: WeightView, last: WeightView) -> Run | None:
    """The run with the view at its end, or None where the view does not continue it."""
    if view.diagonal or view.transposed or run.view.parameter_name != view.parameter_name:
        return None
    if (run.count == 1 or run.axis == 0) and last.cols == view.cols:
        rows = _union(run.view.rows, last.rows, view.rows)
        if rows is not None:
            return Run(replace(view, rows=rows), run.start, run.count + 1, axis=0)
    if (run.count == 1 or run.axis == 1) and last.rows == view.rows:
        cols = _union(run.view.cols, last.cols, view.cols)
        if cols is not None:
            return Run(replace(view, cols=cols), run.start, run.count + 1, axis=1)
    return None


def _union(whole: Index | None, last: Index | None, following: Index | None) -> range | None:
    if not (isinstance(whole, range) and isinstance(last, range) and isinstance(following, range)):
        return None
    beside = last.step == following.step == 1 and last.stop == following.start
    return range(whole.start, following.stop) if beside else None


def _joined(runs: Sequence[Run], parameters: Mapping[str, Tensor]) -> Tensor:
    read = [run.read(parameters) for run in runs]
    return read[0] if len(read) == 1 else torch.cat(read)


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float64 if it is, else in float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _meet(one: Index | None, other: Index | None) -> bool:
    if one is None or other is None:
        return True
    if isinstance(one, range) and isinstance(other, range) and one.step == other.step == 1:
        return max(one.start, other.start) < min(one.stop, other.stop)
    return not set(one).isdisjoint(other)
