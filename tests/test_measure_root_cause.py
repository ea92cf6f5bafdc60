from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quietvit.measure import diagnose
from quietvit.measure.colinearity import decompose
from quietvit.measure.contribution import explain
from quietvit.pairs import find_pairs

WIDTH, HIDDEN, HEADS, TOKENS = 12, 24, 3, 4
KINDS = ("mlp", "value_output", "gated_mlp", "norm_linear")


class Block(nn.Module):
    """A plain pre-norm transformer block over the columns of an image."""

    def __init__(self, activation=F.gelu, gated=False):
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.gate = nn.Linear(WIDTH, HIDDEN) if gated else None
        self.head = nn.Linear(WIDTH, 2)
        self.activation = activation
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.3)

    def forward(self, images):
        x = self.embed(images.flatten(1, 2).mT)
        n = len(x)
        qkv = self.qkv(self.norm1(x)).view(n, TOKENS, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(mixed.transpose(1, 2).reshape(n, TOKENS, WIDTH))
        z = self.norm2(x)
        h = self.activation(self.fc1(z))
        if self.gate is not None:
            h = h * self.gate(z)
        x = x + self.fc2(h)
        return self.head(x.mean(1))


def planted(hidden, inputs, strength):
    u = torch.rand(hidden) + 0.5
    v = torch.randn(inputs)
    return strength * torch.outer(u / u.norm(), v / v.norm()), u / u.norm()


@pytest.fixture
def images():
    return torch.randn(10, 2, 3, TOKENS)


def causes(model, images, kind, **options):
    pairs = [p for p in find_pairs(model, images[:1], kinds=KINDS) if p.kind == kind]
    found = diagnose(model, images, pairs=pairs, batch_size=4, **options)
    assert found.skipped == ()
    return found.root_causes


def output_of(model, images, name):
    held = []
    hook = getattr(model, name).register_forward_hook(lambda *call: held.append(call))
    with torch.no_grad():
        model.eval()(images)
    hook.remove()
    return held[0][1][0], held[0][2]


@pytest.mark.parametrize("activation", [F.gelu, F.relu, F.silu])
def test_a_planted_mlp_outlier_is_traced_to_its_direction(images, activation):
    model = Block(activation)
    with torch.no_grad():
        rank_one, u = planted(HIDDEN, WIDTH, 20.0)
        model.fc1.weight.mul_(0.1).add_(rank_one)
        model.fc2.weight.mul_(0.1)
        model.fc2.weight[5] = 4 * u
    (cause,) = causes(model, images, "mlp")
    assert cause.pair == "mlp: fc1.weight -> fc2.weight"
    assert (cause.channel, cause.contribution.direction) == (5, 0)
    assert cause.share >= 0.95
    assert cause.contribution.through / cause.value >= 0.95
    assert cause.share_linear >= 0.95
    assert cause.colinearity == pytest.approx(1, abs=0.02)
    assert cause.value > 20 * cause.output_rms / WIDTH


def test_a_planted_value_output_outlier_names_the_head(images):
    model = Block()
    size, head = WIDTH // HEADS, 1
    with torch.no_grad():
        model.qkv.bias.zero_()
        rank_one, u = planted(size, WIDTH, 20.0)
        rows = slice(2 * WIDTH + head * size, 2 * WIDTH + (head + 1) * size)
        model.qkv.weight[rows] = rank_one + 0.05 * torch.randn(size, WIDTH)
        model.proj.weight.mul_(0.1)
        model.proj.weight[7, head * size : (head + 1) * size] = 4 * u
    (cause,) = causes(model, images, "value_output")
    assert (cause.head, cause.channel, cause.contribution.direction) == (head, 7, 0)
    assert cause.share >= 0.95
    assert cause.contribution.product == pytest.approx(cause.contribution.through, rel=1e-3)


def test_a_planted_gain_is_named(images):
    model = Block()
    with torch.no_grad():
        model.norm2.bias.zero_()
        model.norm2.weight[4] = -40.0
        model.fc1.weight.mul_(0.1)
        model.fc1.weight[9, 4] = 2.0
    by_site = {cause.site: cause for cause in causes(model, images, "norm_linear")}
    cause = by_site["fc1"]
    assert cause.pair == "norm_linear: norm2.weight -> fc1.weight"
    assert (cause.channel, cause.contribution.direction) == (9, 0)
    assert cause.contribution.singular_value == 40
    assert cause.share >= 0.95


def test_a_random_model_has_no_single_cause():
    shares = []
    for seed in range(5):
        torch.manual_seed(seed)
        model = Block()
        (cause,) = causes(model, torch.randn(10, 2, 3, TOKENS), "mlp")
        shares.append(cause.contribution.through / cause.value)
    assert sorted(shares)[2] < 0.5


@pytest.mark.parametrize("kind", ["mlp", "value_output", "norm_linear"])
def test_the_value_reported_is_the_model_s_own_largest(images, kind):
    model = Block()
    for cause in causes(model, images, kind):
        _, output = output_of(model, images, cause.site)
        assert abs(cause.value) == pytest.approx(float(output.abs().max()), rel=1e-4)
        place = (cause.image, *cause.index[1:])
        assert cause.value == pytest.approx(float(output[place]), rel=1e-4)
        assert cause.output_rms == pytest.approx(float(output.square().mean().sqrt()), rel=1e-5)


def test_the_attention_weighted_mean_is_exact(images):
    model = Block().double().requires_grad_(False)
    images = images.double()
    (cause,) = causes(model, images, "value_output")
    size, head = WIDTH // HEADS, cause.head
    x, qkv = output_of(model, images[cause.image : cause.image + 1], "qkv")
    q, k, _ = qkv.view(TOKENS, 3, HEADS, size).permute(1, 2, 0, 3)
    probabilities = (q[head] @ k[head].mT / size**0.5).softmax(-1)
    mean = (probabilities @ x[0])[cause.index[1]]
    rows = model.qkv.weight[2 * WIDTH + head * size : 2 * WIDTH + (head + 1) * size]
    row = model.proj.weight[cause.channel, head * size : (head + 1) * size]
    c = cause.contribution
    u, s, v = torch.linalg.svd(rows, full_matrices=False)
    i = c.direction
    assert c.product == pytest.approx(float(s[i] * (row @ u[:, i]) * (v[i] @ mean)), rel=1e-9)
    assert c.linear == pytest.approx(float(row @ rows @ mean), rel=1e-9)


def test_products_add_up_to_the_linear_output_and_parts_to_the_hidden_one():
    a, b, x = torch.randn(9, 5).double(), torch.randn(9).double(), torch.randn(5).double()
    h = F.gelu(a @ x)
    c = explain(decompose(a), b, h, inputs=x, activation=F.gelu)
    assert c.linear == pytest.approx(float(b @ a @ x))
    assert c.hidden == pytest.approx(float(b @ h))
    u, s, v = torch.linalg.svd(a, full_matrices=False)
    i = c.direction
    assert c.product == pytest.approx(float(s[i] * (b @ u[:, i]) * (v[i] @ x)))
    assert c.through == pytest.approx(float((b @ u[:, i]) * (u[:, i] @ h)))
    assert c.alone == pytest.approx(float(b @ F.gelu(s[i] * u[:, i] * (v[i] @ x))))


def test_all_accounts_agree_without_anything_between():
    a, b, x = torch.randn(5, 9).double(), torch.randn(5).double(), torch.randn(9).double()
    direct = explain(decompose(a), b, a @ x, inputs=x)
    bias = torch.randn(5).double()
    recovered = explain(decompose(a), b, a @ x + bias, bias=bias)
    assert direct.direction == recovered.direction
    assert direct.product == pytest.approx(recovered.product)
    assert direct.input_component == pytest.approx(recovered.input_component)
    assert direct.through == pytest.approx(direct.product)
    assert recovered.hidden - recovered.linear == pytest.approx(float(b @ bias))


def test_a_gated_mlp_is_taken_apart_without_guessing_the_gate(images):
    (cause,) = causes(Block(F.silu, gated=True), images, "gated_mlp")
    assert cause.contribution.alone is None
    assert cause.share == cause.contribution.through / cause.value


def test_zero_directions_are_no_division_by_zero():
    c = explain(decompose(torch.zeros(4)), torch.randn(4), torch.zeros(4))
    assert (c.product, c.through, c.input_component) == (0, 0, 0)
