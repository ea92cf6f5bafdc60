"""``trace``: what a model multiplies, in which roles, and what feeds what.

The records live in ``sites``; how calls are watched is ``record``'s business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.tracing import labels
from quietvit.tracing.inputs import call, one_sample, refusing
from quietvit.tracing.places import STEADY
from quietvit.tracing.raw import Record
from quietvit.tracing.record import Recorder
from quietvit.tracing.roles import operand_roles, role_of
from quietvit.tracing.sites import Link, Operand, Scores, Site, Trace
from quietvit.tracing.wrappers import eagerly, plain_model


def trace(model: nn.Module, example: Any) -> Trace:
    """Record every matrix multiplication of a forward pass and what stands between them.

    ``example``: images of shape (B, C, H, W), or a tuple or dict of tensors as the model takes
    them, or a list of images (C, H, W) for a model that takes such a list, as detectors do. Only
    the first sample is run. The model runs in eval mode without gradients and is left
    as it was. It runs twice, and the second pass is recorded: a model that computes a table in its
    first pass and keeps it goes another way from then on. ``scaled_dot_product_attention`` and
    ``nn.MultiheadAttention`` are replaced by explicit equals while recording, so that their
    products are sites too.

    Raises QuietvitError where the model does not run on the example.
    """
    model = plain_model(model)
    inputs = one_sample(example)
    checked = partial(refusing, partial(_complaint, model, example))
    with evaluating(model), torch.no_grad(), eagerly():
        with checked():
            call(model, inputs)
        recorder = Recorder(model)
        recorder.mark_inputs(inputs)
        try:
            with checked(), recorder:
                result = call(model, inputs)
        finally:
            unseen = recorder.finish()
    if unseen:
        recorder.opaque("unseen", unseen // 2)
    return _assemble(type(model).__name__, recorder, _tensors(result))


def _complaint(model: nn.Module, example: Any, what: str) -> str:
    """What to say where the model raises over an example."""
    if "Expected gradient function" in what:
        what += (
            " (torch's FlopCounterMode raises this without gradients; trace outside of it, the "
            "trace counts by itself)"
        )
    return (
        f"{type(model).__name__} does not run on the example given (shapes "
        f"{[tuple(x.shape) for x in _tensors(example)]}, the first sample of it): {what}. Give "
        "images as the model takes them, for example torch.randn(1, 3, 224, 224); several "
        "arguments as a tuple, named ones as a dict; a list of images (C, H, W) where the model "
        "takes one."
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode and afterwards every module back into the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _tensors(nested: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_flatten(nested)[0]
    opened = [
        part
        for leaf in leaves
        for part in (vars(leaf).values() if hasattr(leaf, "__dataclass_fields__") else (leaf,))
    ]
    return [leaf for leaf in opened if isinstance(leaf, Tensor)]


def _assemble(model_name: str, recorder: Recorder, results: list[Tensor]) -> Trace:
    records = recorder.records
    by_key = {record.key: record for record in records}
    for record in records:
        for value in record.inputs:
            for source in value.origin:
                by_key[source].feeds.add(record.key)
    roles = {record.key: role_of(record, by_key) for record in records}
    of_operands = {record.key: operand_roles(record, roles, by_key) for record in records}
    names: dict[str, str] = {}
    used: Counter[str] = Counter()
    modules = recorder.leaf_modules
    for record in records:
        base = _name(record, roles[record.key], modules)
        names[record.key] = base if not used[base] else f"{base}#{used[base]}"
        used[base] += 1
    order = {record.key: i for i, record in enumerate(records)}
    sites = []
    for record in records:
        operands = tuple(
            Operand(
                role, shape, tuple(names[k] for k in sorted(value.origin, key=order.__getitem__))
            )
            for role, shape, value in zip(
                of_operands[record.key], record.shapes, record.inputs, strict=True
            )
        )
        sites.append(
            Site(
                name=names[record.key],
                kind=record.kind,
                role=roles[record.key],
                module=record.module,
                function=record.function,
                place=record.place,
                operands=operands,
                output_shape=record.output_shape,
                macs=record.macs,
                weight=record.weight,
                weight_shape=record.weight_shape,
                has_scale=record.has_scale,
                feeds=tuple(names[key] for key in sorted(record.feeds, key=order.__getitem__)),
            )
        )
    links = tuple(
        Link(
            names[link.source],
            names[link.consumer],
            tuple(torch.where(link.columns < 0, -1, link.columns % labels.HEAD).tolist()),
            tuple(torch.where(link.columns < 0, -1, link.columns // labels.HEAD - 1).tolist()),
            _steps(link.through),
            link.partial,
            tuple(
                names[step.partition(labels.AT)[2]] for step in link.through if labels.AT in step
            ),
        )
        for link in recorder.links
    )
    scores = tuple(
        Scores(
            names[score.site],
            names[score.query],
            names[score.key],
            tuple((tuple(q.tolist()), tuple(k.tolist())) for q, k in score.heads),
            _steps(score.through),
        )
        for score in recorder.scores
        if roles[score.site] == "query_key"
    )
    counts = {family: recorder.places.counts[family] for family in sorted(STEADY)}
    leaving = {key for result in results for key in recorder.value(result).origin}
    outputs = tuple(names[key] for key in sorted(leaving, key=order.__getitem__))
    return Trace(model_name, tuple(sites), links, scores, counts, outputs)


def _steps(through: tuple[str, ...]) -> tuple[str, ...]:
    """What stands between, without the sites that say where."""
    return tuple(dict.fromkeys(step.partition(labels.AT)[0] for step in through))


def _name(record: Record, role: str, leaf_modules: frozenset[str]) -> str:
    if record.parameter is not None:
        return record.parameter.removesuffix(".weight")
    if record.module in leaf_modules:
        return record.module
    own = {"query_key": "query_key", "attention_value": "attention_value"}
    label = own.get(role, record.function if record.kind == "opaque" else record.kind)
    return f"{record.module}.{label}" if record.module else label
