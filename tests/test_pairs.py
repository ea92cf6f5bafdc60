"""Laws of the pairs: a row of the first matrix is what reaches the column of the second."""

from __future__ import annotations

from collections import Counter

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import quietvit
from quietvit.errors import QuietvitError
from quietvit.pairs import KINDS, find_pairs
from quietvit.tracing import call, intercept
from zoo import build

COUNTS = {
    "timm-vit": {"residual": 3, "norm_linear": 4, "value_output": 4, "mlp": 2, "query_key": 4},
    "timm-deit-distilled": {
        "residual": 3,
        "norm_linear": 4,
        "value_output": 4,
        "mlp": 2,
        "query_key": 4,
    },
    "timm-swin": {"residual": 7, "norm_linear": 9, "value_output": 12, "mlp": 4, "query_key": 12},
    "timm-beit": {"residual": 3, "norm_linear": 4, "value_output": 4, "mlp": 2, "query_key": 4},
    "timm-eva-swiglu": {"residual": 3, "norm_linear": 4, "value_output": 4, "gated_mlp": 4},
    "timm-dinov2-layerscale": {
        "residual": 3,
        "norm_linear": 4,
        "value_output": 4,
        "mlp": 2,
        "query_key": 4,
    },
    "timm-hybrid": {"residual": 4, "norm_linear": 4, "value_output": 4, "mlp": 2, "query_key": 4},
    "timm-qk-norm": {"residual": 3, "norm_linear": 4, "value_output": 4, "mlp": 2},
    "timm-convit-cached-table": {
        "residual": 4,
        "norm_linear": 6,
        "value_output": 4,
        "mlp": 2,
        "query_key": 4,
    },
    "hf-detr": {"residual": 10, "norm_linear": 12, "value_output": 20, "mlp": 5, "query_key": 16},
    "hf-vit": {"residual": 5, "norm_linear": 8, "value_output": 8, "mlp": 2, "query_key": 8},
    "hf-dinov2": {"residual": 5, "norm_linear": 8, "value_output": 8, "mlp": 2, "query_key": 8},
    "hf-swin": {"residual": 13, "norm_linear": 17, "value_output": 12, "mlp": 4, "query_key": 12},
    "hf-siglip": {"residual": 7, "norm_linear": 10, "value_output": 12, "mlp": 3, "query_key": 8},
    "hf-yolos": {"residual": 7, "norm_linear": 10, "value_output": 8, "mlp": 4, "query_key": 8},
    "tv-vit": {"residual": 3, "norm_linear": 4, "value_output": 4, "mlp": 2, "query_key": 4},
    "tv-swin": {"residual": 7, "norm_linear": 9, "value_output": 12, "mlp": 4, "query_key": 12},
    "nn-encoder-pre-norm": {
        "residual": 3,
        "norm_linear": 4,
        "value_output": 8,
        "mlp": 2,
        "query_key": 8,
    },
    "nn-encoder-post-norm": {
        "residual": 3,
        "norm_linear": 3,
        "value_output": 8,
        "mlp": 2,
        "query_key": 8,
    },
}


@pytest.mark.parametrize("name", COUNTS)
def test_kinds_and_numbers_of_pairs(name):
    model, example = build(name)
    pairs = find_pairs(model, example, kinds=KINDS)
    assert Counter(pair.kind for pair in pairs) == COUNTS[name]
    assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("name", COUNTS)
def test_a_row_of_the_first_reaches_that_column_of_the_second_alone(name):
    model, example = build(name)
    traced = quietvit.trace(model, example)
    kinds = ("mlp", "value_output", "gated_mlp", "norm_linear")
    assert_reaches_its_column_alone(
        model, example, traced, find_pairs(model, trace=traced, kinds=kinds)
    )


