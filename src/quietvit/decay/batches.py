"""How pairs are read in batches of equal shape, and which of them share entries of a weight.

Only indices and copies. ``penalties`` and ``limits`` compute with the matrices, ``update`` writes
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from quietvit.pairs import MatrixPair
from quietvit.tensors import wide
from quietvit.tracing import WeightView
from quietvit.tracing.weights import Index

LARGEST_BATCH = 2**24
Side = TypeVar("Side")


@dataclass(frozen=True)
class AdjacentViews:
    """Views of one parameter that lie side by side, read and written as one.

    Example: the V of 12 heads of width 64 are rows 1536 to 2304 of a fused qkv (2304, 768). They
    are one slice, read as (12, 64, 768) without a copy.

    Args:
        view: covers all of them.
        start: the position of the first one in its batch.
        count: how many there are.
        axis: they follow each other along rows (0) or columns (1).
    """

    view: WeightView
    start: int
    count: int = 1
    axis: int = 0

    def read(self, whole: Tensor) -> Tensor:
        """Return the matrices (count, rows, cols), or gains (1, h), at least in float32.

        It is a view of a float32 or float64 parameter if the indices are ranges.
        """
        entries = wide(self.view.select(whole))
        if self.count == 1:
            return entries.unsqueeze(0)
        if self.axis == 0:
            return entries.unflatten(0, (self.count, -1))
        return entries.unflatten(1, (self.count, -1)).transpose(0, 1)

    def add_scaled_(self, whole: Tensor, entries: Tensor, factors: Tensor) -> None:
        """Add entries shaped like ``read``'s, each matrix times its factor (count,), into whole."""
        factors = factors.view(-1, *([1] * (entries.ndim - 1)))
        chosen = (self.view.rows, self.view.cols)
        if all(index is None or isinstance(index, range) for index in chosen) and (
            whole.ndim <= 2 or whole.is_contiguous()
        ):
            self.read(whole).addcmul_(entries, factors)
        else:
            self.scatter_add_(whole, entries * factors)

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
class Operands:
    """The matrices of a batch of n pairs, at least in float32.

    A is (n, h, d), or (n, h) if diagonal, and B is (n, o, h). Gains of norms are ``before`` (n, d)
    and ``between`` (n, h). With gains, the partner of B is diag(between) A diag(before), and the
    partner of A is B diag(between), see ``quietvit.MatrixPair``.
    """

    A: Tensor
    B: Tensor
    before: Tensor | None = None
    between: Tensor | None = None

    def apply(self, method: Callable[[Tensor, Tensor], tuple[Side, Side]]) -> tuple[Side, Side]:
        """Return what a penalty's method gives for A and for B, each beside its partner.

        With gains the two partners differ from A and B, so the method runs twice.
        """
        if self.before is None and self.between is None:
            return method(self.A, self.B)
        A, B = self.partners()
        return method(self.A, B)[0], method(A, self.B)[1]

    def partners(self) -> tuple[Tensor, Tensor]:
        """Return the partner of B, shaped like A, and that of A, shaped like B."""
        A, B = self.A, self.B
        if self.before is not None:
            A = A * self.before[:, None, :]
        if self.between is not None:
            A, B = A * self.between[:, :, None], B * self.between[:, None, :]
        return A, B


