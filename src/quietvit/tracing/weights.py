"""Weight views: a matrix inside a parameter, held by name so that it stays valid after a reload.

``view_of`` finds the view for recorded entries. Pairs of views live in ``pairs``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.tracing.scales import read_entry, scale_name

Index = range | tuple[int, ...]


@dataclass(frozen=True)
class WeightView:
    """A matrix inside a parameter: the chosen rows and columns of ``module.attribute``.

    A parameter of shape (out, in, ...) is read as the matrix (out, in * ...); None selects all rows
    or columns. With ``transposed`` the matrix is the transpose of this selection. With ``diagonal``
    the parameter is a vector of gains g, shape (h,), and stands for diag(g).

    The parameter may be a computed scale (``tracing.scales``), which is read-only.
    """

    module: str
    attribute: str = "weight"
    rows: Index | None = None
    cols: Index | None = None
    transposed: bool = False
    diagonal: bool = False

    @property
    def parameter_name(self) -> str:
        return f"{self.module}.{self.attribute}" if self.module else self.attribute

    def parameter(self, model: nn.Module) -> Tensor:
        """Return the whole present parameter. Raises QuietvitError if it is missing."""
        try:
            return read_entry(model, self.parameter_name)
        except AttributeError as error:
            raise QuietvitError(
                f"a pair names {self.parameter_name}, but this {type(model).__name__} does not "
                "have it. Find the pairs again on this model: quietvit.find_pairs(model, example)."
            ) from error

    def read(self, model: nn.Module) -> Tensor:
        """Return the matrix (rows, cols), or the vector of gains (h,) if diagonal."""
        return self.select(self.parameter(model))

    def select(self, parameter: Tensor) -> Tensor:
        """Select this view's entries from a tensor shaped like the whole parameter."""
        if self.diagonal:
            return parameter if self.rows is None else parameter[_index(self.rows)]
        matrix = parameter.flatten(1)
        if self.rows is not None:
            matrix = matrix[_index(self.rows)]
        if self.cols is not None:
            matrix = matrix[:, _index(self.cols)]
        return matrix.mT if self.transposed else matrix

    def scatter_add_(self, whole: Tensor, entries: Tensor) -> None:
        """Add ``entries`` (shaped like ``read``'s result) into ``whole`` (like the parameter)."""
        self.scatter_(whole, self.select(whole) + entries)

    def scatter_(self, whole: Tensor, entries: Tensor) -> None:
        """Write ``entries`` (shaped like ``read``'s result) into ``whole`` (like the parameter)."""
        rows = _index(self.rows) if self.rows is not None else slice(None)
        if self.diagonal:
            whole[rows] = entries
            return
        if self.transposed:
            entries = entries.mT
        matrix = whole.flatten(1)  # a copy if the memory is not row-major, e.g. channels_last
        cols = _index(self.cols) if self.cols is not None else slice(None)
        if isinstance(rows, list) and isinstance(cols, list):
            matrix[torch.tensor(rows)[:, None], torch.tensor(cols)] = entries
        else:
            matrix[rows, cols] = entries
        if matrix.data_ptr() != whole.data_ptr():
            whole.copy_(matrix.view(whole.shape))

    def __str__(self) -> str:
        if self.diagonal:
            return f"diag({self.parameter_name}{_span(self.rows)})"
        where = f"[{_span(self.rows) or ':'}, {_span(self.cols) or ':'}]"
        shown = self.parameter_name + (where if (self.rows, self.cols) != (None, None) else "")
        return shown + ("ᵀ" if self.transposed else "")


def view_of(
    entry: tuple[str, Tensor], parameters: Mapping[str, Tensor], *, gain: bool = False
) -> WeightView | None:
    """Return the view that selects ``entry``, or None if its entries are not a matrix.

    ``entry``: (parameter name, flat indices into it), the indices of shape (out, in, ...), or (h,)
    with ``gain``. Example: rows 384 to 575 of a weight (576, 192) have the indices 73728 to 110591.
    """
    name, entries = entry
    module, _, attribute = name.rpartition(".")
    whole = parameters[name]
    if gain:
        chosen = None if len(entries) == whole.numel() else _compress(entries)
        return WeightView(module, attribute, rows=chosen, diagonal=True)
    if whole.ndim < 2 or entries.ndim < 2:
        return None
    width = whole[0].numel()
    entries = entries.flatten(1)
    for transposed in (False, True):
        matrix = entries.mT if transposed else entries
        rows, cols = matrix[:, 0] // width, matrix[0] % width
        if torch.equal(matrix, rows[:, None] * width + cols[None]):
            full_rows = torch.equal(rows, torch.arange(len(whole), device=rows.device))
            full_cols = torch.equal(cols, torch.arange(width, device=cols.device))
            return WeightView(
                module,
                attribute,
                rows=None if full_rows else _compress(rows),
                cols=None if full_cols else _compress(cols),
                transposed=transposed,
            )
    return None


def scale_view(modules: Sequence[str], rows: Sequence[int], size: int) -> WeightView:
    """Return the view of the product of the scales of ``modules``, (``size``,), at ``rows``."""
    whole = WeightView(*scale_name(modules), diagonal=True)
    return replace(whole, rows=_chosen(None, rows, size))


def _compress(index: Tensor) -> Index:
    """Return the indices as a range if they rise evenly, else as a tuple."""
    return compress(tuple(index.tolist()))


def compress(index: tuple[int, ...]) -> Index:
    """Return the indices as a range if they rise evenly, else unchanged."""
    step = index[1] - index[0] if len(index) > 1 else 1
    if step > 0 and index == tuple(range(index[0], index[-1] + 1, step)):
        return range(index[0], index[-1] + 1, step)
    return index


def select_rows(view: WeightView, rows: Sequence[int], height: int) -> WeightView:
    """Return the view of the given rows of ``view``'s matrix, which has ``height`` rows."""
    if view.transposed:
        return replace(view, cols=_chosen(view.cols, rows, height))
    return replace(view, rows=_chosen(view.rows, rows, height))


def select_cols(view: WeightView, cols: Sequence[int], width: int) -> WeightView:
    """Return the view of the given columns of ``view``'s matrix, which has ``width`` columns."""
    if view.transposed:
        return replace(view, rows=_chosen(view.rows, cols, width))
    return replace(view, cols=_chosen(view.cols, cols, width))


def _chosen(base: Index | None, chosen: Sequence[int], size: int) -> Index | None:
    if tuple(chosen) == tuple(range(size)):
        return base
    return compress(tuple(chosen) if base is None else tuple(base[i] for i in chosen))


def _index(index: Index) -> slice | list[int]:
    return slice(index.start, index.stop, index.step) if isinstance(index, range) else list(index)


def _span(index: Index | None) -> str:
    if index is None:
        return ""
    if isinstance(index, range):
        step = f":{index.step}" if index.step != 1 else ""
        return f"{index.start}:{index.stop}{step}"
    return f"({len(index)} of {max(index) + 1})"