@pytest.mark.parametrize("name", COUNTS)
def test_a_writer_of_the_stream_reaches_its_column_alone_but_for_the_norm(name, monkeypatch):
    model, example = build(name)
    traced = quietvit.trace(model, example)
    pairs = [
        pair for pair in find_pairs(model, trace=traced, kinds=KINDS) if pair.kind == "residual"
    ]
    scaled = lambda x, shape, weight=None, bias=None, eps=0.0: x * weight + bias  # noqa: E731
    monkeypatch.setattr(F, "layer_norm", scaled)
    assert_reaches_its_column_alone(model, example, traced, pairs)


def assert_reaches_its_column_alone(model, example, traced, pairs):
    seen = {}

    def handler(site, operands, run):
        if site.kind in ("linear", "conv") and site.weight is not None:
            x = operands[0] if site.kind == "linear" else operands[0].movedim(1, -1)
            seen.setdefault(site.weight, x.flatten(0, -2))
        return run(*operands)

    def inputs():
        seen.clear()
        with torch.no_grad(), intercept(traced, handler):
            call(model, example)
        return dict(seen)

    before = inputs()
    silent = 0
    for number, pair in enumerate(pairs):
        parameter = pair.first.parameter(model)
        original = parameter.detach().clone()
        row = (7 * number) % pair.first.read(model).shape[0]
        with torch.no_grad():
            change = torch.zeros_like(pair.first.read(model))
            change[row] = 0.5 + torch.rand_like(change[row])
            pair.first.scatter_add_(parameter.data, change)
            after = inputs()
            parameter.copy_(original)
        consumer = next(
            view
            for view in before
            if view.parameter_name == pair.second.parameter_name
            and (view.rows == pair.second.rows or pair.second.rows is None)
        )
        heard = (after[consumer] - before[consumer]).abs().amax(0)
        reached = set(torch.nonzero(heard > 1e-5 * before[consumer].abs().max()).flatten().tolist())
        column = row if pair.second.cols is None else pair.second.cols[row]
        assert reached <= {column}, pair.name
        silent += not reached
    assert silent <= len(pairs) // 10  # a ReLU may be


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit", "timm-swin", "nn-encoder-post-norm"])
def test_gains_between_and_before_are_those_that_the_reader_sees(name):
    model, example = build(name)
    kinds = ("mlp", "value_output", "residual", "norm_linear")
    pairs = find_pairs(model, example, kinds=kinds, fold_gains=True)
    of_reader = {p.second.parameter_name: p.first for p in pairs if p.kind == "norm_linear"}
    folded = [pair for pair in pairs if pair.kind in ("mlp", "value_output")]
    for pair in folded:
        assert pair.before == of_reader.get(pair.first.parameter_name)
        assert pair.between is None
    assert any(pair.before is not None for pair in folded)
    for pair in pairs:
        if pair.kind == "residual":
            assert pair.between == of_reader[pair.second.parameter_name]
    plain = find_pairs(model, example, kinds=kinds)
    assert all(pair.before is None for pair in plain)


def test_query_key_product_makes_the_scores():
    model, example = build("timm-vit")
    block = model.blocks[0].attn
    pairs = find_pairs(model, example, kinds=["query_key"])[:2]
    x = torch.randn(4, 32)
    with torch.no_grad():
        q, k, _ = F.linear(x, block.qkv.weight).view(4, 3, 2, 16).permute(1, 2, 0, 3)
        for head, pair in enumerate(pairs):
            A, B = pair.first.read(model), pair.second.read(model)
            torch.testing.assert_close(x @ B @ A @ x.mT, q[head] @ k[head].mT)


class Grouped(nn.Module):
    """Attention whose query heads share key and value heads."""

    def __init__(self, rotate=False):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.o = nn.Linear(16, 16)
        self.rotate = rotate

    def forward(self, x):
        q = self.q(x).view(1, -1, 4, 4).transpose(1, 2)
        k = self.k(x).view(1, -1, 2, 4).transpose(1, 2)
        v = self.v(x).view(1, -1, 2, 4).transpose(1, 2)
        if self.rotate:
            q = q * 0.8 + q.roll(1, -1) * 0.6
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return x + self.o(y.transpose(1, 2).flatten(2))


