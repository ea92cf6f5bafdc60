"""The penalty of Colinearity Decay: its value, update directions and decay rates.

Pure functions of batched matrices, without strength or optimizer. Limits live in ``limits``.

Shapes: n pairs at once. A: (n, h, d) acts first, B: (n, o, h) acts second. If A holds norm gains,
A: (n, h) stands for diag(A), which is never built as a matrix.
Units: nu(M) = |M|^2 / min(shape) is the mean squared singular value. A direction has the units of
its weight. So learning rate x strength x direction is a decoupled update, and the strength has
weight-decay units.

Normalisers are constants of the update: ``sg`` (stop gradient, ``detach``) marks them in each
stated penalty. The direction is the autograd gradient of exactly that scalar. All forms are derived
here, because the formula of arXiv 2605.01330 is not public to us.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quietvit.decay.penalty import Basis, Factored, Operator, Operators, Penalty
from quietvit.decay.products import both_products, channel_energy, inverse, mean_square, scaled


class Energy(Penalty):
    """Penalize the amplification of white input: R = |B A|^2 / 2.

    Stated penalty: ``|B sg(A)|^2 / (2 nu(sg A)) + |sg(B) A|^2 / (2 nu(sg B))``.
    Directions: dB = B A A^T / nu(A), dA = B^T B A / nu(B).
    Laws: (i) if A has orthogonal rows of equal length, dB = B, which is plain weight decay; (ii)
    components of B orthogonal to range(A) do not change; (iv) zero at A = 0 or B = 0; (v) invariant
    to orthogonal maps of the hidden dimension (to permutations, if A is diagonal).
    Cost: three products of (o, h) x (h, d), or four with an h x h matrix if that is cheaper.
    Source: derived here (docs/method.md).
    """

    name = "energy"
    stays_finite = True

    def sides(self, A: Tensor, B: Tensor, basis: Basis | None = None) -> tuple[Tensor, Tensor]:
        held_A, held_B = A.detach(), B.detach()
        of_A = channel_energy(A, held_B).sum(-1) * inverse(mean_square(held_B))
        of_B = channel_energy(held_A, B).sum(-1) * inverse(mean_square(held_A))
        return of_A / 2, of_B / 2

    def factored(
        self, A: Tensor, B: Tensor, basis: Basis | None = None, products: torch.dtype | None = None
    ) -> Factored:
        fA, fB = inverse(mean_square(B)), inverse(mean_square(A))
        PA, PB = both_products(A, B, products)
        return (PA, fA), (PB, fB)

    def operators(self, A: Tensor, B: Tensor, basis: Basis | None = None) -> Operators:
        return (
            Operator(scaled(right_gram(A, B), inverse(mean_square(B)))),
            Operator(scaled(left_gram(A), inverse(mean_square(A)))),
        )


def left_gram(A: Tensor) -> Tensor:
    """Return A A^T (n, h, h); its diagonal (n, h) if A is diagonal."""
    return A.square() if A.ndim == 2 else A @ A.mT


def right_gram(A: Tensor, B: Tensor) -> Tensor:
    """Return B^T B (n, h, h); its diagonal (n, h) if A is diagonal."""
    return B.square().sum(1) if A.ndim == 2 else B.mT @ B
