"""Split one output value into the singular directions of the matrix that made it.

Only arithmetic on vectors; ``root_cause`` supplies the vectors.
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

    y_k = b_kᵀ h + bias, with h the true hidden activation. f is what stands between the two
    matrices, and A = Σ s_i u_i v_iᵀ is the first matrix. ``product``, ``alone`` and ``through``
    are equal if f is the identity and there is no bias.

    Attributes:
        direction: i, counted from 0 in descending order of s_i.
        singular_value: s_i.
        second_component: b_kᵀ u_i.
        input_component: v_iᵀ x.
        product: ``s_i (b_kᵀ u_i)(v_iᵀ x)``, the value of this direction without f.
        alone: ``b_kᵀ f(s_i u_i v_iᵀ x)``, the value of this direction alone through f. These need
            not add up over directions. None if f is not one activation function. Equal to
            ``product`` if only an average stands between the matrices.
        through: ``(b_kᵀ u_i)(u_iᵀ h)``, the exact part of the true value along u_i. It includes
            everything between the two matrices.
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
        """``alone``, or ``through`` if ``alone`` is None."""
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
    """Split b_kᵀ h into the singular directions of A and return the one that explains most.

    That is the direction whose ``product`` is largest with the sign of b_kᵀ h. If ``alone`` is
    unknown, ``through`` takes the place of ``product``. Derived here.

    Args:
        decomposition: of A, shape (h, d).
        row: b_k, shape (h,).
        hidden: the true activation h that b_k multiplies, shape (h,).
        inputs: x, shape (d,). Give it if an activation function stands between the matrices.
        bias: c, shape (h,), the first bias. Give it if h = A x̄ + c, where x̄ is an average of
            inputs. In attention, x̄ is the attention-weighted mean, because rows of probabilities
            sum to 1. Then v_iᵀ x̄ = u_iᵀ(h − c) / s_i exactly.
        activation: f, elementwise, if it is known. It needs ``inputs``.
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
