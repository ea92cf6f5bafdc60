"""Laws of the penalties: autograd of what is stated, weight-decay units, invariances, zeros."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from quietvit import QuietvitError
from quietvit.decay.penalties import PENALTIES, Cosine, Energy, Operator, Peak, Penalty, Top
from quietvit.decay.products import largest_rate

SHAPES = [(3, 6, 9, 7), (2, 12, 5, 4), (1, 4, 20, 11), (2, 7, 7, 7)]
RULES: list[Penalty] = [Energy(), Peak(), Cosine(), Top(count=3)]
rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
diagonal = pytest.mark.parametrize("diagonal", [False, True], ids=["dense", "diagonal"])


def pair(n: int, h: int, d: int, o: int, diagonal: bool = False) -> tuple[Tensor, Tensor]:
    A = torch.randn(n, h, dtype=torch.float64) if diagonal else torch.randn(n, h, d).double()
    return A, torch.randn(n, o, h, dtype=torch.float64) * 0.3


def apply(operator: Operator, weight: Tensor, first: bool) -> Tensor:
    gram = operator.gram
    if gram.ndim == 2:
        out = weight * (gram if first else gram[:, None, :])
    else:
        out = gram @ weight if first else weight @ gram
    if operator.weights is not None:
        out = out * operator.weights[:, :, None]
    if operator.shift is not None:
        out = out - weight * operator.shift.view(-1, *([1] * (weight.ndim - 1)))
    return out


def relative(one: Tensor, other: Tensor) -> float:
    return float(((one - other).norm() / other.norm()).detach())


def test_every_penalty_is_registered_under_its_name() -> None:
    assert set(PENALTIES) == {"energy", "peak", "cosine", "top"}
    assert {name: kind.name for name, kind in PENALTIES.items()} == {n: n for n in PENALTIES}


@rules
@diagonal
@pytest.mark.parametrize("shape", SHAPES)
def test_directions_are_the_gradient_of_the_stated_penalty(
    rule: Penalty, diagonal: bool, shape: tuple[int, int, int, int]
) -> None:
    A, B = pair(*shape, diagonal=diagonal)
    basis = rule.basis(A, B)
    A, B = A.requires_grad_(), B.requires_grad_()
    gradient = torch.autograd.grad(rule.penalty(A, B, basis).sum(), (A, B))
    with torch.no_grad():
        for direction, expected in zip(rule.directions(A, B, basis), gradient, strict=True):
            assert relative(direction, expected) <= 1e-10


@diagonal
def test_energy_is_the_gradient_of_half_the_squared_product(diagonal: bool) -> None:
    A, B = pair(2, 6, 9, 7, diagonal)
    A, B = A.requires_grad_(), B.requires_grad_()
    product = B @ (torch.diag_embed(A) if diagonal else A)
    gA, gB = torch.autograd.grad(product.square().sum() / 2, (A, B))
    dA, dB = Energy().directions(A, B)
    nu_A = A.flatten(1).square().sum(1) / 6
    nu_B = B.flatten(1).square().sum(1) / 6
    assert relative(dB, gB / nu_A[:, None, None]) <= 1e-12
    assert relative(dA, gA / nu_B.view(-1, *([1] * (A.ndim - 1)))) <= 1e-12


def test_peak_is_the_gradient_of_the_fourth_powers_up_to_one_factor_a_side() -> None:
    A, B = pair(1, 6, 9, 7)
    A, B = A.requires_grad_(), B.requires_grad_()
    gradients = torch.autograd.grad((B @ A).square().sum(-1).square().sum(), (A, B))
    for direction, gradient in zip(Peak().directions(A, B), gradients, strict=True):
        cosine = (direction * gradient).sum() / direction.norm() / gradient.norm()
        assert abs(float(cosine.detach()) - 1) < 1e-12


def test_cosine_is_the_gradient_of_the_cosine_up_to_one_factor_a_side() -> None:
    A, B = pair(1, 6, 9, 7)
    A, B = A.requires_grad_(), B.requires_grad_()
    value = (B @ A).square().sum() / A.square().sum() / B.square().sum()
    gradients = torch.autograd.grad(value, (A, B))
    for weight, direction, gradient in zip(
        (A, B), Cosine().directions(A, B), gradients, strict=True
    ):
        cosine = (direction * gradient).sum() / direction.norm() / gradient.norm()
        assert abs(float(cosine.detach()) - 1) < 1e-12
        assert abs((direction * weight).sum().detach()) < 1e-12 * weight.square().sum().detach()


def test_top_with_all_directions_is_energy() -> None:
    A, B = pair(2, 6, 9, 7)
    for one, other in zip(Top(count=6).directions(A, B), Energy().directions(A, B), strict=True):
        assert relative(one, other) < 1e-12


@rules
@pytest.mark.parametrize("shape", SHAPES)
def test_diagonal_first_matrix_is_the_dense_one_restricted_to_its_diagonal(
    rule: Penalty, shape: tuple[int, int, int, int]
) -> None:
    gains, B = pair(*shape, diagonal=True)
    dense = torch.diag_embed(gains)
    basis = rule.basis(gains, B)
    d_gains, dB = rule.directions(gains, B, basis)
    d_dense, dB_dense = rule.directions(dense, B, basis)
    assert relative(d_gains, d_dense.diagonal(dim1=1, dim2=2)) < 1e-12
    assert relative(dB, dB_dense) < 1e-12
    assert torch.allclose(rule.penalty(gains, B, basis), rule.penalty(dense, B, basis))


@rules
@diagonal
@pytest.mark.parametrize("shape", SHAPES)
def test_operators_give_the_directions_and_bounds_bound_their_eigenvalues(
    rule: Penalty, diagonal: bool, shape: tuple[int, int, int, int]
) -> None:
    A, B = pair(*shape, diagonal=diagonal)
    basis = rule.basis(A, B)
    of_A, of_B = rule.operators(A, B, basis)
    dA, dB = rule.directions(A, B, basis)
    assert relative(apply(of_A, A, True), dA) < 1e-12
    assert relative(apply(of_B, B, False), dB) < 1e-12
    statics = rule.static_bounds(A, B)
    cheap = [rule.bounds(A, B, basis, partial(largest_rate, squarings=count)) for count in range(3)]
    for side, operator in enumerate((of_A, of_B)):
        gram = operator.gram
        largest = gram.amax(-1) if gram.ndim == 2 else torch.linalg.eigvalsh(gram)[:, -1]
        if operator.weights is not None:
            largest = largest * operator.weights.amax(-1)
        bounds = [largest, *(found[side] for found in reversed(cheap))]
        for tighter, wider in pairwise(bounds):
            assert (tighter <= wider * (1 + 1e-12)).all()
        assert (largest <= statics[side] * (1 + 1e-12)).all()


def orthogonal_rows(h: int, d: int, length: float) -> Tensor:
    return torch.linalg.qr(torch.randn(d, h).double()).Q.mT[None] * length


@pytest.mark.parametrize("rule", [Energy(), Top(count=6)], ids=lambda rule: rule.name)
def test_law_1_flat_spectrum_is_weight_decay(rule: Penalty) -> None:
    A, B = orthogonal_rows(6, 9, 3.7), torch.randn(1, 7, 6).double()
    assert relative(rule.directions(A, B)[1], B) < 1e-12
    gains = torch.full((1, 6), 2.5).double()
    assert relative(rule.directions(gains, B)[1], B) < 1e-12
    B = orthogonal_rows(7, 9, 0.2).mT.contiguous()
    A = torch.randn(1, 7, 4).double()
    assert relative(Energy().directions(A, B)[0], A) < 1e-12


def test_law_1_peak_needs_output_channels_of_equal_length_too() -> None:
    A, B = orthogonal_rows(6, 9, 3.7), torch.randn(1, 7, 6).double()
    assert relative(Peak().directions(A, B)[1], B) > 0.1
    B = B / B.norm(dim=-1, keepdim=True)
    assert relative(Peak().directions(A, B)[1], B) < 1e-12


def test_law_1_cosine_leaves_a_flat_spectrum_alone() -> None:
    A, B = orthogonal_rows(6, 9, 3.7), torch.randn(1, 7, 6).double()
    assert float(Cosine().directions(A, B)[1].norm()) < 1e-12


def test_peak_moves_the_pull_of_energy_to_the_extreme_channels_and_keeps_its_total() -> None:
    A, B = pair(2, 6, 9, 7)
    share = Peak().operators(A, B)[1].weights
    assert share is not None
    amplification = (B @ A).square().sum(-1)
    assert torch.equal(share.argsort(), amplification.argsort())
    dA, dB = Energy().directions(A, B)
    peak_A, peak_B = Peak().directions(A, B)
    assert relative(peak_B, dB * share[:, :, None]) < 1e-12
    for weight, one, other in ((A, dA, peak_A), (B, dB, peak_B)):
        assert torch.allclose((weight * one).sum((1, 2)), (weight * other).sum((1, 2)))


@pytest.mark.parametrize("outputs", [2, 9, 100])
def test_no_share_of_peak_exceeds_its_bound(outputs: int) -> None:
    lengths = torch.ones(40, outputs).double()
    lengths[:, 0] = torch.logspace(-1, 2, 40).double()
    B = torch.diag_embed(lengths).sqrt()
    share = Peak().operators(torch.ones(40, outputs).double(), B)[1].weights
    assert share is not None
    assert float(share.max()) <= (1 + outputs**0.5) / 2 + 1e-12
    assert float(share.max()) > 0.9 * (1 + outputs**0.5) / 2


@pytest.mark.parametrize("rule", [Energy(), Peak(), Top(count=3)], ids=lambda rule: rule.name)
def test_law_2_components_orthogonal_to_the_range_of_A_stay(rule: Penalty) -> None:
    A, B = pair(2, 9, 4, 7)
    away = torch.linalg.qr(A, mode="complete").Q[:, :, 4:]
    dB = rule.directions(A, B)[1]
    assert float((dB @ away).norm()) < 1e-12 * float(dB.norm())


def test_law_2_cosine_grows_what_is_orthogonal_to_the_range_of_A() -> None:
    A, B = pair(1, 9, 4, 7)
    away = torch.linalg.qr(A, mode="complete").Q[:, :, 4:]
    shift = Cosine().operators(A, B)[1].shift
    assert shift is not None
    assert float(shift) > 0
    dB = Cosine().directions(A, B)[1]
    assert relative(dB @ away, -shift[:, None, None] * (B @ away)) < 1e-12


@rules
@diagonal
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_law_4_zero_matrices_give_zero(rule: Penalty, diagonal: bool, dtype: torch.dtype) -> None:
    A, B = (part.to(dtype) for part in pair(3, 6, 9, 7, diagonal))
    A[0] = 0
    B[1] = 0
    A[2], B[2] = A[2] * 1e-30, B[2] * 1e-30
    for operator in rule.operators(A, B):
        assert operator.gram.isfinite().all()
    for direction in rule.directions(A, B):
        assert direction.isfinite().all()
        assert (direction[:2] == 0).all()
    assert (rule.penalty(A, B)[:2] == 0).all()
    assert rule.penalty(A, B).isfinite().all()


@rules
def test_law_5_invariant_to_rotation_and_permutation_of_the_hidden_dimension(
    rule: Penalty,
) -> None:
    A, B = pair(2, 6, 9, 7)
    turn = torch.linalg.qr(torch.randn(2, 6, 6).double()).Q
    dA, dB = rule.directions(A, B)
    turned_A, turned_B = rule.directions(turn @ A, B @ turn.mT)
    assert relative(turned_A, turn @ dA) < 1e-10
    assert relative(turned_B, dB @ turn.mT) < 1e-10
    assert torch.allclose(rule.penalty(A, B), rule.penalty(turn @ A, B @ turn.mT))
    gains, order = torch.randn(2, 6).double(), torch.randperm(6)
    dg, dB = rule.directions(gains, B)
    moved_g, moved_B = rule.directions(gains[:, order], B[:, :, order])
    assert relative(moved_g, dg[:, order]) < 1e-10
    assert relative(moved_B, dB[:, :, order]) < 1e-10


@rules
@diagonal
def test_scaling_the_partner_changes_nothing(rule: Penalty, diagonal: bool) -> None:
    A, B = pair(2, 6, 9, 7, diagonal)
    assert relative(rule.directions(A * 31.0, B)[1], rule.directions(A, B)[1]) < 1e-12
    assert relative(rule.directions(A, B * 31.0)[0], rule.directions(A, B)[0]) < 1e-12


@rules
@diagonal
def test_batched_is_unbatched(rule: Penalty, diagonal: bool) -> None:
    A, B = pair(3, 6, 9, 7, diagonal)
    together = rule.directions(A, B)
    for i in range(3):
        alone = rule.directions(A[i : i + 1], B[i : i + 1])
        for one, many in zip(alone, together, strict=True):
            assert relative(one[0], many[i]) < 1e-12


def test_top_keeps_the_basis_it_is_given() -> None:
    A, B = pair(1, 6, 9, 7)
    rule = Top(count=2)
    old = rule.basis(A, B)
    moved = A + torch.randn_like(A)
    assert relative(rule.directions(moved, B, old)[1], rule.directions(moved, B)[1]) > 0.01
    with pytest.raises(QuietvitError, match="both must be 1 or more"):
        Top(count=0)
