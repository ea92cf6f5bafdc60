"""What a penalty of ordered pairs has to offer.

``energy`` has the penalty of Colinearity Decay, with shapes, units and what counts as constant.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quietvit.decay.products import largest_rate, scaled, smaller

Basis = tuple[Tensor, Tensor]
Rate = Callable[[Tensor], Tensor]
Factored = tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Operator:
    """The linear map whose value on a weight is its direction: weight (x) gram - shift.

    ``gram`` (n, h, h), or (n, h) where diagonal, is symmetric and acts on the hidden dimension;
    ``weights`` (n, o) scales output channels; ``shift`` (n,) is subtracted as a multiple of the
    identity. Its eigenvalues are weights_k * gram_i - shift: the rate of each direction.
    """

    gram: Tensor
    weights: Tensor | None = None
    shift: Tensor | None = None


Operators = tuple[Operator, Operator]


class Penalty(ABC):
    """One penalty. All methods are pure and accept (A, B) as the module describes.

    ``stays_finite``: whether finite weights of ordinary size always give finite directions. If not,
    an update checks each direction before it writes one, which costs a second pass.
    ``caches``: whether ``basis`` is kept between steps, until ``is_due``.
    """

    name: ClassVar[str]
    stays_finite: ClassVar[bool] = False
    caches: ClassVar[bool] = False

    @abstractmethod
    def sides(self, A: Tensor, B: Tensor, basis: Basis | None = None) -> tuple[Tensor, Tensor]:
        """Return the parts of the stated penalty that A and that B is moved by, each (n,)."""

    @abstractmethod
    def factored(
        self, A: Tensor, B: Tensor, basis: Basis | None = None, products: torch.dtype | None = None
    ) -> Factored:
        """Return ((PA, fA), (PB, fB)) with dA = fA PA and dB = fB PB, f: (n,), None for 1.

        ``products``: dtype of the matrix products (and then of PA and PB), None for that of A.
        """

    def penalty(self, A: Tensor, B: Tensor, basis: Basis | None = None) -> Tensor:
        """Return the stated penalty of each pair, shape (n,)."""
        of_A, of_B = self.sides(A, B, basis)
        return of_A + of_B

    def directions(self, A: Tensor, B: Tensor, basis: Basis | None = None) -> tuple[Tensor, Tensor]:
        """Return (dA, dB), shaped like A and B: the gradients of the stated penalty."""
        (PA, fA), (PB, fB) = self.factored(A, B, basis)
        return PA if fA is None else scaled(PA, fA), PB if fB is None else scaled(PB, fB)

    @abstractmethod
    def operators(self, A: Tensor, B: Tensor, basis: Basis | None = None) -> Operators:
        """Return the linear maps that take A to dA and B to dB. Forms h x h matrices: not cheap."""

    def static_bounds(self, A: Tensor, B: Tensor) -> tuple[float, float]:
        """Return upper bounds of the rates of A and of B that follow from shapes alone."""
        return smaller(B), smaller(A)

    def bounds(
        self, A: Tensor, B: Tensor, basis: Basis | None = None, rate: Rate = largest_rate
    ) -> tuple[Tensor, Tensor]:
        """Return upper bounds (n,) of the largest rates of A and of B, without a decomposition.

        ``rate`` bounds s_max^2 / nu of a matrix: ``largest_rate``, in the precision and with the
        squarings that the caller chooses.
        """
        return rate(B), rate(A)

    def bound_beside_gains(self, A: Tensor, outputs: int) -> Tensor:
        """Return upper bounds (n,) of the rates of B (n, outputs, h) where A (n, h) is diagonal.

        Without a product: gains are of about one size, and the bound is near to 1 then, not h.
        """
        return largest_rate(A)

    def basis(self, A: Tensor, B: Tensor) -> Basis | None:
        """Return what has to be cached between steps, or None where nothing has."""
        return None

    def is_due(self, applied: int) -> bool:
        """Whether ``basis`` is computed anew, after so many applied steps."""
        return False

    def settings(self) -> dict[str, Any]:
        """Return its own settings: numbers by name."""
        return {}
