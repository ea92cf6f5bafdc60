"""Torch's composite attention functions, rewritten with explicit matrix multiplications.

The trace runs these in place of the composites to see every product; ``record`` records them.
Shape suffixes: B batch, H heads, N target tokens, S source tokens, D head size, E width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute ``F.scaled_dot_product_attention``: softmax(Q Kᵀ · scale + mask) V.

    Shapes: query (..., H, N, D), key and value (..., H or fewer, S, D); returns (..., H, N, D).
    """
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key = key.repeat_interleave(groups, dim=-3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], dim=-3)
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.matmul(query * factor, key.transpose(-2, -1))
    if is_causal:
        shape = (query.shape[-2], key.shape[-2])
        allowed = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(allowed.logical_not(), -torch.inf)
    if attn_mask is None:
        probabilities = F.softmax(scores, dim=-1)
    elif attn_mask.dtype == torch.bool:
        probabilities = _softmax(scores.masked_fill(attn_mask.logical_not(), -torch.inf))
    else:
        probabilities = _softmax(scores + attn_mask)
    if dropout_p > 0.0:
        probabilities = F.dropout(probabilities, dropout_p)
    return torch.matmul(probabilities, value)


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute ``F.multi_head_attention_forward``, the function inside ``nn.MultiheadAttention``.

    Shapes: query (N, B, E) or (N, E), key and value (S, B, E) or (S, E), ``static_k`` and
    ``static_v`` (B * H, S, D). Returns the output, shaped like query, and the attention weights,
    None unless ``need_weights``.
    """
    del embed_dim_to_check
    batched = query.ndim == 3
    same = query is key and key is value
    same_source = key is value
    if not batched:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
    tokens, batch, width = query.shape
    size = width // num_heads
    if use_separate_proj_weight:
        weights = (q_proj_weight, k_proj_weight, v_proj_weight)
        biases: tuple[Tensor | None, ...] = (None, None, None)
        if in_proj_bias is not None:
            biases = in_proj_bias.chunk(3)
        parts = zip((query, key, value), weights, biases, strict=True)
        q, k, v = (F.linear(x, w, b) for x, w, b in parts if w is not None)
    elif same:
        assert in_proj_weight is not None
        packed = F.linear(query, in_proj_weight, in_proj_bias)
        q, k, v = packed.unflatten(-1, (3, width)).unbind(-2)
    else:
        assert in_proj_weight is not None
        weight_q, weight_kv = in_proj_weight.split([width, 2 * width])
        bias_q, bias_kv = (
            (None, None) if in_proj_bias is None else in_proj_bias.split([width, 2 * width])
        )
        q = F.linear(query, weight_q, bias_q)
        if same_source:
            k, v = F.linear(key, weight_kv, bias_kv).unflatten(-1, (2, width)).unbind(-2)
        else:
            weight_k, weight_v = weight_kv.chunk(2)
            bias_k_, bias_v_ = (None, None) if bias_kv is None else bias_kv.chunk(2)
            k, v = F.linear(key, weight_k, bias_k_), F.linear(value, weight_v, bias_v_)
    extra = 0
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.repeat(1, batch, 1)])
        v = torch.cat([v, bias_v.repeat(1, batch, 1)])
        extra += 1
    q_BHND = q.reshape(tokens, batch, num_heads, size).permute(1, 2, 0, 3)
    k_BHSD = (
        _heads(k, batch, num_heads, size)
        if static_k is None
        else static_k.view(batch, num_heads, -1, size)
    )
    v_BHSD = (
        _heads(v, batch, num_heads, size)
        if static_v is None
        else static_v.view(batch, num_heads, -1, size)
    )
    if add_zero_attn:
        zero = torch.zeros(batch, num_heads, 1, size, dtype=k.dtype, device=k.device)
        k_BHSD, v_BHSD = torch.cat([k_BHSD, zero], dim=2), torch.cat([v_BHSD, zero], dim=2)
        extra += 1
    mask = _mask(attn_mask, key_padding_mask, batch, num_heads, extra, query.dtype)
    if mask is None and is_causal and not need_weights:
        keep = torch.ones(tokens, k_BHSD.shape[2], dtype=torch.bool, device=q.device).tril()
        mask = torch.zeros(keep.shape, dtype=q.dtype, device=q.device).masked_fill(
            ~keep, -torch.inf
        )
    scores = torch.matmul(q_BHND * (1.0 / math.sqrt(size)), k_BHSD.transpose(-2, -1))
    if mask is not None:
        scores = scores + mask
    safe = mask is not None and not need_weights
    probabilities = _softmax(scores) if safe else F.softmax(scores, dim=-1)
    if training and dropout_p > 0.0:
        probabilities = F.dropout(probabilities, dropout_p)
    merged = torch.matmul(probabilities, v_BHSD).permute(2, 0, 1, 3).reshape(tokens, batch, width)
    output = F.linear(merged, out_proj_weight, out_proj_bias)
    if not batched:
        output = output.squeeze(1)
    if not need_weights:
        return output, None
    shown = probabilities.mean(dim=1) if average_attn_weights else probabilities
    return output, shown if batched else shown.squeeze(0)


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over sources; as in torch, 0 for a target whose sources are all masked."""
    masked = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return F.softmax(scores.masked_fill(masked, 0.0), dim=-1).masked_fill(masked, 0.0)


def _heads(x: Tensor, batch: int, heads: int, size: int) -> Tensor:
    return x.reshape(x.shape[0], batch, heads, size).permute(1, 2, 0, 3)


def _mask(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    batch: int,
    heads: int,
    extra: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """Combine both masks into an additive one for (B, H, N, S); the last ``extra`` sources pass."""
    masks = []
    for mask, shape in ((attn_mask, None), (key_padding_mask, (batch, 1, 1, -1))):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
        if shape is not None:
            mask = mask.view(shape)
        elif mask.ndim == 3:
            mask = mask.view(batch, heads, *mask.shape[-2:])
        masks.append(F.pad(mask, (0, extra)) if extra else mask)
    if not masks:
        return None
    return masks[0] if len(masks) == 1 else masks[0] + masks[1]


STANDINS: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: attention,
    F.multi_head_attention_forward: multi_head_attention,
}
