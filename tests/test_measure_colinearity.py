from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from quietvit.errors import QuietvitError
from quietvit.measure.colinearity import (
    amplification,
    decompose,
    expected_at_random,
    measure_pair,
)
from quietvit.pairs import MatrixPair, WeightView, find_pairs


class Two(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.a, self.b = nn.Module(), nn.Module()
        self.a.weight, self.b.weight = nn.Parameter(first), nn.Parameter(second)


def measure(first, second, kind="mlp"):
    diagonal = first.ndim == 1
    pair = MatrixPair(WeightView("a", diagonal=diagonal), WeightView("b"), kind)
    return measure_pair(Two(first, second), pair)


@pytest.mark.parametrize(("o", "h", "d"), [(6, 24, 6), (24, 6, 24), (5, 7, 9), (1, 4, 1)])
def test_the_spectrum_sums_to_the_product(o, h, d):
    a, b = torch.randn(h, d).double(), torch.randn(o, h).double()
    s = measure(a, b)
    assert sum(x * x for x in s.amplification) == pytest.approx(float((b @ a).square().sum()))
    assert s.product_norm == pytest.approx(float((b @ a).norm()))
    assert s.shape == (o, h, d)


def test_a_diagonal_first_matrix_is_as_if_written_out():
    gains, b = torch.randn(12), torch.randn(5, 12)
    gains[3] = 0
    vector, matrix = measure(gains, b), measure(torch.diag(gains), b)
    assert vector.singular_values == pytest.approx(matrix.singular_values)
    assert vector.amplification == pytest.approx(matrix.amplification, abs=1e-6)
    assert vector.alignment == pytest.approx(matrix.alignment)
    assert vector.product_norm == pytest.approx(matrix.product_norm)
    pairs = zip(vector.worst_channels, matrix.worst_channels, strict=True)
    for x, y in pairs:
        assert (x.channel, x.direction) == (y.channel, y.direction)
        assert x.colinearity == pytest.approx(y.colinearity)
        assert x.cosine == pytest.approx(y.cosine)


def test_a_diagonal_decomposition_gives_the_matrix_back():
    gains, x = torch.randn(12).double(), torch.randn(12).double()
    d = decompose(gains)
    back = torch.zeros(12).double()
    back[d.order] = d.values * d.onto_right(x)
    assert torch.equal(back, gains * x)


def test_alignment_is_one_on_average_over_rotations():
    a, b = torch.randn(16, 8).double(), torch.randn(6, 16).double()
    a[:, 0] *= 10
    numbers = []
    for _ in range(400):
        q, r = torch.linalg.qr(torch.randn(16, 16).double())
        numbers.append(measure(q * r.diagonal().sign() @ a, b).alignment)
    assert torch.tensor(numbers).mean() == pytest.approx(1, abs=0.06)


def test_alignment_has_no_unit():
    a, b = torch.randn(16, 8).double(), torch.randn(6, 16).double()
    assert measure(100 * a, 0.01 * b).alignment == pytest.approx(measure(a, b).alignment)


def test_numbers_survive_rotation_of_the_hidden_axis():
    a, b = torch.randn(16, 8).double(), torch.randn(6, 16).double()
    q, _ = torch.linalg.qr(torch.randn(16, 16).double())
    plain, rotated = measure(a, b), measure(q @ a, b @ q.T)
    assert rotated.amplification == pytest.approx(plain.amplification)
    assert rotated.alignment == pytest.approx(plain.alignment)
    assert [c.colinearity for c in rotated.worst_channels] == pytest.approx(
        [c.colinearity for c in plain.worst_channels]
    )


def test_orthogonal_rows_of_equal_length_leave_only_the_norm():
    q, _ = torch.linalg.qr(torch.randn(8, 8).double())
    s = measure(3 * q, torch.randn(6, 8).double())
    assert s.alignment == pytest.approx(1)
    for channel in s.worst_channels:
        assert channel.colinearity == pytest.approx(1)


def test_a_planted_colinear_channel_is_found():
    a = 0.1 * torch.randn(32, 8)
    u = torch.randn(32) / 32**0.5
    a += 20 * torch.outer(u, torch.randn(8)) / 8**0.5
    b = torch.randn(10, 32) / 32**0.5
    b[7] = 5 * u
    s = measure(a, b)
    worst = s.worst_channels[0]
    assert (worst.channel, worst.direction) == (7, 0)
    assert worst.colinearity == pytest.approx(1, abs=1e-2)
    assert worst.cosine == pytest.approx(1, abs=1e-2)
    assert worst.colinearity > 1.3 * s.expected_worst
    assert s.alignment > 5


def test_expectation_at_random_agrees_with_random_directions():
    a = torch.randn(32, 8).double() * torch.linspace(0.2, 4, 8)
    values = torch.linalg.svdvals(a)
    draws = torch.randn(60, 50, 32).double()
    colinearity = (draws @ a).norm(dim=-1) / (values[0] * draws.norm(dim=-1))
    single, largest = expected_at_random(values, 32, 50)
    assert single == pytest.approx(float(colinearity.square().mean().sqrt()), rel=0.02)
    assert largest == pytest.approx(float(colinearity.amax(1).mean()), rel=0.1)


@pytest.mark.parametrize("which", ["first", "second"])
def test_zero_weights_are_no_division_by_zero(which):
    a, b = torch.randn(8, 4), torch.randn(3, 8)
    (a if which == "first" else b).zero_()
    s = measure(a, b)
    assert s.alignment == s.product_norm == 0
    assert max(s.amplification) == 0


@pytest.mark.parametrize("which", ["a.weight", "b.weight"])
def test_nan_is_refused_by_name(which):
    a, b = torch.randn(8, 4), torch.randn(3, 8)
    (a if which == "a.weight" else b)[0, 0] = torch.nan
    with pytest.raises(QuietvitError, match=f"{which} holds NaN"):
        measure(a, b)


def test_matrices_that_do_not_follow_each_other_are_refused():
    with pytest.raises(QuietvitError, match="8 rows and the second 9 columns"):
        measure(torch.randn(8, 4), torch.randn(3, 9))


def test_amplification_alone_agrees():
    a, b = torch.randn(8, 4), torch.randn(3, 8)
    assert amplification(decompose(a), b).tolist() == pytest.approx(
        list(measure(a, b).amplification)
    )


def test_trained_weights_are_aligned_where_random_ones_are_not(test_data):
    model = timm.create_model("deit_tiny_patch16_224")
    example = torch.randn(1, 3, 224, 224)
    random = [measure_pair(model, p) for p in find_pairs(model, example, kinds=("mlp",))]
    model.load_state_dict(load_file(test_data / "deit_tiny_patch16_224.safetensors"))
    trained = [measure_pair(model, p) for p in find_pairs(model, example, kinds=("mlp",))]
    for pair in random:
        assert pair.alignment == pytest.approx(1, abs=0.05)
        assert pair.worst_channels[0].colinearity < 1.2 * pair.expected_worst
    last = trained[11]
    assert last.alignment > 5
    assert last.worst_channels[0].channel == 21
    assert last.worst_channels[0].colinearity > 4 * last.expected_worst