@dataclass(frozen=True)
class PairBatch:
    """Pairs of one kind and equal shape, read together.

    ``members`` are their positions in the list of pairs; ``firsts`` and ``seconds`` cover them in
    order.
    """

    members: tuple[int, ...]
    pairs: tuple[MatrixPair, ...]
    firsts: tuple[AdjacentViews, ...]
    seconds: tuple[AdjacentViews, ...]

    def read(self, parameters: Mapping[str, Tensor]) -> Operands:
        """Return the matrices of the members, and their gains."""
        return Operands(
            self.read_first(parameters),
            _joined(self.seconds, parameters),
            _gains([pair.before for pair in self.pairs], parameters),
            _gains([pair.between for pair in self.pairs], parameters),
        )

    def read_first(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return A alone."""
        return _joined(self.firsts, parameters)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that its pairs move."""
        return tuple(dict.fromkeys(r.view.parameter_name for r in (*self.firsts, *self.seconds)))


def windows(
    pairs: Sequence[MatrixPair], parameters: Mapping[str, Tensor], room: int
) -> list[list[int]]:
    """Return the positions of pairs that are worked on together, in the order of the parameters.

    Pairs of the same two parameters stay together. The parameters of a window hold at most ``room``
    numbers, unless a single group of pairs has more.
    """
    order = {id(parameter): place for place, parameter in enumerate(parameters.values())}
    size = {id(parameter): parameter.numel() for parameter in parameters.values()}
    groups: dict[tuple[int, int], list[int]] = {}
    for position, pair in enumerate(pairs):
        one, two = (id(parameters[view.parameter_name]) for view in pair.sides)
        groups.setdefault((one, two), []).append(position)
    result: list[list[int]] = []
    window: set[int] = set()
    for ids in sorted(groups, key=lambda ids: sorted(order[i] for i in ids)):
        if not result or sum(size[i] for i in window | set(ids)) > room:
            result.append([])
            window = set()
        result[-1] += groups[ids]
        window |= set(ids)
    return result


def block_size(pairs: Sequence[MatrixPair], parameters: Mapping[str, Tensor]) -> int:
    """Return about the numbers in the largest block: 3/2 of those in the largest pair.

    In a transformer block of width h, fc1 and fc2 hold 8 h^2 numbers, and all four weights 12 h^2.
    One percent is added for the gains of its norms, so that they do not push a pair out.
    """
    largest = 0
    for pair in pairs:
        matrices = {id(w): w for w in (parameters[v.parameter_name] for v in pair.sides)}
        largest = max(largest, sum(parameter.numel() for parameter in matrices.values()))
    return largest * 303 // 200


def batches(
    pairs: Sequence[MatrixPair],
    parameters: Mapping[str, Tensor],
    positions: Iterable[int] | None = None,
    room: int = LARGEST_BATCH,
) -> list[PairBatch]:
    """Group pairs of equal kind, shapes, dtype and device; a batch holds at most ``room`` numbers.

    ``positions``: only these pairs. The largest matrices come first, then the order of the pairs.
    So the changes of a small batch fit into the memory that a large one has freed, while copies of
    shared parameters wait.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    sizes: dict[tuple[object, ...], int] = {}
    for position in range(len(pairs)) if positions is None else positions:
        pair = pairs[position]
        shapes = []
        for view in pair.sides:
            entries = view.select(parameters[view.parameter_name])
            shapes.append((tuple(entries.shape), entries.dtype, entries.device))
        gains = (pair.before is None, pair.between is None)
        key = (*shapes, pair.first.diagonal, pair.kind, *gains)
        groups.setdefault(key, []).append(position)
        sizes[key] = sum(math.prod(shape) for shape, _, _ in shapes)
    result = []
    for key, members in sorted(groups.items(), key=lambda item: -sizes[item[0]]):
        most = max(1, min(room, LARGEST_BATCH) // max(1, sizes[key]))
        for start in range(0, len(members), most):
            chosen = tuple(members[start : start + most])
            here = tuple(pairs[i] for i in chosen)
            firsts, seconds = (_runs([getattr(p, s) for p in here]) for s in ("first", "second"))
            result.append(PairBatch(chosen, here, firsts, seconds))
    return result


def overlaps(views: Sequence[WeightView], parameters: Mapping[str, Tensor]) -> list[list[int]]:
    """Return for each view the positions of all views that share an entry with it, itself too.

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


def _runs(views: Sequence[WeightView]) -> tuple[AdjacentViews, ...]:
    runs: list[AdjacentViews] = []
    for position, view in enumerate(views):
        longer = _extended(runs[-1], view, views[position - 1]) if runs else None
        if longer is None:
            runs.append(AdjacentViews(view, position))
        else:
            runs[-1] = longer
    return tuple(runs)


def _extended(run: AdjacentViews, view: WeightView, last: WeightView) -> AdjacentViews | None:
    """``run`` with the view at its end, or None if the view does not continue it."""
    if view.diagonal or view.transposed or run.view.parameter_name != view.parameter_name:
        return None
    if (run.count == 1 or run.axis == 0) and last.cols == view.cols:
        rows = _union(run.view.rows, last.rows, view.rows)
        if rows is not None:
            return AdjacentViews(replace(view, rows=rows), run.start, run.count + 1, axis=0)
    if (run.count == 1 or run.axis == 1) and last.rows == view.rows:
        cols = _union(run.view.cols, last.cols, view.cols)
        if cols is not None:
            return AdjacentViews(replace(view, cols=cols), run.start, run.count + 1, axis=1)
    return None


def _union(whole: Index | None, last: Index | None, following: Index | None) -> range | None:
    if not (isinstance(whole, range) and isinstance(last, range) and isinstance(following, range)):
        return None
    beside = last.step == following.step == 1 and last.stop == following.start
    return range(whole.start, following.stop) if beside else None


def _joined(runs: Sequence[AdjacentViews], parameters: Mapping[str, Tensor]) -> Tensor:
    read = [run.read(parameters[run.view.parameter_name]) for run in runs]
    return read[0] if len(read) == 1 else torch.cat(read)


def _gains(views: Sequence[WeightView | None], parameters: Mapping[str, Tensor]) -> Tensor | None:
    result = [view.select(parameters[view.parameter_name]) for view in views if view is not None]
    return wide(torch.stack(result)) if result else None


def _meet(one: Index | None, other: Index | None) -> bool:
    if one is None or other is None:
        return True
    if isinstance(one, range) and isinstance(other, range) and one.step == other.step == 1:
        return max(one.start, other.start) < min(one.stop, other.stop)
    return not set(one).isdisjoint(other)
