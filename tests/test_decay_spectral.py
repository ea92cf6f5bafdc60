"""S2D: which layers are dominated, the gradient of the stated penalty, and the cached vectors."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decay_cases import images, still, tower, train, weights
from quietvit import QuietvitError, SpectralDecay
from quietvit.decay.dominance import leading, shares

SIZE = 24


class Two(nn.Module):
    """A layer dominated by ``rank`` components beside a random one, and a head over both."""

    def __init__(self, rank: int = 1, gain: float = 40.0) -> None:
        super().__init__()
        self.planted, self.random = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.head = nn.Linear(SIZE, 3)
        generator = torch.Generator().manual_seed(5)
        noise = torch.randn(2, SIZE, SIZE, generator=generator)
        u = torch.linalg.qr(torch.randn(SIZE, rank, generator=generator)).Q
        v = torch.linalg.qr(torch.randn(SIZE, rank, generator=generator)).Q
        with torch.no_grad():
            self.planted.weight.copy_(noise[0] * 0.02 + gain * u @ v.mT)
            self.random.weight.copy_(noise[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.planted(x).tanh() + self.random(x).tanh())


def rows(count: int = 300, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, SIZE, generator=generator, dtype=torch.float64).to(dtype)


def stepped(model: nn.Module, lr: float = 0.0, **options: Any) -> SpectralDecay:
    """The regularizer after one step of an optimizer that does nothing by itself."""
    x = rows(dtype=next(model.parameters()).dtype)
    made = SpectralDecay(model, x, **options)
    optimizer = still(model, lr=lr)
    made.attach(optimizer)
    optimizer.step()
    return made


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_planted_layer_is_selected_with_its_rank_and_a_random_one_is_left(rank: int) -> None:
    model = Two(rank).double()
    made = stepped(model)
    assert made.selected == {"planted.weight": rank}
    assert all(value < 0.95 for value in made.dominance["random.weight"])
    assert not model.random.weight.grad.any()
    assert not model.head.weight.grad.any()
    assert "head.weight" not in made.dominance


def test_more_components_than_allowed_are_left_alone() -> None:
    assert stepped(Two(3).double(), components=2).selected == {}


def test_a_selection_of_no_layer_is_told_once_with_the_nearest(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "quietvit")
    model = Two(3).double()
    made = SpectralDecay(model, rows(), components=2, refresh=1)
    optimizer = still(model, lr=0.0)
    made.attach(optimizer)
    assert not caplog.records, "nothing was chosen yet"
    for _ in range(3):
        optimizer.step()
    assert made.selected == {}
    assert made.penalty() == 0.0
    (record,) = caplog.records
    told = record.getMessage()
    nearest = max(made.dominance.items(), key=lambda found: max(found[1]))
    assert "none of its 2 layers" in told
    assert "threshold=0.95 with components=2" in told
    assert f"The largest is {max(nearest[1]):.3g} ({nearest[0]})" in told
    assert nearest[0] == "planted.weight"
    caplog.clear()
    stepped(Two(3).double())
    stepped(Two(3).double(), components=2, strength=0.0)
    assert not caplog.records


def test_pcdr_is_the_formula_row_by_row() -> None:
    W = torch.randn(9, 7, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    X = rows(11)[:, :7]
    total, count = shares(X, W, leading(W, 4))
    wanted = torch.zeros(4, dtype=torch.float64)
    for x in X:
        y = W @ x
        i = int(y.abs().argmax())
        for k in range(4):
            part = sum(S[r] * U[i, r] * (Vh[r] @ x) for r in range(k + 1))
            wanted[k] += abs(part / y[i])
    torch.testing.assert_close(total, wanted, rtol=1e-10, atol=0)
    assert int(count) == 11


def test_dominance_is_the_mean_over_rows_and_rows_of_zeros_do_not_count() -> None:
    model = Two().double()
    x = rows(20)
    x[5:] = 0
    made = SpectralDecay(model, x)
    made.penalty()
    found = made._selection(made.parameters())[1]["random.weight"]
    total, count = shares(x[:5], model.random.weight.detach(), leading(model.random.weight, 3))
    assert found == pytest.approx((total / 5).tolist(), rel=1e-12)
    assert int(count) == 5


@pytest.mark.parametrize("shape", [(9, 7), (7, 9), (8, 8), (2, 30)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_leading_is_the_singular_value_decomposition(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    W = torch.randn(shape, dtype=dtype)
    u, v, s = leading(W, 2)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    wanted = (U[:, :2] * S[:2]) @ Vh[:2]
    close = (
        {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    )
    torch.testing.assert_close(s, S[:2], **close)
    torch.testing.assert_close((u * s) @ v.mT, wanted, **close)


def test_components_within_rounding_of_zero_are_zero() -> None:
    for dtype in (torch.float32, torch.float64):
        W = torch.outer(torch.randn(40, dtype=dtype), torch.randn(30, dtype=dtype))
        u, v, s = leading(W, 3)
        assert float(s[0]) == pytest.approx(float(W.norm()), rel=1e-5)
        assert not s[1:].any()
        assert not u[:, 1:].any()
        assert not v[:, 1:].any()
    assert not any(part.any() for part in leading(torch.zeros(4, 5), 2))


@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("rank", [1, 3])
def test_gradient_is_autograd_of_the_stated_penalty(rank: int, power: int) -> None:
    model = Two(rank).double()
    made = stepped(model, power=power, strength=0.3)
    W = model.planted.weight
    penalty = (torch.linalg.svdvals(W)[:rank] ** (power + 1)).sum() / (power + 1)
    wanted = torch.autograd.grad(0.3 * penalty, W)[0]
    assert float((W.grad - wanted).norm() / wanted.norm()) < 1e-10
    assert made.penalty() == pytest.approx(float(penalty.detach()), rel=1e-10)
    assert made.penalties()["random.weight"] == 0.0


def test_between_refreshes_vectors_stay_and_singular_values_are_current() -> None:
    """Then the gradient is that of sum |u_r . W v_r|^(n + 1) / (n + 1), u and v constants."""
    model = Two(2).double()
    x = rows()
    made = SpectralDecay(model, x, strength=0.3, refresh=2)
    optimizer = still(model, lr=0.0)
    made.attach(optimizer)
    optimizer.step()
    u, v = made._chosen["planted.weight"]
    with torch.no_grad():
        model.planted.weight.mul_(0.9).add_(torch.randn(SIZE, SIZE) * 0.1)
    optimizer.zero_grad()
    optimizer.step()
    W = model.planted.weight
    s = ((u.mT @ W @ v).diagonal()).abs()
    wanted = torch.autograd.grad(0.3 * (s**3).sum() / 3, W)[0]
    torch.testing.assert_close(W.grad, wanted, rtol=1e-10, atol=1e-14)
    assert made._chosen["planted.weight"][0] is u
    optimizer.step()
    assert made._chosen["planted.weight"][0] is not u


def test_a_layer_that_is_quiet_again_is_left_alone_after_a_refresh() -> None:
    model = Two().double()
    made = SpectralDecay(model, rows(), refresh=3)
    optimizer = still(model, lr=0.0)
    made.attach(optimizer)
    optimizer.step()
    with torch.no_grad():
        model.planted.weight.copy_(model.random.weight)
    seen = []
    for _ in range(3):
        seen.append(dict(made.selected))
        optimizer.step()
    assert seen == [{"planted.weight": 1}] * 3
    assert made.selected == {}


@pytest.mark.parametrize("strength", [0.1, 1e3, 1e9])
def test_decoupled_never_carries_a_component_through_zero(strength: float) -> None:
    model = Two(2).double()
    before = model.planted.weight.detach().clone()
    made = stepped(model, lr=0.01, coupled=False, strength=strength)
    u, v = made._chosen["planted.weight"]
    s = (u.mT @ before @ v).diagonal()
    left = (u.mT @ model.planted.weight.detach() @ v).diagonal()
    wanted = (s - 0.01 * strength * s**2).clamp_min(0)
    torch.testing.assert_close(left, wanted, rtol=1e-9, atol=1e-10)
    rest = before - (u * s) @ v.mT
    torch.testing.assert_close(
        model.planted.weight.detach() - (u * wanted) @ v.mT, rest, rtol=0, atol=1e-10
    )


def test_many_decoupled_steps_between_refreshes_keep_signs_too() -> None:
    model = Two(2).double()
    made = SpectralDecay(model, rows(), strength=3.0, coupled=False, refresh=50)
    optimizer = still(model)
    made.attach(optimizer)
    for _ in range(50):
        optimizer.step()
        u, v = made._chosen["planted.weight"]
        assert ((u.mT @ model.planted.weight.detach() @ v).diagonal() > -1e-12).all()


def test_the_model_is_left_in_its_mode_and_buffers_stay() -> None:
    model = nn.Sequential(
        nn.Linear(SIZE, SIZE), nn.BatchNorm1d(SIZE), nn.GELU(), nn.Linear(SIZE, 3)
    )
    model = model.double()
    model[1].eval()
    before = {name: value.clone() for name, value in model.named_buffers()}
    stepped(model)
    assert [module.training for module in model] == [True, False, True, True]
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name])


def test_a_tied_layer_is_penalized_once_and_judged_over_all_its_uses() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
            self.b.weight = self.a.weight
            self.head = nn.Linear(SIZE, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.a(x).tanh()).tanh())

    model = Tied().double()
    with torch.no_grad():
        model.a.weight.copy_(Two().planted.weight)
    made = stepped(model, strength=0.3)
    assert made.selected == {"a.weight": 1}
    assert [layer.sites for layer in made.layers] == [("a", "a#1")]
    penalty = torch.linalg.svdvals(model.a.weight)[0] ** 3 / 3
    wanted = torch.autograd.grad(0.3 * penalty, model.a.weight)[0]
    torch.testing.assert_close(model.b.weight.grad, wanted, rtol=1e-9, atol=1e-12)


def test_other_images_than_the_example_decide() -> None:
    model = Two().double()
    loud = torch.linalg.svd(model.random.weight.detach()).Vh[0].expand(50, SIZE)
    made = stepped(model)
    assert "random.weight" not in made.selected
    made = SpectralDecay(model, rows(4), images=loud)
    made.attach(still(model))._act(still(model))
    assert made.selected["random.weight"] == 1


def test_a_resumed_state_goes_on_with_the_same_vectors() -> None:
    """The refresh of the resumed run comes at the step where it would have come."""
    options = {"threshold": 0.2, "refresh": 5, "strength": 0.1}
    model = tower()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    made = SpectralDecay(model, images(), **options).attach(optimizer)
    train(model, optimizer, steps=range(3))
    state = made.state_dict()
    again = SpectralDecay(model, images(), **options)
    again.load_state_dict(state)
    made.detach()
    again.attach(optimizer)
    vectors = again._chosen
    train(model, optimizer, steps=range(3, 5))
    assert again._chosen is vectors
    assert again.selected == made.selected
    train(model, optimizer, steps=range(5, 6))
    assert again._chosen is not vectors
    state["chosen"]["elsewhere.weight"] = next(iter(state["chosen"].values()))
    with pytest.raises(QuietvitError, match=r"elsewhere\.weight, which is no linear layer"):
        SpectralDecay(model, images(), **options).load_state_dict(state)


def test_reading_the_penalty_selects_nothing() -> None:
    model = tower()
    made = SpectralDecay(model, images(), threshold=0.2)
    before = weights(model)
    assert made.penalty() > 0
    assert made.selected == {}
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_layers_narrower_than_the_components_have_fewer() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 3), nn.Tanh(), nn.Linear(3, SIZE))
    model = nn.Sequential(model, nn.Linear(SIZE, 4)).double()
    made = stepped(model, components=5)
    assert [len(share) for share in made.dominance.values()] == [5, 2, 2]


def test_images_that_make_nan_are_refused_and_named() -> None:
    model = Two().double()
    bad = rows()
    bad[3, 3] = float("nan")
    made = SpectralDecay(model, rows(), images=bad)
    optimizer = still(model)
    made.attach(optimizer)
    with pytest.raises(QuietvitError, match=r"planted\.weight: the activations of the images"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.1}, "PCDR is a share"),
        ({"threshold": -0.1}, "threshold=-0.1"),
        ({"components": 0}, "components=0"),
        ({"refresh": 0}, "refresh=0"),
        ({"power": 1.5}, "power=1.5"),
        ({"power": 0}, "power=0"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(QuietvitError, match=message):
        SpectralDecay(Two(), rows(dtype=torch.float32), **options)


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(QuietvitError, match="SpectralDecay has nothing to act on"):
        SpectralDecay(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 8, 8))
