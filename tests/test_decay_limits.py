"""The trust region: no direction changes sign at any strength, and nothing else is touched."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from quietvit.decay import PENALTIES, ColinearityDecay
from quietvit.decay.batches import batches, overlaps
from quietvit.decay.limits import TrustRegion
from quietvit.decay.penalties import Energy
from quietvit.pairs import MatrixPair
from quietvit.tracing import WeightView

STRENGTHS = [1.0, 30.0, 1e3, 1e9]
penalties = pytest.mark.parametrize("penalty", PENALTIES)
strengths = pytest.mark.parametrize("strength", STRENGTHS)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def spiked(o: int, h: int, spike: float = 10.0) -> Tensor:
    matrix = torch.randn(o, h, dtype=torch.float64)
    return matrix + spike * torch.outer(torch.randn(o), torch.randn(h)) / (o * h) ** 0.25


def chain(*widths: int, norm: bool = False) -> nn.Module:
    model = nn.Module()
    for i, (h, o) in enumerate(pairwise(widths)):
        linear = nn.Linear(h, o, bias=False).double()
        linear.weight = nn.Parameter(spiked(o, h))
        model.add_module(f"l{i}", linear)
    if norm:
        model.add_module("norm", nn.LayerNorm(widths[0]).double())
        nn.init.normal_(model.norm.weight)
        with torch.no_grad():
            model.norm.weight[0] *= 8
    return model


def link(first: str, second: str, diagonal: bool = False) -> MatrixPair:
    kind = "norm_linear" if diagonal else "mlp"
    return MatrixPair(WeightView(first, diagonal=diagonal), WeightView(second), kind)


def step(
    model: nn.Module, pairs: Sequence[MatrixPair], strength: float, penalty: str, lr: float = 1e-2
) -> None:
    decay = ColinearityDecay(model, strength=strength, penalty=penalty, pairs=pairs)
    decay.step(torch.optim.SGD(model.parameters(), lr=lr))


@penalties
@strengths
@pytest.mark.parametrize("widths", [(9, 6, 7), (4, 12, 5), (20, 4, 11)])
def test_law_3_components_along_the_partners_singular_vectors_keep_their_sign(
    penalty: str, strength: float, widths: tuple[int, ...]
) -> None:
    model = chain(*widths)
    A, B = (p.detach().clone() for p in model.parameters())
    step(model, [link("l0", "l1")], strength, penalty)
    new_A, new_B = (p.detach() for p in model.parameters())
    u = torch.linalg.svd(A, full_matrices=False).U
    shares = (B @ A).square().sum(-1)
    M = B * shares.sqrt()[:, None] if penalty == "peak" else B
    rounding = 1e-12 if strength < 1e6 else 1e-7
    v = torch.linalg.svd(M, full_matrices=False).Vh.mT
    growth = 2.0 if penalty == "cosine" else 1.0
    for old, new in ((B @ u, new_B @ u), (v.mT @ A, v.mT @ new_A)):
        assert (new * old.sign() >= -rounding).all()
        assert (new.abs() <= growth * old.abs() + rounding).all()


def test_eigenvalues_are_left_alone_while_products_show_that_a_step_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One product bounds the load of this pair by 1.2, its squares by 0.3; it is 0.1."""
    model = nn.Module()
    model.l0, model.l1 = nn.Linear(512, 1024, bias=False), nn.Linear(1024, 512, bias=False)
    pair = link("l0", "l1")
    old = [p.detach().clone() for p in model.parameters()]
    operands = batches([pair], dict(model.named_parameters()))[0].read(model.state_dict())
    plain = operands.apply(Energy().directions)
    largest = max(float(bound) for bound in operands.apply(Energy().bounds))
    decay = ColinearityDecay(model, strength=1.2 / (1e-3 * largest), pairs=[pair])
    monkeypatch.delattr(torch.linalg, "eigvalsh")
    monkeypatch.delattr(torch.linalg, "eigh")
    decay.step(torch.optim.SGD(model.parameters(), lr=1e-3))
    for weight, before, direction in zip(model.parameters(), old, plain, strict=True):
        wanted = before - 1.2 / largest * direction.view_as(before)
        assert torch.allclose(
            weight, wanted, rtol=0, atol=2e-2 * float((weight - before).abs().max())
        )


@penalties
@strengths
def test_law_3_holds_for_gains_and_their_reader(penalty: str, strength: float) -> None:
    model = chain(6, 9, norm=True)
    gains, B = model.norm.weight.detach().clone(), model.l0.weight.detach().clone()
    step(model, [link("norm", "l0", diagonal=True)], strength, penalty)
    growth = 2.0 if penalty == "cosine" else 1.0
    for old, new in ((gains, model.norm.weight.detach()), (B, model.l0.weight.detach())):
        assert (new * old.sign() >= -1e-12).all()
        assert (new.abs() <= growth * old.abs() + 1e-12).all()


