"""Turn the operands of one call into plain matrices, and choose which of their rows to keep.

``products`` collects them over all images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quietvit.tracing import Site

_FEWEST = 16
"""At least so many rows of each activation matrix are kept, before whole matrices are dropped."""


@dataclass(eq=False)
class Laid:
    """Operands of one call in the layout of ``Product``. ``arrange`` lays out its output alike."""

    left: Tensor
    right: Tensor
    arrange: Callable[[Tensor], Tensor]
    activations: bool


def lay_out(
    site: Site, operands: tuple[Tensor, ...], output: Tensor, run: Callable[..., Tensor]
) -> Laid | None:
    """Return the matrices of one call as in ``Product``, or None if there is no such layout."""
    left, right = operands
    if site.kind == "linear" and left.dim() >= 1 and right.dim() == 2:
        inputs, outputs = left.shape[-1], right.shape[0]
        return Laid(
            left.reshape(1, 1, -1, inputs),
            right.mT[None, None],
            lambda y: y.reshape(1, 1, -1, outputs),
            activations=False,
        )
    if site.kind == "conv":
        return _convolution(site, left, right, output, run)
    if site.kind != "matmul" or min(left.dim(), right.dim()) < 2:
        return None
    leading = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    if (*leading, left.shape[-2], right.shape[-1]) != tuple(output.shape):
        return None
    heads = leading[-1] if len(leading) > 1 else 1

    def arrange(y: Tensor) -> Tensor:
        return y.expand(*leading, *y.shape[-2:]).reshape(-1, heads, *y.shape[-2:])

    return Laid(arrange(left), arrange(right), arrange, activations=True)


def patches(
    x: Tensor, weight: Tensor, groups: int, transposed: bool, run: Callable[..., Tensor]
) -> Tensor:
    """Return the patches that a convolution's kernel reads: (groups, rows, taps).

    Rows run over images and positions. The convolution itself runs on one-hot kernels, so strides,
    padding and dilation need not be known. Example: a 3 x 3 kernel on 64 channels has 576 taps.
    """
    own = weight.transpose(0, 1) if transposed else weight
    filters, taps = own.shape[0] // groups, own[0].numel()
    bias = run(x, torch.zeros_like(weight))
    columns = []
    for start in range(0, taps, filters):
        stop = min(start + filters, taps)
        ones = weight.new_zeros(own.shape[0], taps)
        for tap in range(start, stop):
            ones[tap - start :: filters, tap] = 1
        kernels = ones.view(own.shape)
        met = run(x, kernels.transpose(0, 1) if transposed else kernels) - bias
        met = met.flatten(2).unflatten(1, (groups, filters))[:, :, : stop - start]
        columns.append(met.permute(1, 0, 3, 2).flatten(1, 2))
    return torch.cat(columns, -1)


def some_rows(
    laid: Laid, gradient: Tensor | None, budget: float | None, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Choose rows, the same in every group; with a gradient, only rows where it is not 0."""
    left = laid.left
    chosen = torch.arange(left.shape[2])
    if gradient is not None:
        weighty = gradient.ne(0).any(-1).any(1)[0].cpu().nonzero()[:, 0]
        chosen = weighty if len(weighty) else chosen
    if budget is not None and len(chosen) > budget:
        few = max(1, round(budget))
        drawn = torch.randperm(len(chosen), generator=generator)[:few]
        chosen = chosen[drawn.sort().values]
    chosen = chosen.to(left.device)
    some = None if gradient is None else gradient[:, :, chosen].bfloat16()
    return left[:, :, chosen].float(), laid.right.float(), some


@dataclass(frozen=True)
class Few:
    """Number of matrices kept of a batch, rows kept of each, and the fraction owed to the next."""

    matrices: int
    rows: int
    owed: float


def few_matrices(laid: Laid, budget: float | None, owed: float, *, first: bool) -> Few:
    """Choose how many activation matrices and rows fit into ``budget`` rows; None keeps all.

    Each kept matrix has at least ``_FEWEST`` rows, or all. If the budget is less than one matrix
    per batch, the fraction is ``owed`` to later batches. So the total does not grow with the number
    of batches. The ``first`` batch keeps at least one matrix.

    Example: 128 windows of 49 rows with a budget of 128 rows give 8 windows of 16 rows.
    """
    count, rows = laid.left.shape[0], laid.left.shape[2]
    if budget is None or budget >= count * rows:
        return Few(count, rows, owed)
        # The same number of rows in every batch: all batches have as many matrices per image.
    fewer = min(rows, max(_FEWEST, int(budget / count + 1e-6)))
    due = owed + budget / fewer
    matrices = min(count, max(1 if first else 0, round(due)))
    return Few(matrices, fewer, min(due - matrices, 1.0))


def some_matrices(
    laid: Laid, gradient: Tensor | None, few: Few, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Choose matrices, and as many rows of each. Rows without gradient are chosen last."""
    left, right = laid.left, laid.right
    count, rows = left.shape[0], left.shape[2]
    if few.matrices < count or few.rows < rows:
        some = torch.randperm(count, generator=generator)[: few.matrices].sort().values
        some = some.to(left.device)
        left, right = left[some], right[some]
        order = torch.rand(few.matrices, rows, generator=generator).to(left.device)
        if gradient is not None:
            gradient = gradient[some]
            order = order + gradient.ne(0).any(-1).any(1)
        drawn = order.topk(few.rows, dim=1).indices.sort(1).values[:, None, :, None]
        left = left.take_along_dim(drawn, 2)
        gradient = None if gradient is None else gradient.take_along_dim(drawn, 2)
    return left.float(), right.float(), None if gradient is None else gradient.bfloat16()


def _convolution(
    site: Site, x: Tensor, weight: Tensor, output: Tensor, run: Callable[..., Tensor]
) -> Laid | None:
    transposed = "transpose" in site.function
    if x.dim() != weight.dim():
        return None
    if transposed:
        groups = output.shape[1] // weight.shape[1]
        if groups != 1:
            return None
    else:
        groups = x.shape[1] // weight.shape[1]
    own = weight.transpose(0, 1) if transposed else weight
    filters = own.shape[0] // groups

    def arrange(y: Tensor) -> Tensor:
        parts = y.flatten(2).unflatten(1, (groups, filters))
        return parts.permute(1, 0, 3, 2).reshape(1, groups, -1, filters)

    left = patches(x, weight, groups, transposed, run)[None]
    return Laid(left, own.reshape(1, groups, filters, -1).mT, arrange, activations=False)
