"""Other penalties, for research: ``peak``, ``cosine`` and ``top``. None was better than ``energy``.

The formula of arXiv 2605.01330 is not public to us, so each is another guess. In fine-tunes of
DeiT-Tiny all had lower accuracy than ``energy`` (docs/lab-log.md). Shapes, units and what counts as
constant: see ``energy``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from quietvit.decay.energy import Energy, left_gram, right_gram
from quietvit.decay.penalty import Basis, Factored, Operator, Operators, Penalty, Rate
from quietvit.decay.products import (
    both_products,
    channel_energy,
    inverse,
    largest_rate,
    mean_square,
    scaled,
    shares,
    smaller,
    square,
)
from quietvit.errors import QuietvitError


class Peak(Penalty):
    """Penalize extreme output channels most: sum_k a_k^2 / 4 with a_k = |A^T b_k|^2 (p = 4).

    The share of channel k is w_k = a_k / c with c = sum(a^2) / sum(a).
    Directions: dB = diag(w) B A A^T / nu(A), dA = B^T diag(w) B A / nu(B).
    Normalisation: sum_k w_k a_k = sum_k a_k, so <B, dB> and <A, dA> equal those of ``energy``.
    The decay only moves to the extreme channels, and the strength keeps its weight-decay units.
    No share exceeds (1 + sqrt o) / 2. Channels of equal amplification give exactly ``energy``.
    (Shares that average to 1 over channels would not keep the units. In the last fc2 of DeiT-Tiny
    one channel holds most of the energy, and it would decay about 150 times as fast.)
    Stated penalty: ``sum_k |sg(A)^T b_k|^4 / (4 c nu(A)) + sum_k |A^T sg(b_k)|^4 / (4 c nu(B))``,
    c and nu constants.
    Laws: (i) needs output channels of equal amplification too; (ii), (iv), (v) as ``energy``.
    Source: derived here (docs/method.md), p = 4.
    """

    name = "peak"
    stays_finite = True

    def sides(self, A: Tensor, B: Tensor, basis: Basis | None = None) -> tuple[Tensor, Tensor]:
        held_A, held_B = A.detach(), B.detach()
        scale = inverse(shares(channel_energy(held_A, held_B))[1]) / 4
        of_A = channel_energy(A, held_B).square().sum(-1) * inverse(mean_square(held_B))
        of_B = channel_energy(held_A, B).square().sum(-1) * inverse(mean_square(held_A))
        return of_A * scale, of_B * scale

    def factored(
        self, A: Tensor, B: Tensor, basis: Basis | None = None, products: torch.dtype | None = None
    ) -> Factored:
        fA, fB = inverse(mean_square(B)), inverse(mean_square(A))
        PA, PB = both_products(A, B, products, weighed=True)
        return (PA, fA), (PB, fB)

    def operators(self, A: Tensor, B: Tensor, basis: Basis | None = None) -> Operators:
        weights, _ = shares(channel_energy(A, B))
        M = _weighted(B, weights)
        return (
            Operator(scaled(right_gram(A, M), inverse(mean_square(B)))),
            Operator(scaled(left_gram(A), inverse(mean_square(A))), weights=weights),
        )

    def static_bounds(self, A: Tensor, B: Tensor) -> tuple[float, float]:
        share = _largest_share(B.shape[1])
        return smaller(B) * share, smaller(A) * share

    def bound_beside_gains(self, A: Tensor, outputs: int) -> Tensor:
        return largest_rate(A) * _largest_share(outputs)

    def bounds(
        self, A: Tensor, B: Tensor, basis: Basis | None = None, rate: Rate = largest_rate
    ) -> tuple[Tensor, Tensor]:
        weights, _ = shares(channel_energy(A, B))
        M = _weighted(B, weights)
        of_A = rate(M) * mean_square(M) * inverse(mean_square(B))
        return of_A, rate(A) * weights.amax(-1)


class Cosine(Penalty):
    """Penalize alignment without regard to scale: C = |B A|^2 / (|A|^2 |B|^2).

    Its gradient has no component along the weight, so it rotates weights and does not shrink them.
    Directions: those of ``energy`` minus their projection on the weight:
    dB = B A A^T / nu(A) - kB B with kB = C min(shape A), and
    dA = B^T B A / nu(B) - kA A with kA = C min(shape B).
    Stated penalty: ``sg(|B|^2 min(shape A)) C(sg A, B) / 2 + sg(|A|^2 min(shape B)) C(A, sg B)/2``.
    Laws: (i) becomes "no update"; (ii) does not hold, because components of B orthogonal to
    range(A) grow by the factor 1 + (learning rate)(strength) kB; (iv), (v) as ``energy``. A finite
    step lengthens a weight in second order. The optimizer's weight decay balances that.
    Source: derived here (docs/method.md).
    """

    name = "cosine"
    stays_finite = True

    def sides(self, A: Tensor, B: Tensor, basis: Basis | None = None) -> tuple[Tensor, Tensor]:
        def cosine(a: Tensor, b: Tensor) -> Tensor:
            return channel_energy(a, b).sum(-1) * inverse(square(a) * square(b))

        held_A, held_B = A.detach(), B.detach()
        of_A = square(held_A) * smaller(B) * cosine(A, held_B)
        of_B = square(held_B) * smaller(A) * cosine(held_A, B)
        return of_A / 2, of_B / 2

    def factored(
        self, A: Tensor, B: Tensor, basis: Basis | None = None, products: torch.dtype | None = None
    ) -> Factored:
        PA, PB = both_products(A, B, products)
        dA, dB = scaled(PA, inverse(mean_square(B))), scaled(PB, inverse(mean_square(A)))
        return (dA - scaled(A, _share(dA, A)), None), (dB - scaled(B, _share(dB, B)), None)

    def operators(self, A: Tensor, B: Tensor, basis: Basis | None = None) -> Operators:
        of_A, of_B = Energy().operators(A, B)
        dA, dB = Energy().directions(A, B)
        return (
            Operator(of_A.gram, shift=_share(dA, A)),
            Operator(of_B.gram, shift=_share(dB, B)),
        )


@dataclass(frozen=True)
class Top(Penalty):
    """Apply ``energy`` to the ``count`` largest singular directions only.

    u_i are the leading left singular vectors of A, v_j the leading right singular vectors of B.
    Both are recomputed every ``refresh`` applied steps; |A^T u_i| and |B v_j| are always current.
    dB = sum_i |A^T u_i|^2 B u_i u_i^T / nu(A), dA = sum_j |B v_j|^2 v_j v_j^T A / nu(B).
    Stated penalty, u and v constants: ``sum_i |sg(A)^T u_i|^2 |B u_i|^2 / (2 nu(A)) +
    sum_j |sg(B) v_j|^2 |A^T v_j|^2 / (2 nu(B))``.
    Laws: (i) on the span of the chosen directions; (ii), (iv), (v) as ``energy`` (equal singular
    values leave the choice of directions open). Cost: h count (o + d), plus the SVDs.
    Source: derived here (docs/method.md).
    """

    name = "top"
    stays_finite = True
    caches = True
    count: int = 8
    refresh: int = 100

    def __post_init__(self) -> None:
        if self.count < 1 or self.refresh < 1:
            raise QuietvitError(
                f"Top(count={self.count}, refresh={self.refresh}): both must be 1 or more."
            )

    def is_due(self, applied: int) -> bool:
        return applied % self.refresh == 0

    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def basis(self, A: Tensor, B: Tensor) -> Basis:
        if A.ndim == 2:
            chosen = A.abs().topk(min(self.count, A.shape[1]), dim=-1).indices
            u = torch.zeros(*A.shape, chosen.shape[1], dtype=A.dtype, device=A.device)
            u.scatter_(1, chosen[:, None, :], 1.0)
        else:
            u = torch.linalg.svd(A, full_matrices=False).U[..., : self.count]
        v = torch.linalg.svd(B, full_matrices=False).Vh[:, : self.count].mT
        return u.contiguous(), v.contiguous()

    def sides(self, A: Tensor, B: Tensor, basis: Basis | None = None) -> tuple[Tensor, Tensor]:
        held_A, held_B = A.detach(), B.detach()
        u, v = self._basis(held_A, held_B, basis)
        of_B = (_first_squares(held_A, u) * (B @ u).square().sum(1)).sum(-1)
        of_A = (_second_squares(held_B, v) * _first_squares(A, v)).sum(-1)
        nu_A, nu_B = inverse(mean_square(held_A)), inverse(mean_square(held_B))
        return of_A * nu_B / 2, of_B * nu_A / 2

    def factored(
        self, A: Tensor, B: Tensor, basis: Basis | None = None, products: torch.dtype | None = None
    ) -> Factored:
        u, v = self._basis(A, B, basis)
        rates_A, rates_B = self._rates(A, B, (u, v))
        dB = ((B @ u) * rates_B[:, None, :]) @ u.mT
        if A.ndim == 2:
            return (A * (v.square() * rates_A[:, None, :]).sum(-1), None), (dB, None)
        return ((v * rates_A[:, None, :]) @ (v.mT @ A), None), (dB, None)

    def operators(self, A: Tensor, B: Tensor, basis: Basis | None = None) -> Operators:
        u, v = self._basis(A, B, basis)
        rates_A, rates_B = self._rates(A, B, (u, v))
        of_B = Operator((u * rates_B[:, None, :]) @ u.mT)
        if A.ndim == 2:
            return Operator((v.square() * rates_A[:, None, :]).sum(-1)), of_B
        return Operator((v * rates_A[:, None, :]) @ v.mT), of_B

    def bounds(
        self, A: Tensor, B: Tensor, basis: Basis | None = None, rate: Rate = largest_rate
    ) -> tuple[Tensor, Tensor]:
        rates_A, rates_B = self._rates(A, B, self._basis(A, B, basis))
        return rates_A.amax(-1), rates_B.amax(-1)

    def _rates(self, A: Tensor, B: Tensor, basis: Basis) -> tuple[Tensor, Tensor]:
        u, v = basis
        return (
            scaled(_second_squares(B, v), inverse(mean_square(B))),
            scaled(_first_squares(A, u), inverse(mean_square(A))),
        )

    def _basis(self, A: Tensor, B: Tensor, basis: Basis | None) -> Basis:
        return self.basis(A, B) if basis is None else basis


def _share(direction: Tensor, weight: Tensor) -> Tensor:
    return (direction * weight).flatten(1).sum(1) * inverse(square(weight))


def _largest_share(outputs: int) -> float:
    return (1 + outputs**0.5) / 2


def _weighted(B: Tensor, weights: Tensor) -> Tensor:
    return B * weights.sqrt()[:, :, None]


def _first_squares(A: Tensor, u: Tensor) -> Tensor:
    return (A[:, :, None] * u if A.ndim == 2 else A.mT @ u).square().sum(1)


def _second_squares(B: Tensor, v: Tensor) -> Tensor:
    return (B @ v).square().sum(1)
