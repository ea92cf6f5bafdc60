"""Weight views: which matrix inside which parameter. Held by name, so no tensor outlives a reload.

How views are found from recorded entries lives here; pairs of them live in ``pairs``.
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
    """A matrix inside a parameter: ``module.attribute``, seen as 2-D, some rows, some columns.

    A parameter of shape (out, in, ...) is read as the matrix (out, in * ...). With ``diagonal`` the
    parameter is a vector of gains g, shape (h,), and stands for diag(g). With ``transposed`` the
    matrix that acts is the transpose of the rows and columns chosen.

    The parameter may also be a computed scale (``tracing.scales``), which can be read and not
    written.
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
        """Return the whole parameter as it is now. Raises QuietvitError where it is missing."""
        try:
            return read_entry(model, self.parameter_name)
        except AttributeError as error:
            raise QuietvitError(
                f"the pair names {self.parameter_name}, which this {type(model).__name__} does not "
                "have; find the pairs again on this model with quietvit.find_pairs(model, example)."
            ) from error

    def read(self, model: nn.Module) -> Tensor:
        """Return the matrix, shape (rows, cols), or the vector of gains, shape (h,) if diagonal."""
        return self.select(self.parameter(model))

    def select(self, parameter: Tensor) -> Tensor:
        """Choose this view's entries out of a tensor shaped like the whole parameter."""
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
        """Put ``entries`` (shaped like ``read``'s result) into ``whole`` (like the parameter)."""
        rows = _index(self.rows) if self.rows is not None else slice(None)
        if self.diagonal:
            whole[rows] = entries
            return
        if self.transposed:
            entries = entries.mT
        matrix = whole.flatten(1)  # a copy where the memory format is not row by row
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
    part: tuple[str, Tensor], parameters: Mapping[str, Tensor], *, gain: bool = False
) -> WeightView | None:
    """The view that selects ``part`` = (parameter name, flat indices), or None if it is no matrix.

    Indices of shape (out, in, ...); or (h,) with ``gain``.
    """
    name, entries = part
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
    """The product of the scales of some modules, of ``size`` channels each, at the chosen rows."""
    whole = WeightView(*scale_name(modules), diagonal=True)
    return replace(whole, rows=_chosen(None, rows, size))


def _compress(index: Tensor) -> Index:
    """A range where the indices are evenly spaced upwards, else the tuple of them."""
    return compress(tuple(index.tolist()))


def compress(index: tuple[int, ...]) -> Index:
    """A range where the indices are evenly spaced upwards, else the tuple itself."""
    step = index[1] - index[0] if len(index) > 1 else 1
    if step > 0 and index == tuple(range(index[0], index[-1] + 1, step)):
        return range(index[0], index[-1] + 1, step)
    return index


def select_rows(view: WeightView, rows: Sequence[int], height: int) -> WeightView:
    """Some rows of the matrix that ``view`` shows, which has ``height`` of them."""
    if view.transposed:
        return replace(view, cols=_chosen(view.cols, rows, height))
    return replace(view, rows=_chosen(view.rows, rows, height))


def select_cols(view: WeightView, cols: Sequence[int], width: int) -> WeightView:
    """Some columns of the matrix that ``view`` shows, which has ``width`` of them."""
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