def test_grouped_heads_make_a_pair_for_each_query_head():
    model = Grouped()
    pairs = find_pairs(model, torch.randn(1, 5, 16))
    assert [(pair.first.rows, pair.second.cols) for pair in pairs] == [
        (range(0, 4), range(0, 4)),
        (range(0, 4), range(4, 8)),
        (range(4, 8), range(8, 12)),
        (range(4, 8), range(12, 16)),
    ]
    assert [pair.head for pair in pairs] == [0, 1, 2, 3]


def test_rotated_queries_are_no_query_key_pair():
    with pytest.raises(QuietvitError, match="no matrix pair"):
        find_pairs(Grouped(rotate=True), torch.randn(1, 5, 16), kinds=["query_key"])


class Mixed(Grouped):
    """Mixes the heads of the attention output before the projection."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x):
        q = self.q(x).view(1, -1, 4, 4).transpose(1, 2)
        scores = (q @ q.transpose(-2, -1)).softmax(-1)
        scores = self.mix(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = scores @ q
        return x + self.o(y.transpose(1, 2).flatten(2))


def test_talking_heads_are_no_pair_and_the_table_says_why():
    with pytest.raises(QuietvitError, match="attention heads are mixed"):
        find_pairs(Mixed(), torch.randn(1, 5, 16))
    model = timm.create_model("cait_xxs24_224", img_size=32, embed_dim=32, depth=1, num_heads=2)
    pairs = find_pairs(model, torch.randn(1, 3, 32, 32))
    assert "blocks.*.attn.qkv -> blocks.*.attn.proj: attention heads are mixed" in str(pairs)
    assert not [
        p for p in pairs if p.kind == "value_output" and p.first.module.startswith("blocks.")
    ]


def test_a_norm_between_is_no_pair():
    model = timm.create_model(
        "eva02_base_patch14_224", img_size=28, patch_size=7, embed_dim=32, depth=1, num_heads=2
    )
    pairs = find_pairs(model, torch.randn(1, 3, 28, 28))
    assert {pair.kind for pair in pairs} == {"value_output", "norm_linear"}
    assert "a norm stands between" in str(pairs)


def test_einsum_attention_is_read_like_matmul_attention():
    class Einsum(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).unbind(2)
            p = torch.einsum("bnhd,...mhd->bhnm", q, k[0]).softmax(-1)
            return x + self.o(torch.einsum("bhnm,bmhd->bnhd", p, v).flatten(2))

    pairs = find_pairs(Einsum(), torch.randn(1, 5, 16), kinds=["value_output"])
    assert [(pair.first.rows, pair.second.cols) for pair in pairs] == [
        (range(32 + 4 * h, 36 + 4 * h), range(4 * h, 4 * h + 4)) for h in range(4)
    ]


def test_norm_between_weights_and_scores_is_no_query_key_pair():
    model, example = build("timm-qk-norm")
    pairs = find_pairs(model, example, kinds=["mlp", "query_key"])
    assert {pair.kind for pair in pairs} == {"mlp"}
    assert "a norm stands between a weight and the scores" in str(pairs)


class Inverted(nn.Module):
    """A bottleneck of convolutions, wide in between."""

    def __init__(self, between, excited=False):
        super().__init__()
        self.up, self.down = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)
        self.between, self.excited = between, excited
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x):
        h = F.gelu(self.between(F.gelu(self.up(x))))
        if self.excited:
            h = h * self.excite(F.relu(self.squeeze(h.mean((2, 3), keepdim=True)))).sigmoid()
        return (x + self.down(h)).mean((1, 2, 3))


def normed(width, after, *, depthwise=False):
    """A 1x1 convolution, or a linear, and its BatchNorm; a depthwise one behind it if asked."""
    flat = after == "linear"
    first = nn.Linear(4, width, bias=False) if flat else nn.Conv2d(4, width, 1)
    layers = [first, nn.BatchNorm1d(width) if flat else nn.BatchNorm2d(width), nn.ReLU6()]
    if depthwise:
        layers += [nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width)]
    return nn.Sequential(*layers)


class Bottleneck(nn.Module):
    """An MLP with a BatchNorm behind each of its maps."""

    def __init__(self, kind="conv", depthwise=False):
        super().__init__()
        self.up = normed(8, kind, depthwise=depthwise)
        self.down = nn.Linear(8, 4) if kind == "linear" else nn.Conv2d(8, 4, 1)
        self.norm = nn.BatchNorm1d(4) if kind == "linear" else nn.BatchNorm2d(4)

    def forward(self, x):
        return (x + self.norm(self.down(F.gelu(self.up(x))))).square().flatten(1).sum(1)


class Levit(nn.Module):
    """Attention of a convolution with a BatchNorm, an activation before the projection."""

    def __init__(self):
        super().__init__()
        self.qkv, self.norm = nn.Linear(8, 24, bias=False), nn.BatchNorm1d(24)
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        y = self.norm(self.qkv(x).flatten(0, 1)).view(*x.shape[:2], 2, 12).transpose(1, 2)
        q, k, v = y.split([4, 4, 4], dim=-1)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return x + self.proj(F.hardswish(y.transpose(1, 2).flatten(2)))


def with_statistics(model):
    """Gains and running variances that differ from channel to channel, and eval mode."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight.data, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


