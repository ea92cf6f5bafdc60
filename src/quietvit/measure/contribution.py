"""One output value taken apart into the singular directions of the matrix that made it.

Pure arithmetic on vectors; where they come from is ``root_cause``'s business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quietvit.measure.colinearity import Decomposition


@dataclass(frozen=True)
class Contribution:
    """The direction i that explains most of one output value. Derived here.

    With y_k = b_kᵀ h + bias, h the true hidden activation, f what stands between the two matrices
    and A = Σ s_i u_i v_iᵀ. The three accounts agree where f is the identity and nothing is biased:

    Attributes:
        direction: i, counted from 0 in descending order of s_i.
        singular_value: s_i.
        second_component: b_kᵀ u_i.
        input_component: v_iᵀ x.
        product: ``s_i (b_kᵀ u_i)(v_iᵀ x)``: what the pair would give without the non-linearity.
        alone: ``b_kᵀ f(s_i u_i v_iᵀ x)``: what this direction by itself gives through f. None where
            f is not one activation function; the product where nothing but an average stands
            between. It need not add up over directions.
        through: ``(b_kᵀ u_i)(u_iᵀ h)``: the exact part of the true value that comes through u_i,
            everything between the two matrices included.
        linear: b_kᵀ A x, the sum of the products over all directions.
        hidden: b_kᵀ h, the true value without the second bias.
    """

    direction: int
    singular_value: float
    second_component: float
    input_component: float
    product: float
    alone: float | None
    through: float
    linear: float
    hidden: float

    @property
    def explained(self) -> float:
        """``alone``, or where there is none ``through``."""
        return self.through if self.alone is None else self.alone


def explain(
    decomposition: Decomposition,
    row: Tensor,
    hidden: Tensor,
    *,
    inputs: Tensor | None = None,
    bias: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] | None = None,
) -> Contribution:
    """Take b_kᵀ h apart into the singular directions of A and return the one that explains most.

    Args:
        decomposition: of A, shape (h, d).
        row: b_k, shape (h,).
        hidden: the true activation h that meets b_k, shape (h,).
        inputs: x, shape (d,), where an activation function stands between.
        bias: c, shape (h,), the first bias, where the hidden activation is A x̄ + c with x̄ an
            average of inputs: attention (rows of probabilities sum to 1, so x̄ is the
            attention-weighted mean) or nothing at all. Then v_iᵀ x̄ = u_iᵀ(h − c) / s_i exactly.
        activation: f, elementwise, where it is known; goes with ``inputs``.

    The direction is the one of largest ``product`` in the direction of b_kᵀ h, or, where ``alone``
    is not known, of largest ``through``. Derived here.
    """
    wide = [t.detach().to("cpu", torch.float64) for t in (row, hidden)]
    row, hidden = wide
    values = decomposition.values
    onto_row, onto_hidden = decomposition.onto_left(row), decomposition.onto_left(hidden)
    if inputs is not None:
        onto_input = decomposition.onto_right(inputs.detach().to("cpu", torch.float64))
    else:
        offset = torch.zeros_like(hidden)
        if bias is not None:
            offset = bias.detach().to("cpu", torch.float64)
        linear_part = decomposition.onto_left(hidden - offset)
        onto_input = torch.where(values > 0, linear_part / values.clamp_min(1e-300), 0.0)
    products, through = values * onto_row * onto_input, onto_row * onto_hidden
    alone: Tensor | None = products if inputs is None else None
    if activation is not None and decomposition.left is not None:
        alone = activation(decomposition.left.mT * (values * onto_input)[:, None]) @ row
    total = float(row @ hidden)
    ranked = through if alone is None else products
    i = int((ranked * (1.0 if total >= 0 else -1.0)).argmax())
    return Contribution(
        direction=i,
        singular_value=float(values[i]),
        second_component=float(onto_row[i]),
        input_component=float(onto_input[i]),
        product=float(products[i]),
        alone=None if alone is None else float(alone[i]),
        through=float(through[i]),
        linear=float(products.sum()),
        hidden=total,
    )
