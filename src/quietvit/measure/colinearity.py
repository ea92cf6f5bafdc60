"""How strongly an ordered pair of weights amplifies, per singular direction and output channel.

This module looks only at weights; ``root_cause`` adds the activations.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.pairs import MatrixPair

RANDOM_DRAWS = 8
WORST_CHANNELS = 4


@dataclass(frozen=True)
class Decomposition:
    """SVD of the first matrix A = Σ s_i u_i v_iᵀ. A diagonal A needs no matrices.

    ``values``: s, shape (r,), descending. ``left``: u as columns, shape (h, r). ``right``: v as
    rows, shape (r, d). For A = diag(γ), s is |γ| sorted, u_i = e_j with j = ``order[i]``,
    v_i = sign(γ_j) e_j, and ``left`` and ``right`` are None.
    """

    values: Tensor
    left: Tensor | None
    right: Tensor | None
    order: Tensor | None = None
    signs: Tensor | None = None

    @property
    def hidden(self) -> int:
        """Size h of the hidden axis."""
        return len(self.values) if self.left is None else self.left.shape[0]

    def onto_left(self, rows: Tensor) -> Tensor:
        """Return the components along u_i of vectors of shape (..., h): shape (..., r)."""
        if self.left is None:
            assert self.order is not None
            return rows[..., self.order]
        return rows @ self.left

    def onto_right(self, rows: Tensor) -> Tensor:
        """Return the components along v_i of vectors of shape (..., d): shape (..., r)."""
        if self.right is None:
            assert self.order is not None
            assert self.signs is not None
            return rows[..., self.order] * self.signs
        return rows @ self.right.mT


def decompose(first: Tensor) -> Decomposition:
    """Decompose A, shape (h, d), in float64 on the CPU. A vector γ, shape (h,), means diag(γ)."""
    wide = first.detach().to("cpu", torch.float64)
    if wide.ndim == 1:
        values, order = wide.abs().sort(descending=True)
        return Decomposition(values, None, None, order, torch.where(wide[order] < 0, -1.0, 1.0))
    left, values, right = torch.linalg.svd(wide, full_matrices=False)
    return Decomposition(values, left, right)


@dataclass(frozen=True)
class ChannelColinearity:
    """How colinear row b_k of B is with the strong directions of A.

    Attributes:
        channel: row k of B.
        gain: ``‖Aᵀ b_k‖``, the root mean square of the channel for white input.
        colinearity: ``‖Aᵀ b_k‖ / (s_1 ‖b_k‖) = √Σ_i (s_i/s_1)² cos²(b_k, u_i)``, in [0, 1]. It is
            1 exactly if b_k lies in the span of the directions with s_i = s_1. Derived here.
        direction: the i that carries most of the gain: the largest ``s_i |b_kᵀ u_i|``.
        cosine: ``|cos(b_k, u_i)|`` of that direction.
    """

    channel: int
    gain: float
    colinearity: float
    direction: int
    cosine: float


@dataclass(frozen=True)
class PairStatistics:
    """Amplification of one pair: A of shape (h, d) acts first, B of shape (o, h) second.

    Attributes:
        name, kind, head: of the pair.
        first, second: the two matrices as text.
        shape: (o, h, d).
        singular_values: s_i, descending.
        amplification: ``s_i ‖B u_i‖``, in the order of s_i; ``Σ amplification² = ‖BA‖²_F``.
        product_norm: ``‖BA‖_F``.
        alignment: ``h ‖BA‖² / (‖A‖² ‖B‖²)``. Its mean over random rotations of the hidden axis is
            exactly 1. A larger value means that B reads the directions where A is strong. 0 if A
            or B is 0. Derived here.
        worst_channels: the rows of B with the largest gain.
        expected_colinearity: root mean square of the colinearity of one random direction,
            ``‖A‖_F / (s_1 √h)``.
        expected_worst: mean of the largest colinearity among o random directions (8 draws with a
            fixed seed). Compare the first of ``worst_channels`` with it.
    """

    name: str
    kind: str
    head: int | None
    first: str
    second: str
    shape: tuple[int, int, int]
    singular_values: tuple[float, ...] = field(repr=False)
    amplification: tuple[float, ...] = field(repr=False)
    product_norm: float
    alignment: float
    worst_channels: tuple[ChannelColinearity, ...]
    expected_colinearity: float
    expected_worst: float


def amplification(decomposition: Decomposition, second: Tensor) -> Tensor:
    """Return ``s_i ‖B u_i‖``, shape (r,), for B of shape (o, h). The squares sum to ‖BA‖²."""
    wide = second.detach().to("cpu", torch.float64)
    norms: Tensor = decomposition.onto_left(wide).norm(dim=0)
    return decomposition.values * norms


def measure_pair(
    model: nn.Module, pair: MatrixPair, decomposition: Decomposition | None = None
) -> PairStatistics:
    """Measure one pair's current weights. Derived here.

    Args:
        decomposition: of the first matrix, if the caller has it already.

    Raises:
        QuietvitError: the weights hold NaN or inf, or the inner dimensions differ.
    """
    second = pair.second.read(model).detach().to("cpu", torch.float64)
    if decomposition is None:
        decomposition = read_first(model, pair)
    if not second.isfinite().all():
        raise QuietvitError(_not_finite(pair, str(pair.second)))
    if second.shape[1] != decomposition.hidden:
        raise QuietvitError(
            f"{pair.name}: the first matrix has {decomposition.hidden} rows and the second "
            f"{second.shape[1]} columns, so they cannot be multiplied; correct the rows and "
            "columns of the pair."
        )
    o, h = second.shape
    values = decomposition.values
    d = h if decomposition.right is None else decomposition.right.shape[1]
    components = decomposition.onto_left(second)
    carried = components.abs() * values
    gains = carried.norm(dim=1)
    norms = second.norm(dim=1)
    top = float(values[0])
    spectrum = carried.norm(dim=0)
    energy = float(spectrum.square().sum())
    scale = float(values.square().sum() * norms.square().sum())
    worst = []
    for k in gains.topk(min(WORST_CHANNELS, o)).indices.tolist():
        i, norm = int(carried[k].argmax()), float(norms[k])
        worst.append(
            ChannelColinearity(
                channel=k,
                gain=float(gains[k]),
                colinearity=float(gains[k]) / (top * norm) if top * norm else 0.0,
                direction=i,
                cosine=float(components[k, i].abs()) / norm if norm else 0.0,
            )
        )
    single, largest = expected_at_random(values, h, o)
    return PairStatistics(
        name=pair.name,
        kind=pair.kind,
        head=pair.head,
        first=str(pair.first),
        second=str(pair.second),
        shape=(o, h, d),
        singular_values=tuple(values.tolist()),
        amplification=tuple(spectrum.tolist()),
        product_norm=energy**0.5,
        alignment=h * energy / scale if scale else 0.0,
        worst_channels=tuple(worst),
        expected_colinearity=single,
        expected_worst=largest,
    )


def read_first(model: nn.Module, pair: MatrixPair) -> Decomposition:
    """Decompose the pair's first matrix with its gains. Raises QuietvitError for NaN or inf."""
    first = pair.first.read(model)
    if pair.before is not None:
        first = first * pair.before.read(model)
    if pair.between is not None:
        between = pair.between.read(model)
        first = first * (between if first.ndim == 1 else between[:, None])
    if not first.isfinite().all():
        raise QuietvitError(_not_finite(pair, str(pair.first)))
    return decompose(first)


def expected_at_random(values: Tensor, hidden: int, channels: int) -> tuple[float, float]:
    """Return the expected colinearity of one random direction, and the largest of ``channels``.

    A random direction of R^h has components z_i / ‖z‖ along the u_i, with z Gaussian. So its
    colinearity is ``√(Σ (s_i/s_1)² z_i² / ‖z‖²)``. The first number is the exact root mean square;
    the second is the mean over draws with a fixed seed. Derived here.
    """
    top = float(values[0])
    if top == 0:
        return 0.0, 0.0
    weights = (values / top).square().numpy()
    generator = np.random.default_rng(0)
    rank, largest = len(weights), 0.0
    for _ in range(RANDOM_DRAWS):
        squares = generator.standard_normal((channels, rank)) ** 2
        rest = generator.chisquare(hidden - rank, channels) if hidden > rank else 0.0
        largest += float(np.sqrt((squares @ weights / (squares.sum(1) + rest)).max()))
    return float(np.sqrt(weights.sum() / hidden)), largest / RANDOM_DRAWS


def _not_finite(pair: MatrixPair, where: str) -> str:
    return f"{pair.name}: {where} holds NaN or inf; load finite weights."