NORMED = {
    "conv": (lambda: Bottleneck(), torch.randn(1, 4, 5, 5)),
    "depthwise": (lambda: Bottleneck(depthwise=True), torch.randn(1, 4, 5, 5)),
    "linear": (lambda: Bottleneck("linear"), torch.randn(3, 4)),
    "levit": (Levit, torch.randn(1, 5, 8)),
}


@pytest.mark.parametrize("name", NORMED)
def test_a_batch_norm_between_is_a_diagonal_map(name):
    """The scale is what a changed row of the first arrives with at the second, but for bends."""
    make, example = NORMED[name]
    model = with_statistics(make())
    traced = quietvit.trace(model, example)
    pairs = find_pairs(model, trace=traced, kinds=("mlp", "value_output"))
    assert len(pairs) == (2 if name == "levit" else 1)
    assert_reaches_its_column_alone(model, example, traced, pairs)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for pair in pairs:
        wanted = norms[0].weight * (norms[0].running_var + norms[0].eps).rsqrt()
        if name == "depthwise":
            kernels = model.up[3].weight.flatten(1).norm(dim=1)
            wanted = wanted * kernels * norms[1].weight
            wanted = wanted * (norms[1].running_var + norms[1].eps).rsqrt()
        rows = slice(None) if pair.first.rows is None else list(pair.first.rows)
        torch.testing.assert_close(pair.between.read(model), wanted[rows].detach())


def test_an_update_is_that_of_the_folded_matrix_with_the_statistics_of_now():
    model = with_statistics(Bottleneck())
    example = torch.randn(2, 4, 5, 5)
    decay = quietvit.ColinearityDecay(model, example, strength=0.3, kinds=("mlp",))
    model.train()(example)  # the running variance moves, and counts in train mode too
    model.up[1].running_var.mul_(3.0)
    scale = (model.up[1].weight * (model.up[1].running_var + 1e-5).rsqrt()).detach()
    folded = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1))
    folded[0].weight.data = model.up[0].weight.detach() * scale[:, None, None, None]
    folded[1].weight.data = model.down.weight.detach().clone()
    pair = quietvit.pairs.MatrixPair(
        quietvit.pairs.WeightView("0"), quietvit.pairs.WeightView("1"), "mlp"
    )
    other = quietvit.ColinearityDecay(folded, pairs=[pair], strength=0.3)
    decay.step(torch.optim.SGD(model.parameters(), lr=0.1))
    other.step(torch.optim.SGD(folded.parameters(), lr=0.1))
    torch.testing.assert_close(model.down.weight, folded[1].weight)
    names_now = set(dict(model.named_parameters())) | set(dict(model.named_buffers()))
    assert names_now == set(model.state_dict())  # nothing was added to the model


