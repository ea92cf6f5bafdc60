"""Channel labels: which output channel of which site each entry of a tensor carries.

A call that moves entries is replayed on the labels with the same arguments, so no layout is known
by name. Example: q, k, v = qkv(x).reshape(B, N, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0) gives v
of shape (B, H, N, D). Its labels have the same shape, and entry (b, h, n, d) is 2 H D + h D + d,
the row of the qkv weight that computed it. Pure functions of labels; models are in ``record``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

NONE = -1  # the entry carries no channel, for example a class token beside patches
MIXED = -2  # the entry is a sum of several channels, for example after a rotary embedding
AT = "@"  # the step "batch_norm@site" names the site where it happened
HEAD = 1 << 32  # behind attention a label is channel + HEAD * (head + 1); before it, channel alone


@dataclass(frozen=True)
class Flow:
    """Labels of one source in one tensor (same shape), and the steps between the two."""

    labels: Tensor
    through: tuple[str, ...] = ()

    def via(self, step: str) -> Flow:
        return self if step in self.through else replace(self, through=(*self.through, step))


@dataclass(frozen=True)
class Value:
    """What the trace knows about a tensor.

    ``depends``: whether it depends on the model's input. ``origin``: the last sites before it.
    ``flows``: source -> labels. ``parameter``: (name, flat indices) if it is part of a parameter.
    ``probability``: "pure" behind a softmax, "mixed" if a matrix has acted since.
    """

    depends: bool = False
    origin: frozenset[str] = frozenset()
    flows: Mapping[str, Flow] = field(default_factory=dict)
    parameter: tuple[str, Tensor] | None = None
    probability: str | None = None


CONSTANT = Value()


def start(shape: Sequence[int], channel_dim: int, device: torch.device) -> Flow:
    """Return the labels of a new source: i for channel i along ``channel_dim``."""
    view = [1] * len(shape)
    view[channel_dim] = shape[channel_dim]
    channels = torch.arange(shape[channel_dim], device=device).view(view)
    return Flow(channels.expand(tuple(shape)))


def merge(values: Sequence[Value]) -> Value:
    """Return what an output inherits from all its inputs: all but flows and parameter."""
    kinds = {value.probability for value in values if value.depends}
    probability = "mixed" if "mixed" in kinds else ("pure" if "pure" in kinds else None)
    return Value(
        depends=any(value.depends for value in values),
        origin=frozenset().union(*(value.origin for value in values)),
        probability=probability,
    )


def move(value: Value, replay: Callable[[Tensor], Any]) -> list[Value]:
    """Return the outputs of a function that moves entries; ``replay`` runs it on labels."""
    moved = {source: _as_list(replay(flow.labels)) for source, flow in value.flows.items()}
    entries = _as_list(replay(value.parameter[1])) if value.parameter else None
    count = max((len(parts) for parts in [*moved.values(), entries or []]), default=0)
    outputs = []
    for i in range(count):
        flows = {s: replace(value.flows[s], labels=parts[i]) for s, parts in moved.items()}
        parameter = (value.parameter[0], entries[i]) if value.parameter and entries else None
        outputs.append(replace(value, flows=flows, parameter=parameter))
    return outputs


def join(values: Sequence[Value], tensors: Sequence[Tensor], replay: Callable[[Any], Any]) -> Value:
    """Return the value of a concatenation or stack; parts without a source get NONE."""
    flows = {}
    for source in dict.fromkeys(s for value in values for s in value.flows):
        parts = [
            value.flows[source].labels
            if source in value.flows
            else torch.full(tensor.shape, NONE, device=tensor.device)
            for value, tensor in zip(values, tensors, strict=True)
        ]
        through = [v.flows[source].through for v in values if source in v.flows]
        steps = tuple(dict.fromkeys(step for steps in through for step in steps))
        flows[source] = Flow(replay(parts), steps)
    return replace(merge(values), flows=flows)


def combine(
    values: Sequence[Value], shapes: Sequence[Sequence[int]], output: Sequence[int], adding: bool
) -> Value:
    """Return the value of an elementwise function of several tensors.

    A product keeps the channels of every factor. A sum keeps a channel only if all terms carry it.
    If both factors carry different channels of one source (a packed gated MLP), the source is kept
    once for each factor, as "source", "source|1", ...

    Steps that are added to ``through``:

    - "gate": a product of two tensors that depend on the input;
    - "pooled": a factor of such a product that is broadcast (the gate of squeeze-and-excitation);
    - "offset": a constant is added;
    - "scale": a parameter is a factor; "factor": another constant is;
    - "branches": the terms of a sum passed different BatchNorms;
    - "beside": the terms of a sum passed different depthwise convolutions.
    """
    dependent = [value for value in values if value.depends]
    flows: dict[str, Flow] = {}
    scaled = any(value.parameter is not None for value in values)
    fixed = len(dependent) < len(values)
    for source in dict.fromkeys(s for value in dependent for s in value.flows):
        carriers = [value.flows[source] for value in dependent if source in value.flows]
        if adding and len(carriers) < len(dependent):
            continue
        wide = [_broadcast(flow.labels, output) for flow in carriers]
        distinct: list[Flow] = []
        for labels, flow in zip(wide, carriers, strict=True):
            if labels is None:
                continue
            pooled = not adding and len(dependent) > 1 and flow.labels.shape != tuple(output)
            flow = flow.via("pooled") if pooled else flow
            twin = next((f for f in distinct if _same_channels(f.labels, labels, adding)), None)
            if twin is None:
                distinct.append(replace(flow, labels=labels))
            else:
                steps = _all_steps((twin, flow))
                if adding and _taken(twin, "batch_norm") != _taken(flow, "batch_norm"):
                    steps = (*steps, "branches")
                if adding and _taken(twin, "depthwise") != _taken(flow, "depthwise"):
                    steps = (*steps, "beside")
                both = Flow(torch.maximum(twin.labels, labels), steps)
                distinct = [both if f is twin else f for f in distinct]
        if adding and (len(distinct) > 1 or any(labels is None for labels in wide)):
            # Channel 0 + channel 32 (rotary embedding) is neither of the two.
            mixed = torch.full((1,) * len(output), MIXED, device=carriers[0].labels.device)
            flows[source] = Flow(mixed.expand(tuple(output)), _all_steps(carriers))
            continue
        for part, flow in enumerate(distinct):
            if adding:
                flow = flow.via("offset") if fixed else flow
            else:
                flow = flow.via("gate") if len(dependent) > 1 else flow
                flow = flow.via("scale" if scaled else "factor") if fixed else flow
            flows[source if part == 0 else f"{source}|{part}"] = flow
    return replace(merge(values), flows=flows)


def _same_channels(one: Tensor, other: Tensor, adding: bool) -> bool:
    """Whether two tensors carry the same channels.

    In a sum, only one of them may have head numbers. Example: V behind attention, plus V behind a
    depthwise convolution beside the attention.
    """
    if torch.equal(one, other):
        return True
    if not adding or bool(((one < 0) != (other < 0)).any()):
        return False
    headless = bool((one < HEAD).all()) or bool((other < HEAD).all())
    return headless and torch.equal(_channel(one), _channel(other))


def _channel(labels: Tensor) -> Tensor:
    return torch.where(labels < 0, labels, labels % HEAD)


def _all_steps(flows: Sequence[Flow]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(step for flow in flows for step in flow.through))


def _taken(flow: Flow, kind: str) -> set[str]:
    return {step for step in flow.through if step.startswith(kind + AT)}


def reduce(value: Value, dims: Sequence[int], keepdim: bool) -> Value:
    """Return the value of a mean or sum over ``dims``; drop flows whose channels it mixes."""
    flows = {}
    for source, flow in value.flows.items():
        labels = flow.labels
        for dim in sorted((d % labels.ndim for d in dims), reverse=True):
            constant = collapse(labels, dim)
            if constant is None:
                break
            labels = constant if keepdim else constant.squeeze(dim)
        else:
            flows[source] = replace(flow, labels=labels)
    return replace(value, flows=flows, parameter=None)


def collapse(labels: Tensor, dim: int) -> Tensor | None:
    """Return labels with ``dim`` of size 1 if all along it agree (or are NONE), else None."""
    top = labels.amax(dim, keepdim=True)
    return top if bool(((labels == top) | (labels == NONE)).all()) else None


def columns(labels: Tensor, channel_dim: int) -> Tensor | None:
    """Return the label of each channel, (channels,), if all other positions agree, else None."""
    flat = labels.movedim(channel_dim, -1).reshape(-1, labels.shape[channel_dim])
    agreed = collapse(flat, 0)
    return None if agreed is None or bool((agreed < 0).all()) else agreed[0]


def spread(flows: Mapping[str, Flow], channel_dim: int, output: Sequence[int]) -> dict[str, Flow]:
    """Return the flows through a depthwise filter, which mixes positions within each channel.

    The dims behind ``channel_dim`` are positions: labels (B, C, H, W) become constant along H and
    W. The dims in front stay, because heads may be folded into the batch. A flow is dropped if one
    channel of the filter holds several channels of the source.
    """
    spreading = {}
    for source, flow in flows.items():
        kept: Tensor | None = flow.labels
        for dim in range(channel_dim % len(output) + 1, len(output)):
            kept = None if kept is None else collapse(kept, dim)
        wide = None if kept is None else _broadcast(kept, output)
        if wide is not None:
            spreading[source] = replace(flow, labels=wide)
    return spreading


def pool(value: Value, dims: Sequence[int], output: Sequence[int]) -> Value:
    """Return the value of a pooling over ``dims``; drop flows whose channels it mixes."""
    kept = reduce(value, dims, keepdim=True)
    wide = {source: _broadcast(flow.labels, output) for source, flow in kept.flows.items()}
    flows = {s: replace(kept.flows[s], labels=w) for s, w in wide.items() if w is not None}
    return replace(kept, flows=flows)


def arrange(value: Value, own: str, groups: Sequence[str]) -> Value:
    """Permute and merge the dims of a value, which ``own`` names by one letter each.

    Letters of the first group stay separate dims (the batch of a matrix product). Each other group
    becomes one dim. Example: "bnhd" with groups ("bh", "n", "d") becomes (b, h, n, d).
    """
    order = [own.index(letter) for group in groups for letter in group]
    flows = {}
    for source, flow in value.flows.items():
        moved = flow.labels.permute(order)
        shape = list(moved.shape[: len(groups[0])])
        start = len(shape)
        for group in groups[1:]:
            shape.append(math.prod(moved.shape[start : start + len(group)]))
            start += len(group)
        flows[source] = replace(flow, labels=moved.reshape(shape))
    return replace(value, flows=flows)


def through_matmul(left: Value, right: Value, output: Sequence[int]) -> dict[str, Flow]:
    """Return the flows of left @ right: the columns of ``right`` and the rows of ``left``.

    A flow survives if its labels are constant along the contracted dim. Example: probabilities
    (B, H, N, N) times V (B, H, N, D) average over tokens, so the channels of V survive. Their
    labels then hold the head h too. A source that reaches both sides is kept once for each.
    """
    flows: dict[str, Flow] = {}
    for value, other, contracted, batch_first in (
        (right, left, -2, (0, slice(None))),
        (left, right, -1, (slice(None), 0)),
    ):
        for source, flow in value.flows.items():
            constant = collapse(flow.labels, contracted) if flow.labels.ndim >= 2 else None
            if constant is None and other.probability is not None:
                mixed = _through_channels(flow, contracted, output, other.probability)
                flows |= {} if mixed is None else {source: mixed}
            wide = None if constant is None else _broadcast(constant, output)
            if constant is None or wide is None:
                continue
            name = f"{source}|left" if source in flows else source
            if other.probability is None:
                flows[name] = Flow(wide, flow.through).via("matmul")
                continue
            heads = _broadcast(_heads(constant[(..., *batch_first)]), output, batch_first)
            if heads is None:
                continue
            # Channel 70 in head 1 becomes 70 + HEAD * 2: the 1 is added because 0 means no head.
            named = torch.where(wide < 0, wide, wide % HEAD + HEAD * (heads + 1))
            steps = ("mixed_heads",) if other.probability == "mixed" else ()
            flows[name] = Flow(named, (*flow.through, *steps, "attention"))
    return flows


def _through_channels(
    flow: Flow, contracted: int, output: Sequence[int], probability: str
) -> Flow | None:
    """Return the flow of values whose channels attention averages (XCA); None for other values.

    Example: probabilities (B, H, D, D) times V (B, H, D, N). Each output channel is a mean of its
    head's channels and keeps the label of the channel at its place.
    """
    tokens = -3 - contracted  # the other one of the last two dims
    channels = collapse(flow.labels, tokens)
    if channels is None or flow.labels.shape != tuple(output) or bool((channels < 0).any()):
        return None
    heads = _heads(channels.squeeze(tokens))
    named = flow.labels % HEAD + HEAD * (heads + 1)[..., None, None]
    steps = ("mixed_heads",) if probability == "mixed" else ()
    return Flow(named, (*flow.through, *steps, "channel_attention"))


Heads = list[tuple[Tensor, Tensor]]


def score_channels(left: Value, right: Value) -> list[tuple[str, str, Heads, tuple[str, ...]]]:
    """Return (query source, key source, heads, steps) for each two sources that meet in Q @ Kᵀ.

    ``heads`` holds, for each head, the channels of Q and of K that multiply, each (D,). ``steps``
    are those between either source and the product.
    """
    meetings = []
    for query, q_flow in left.flows.items():
        for key, k_flow in right.flows.items():
            q, k = collapse(q_flow.labels, -2), collapse(k_flow.labels, -1)
            if q is None or k is None:
                continue
            q, k = torch.broadcast_tensors(q.squeeze(-2), k.squeeze(-1))
            if bool((q < 0).any()) or bool((k < 0).any()):
                continue
            both = torch.stack([q % HEAD, k % HEAD], dim=-2).reshape(-1, 2, q.shape[-1])
            heads = torch.unique(both, dim=0)  # images and windows repeat the same heads
            through = tuple(dict.fromkeys((*q_flow.through, *k_flow.through)))
            meetings.append((query, key, [(head[0], head[1]) for head in heads], through))
    return meetings


def _heads(labels: Tensor) -> Tensor:
    """Number the heads of labels (..., D): positions with the same first channel are one head."""
    first = labels[..., 0]
    _, inverse = torch.unique(first, return_inverse=True)
    return inverse


def _broadcast(labels: Tensor, shape: Sequence[int], keep: Any = None) -> Tensor | None:
    if keep is not None:
        labels = labels[..., None, None]
    try:
        return labels.expand(tuple(shape)) if labels.shape != tuple(shape) else labels
    except RuntimeError:
        return None


def _as_list(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)
