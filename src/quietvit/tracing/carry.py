"""Propagate channel labels through calls that are not sites, such as ``reshape`` or ``cat``.

Pure functions of values. ``record`` decides which calls are sites and handles them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from quietvit.tracing import labels, ops
from quietvit.tracing.labels import Value

Descends = Callable[[frozenset[str], str], bool]


def carried(
    func: Any,
    name: str,
    args: Any,
    kwargs: Any,
    outputs: list[Tensor],
    tensors: list[Tensor],
    values: list[Value],
    descends: Descends,
) -> list[Value]:
    """Return the values of a call's outputs, given its input tensors and their values.

    ``descends(origin, source)``: whether one of the sites ``origin`` is computed from ``source``.
    """
    if name in ops.FRESH:
        return [labels.CONSTANT] * len(outputs)
    rest = [labels.merge(values)] * len(outputs)
    if not tensors or not any(value.flows or value.parameter for value in values):
        return rest
    if name in ops.MOVING or func in ops.MOVING_PROPERTIES:
        moved = _moved(func, args, kwargs, tensors[0], values[0], outputs)
        # table[index]: the entries are constant, but the input selects them.
        chosen = name in ops.CHOOSING and not values[0].depends and rest[0].depends
        if moved is None or chosen:
            return rest
        return moved
    if name == "pad" and (args[2:3] or (kwargs.get("mode", "constant"),))[0] == "constant":
        width = args[1] if len(args) > 1 else kwargs["pad"]
        return labels.move(
            values[0], lambda x: torch.nn.functional.pad(x, width, value=labels.NONE)
        )
    if name in ops.JOINING and args and "out" not in kwargs:
        return [labels.join(values, tensors, lambda parts: func(parts, *args[1:], **kwargs))]
    if name in ops.REDUCING and len(outputs) == 1:
        reduced = _reduced(name, args, kwargs, values[0], outputs[0])
        if name == "sum":
            flows = {source: flow.via("summed") for source, flow in reduced.flows.items()}
            reduced = replace(reduced, flows=flows)
        return [reduced]
    if (name in ops.CASTING or func in ops.CASTING_PROPERTIES) and len(outputs) == 1:
        return [values[0]]
    if name in ops.ELEMENTWISE and len(outputs) == 1:
        floating = [
            (value, tuple(tensor.shape))
            for value, tensor in zip(values, tensors, strict=True)
            if tensor.is_floating_point() or tensor.is_complex()
        ]
        if not floating:
            return rest
        adding = name in ops.ADDING
        kept, shapes = [v for v, _ in floating], [s for _, s in floating]
        if len(floating) == 1 and shapes[0] == tuple(outputs[0].shape):
            combined = replace(kept[0], parameter=None)
        else:
            combined = labels.combine(kept, shapes, outputs[0].shape, adding)
        bent = [name.strip("_")] if name in ops.BENDING else []
        if len(floating) == 1 and not bent:  # the other operand is a number or a mask
            bent = ["offset" if adding else "factor"]
        flows = {}
        for source, flow in combined.flows.items():
            for step in (*bent, *_mixing_gate(source, kept, adding, descends)):
                flow = flow.via(step)
            flows[source] = flow
        return [replace(combined, flows=flows)]
    return rest


def _mixing_gate(
    source: str, factors: Sequence[Value], adding: bool, descends: Descends
) -> list[str]:
    """Return ["mixing_gate"] if a factor of the product is computed from all of ``source``."""
    own = base(source)
    others = [v for v in factors if v.depends and own not in {*map(base, v.flows)}]
    mixing = not adding and any(descends(value.origin, own) for value in others)
    return ["mixing_gate"] if mixing else []


def _unfold(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run ``F.unfold`` on labels; padding gets the label NONE."""
    # unfold pads with 0: shift the labels so that 0 means NONE.
    return F.unfold((input - labels.NONE).double(), *args, **kwargs).long() + labels.NONE


def _fold(input: Tensor, output_size: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Run ``F.fold`` on labels: overlapping windows keep equal labels, others become MIXED."""
    entries = input.double()

    def fold(x: Tensor) -> Tensor:
        return F.fold(x, output_size, *args, **kwargs)

    counts = fold(torch.ones_like(entries))
    mean = fold(entries) / counts.clamp(min=1)
    differs = fold((F.unfold(mean, *args, **kwargs) != entries).double()) > 0
    agreed = torch.where(differs, labels.MIXED, mean.long())
    return torch.where(counts == 0, labels.NONE, agreed)


_WINDOWS = {F.unfold: _unfold, F.fold: _fold}  # torch's own do not accept integers


def _moved(
    func: Any, args: Any, kwargs: Any, tensor: Tensor, value: Value, outputs: list[Tensor]
) -> list[Value] | None:
    """Run a function that moves entries on the labels; None if the result is not usable."""
    func = _WINDOWS.get(func, func)

    def replay(moving: Tensor) -> Any:
        moving = moving.contiguous()
        new_args, new_kwargs = tree_map(
            lambda leaf: moving if leaf is tensor else leaf, (args, kwargs)
        )
        return func(*new_args, **new_kwargs)

    try:
        moved = labels.move(value, replay)
    except (RuntimeError, TypeError, IndexError):
        return None
    flows = [flow.labels for piece in moved for flow in piece.flows.values()]
    if len(moved) != len(outputs) or any(entry.dtype != torch.long for entry in flows):
        return None
    same = (
        flow.labels.shape == output.shape
        for piece, output in zip(moved, outputs, strict=True)
        for flow in piece.flows.values()
    )
    return moved if all(same) else None


def _reduced(name: str, args: Any, kwargs: Any, value: Value, output: Tensor) -> Value:
    if name in ops.POOLING:
        return labels.pool(value, range(-ops.POOLING[name], 0), output.shape)
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    if dims is None or isinstance(dims, torch.dtype):
        return labels.merge([value])
    dims = (dims,) if isinstance(dims, int) else tuple(dims)
    keepdim = bool(args[2] if len(args) > 2 else kwargs.get("keepdim", False))
    return labels.reduce(value, dims, keepdim)


def base(source: str) -> str:
    """Return the site of a source: "matmul:0:3|1" (see ``labels.combine``) gives "matmul:0:3"."""
    return source.partition("|")[0]