def test_processes_agree_on_the_statistics(monkeypatch):
    """Under DDP each process has a running variance of its own, and all have to move alike."""
    model = with_statistics(Bottleneck())
    decay = quietvit.ColinearityDecay(model, torch.randn(1, 4, 5, 5), strength=0.3, kinds=("mlp",))
    source = decay._source()
    before = dict(source)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    others = lambda joined: joined.mul_(4.0)  # noqa: E731 - the other process holds three times ours
    monkeypatch.setattr(torch.distributed, "all_reduce", others)
    source.agree()
    scales = [name for name in source if name.endswith("channel_scale()")]
    assert len(scales) == 1
    for name, whole in before.items():
        torch.testing.assert_close(source.parameters[name].detach(), whole * (1 + (name in scales)))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)
        self.one, self.other = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x):
        h = self.up(x)
        return (x + self.down(F.relu(self.one(h) + self.other(h)))).square().sum((1, 2, 3))


def test_batch_norms_that_are_no_diagonal_map_are_named():
    with pytest.raises(QuietvitError, match="BatchNorms in parallel branches"):
        find_pairs(Branches().eval(), torch.randn(1, 4, 5, 5))
    model = Bottleneck()
    model.up[1] = nn.BatchNorm2d(8, track_running_stats=False)
    with pytest.raises(QuietvitError, match="a norm stands between"):
        find_pairs(model, torch.randn(1, 4, 5, 5))


class LocalBeside(Branches):
    """A map and its depthwise convolution, added, read by a BatchNorm or behind one."""

    def __init__(self, norm_last):
        super().__init__()
        self.local = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.norm_last = nn.BatchNorm2d(8), norm_last

    def forward(self, x):
        h = self.up(x) if self.norm_last else self.norm(self.up(x))
        h = h + self.local(h)
        return (x + self.down(F.relu(self.norm(h) if self.norm_last else h))).square().mean((2, 3))


def test_a_depthwise_convolution_beside_its_input_has_no_scale():
    x = torch.randn(1, 4, 5, 5)
    with pytest.raises(QuietvitError, match="plus a parallel path"):
        find_pairs(LocalBeside(norm_last=True).eval(), x, kinds=["mlp"])
    (pair,) = find_pairs(LocalBeside(norm_last=False).eval(), x, kinds=["mlp"])
    assert pair.between is not None


