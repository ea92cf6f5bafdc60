"""What GPTQ and ERQ are made of: rounding with error feedback, ridge compensation, rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quietvit.errors import QuietvitError
from quietvit.quantization.fitting.least_squares import (
    Gram,
    damped,
    grouped,
    nearest,
    ridge,
    round_with_feedback,
    rows,
    weight_grid,
)
from quietvit.quantization.methods.erq import flip, round_by_halves

SEEDS = range(4)


def correlated(seed, count=300, features=24):
    """Inputs (1, count, features) whose features share a few directions, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    spectrum = torch.logspace(0, -2, features, dtype=torch.float64)
    return (
        torch.randn(1, count, features, generator=generator, dtype=torch.float64)
        * spectrum
        @ (mixing)
    )


def layer(seed, outputs=12, features=24):
    """A weight (outputs, features) and its grid of 3 bits."""
    generator = torch.Generator().manual_seed(100 + seed)
    weight = torch.randn(outputs, features, generator=generator)
    return weight, weight_grid(weight, 3, "minmax", False)


def output_error(x, weight, rounded):
    return float((x @ (rounded - weight).mT).square().sum())


def feedback(weight, grid, hessian, **options):
    columns = grouped(weight, 1)
    return round_with_feedback(columns, hessian, lambda w: nearest(grid, w), **options)


# Rounding with error feedback


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_feedback_lowers_the_output_error(seed, act_order):
    x, (weight, grid) = correlated(seed), layer(seed)
    columns = grouped(weight, 1)
    plain = output_error(x, columns, nearest(grid, columns))
    hessian = damped(x.mT @ x, 0.01)
    better = output_error(x, columns, feedback(weight, grid, hessian, act_order=act_order))
    assert better < plain


def test_white_inputs_leave_nothing_to_feed_back():
    weight, grid = layer(0)
    rounded = feedback(weight, grid, torch.eye(24, dtype=torch.float64)[None])
    assert torch.equal(rounded[0].float(), grid(weight))


@pytest.mark.parametrize("block", [1, 5, 24, 128])
@pytest.mark.parametrize("act_order", [False, True])
def test_blocks_change_nothing(block, act_order):
    x, (weight, grid) = correlated(1), layer(1)
    hessian = damped(x.mT @ x, 0.01)
    order = list(range(24))
    if act_order:
        order = hessian[0].diagonal().argsort(descending=True).tolist()
    # One column after the other, each time solving the whole least-squares problem of the rest.
    left = weight.double().clone()
    for done, j in enumerate(order):
        rest = order[done + 1 :]
        error = left[:, j] - nearest(grid, left[None, :, j, None])[0, :, 0]
        left[:, j] -= error
        if rest:
            pull = torch.linalg.solve(hessian[0][rest][:, rest], hessian[0][rest, j])
            left[:, rest] += error[:, None] * pull
    got = feedback(weight, grid, hessian, block=block, act_order=act_order)
    assert torch.allclose(got[0], left, atol=1e-9)


def test_groups_are_rounded_each_for_itself():
    x = torch.cat([correlated(seed) for seed in (0, 1)])
    weight, grid = layer(2, outputs=24)
    hessian = damped(x.mT @ x, 0.01)
    both = round_with_feedback(grouped(weight, 2), hessian, lambda w: nearest(grid, w))
    for group in (0, 1):
        half = weight[12 * group : 12 * group + 12]
        own = weight_grid(half, 3, "minmax", False)
        alone = feedback(half, own, hessian[group : group + 1])
        assert torch.allclose(both[group], alone[0], atol=1e-12)


def test_unused_features_are_rounded_to_nearest_and_move_nothing():
    x, (weight, grid) = correlated(3), layer(3)
    x[..., [0, 7]] = 0
    hessian = damped(x.mT @ x, 0.01)
    got = feedback(weight, grid, hessian)
    assert torch.equal(got[0][:, [0, 7]].float(), grid(weight)[:, [0, 7]])
    used = [j for j in range(24) if j not in (0, 7)]
    alone = round_with_feedback(
        grouped(weight[:, used], 1), hessian[:, used][:, :, used], lambda w: nearest(grid, w)
    )
    assert torch.allclose(got[..., used], alone, atol=1e-12)


def test_all_unused_is_round_to_nearest():
    weight, grid = layer(0)
    got = feedback(weight, grid, damped(torch.zeros(1, 24, 24, dtype=torch.float64), 0.01))
    assert torch.equal(got[0].float(), grid(weight))


# Ridge compensation


def noisy(x, seed=0, step=0.5):
    """x rounded coarsely: what activation quantization makes of it."""
    return (x / step).round() * step


def remaining(x, quantized, weight, strength):
    """Output error after step 1 of ERQ, without a bias."""
    gram = quantized.mT @ quantized
    lost = quantized.mT @ (x - quantized)
    moved = weight + ridge(gram, lost @ weight.mT, strength).mT
    return float((x @ weight.mT - quantized @ moved.mT).square().sum())


@pytest.mark.parametrize("seed", SEEDS)
def test_ridge_compensation_lowers_the_output_error(seed):
    x, (weight, _) = correlated(seed), layer(seed)
    quantized, columns = noisy(x), grouped(weight, 1)
    none = float(((x - quantized) @ columns.mT).square().sum())
    errors = [remaining(x, quantized, columns, 10.0**power) for power in (-6, 0, 2, 5)]
    assert errors == sorted(errors)
    assert errors[-1] < none
    assert errors[0] < 0.9 * none