@penalties
@strengths
def test_law_3_the_sum_over_pairs_that_share_a_weight_is_limited(
    penalty: str, strength: float
) -> None:
    """l1 is second under l0 and under the gains, and first before l2, all at once."""
    model = chain(7, 6, 8, 5)
    model.add_module("norm", nn.LayerNorm(6).double())
    nn.init.normal_(model.norm.weight)
    pairs = [link("l0", "l1"), link("l1", "l2"), link("norm", "l1", diagonal=True)]
    before = model.l1.weight.detach().clone()
    step(model, pairs, strength, penalty)
    after = model.l1.weight.detach()
    inner = float((before * after).sum()) / float(before.square().sum())
    assert -1e-12 <= inner <= (2.0 if penalty == "cosine" else 1.0) + 1e-12
    if penalty == "cosine":
        assert float((before - after).norm()) <= float(before.norm()) * (1 + 1e-12)
    else:
        assert float((2 * after - before).norm()) <= float(before.norm()) * (1 + 1e-12)


@strengths
def test_the_map_of_a_shared_weight_has_eigenvalues_between_zero_and_one(strength: float) -> None:
    """The whole linear map, written out: partners are held, so the update is linear in l1."""
    model = chain(7, 4, 3, 5)
    model.add_module("norm", nn.LayerNorm(4).double())
    nn.init.normal_(model.norm.weight)
    pairs = [link("l0", "l1"), link("norm", "l1", diagonal=True)]
    start = model.l1.weight.detach().clone()
    columns = []
    for unit in torch.eye(start.numel()).double():
        probe = copy.deepcopy(model)
        probe.l1.weight = nn.Parameter(unit.view_as(start).clone())
        for name, parameter in probe.named_parameters():
            parameter.requires_grad_(name == "l1.weight")
        step(probe, pairs, strength, "energy")
        columns.append(probe.l1.weight.detach().flatten())
    linear = torch.stack(columns, 1)
    assert torch.allclose(linear, linear.mT, atol=1e-12)
    eigenvalues = torch.linalg.eigvalsh(linear)
    assert float(eigenvalues.min()) >= -1e-12
    assert float(eigenvalues.max()) <= 1 + 1e-12


def test_only_the_directions_that_trip_are_limited() -> None:
    model = chain(9, 6, 7)
    A, B = (p.detach().clone() for p in model.parameters())
    model.l0.weight.requires_grad_(False)
    U, s, _ = torch.linalg.svd(A, full_matrices=False)
    rates = s**2 / (s**2).mean()
    strength = 100 * 1.5 / float(rates[0])
    assert float(rates[1]) * strength / 100 < 1
    step(model, [link("l0", "l1")], strength, "energy")
    kept = (1 - strength / 100 * rates).clamp_min(0)
    assert torch.allclose(model.l1.weight.detach() @ U, (B @ U) * kept, atol=1e-12)
    assert float(kept[0]) == 0


@pytest.mark.parametrize(
    ("penalty", "strength"),
    [(penalty, strength) for penalty in PENALTIES for strength in (1.0, 12.0)]
    + [("energy", 25.0), ("cosine", 25.0), ("top", 25.0)],
)
def test_within_the_region_the_explicit_formula_holds_to_rounding(
    penalty: str, strength: float
) -> None:
    """At 12 and 25 bounds from shapes, or from Gram matrices, trip although no rate reaches 1."""
    model = chain(30, 24, 26, norm=False)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)
    A, B = (p.detach().clone() for p in model.parameters())
    rule = PENALTIES[penalty]()
    dA, dB = rule.directions(A[None], B[None])
    for operator in rule.operators(A[None], B[None]):
        top = float(torch.linalg.eigvalsh(operator.gram).max())
        top *= float(operator.weights.max()) if operator.weights is not None else 1.0
        assert top * strength * 1e-2 <= 1
    step(model, [link("l0", "l1")], strength, penalty)
    for weight, before, direction in ((model.l0.weight, A, dA), (model.l1.weight, B, dB)):
        wanted = before - direction[0] * (strength * 1e-2)
        torch.testing.assert_close(weight.detach(), wanted, rtol=1e-14, atol=1e-14)


