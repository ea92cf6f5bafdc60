"""Ordered matrix pairs: which weight acts first, which second, and through what.

Pairs hold names, never tensors, so that they survive ``.to()``, ``load_state_dict(assign=True)``,
compilation and sharding. How pairs act on weights lives in ``decay``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError

Index = range | tuple[int, ...]


@dataclass(frozen=True)
class WeightView:
    """A matrix inside a parameter: ``module.attribute``, seen as 2-D, some rows, some columns.

    A parameter of shape (out, in, ...) is read as the matrix (out, in * ...). With ``diagonal`` the
    parameter is a vector of gains g, shape (h,), and stands for diag(g). With ``transposed`` the
    matrix that acts is the transpose of the rows and columns chosen.
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
        """Return the whole parameter as it is now. Raises QuietvitError where the model lacks it."""
        try:
            found = getattr(model.get_submodule(self.module), self.attribute)
        except AttributeError as error:
            raise QuietvitError(
                f"the pair names {self.parameter_name}, which this {type(model).__name__} does not "
                "have; find the pairs again on this model with quietvit.find_pairs(model, example)."
            ) from error
        assert isinstance(found, Tensor)
        return found

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
        if self.diagonal:
            rows = _index(self.rows) if self.rows is not None else slice(None)
            whole[rows] += entries
            return
        if self.transposed:
            entries = entries.mT
        matrix = whole.view(whole.shape[0], -1)
        rows = _index(self.rows) if self.rows is not None else slice(None)
        cols = _index(self.cols) if self.cols is not None else slice(None)
        if isinstance(rows, list) and isinstance(cols, list):
            matrix[torch.tensor(rows)[:, None], torch.tensor(cols)] += entries
        else:
            matrix[rows, cols] += entries

    def __str__(self) -> str:
        if self.diagonal:
            return f"diag({self.parameter_name}{_span(self.rows)})"
        where = f"[{_span(self.rows) or ':'}, {_span(self.cols) or ':'}]"
        shown = self.parameter_name + (where if (self.rows, self.cols) != (None, None) else "")
        return shown + ("ᵀ" if self.transposed else "")


@dataclass(frozen=True)
class MatrixPair:
    """An ordered pair: ``first`` (A) acts before ``second`` (B), and B A is defined.

    ``kind`` is one of ``mlp``, ``value_output``, ``gated_mlp``, ``norm_linear``, ``query_key``.
    ``head`` counts attention heads, ``through`` names what stands between the two.
    """

    first: WeightView
    second: WeightView
    kind: str
    head: int | None = None
    through: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        head = "" if self.head is None else f" head {self.head}"
        return f"{self.kind}: {self.first.parameter_name} -> {self.second.parameter_name}{head}"


def _index(index: Index) -> slice | list[int]:
    return slice(index.start, index.stop, index.step) if isinstance(index, range) else list(index)


def _span(index: Index | None) -> str:
    if index is None:
        return ""
    if isinstance(index, range):
        step = f":{index.step}" if index.step != 1 else ""
        return f"{index.start}:{index.stop}{step}"
    return f"({len(index)} of {max(index) + 1})"


Pairs = Sequence[MatrixPair]
