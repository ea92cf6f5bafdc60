"""Laws of the stand-ins: they equal the composite calls they replace, in every configuration."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quietvit.tracing.standins import attention, multi_head_attention

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("mask", [None, "bool", "float", "causal"])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_equals_scaled_dot_product_attention(mask, scale, key_heads):
    q, k, v = (
        torch.randn(2, 4, 5, 8),
        torch.randn(2, key_heads, 7, 8),
        torch.randn(2, key_heads, 7, 8),
    )
    kwargs = {"scale": scale, "enable_gqa": key_heads != 4, "is_causal": mask == "causal"}
    if mask == "bool":
        kwargs["attn_mask"] = torch.rand(5, 7) > 0.3
    elif mask == "float":
        kwargs["attn_mask"] = torch.randn(2, 1, 5, 7)
    got = attention(q, k, v, **kwargs)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, **kwargs), **CLOSE)


@pytest.mark.parametrize("additive", [False, True])
def test_targets_that_see_nothing_are_zero_as_torchs(additive):
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])
    if additive:
        mask = torch.zeros(3, 3).masked_fill(~mask, -torch.inf)
    got = attention(q, q, q, mask)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, q, q, mask), **CLOSE)
    got.sum().backward()
    assert torch.isfinite(q.grad).all()


def forward_both(module, *inputs, **kwargs):
    """The module's output with torch's composite call, and with the stand-in in its place."""
    expected = module(*inputs, **kwargs)
    original = F.multi_head_attention_forward
    F.multi_head_attention_forward = multi_head_attention
    try:
        got = module(*inputs, **kwargs)
    finally:
        F.multi_head_attention_forward = original
    return got, expected


FLAGS = [False, True]
CASES = [
    case
    for case in itertools.product(
        ["self", "shared", "cross"], FLAGS, FLAGS, [None, "bool", "float", "heads"], FLAGS
    )
    if case[0] != "self" or not case[-1]  # keys of another width cannot be the queries
]


@pytest.mark.parametrize(("inputs", "extra", "batch_first", "mask", "separate"), CASES)
def test_multi_head_attention_equals_torchs(inputs, extra, batch_first, mask, separate):
    sizes = {"kdim": 12, "vdim": 12} if separate else {}
    module = nn.MultiheadAttention(
        16, 4, add_bias_kv=extra, add_zero_attn=extra, batch_first=batch_first, **sizes
    )
    nn.init.normal_(module.in_proj_bias)
    width = 12 if separate else 16
    shape = (2, 5) if batch_first else (5, 2)
    source = (2, 7) if batch_first else (7, 2)
    query = torch.randn(*shape, 16)
    key = query if inputs == "self" else torch.randn(*source, width)
    value = key if inputs != "cross" else torch.randn(*source, width)
    tokens = 5 if inputs == "self" else 7
    masks = {
        None: None,
        "bool": torch.rand(5, tokens) > 0.7,
        "float": torch.randn(5, tokens),
        "heads": torch.randn(8, 5, tokens),
    }
    for weights, average in ((True, True), (True, False), (False, True)):
        got, expected = forward_both(
            module,
            query,
            key,
            value,
            attn_mask=masks[mask],
            need_weights=weights,
            average_attn_weights=average,
        )
        torch.testing.assert_close(got[0], expected[0], **CLOSE)
        if weights:
            torch.testing.assert_close(got[1], expected[1], **CLOSE)
        else:
            assert got[1] is None


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_key_padding_mask_and_attention_mask_add_up(kind):
    module = nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 5, 16)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    if kind == "float":
        padding = torch.zeros(2, 5).masked_fill(padding, -torch.inf)
    mask = torch.randn(5, 5) if kind == "float" else torch.rand(5, 5) > 0.9
    got, expected = forward_both(
        module, x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=False
    )
    torch.testing.assert_close(got[0], expected[0], **CLOSE)


def test_causal_hint_and_unbatched_input():
    module = nn.MultiheadAttention(16, 4)
    x = torch.randn(5, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    got, expected = forward_both(module, x, x, x, attn_mask=mask, is_causal=True)
    torch.testing.assert_close(got[0], expected[0], **CLOSE)
    torch.testing.assert_close(got[1], expected[1], **CLOSE)
    got, expected = forward_both(
        module, x, x, x, attn_mask=mask, is_causal=True, need_weights=False
    )
    torch.testing.assert_close(got[0], expected[0], **CLOSE)


def test_padding_mask_of_one_sequence():
    module = nn.MultiheadAttention(16, 4)
    x = torch.randn(5, 16)
    padding = torch.tensor([False, False, False, True, True])
    got, expected = forward_both(module, x, x, x, key_padding_mask=padding)
    torch.testing.assert_close(got[0], expected[0], **CLOSE)