def test_three_stages_of_bounds_agree_and_are_ordered() -> None:
    model = chain(30, 24, 26)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    pairs = [link("l0", "l1")]
    plan = batches(pairs, parameters)
    region = TrustRegion(pairs, parameters, plan, Energy())
    for value in (1e-4, 1 / 23.0, 10.0):
        steps = [value, value]
        to_check = region.to_check(steps, parameters)
        within = bool(region.within(to_check, parameters, steps, [None]))
        limited = region.limited(to_check, parameters, steps, [None])
        assert bool(to_check.batches) == (value * 24 > 1)
        assert not (within and limited is not None)
    assert limited is not None


def beside_gains(spike: float) -> tuple[nn.Module, list[MatrixPair]]:
    """fc1 is the second of one pair and the first of another: shapes alone count it twice."""
    model = chain(24, 96, 24, norm=True)
    model.norm.weight.data = torch.linspace(0.8, 1.2, 24, dtype=torch.float64)
    model.norm.weight.data[3] = spike
    return model, [link("norm", "l0", diagonal=True), link("l0", "l1")]


@penalties
def test_gains_of_about_one_size_need_no_gram_matrix(penalty: str) -> None:
    model, pairs = beside_gains(spike=1.0)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    rule = PENALTIES[penalty]()
    region = TrustRegion(pairs, parameters, batches(pairs, parameters), rule)
    share = (1 + 96**0.5) / 2 if penalty == "peak" else 1.0
    steps = [0.03 / share] * 4
    assert 1 < 2 * steps[0] * 24 * share < 2, "shapes alone are not enough, half of them is"
    assert not region.to_check(steps, parameters).batches
    of_B = region.to_check(steps, parameters).bounds[1]
    assert 1 <= of_B <= 1.5 * share
    model.norm.weight.data[3] = 40.0
    assert region.to_check(steps, parameters).batches, "one gain makes up the whole spectrum"
    model.norm.weight.data[3] = float("nan")
    assert region.to_check(steps, parameters).batches


@penalties
@pytest.mark.parametrize("spike", [1.0, 3.0, 40.0])
def test_the_bound_beside_gains_is_one(penalty: str, spike: float) -> None:
    model, _ = beside_gains(spike)
    A, B = model.norm.weight.data[None], model.l0.weight.data[None]
    rule = PENALTIES[penalty]()
    operator = rule.operators(A, B, rule.basis(A, B))[1]
    gram = operator.gram if operator.gram.ndim == 3 else torch.diag_embed(operator.gram)
    rates = torch.linalg.eigvalsh(gram)
    largest = float(rates.amax())
    if operator.weights is not None:
        largest *= float(operator.weights.amax())
    assert largest <= float(rule.bound_beside_gains(A, B.shape[1])) * (1 + 1e-12)


def test_limiting_warns_once() -> None:
    model = chain(9, 6, 7)
    decay = ColinearityDecay(model, strength=1e4, pairs=[link("l0", "l1")])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decay.step(optimizer)
        decay.step(optimizer)
    assert [str(w.message)[:28] for w in caught] == ["learning rate x strength wou"]


@strengths
def test_law_2_holds_for_limited_steps_too(strength: float) -> None:
    model = chain(4, 12, 5)
    A, B = (p.detach().clone() for p in model.parameters())
    step(model, [link("l0", "l1")], strength, "energy")
    away = torch.linalg.qr(A, mode="complete").Q[:, 4:]
    assert torch.allclose(model.l1.weight.detach() @ away, B @ away, atol=1e-12)


@penalties
@strengths
def test_law_4_zero_matrices_stay_as_they_are_at_any_strength(
    penalty: str, strength: float
) -> None:
    model = chain(9, 6, 7)
    nn.init.zeros_(model.l0.weight)
    B = model.l1.weight.detach().clone()
    step(model, [link("l0", "l1")], strength, penalty)
    assert (model.l0.weight == 0).all()
    assert torch.equal(model.l1.weight, B)


def test_overlaps_are_found_by_entries() -> None:
    model = nn.Module()
    model.add_module("qkv", nn.Linear(4, 12))
    model.add_module("proj", nn.Linear(4, 4))
    parameters = dict(model.named_parameters())
    views = [
        WeightView("qkv", rows=range(8, 10)),
        WeightView("qkv", rows=range(10, 12)),
        WeightView("qkv"),
        WeightView("qkv", rows=(1, 9)),
        WeightView("proj", cols=range(0, 2)),
        WeightView("proj", cols=(1, 2)),
        WeightView("proj", rows=range(0, 4, 2)),
        WeightView("proj", rows=(1, 3)),
    ]
    shared = [sorted(found) for found in overlaps(views, parameters)]
    assert shared[:4] == [[0, 2, 3], [1, 2], [0, 1, 2, 3], [0, 2, 3]]
    assert shared[4:] == [[4, 5, 6, 7], [4, 5, 6, 7], [4, 5, 6], [4, 5, 7]]