class CrossCovariance(nn.Module):
    """Attention that averages over the channels of a head (XCA)."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 4, 1)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return x + self.proj(y.permute(0, 3, 1, 2).flatten(2))


@pytest.mark.parametrize("tokens", [5, 4])
def test_attention_over_channels_makes_a_pair_of_each_head(tokens):
    model, x = CrossCovariance(), torch.randn(1, tokens, 8)
    pairs = find_pairs(model, x, kinds=["value_output"])
    assert [(p.first.rows, p.second.cols, p.head) for p in pairs] == [
        (range(16 + 4 * h, 20 + 4 * h), range(4 * h, 4 * h + 4), h) for h in range(2)
    ]
    seen = []
    model.proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for pair in pairs:
        model(x)
        with torch.no_grad():
            for tensor in (model.qkv.weight, model.qkv.bias):
                tensor[list(pair.first.rows)] = 0.0
        model(x)
        before, after = seen[-2:]
        silenced = (before != after).flatten(0, 1).any(0).nonzero().flatten().tolist()
        assert silenced == list(pair.second.cols)
        assert not after[..., silenced].any()


class BesideAttention(nn.Module):
    """An attention of packed queries, keys and values, and something added to its output."""

    def __init__(self, beside):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.local = nn.Conv1d(8, 8, 3, padding=1, groups=8, bias=False)
        self.pool = nn.Conv1d(4, 4, 3, stride=2, groups=4)
        self.grouped = nn.Conv1d(8, 8, 1, groups=2)
        self.beside = beside

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        if self.beside == "pooled":  # heads folded into the batch, as in MViTv2
            k, v = (self.pool(x.flatten(0, 1).mT).mT.unflatten(0, (-1, 2)) for x in (k, v))
        if self.beside == "grouped":
            v = self.grouped(v.permute(0, 1, 3, 2).flatten(1, 2)).unflatten(1, (2, 4)).mT
        y = (q @ k.mT).softmax(-1) @ v
        if self.beside == "values":
            local = self.local(v.permute(0, 1, 3, 2).flatten(1, 2)).mT
            return x + self.proj(y.transpose(1, 2).flatten(2) + local)
        if self.beside == "queries":
            return x + self.proj((q + y).transpose(1, 2).flatten(2))
        if self.beside in ("pooled", "grouped"):
            return x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.proj((q.relu() @ (k.relu().mT @ v)).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("beside", "through"),
    [("values", ("attention", "depthwise")), ("pooled", ("depthwise", "attention"))],
)
def test_a_depthwise_convolution_beside_or_before_attention_keeps_the_pair(beside, through):
    pairs = find_pairs(BesideAttention(beside), torch.randn(1, 5, 8), kinds=["value_output"])
    assert [(p.first.rows, p.second.cols, p.head) for p in pairs] == [
        (range(16 + 4 * h, 20 + 4 * h), range(4 * h, 4 * h + 4), h) for h in range(2)
    ]
    assert {p.through for p in pairs} == {through}


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        ("queries", "qkv -> proj: other channels of A are added"),
        ("nothing", "qkv -> proj: a product of activations without softmax"),
        ("grouped", "grouped -> proj: A is a grouped convolution"),
    ],
)
def test_what_stands_between_values_and_projection_is_named(beside, reason):
    with pytest.raises(QuietvitError, match=reason):
        find_pairs(BesideAttention(beside), torch.randn(1, 5, 8))


class Outlook(nn.Module):
    """Attention inside windows that overlap, as VOLO's, with windows cut out and added back."""

    def __init__(self):
        super().__init__()
        self.value, self.scores, self.proj = nn.Linear(8, 8), nn.Linear(8, 162), nn.Linear(8, 8)

    def forward(self, x):
        size = x.shape[1:3]
        v = F.unfold(self.value(x).permute(0, 3, 1, 2), 3, padding=1)
        v = v.view(1, 2, 4, 9, -1).permute(0, 1, 4, 3, 2)
        scores = self.scores(x).view(1, -1, 2, 9, 9).permute(0, 2, 1, 3, 4)
        y = (scores.softmax(-1) @ v).permute(0, 1, 4, 3, 2).reshape(1, 72, -1)
        return x + self.proj(F.fold(y, size, 3, padding=1).permute(0, 2, 3, 1))


def test_windows_that_overlap_keep_the_channels_apart():
    pairs = find_pairs(Outlook(), torch.randn(1, 4, 4, 8), kinds=["value_output"])
    assert [(p.first.parameter_name, p.first.rows, p.second.cols) for p in pairs] == [
        ("value.weight", range(4 * h, 4 * h + 4), range(4 * h, 4 * h + 4)) for h in range(2)
    ]


class Quantizable(nn.Module):
    """torch's attention for quantization, of tokens first."""

    def __init__(self):
        super().__init__()
        self.attention = torch.ao.nn.quantizable.MultiheadAttention(8, 2)

    def forward(self, x):
        return x + self.attention(x, x, x)[0]


def test_quantizable_attention_is_read():
    pairs = find_pairs(Quantizable(), torch.randn(5, 1, 8), kinds=["value_output"])
    assert [(p.first.rows, p.second.cols) for p in pairs] == [
        (range(4 * h, 4 * h + 4), range(4 * h, 4 * h + 4)) for h in range(2)
    ]


class Scrambled(nn.Module):
    """Forgets to put heads behind tokens, as torch's quantizable attention of batches first."""

    def __init__(self):
        super().__init__()
        self.v, self.proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        v = self.v(x).view(1, -1, 2, 4).transpose(1, 2)
        y = (v @ v.mT).softmax(-1) @ v
        return x + self.proj(y.reshape(x.shape))


