"""KURE: its closed-form gradient, and what it does to a distribution of weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from decay_cases import images, still, tower
from quietvit import KurtosisRegularization, QuietvitError
from quietvit.decay.kurtosis import kurtosis_gradient, standardized


def stated(W: Tensor, target: float) -> Tensor:
    z = (W - W.mean()) / W.std(correction=0)
    return ((z**4).mean() - target) ** 2


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("target", [1.0, 1.8, 3.0])
def test_gradient_is_autograd_of_the_stated_penalty(scale: float, target: float) -> None:
    W = ((torch.randn(7, 11, dtype=torch.float64) ** 3 + 0.4) * scale).requires_grad_()
    (wanted,) = torch.autograd.grad(stated(W, target), W)
    found = kurtosis_gradient(W.detach(), target)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-10


def test_what_is_added_is_the_gradient_of_strength_times_the_mean_over_weights() -> None:
    model = tower()
    made = KurtosisRegularization(model, images(), strength=0.7, target=2.0)
    optimizer = still(model, lr=0.0)
    made.attach(optimizer)
    optimizer.step()
    matrices = {n: p for n, p in model.named_parameters() if p.ndim == 2}
    assert set(made.weights) == set(matrices)
    loss = 0.7 * sum(stated(p, 2.0) for p in matrices.values()) / len(matrices)
    assert made.penalty() * 0.7 == pytest.approx(float(loss.detach()), rel=1e-12)
    for parameter, wanted in zip(
        matrices.values(), torch.autograd.grad(loss, list(matrices.values())), strict=True
    ):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-10, atol=1e-16)


def test_convolutions_count_and_a_tied_weight_counts_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)).double()
    model[2].weight = model[1].weight
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    made = KurtosisRegularization(model, x)
    assert made.weights == ("0.weight", "1.weight")
    optimizer = still(model, lr=0.0)
    made.attach(optimizer)
    optimizer.step()
    wanted = torch.autograd.grad(
        (stated(model[0].weight, 1.8) + stated(model[1].weight, 1.8)) / 2, model[1].weight
    )[0]
    torch.testing.assert_close(model[2].weight.grad, wanted, rtol=1e-10, atol=1e-16)


def test_descent_reaches_the_target() -> None:
    W = torch.randn(40, 40, dtype=torch.float64)
    for _ in range(300):
        W = W - 20.0 * kurtosis_gradient(W, 1.8)
    assert float(standardized(W)[0].pow(4).mean()) == pytest.approx(1.8, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7e20, 1e-30])
def test_equal_entries_have_no_kurtosis_and_no_gradient(value: float, dtype: torch.dtype) -> None:
    W = torch.full((30, 50), value, dtype=dtype)
    assert (kurtosis_gradient(W, 1.8) == 0).all()
    assert float(standardized(W)[1]) == 0


def test_huge_and_small_weights_do_not_overflow() -> None:
    W = torch.randn(9, 9)
    for scale in (1e-18, 1e18):
        found = kurtosis_gradient(W * scale, 1.8) * scale
        torch.testing.assert_close(found, kurtosis_gradient(W, 1.8), rtol=1e-4, atol=1e-7)


def test_bad_targets_and_models_without_weights_are_refused() -> None:
    for target in (0.9, float("nan"), None):
        with pytest.raises(QuietvitError, match="target="):
            KurtosisRegularization(tower(), images(), target=target)  # type: ignore[arg-type]
    with pytest.raises(QuietvitError, match="no linear or convolution"):
        KurtosisRegularization(nn.LayerNorm(8), torch.randn(2, 8))