def test_ridge_vanishes_with_its_strength_and_solves_without():
    x, right = correlated(0), torch.ones(1, 24, 3, dtype=torch.float64)
    gram = x.mT @ x + torch.eye(24)
    assert float(ridge(gram, right, 1e12).abs().max()) < 1e-11
    assert torch.allclose(gram @ ridge(gram, right, 1e-12), right, atol=0.02)


def test_ridge_takes_a_singular_gram():
    ones = torch.ones(1, 5, 5, dtype=torch.float64)
    assert torch.allclose(ridge(ones, ones, 1e-9), ones / 5, atol=1e-3)


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_halves_end_on_the_grid_with_less_error(seed, refine):
    x, (weight, grid) = correlated(seed), layer(seed)
    x = torch.nn.functional.pad(x, (0, 1), value=1.0)
    columns = torch.nn.functional.pad(grouped(weight, 1), (0, 1))
    got = round_by_halves(columns, x.mT @ x, grid, 1e-3, refine=refine)
    assert torch.equal(nearest(grid, got[..., :-1]), got[..., :-1])
    plain = columns.clone()
    plain[..., :-1] = nearest(grid, columns[..., :-1])
    assert output_error(x, columns, got) < output_error(x, columns, plain)


def test_halves_without_compensation_round_to_nearest():
    x, (weight, grid) = correlated(0), layer(0)
    x = torch.nn.functional.pad(x, (0, 1), value=1.0)
    columns = torch.nn.functional.pad(grouped(weight, 1), (0, 1))
    got = round_by_halves(columns, x.mT @ x, grid, 1e12, refine=False)
    assert torch.equal(got[0, :, :-1].float(), grid(weight))


@pytest.mark.parametrize("seed", SEEDS)
def test_flips_lower_the_proxy_and_stay_next_to_the_weight(seed):
    x, (weight, grid) = correlated(seed), layer(seed)
    columns = grouped(weight, 1)
    rounded = nearest(grid, columns)
    better = flip(columns, rounded, x.mT @ x, grid)
    assert output_error(x, columns, better) < output_error(x, columns, rounded)
    assert torch.equal(nearest(grid, better), better)
    step = grid.scale[None, :, None]
    assert bool(((better - columns).abs() <= step * (1 + 1e-5)).all())


def test_flips_by_hand():
    weight = torch.tensor([[0.4, 0.4, -1.0, 1.0]])
    grid = weight_grid(weight, 2, "minmax", True)
    columns, gram = grouped(weight, 1), torch.ones(1, 4, 4, dtype=torch.float64)
    assert nearest(grid, columns).tolist() == [[[0.0, 0.0, -1.0, 1.0]]]
    # The sum of errors is -0.8; one weight rounded up makes it 0.2.
    assert sorted(flip(columns, nearest(grid, columns), gram, grid)[0, 0].tolist()) == [-1, 0, 1, 1]


# Rows


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, 3, groups=2, dilation=2, bias=False),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Conv1d(4, 2, 4, stride=4),
        nn.Conv3d(2, 4, 2),
        nn.Linear(5, 3),
    ],
    ids=str,
)
def test_rows_times_the_weight_are_the_output(conv):
    torch.manual_seed(0)
    spatial = conv.weight.dim() - 2
    x = torch.randn(2, 5, 5) if spatial == 0 else torch.randn(2, conv.in_channels, *[8] * spatial)
    function = {0: nn.functional.linear, 1: nn.functional.conv1d, 2: nn.functional.conv2d}.get(
        spatial, nn.functional.conv3d
    )
    names = ("stride", "padding", "dilation", "groups") if spatial else ()
    given = {name: getattr(conv, name) for name in names}

    def run(x, weight):
        return function(x, weight, conv.bias, **given)

    with torch.no_grad():
        seen = torch.cat(list(rows(x, conv.weight, run)), 1)
        out = seen.double() @ grouped(conv.weight, seen.shape[0]).mT
        out = out.movedim(0, 1).flatten(1)
        wanted = conv(x).movedim(1, -1) if spatial else conv(x)
        wanted = wanted.reshape(-1, conv.weight.shape[0]) - (0 if conv.bias is None else conv.bias)
    assert torch.allclose(out.float(), wanted, atol=1e-5)


def test_a_gram_is_the_same_however_the_rows_come():
    x, whole, parts = correlated(0), Gram(), Gram()
    whole.update(x, x)
    for part in x.split(7, 1):
        parts.update(part, part)
    assert whole.rows == parts.rows == 300
    assert torch.allclose(whole.finish("fc1"), parts.finish("fc1"))


def test_a_gram_of_what_is_not_finite_names_its_site():
    gram = Gram()
    gram.update(torch.full((1, 2, 3), 1e30), torch.full((1, 2, 3), 1e30))
    with pytest.raises(QuietvitError, match="fc1"):
        gram.finish("fc1")


def test_a_hessian_that_is_not_positive_definite_is_refused_with_the_remedy():
    hessian = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]], dtype=torch.float64)
    weight = torch.ones(1, 3, 2, dtype=torch.float64)
    with pytest.raises(QuietvitError, match="raise damp"):
        round_with_feedback(weight, hessian, torch.round)