def test_what_scrambles_the_channels_of_attention_is_named():
    with pytest.raises(QuietvitError, match=r"v -> proj: .* reach other columns at other tokens"):
        find_pairs(Scrambled(), torch.randn(1, 5, 8), kinds=["value_output"])


def names(pairs):
    return {(pair.first.module, pair.second.module) for pair in pairs}


def test_depthwise_and_grouped_convolutions_are_no_first_matrix():
    images = torch.randn(1, 4, 6, 6)
    depthwise = Inverted(nn.Conv2d(8, 8, 3, padding="same", groups=8))
    assert names(find_pairs(depthwise, images)) == {("up", "down")}
    grouped = Inverted(nn.Conv2d(8, 8, 1, groups=2))
    with pytest.raises(QuietvitError, match="no matrix pair"):
        find_pairs(grouped, images)
    full = Inverted(nn.Conv2d(8, 8, 3, padding="same"))
    assert names(find_pairs(full, images)) == {("between", "down")}
    backwards = Inverted(nn.ConvTranspose2d(8, 8, 1))
    with pytest.raises(QuietvitError, match="no matrix pair"):
        find_pairs(backwards, images)


def test_squeeze_and_excitation_mixes_what_it_scales():
    pairs = find_pairs(Inverted(nn.Identity(), excited=True), torch.randn(1, 4, 6, 6))
    assert names(pairs) == {("up", "squeeze"), ("squeeze", "excite")}
    assert "up -> down: a gate computed from the output of A" in str(pairs)


def test_packed_gates_make_two_pairs():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 24), nn.Linear(12, 8)

        def forward(self, x):
            gate, value = self.up(x).chunk(2, dim=-1)
            return self.down(F.silu(gate) * value)[..., :4].sum(-1).tanh() @ torch.ones(5, 1)

    pairs = find_pairs(Packed(), torch.randn(1, 5, 8))
    assert [(pair.kind, pair.first.rows) for pair in pairs] == [
        ("gated_mlp", range(0, 12)),
        ("gated_mlp", range(12, 24)),
    ]


def test_self_gated_activation_is_an_mlp():
    class Quick(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x):
            h = self.up(x)
            return x + self.down(h * torch.sigmoid(1.702 * h))

    (pair,) = find_pairs(Quick(), torch.randn(1, 5, 8))
    assert pair.kind == "mlp"


def test_pairs_survive_moving_reloading_and_compiling():
    model, example = build("timm-vit")
    pairs = find_pairs(model, example)
    before = [pair.first.read(model).clone() for pair in pairs]
    state = {key: value.clone() * 2 for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.to(torch.float64)
    compiled = torch.compile(model)
    for pair, old in zip(pairs, before, strict=True):
        torch.testing.assert_close(pair.first.read(model), 2 * old.double())
        assert torch.equal(pair.first.read(compiled), pair.first.read(model))


def test_scatter_add_undoes_select():
    model, example = build("tv-vit")
    for pair in find_pairs(model, example, kinds=KINDS):
        for view in (pair.first, pair.second):
            whole = torch.zeros_like(view.parameter(model))
            view.scatter_add_(whole, view.read(model).detach())
            assert torch.equal(view.select(whole), view.read(model))
            assert torch.equal(whole[whole != 0], view.parameter(model)[whole != 0])


def test_models_without_pairs_say_what_was_seen():
    with pytest.raises(QuietvitError, match=r"ResNet has no matrix pair.*20 conv.*give the pairs"):
        find_pairs(timm.create_model("resnet18"), torch.randn(1, 3, 64, 64))


def test_bad_arguments():
    model, example = build("timm-vit")
    with pytest.raises(QuietvitError, match="did you mean 'value_output'"):
        find_pairs(model, example, kinds=["value_outputs"])
    with pytest.raises(QuietvitError, match="needs an example"):
        find_pairs(model)


def test_table_shows_kind_weights_and_heads():
    model, example = build("timm-vit")
    table = str(find_pairs(model, example))
    assert "blocks.0.mlp.fc1.weight" in table
    assert "10 pairs: 4 norm_linear, 4 value_output, 2 mlp" in table
