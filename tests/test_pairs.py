"""Laws of the pairs: a row of the first matrix is what reaches the column of the second."""

from __future__ import annotations

import copy
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
    "timm-vit": {"norm_linear": 4, "value_output": 4, "mlp": 2, "query_key": 4},
    "timm-deit-distilled": {"norm_linear": 4, "value_output": 4, "mlp": 2, "query_key": 4},
    "timm-swin": {"norm_linear": 9, "value_output": 12, "mlp": 4, "query_key": 12},
    "timm-beit": {"norm_linear": 4, "value_output": 4, "mlp": 2, "query_key": 4},
    "timm-eva-swiglu": {"norm_linear": 4, "value_output": 4, "gated_mlp": 4},
    "timm-dinov2-layerscale": {"norm_linear": 4, "value_output": 4, "mlp": 2, "query_key": 4},
    "timm-hybrid": {"norm_linear": 4, "value_output": 4, "mlp": 2, "query_key": 4},
    "hf-vit": {"norm_linear": 8, "value_output": 8, "mlp": 2, "query_key": 8},
    "hf-dinov2": {"norm_linear": 8, "value_output": 8, "mlp": 2, "query_key": 8},
    "hf-swin": {"norm_linear": 17, "value_output": 12, "mlp": 4, "query_key": 12},
    "hf-siglip": {"norm_linear": 10, "value_output": 12, "mlp": 3, "query_key": 8},
    "hf-yolos": {"norm_linear": 10, "value_output": 8, "mlp": 4, "query_key": 8},
    "tv-vit": {"norm_linear": 4, "value_output": 4, "mlp": 2, "query_key": 4},
    "tv-swin": {"norm_linear": 9, "value_output": 12, "mlp": 4, "query_key": 12},
    "nn-encoder-pre-norm": {"norm_linear": 4, "value_output": 8, "mlp": 2, "query_key": 8},
    "nn-encoder-post-norm": {"norm_linear": 3, "value_output": 8, "mlp": 2, "query_key": 8},
}


@pytest.mark.parametrize("name", COUNTS)
def test_kinds_and_numbers_of_pairs(name):
    model, example = build(name)
    pairs = find_pairs(model, example, kinds=KINDS)
    assert Counter(pair.kind for pair in pairs) == COUNTS[name]
    assert len(set(pairs)) == len(pairs)


def silence(model, view, row):
    """Make channel ``row`` of a view's matrix exactly zero, its bias with it."""
    module = model.get_submodule(view.module)
    parameter = view.parameter(model)
    with torch.no_grad():
        hit = torch.zeros_like(parameter)
        entries = torch.zeros_like(view.select(parameter))
        entries[row] = 1
        view.scatter_add_(hit, entries)
        parameter[hit > 0] = 0
        channels = hit.flatten(1).any(1) if hit.ndim > 1 else hit > 0
        for attribute in (view.attribute.replace("weight", "bias"), "v_bias"):
            bias = getattr(module, attribute, None)
            if bias is None and attribute == "v_bias":  # beside a packed weight, one level up
                bias = getattr(model.get_submodule(view.module.rpartition(".")[0]), "v_bias", None)
            if isinstance(bias, torch.Tensor):
                bias[channels[-len(bias) :]] = 0


@pytest.mark.parametrize("name", COUNTS)
def test_silencing_a_row_of_the_first_silences_that_column_of_the_second_alone(name):
    model, example = build(name)
    traced = quietvit.trace(model, example)
    pairs = find_pairs(model, trace=traced, kinds=KINDS[:4])
    seen = {}

    def handler(site, operands, run):
        if site.kind == "linear" and site.weight is not None:
            seen.setdefault(site.weight, []).append(operands[0])
        return run(*operands)

    for number, pair in enumerate(pairs):
        broken = copy.deepcopy(model)
        row = (7 * number) % pair.first.read(model).shape[0]
        silence(broken, pair.first, row)
        seen.clear()
        with torch.no_grad(), intercept(traced, handler):
            call(broken, example)
        consumer = next(
            view
            for view in seen
            if view.parameter_name == pair.second.parameter_name
            and (view.rows == pair.second.rows or pair.second.rows is None)
        )
        columns = pair.second.cols
        column = row if columns is None else columns[row]
        read = torch.cat([x.flatten(0, -2) for x in seen[consumer]])
        heard = read.abs().amax(0) > 0
        assert not heard[column], f"{pair.name}: row {row} still reaches column {column}"
        others = [c for c in (columns or range(read.shape[1])) if c != column]
        assert heard[others].float().mean() > 0.3, pair.name  # a ReLU may be silent


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
    assert {pair.kind for pair in pairs} == {"value_output"}
    assert "a norm stands between" in str(pairs)


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
    assert "6 pairs: 4 value_output, 2 mlp" in table
