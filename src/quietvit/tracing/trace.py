"""``trace``: a model's operations, their roles, and what feeds what.

``sites`` holds the public records; ``record`` observes the calls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.outputs import tensors_of
from quietvit.tracing import labels
from quietvit.tracing.inputs import call, is_image_list, one_sample, refusing
from quietvit.tracing.places import STEADY
from quietvit.tracing.raw import Record
from quietvit.tracing.record import Recorder
from quietvit.tracing.residual import residual_blocks
from quietvit.tracing.roles import operand_roles, role_of
from quietvit.tracing.sites import Link, Operand, Scores, Site, Trace
from quietvit.tracing.wrappers import eagerly, plain_model


def trace(model: nn.Module, example: Any) -> Trace:
    """Record every matrix multiplication of a forward pass and the operations between them.

    ``example``: images (B, C, H, W); a tuple or dict of the model's arguments; or a list of images
    (C, H, W) for a detector. Only the first sample is run.

    The model runs in eval mode without gradients and is left unchanged. It runs twice, and the
    second pass is recorded, because some models compute and keep a table in their first pass.
    ``scaled_dot_product_attention`` and ``nn.MultiheadAttention`` are replaced by explicit products
    while recording, so that each product is a site.

    Raises QuietvitError if the model does not run on the example.
    """
    return _traced(model, example, partial(_complaint, plain_model(model), example))


def trace_images(model: nn.Module, images: Any, remedy: str) -> Trace:
    """Record the model like ``trace``, for a caller that takes data and chooses the example itself.

    ``images``: what the caller passes to the model, a tensor or a dict of tensors. ``remedy``: the
    sentences that end the error of a model that does not run on them.
    """
    shapes = (
        {key: tuple(value.shape) for key, value in images.items()}
        if isinstance(images, Mapping)
        else tuple(images.shape)
    )
    name = type(plain_model(model)).__name__
    return _traced(
        model,
        images,
        lambda what: f"{name} does not run on images of shape {shapes} ({what}). {remedy}",
    )


def _traced(model: nn.Module, example: Any, complaint: Callable[[str], str]) -> Trace:
    model = plain_model(model)
    inputs = one_sample(example)
    checked = partial(refusing, complaint)
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
    for tensor in _beside_boxes(result):
        for key in recorder.value(tensor).origin:
            recorder.by_key[key].found = True
    return _assemble(type(model).__name__, recorder, _tensors(result))


def _complaint(model: nn.Module, example: Any, what: str) -> str:
    """Return the message for a model that raises ``what`` on the example."""
    if "Expected gradient function" in what:
        what += (
            " (torch's FlopCounterMode raises this without gradients; trace outside of it, the "
            "trace counts by itself)"
        )
    return (
        f"{type(model).__name__} does not run on the first sample of the example (shapes "
        f"{[tuple(x.shape) for x in _tensors(example)]}): {what}. {_remedy(example)}"
    )


def _remedy(example: Any) -> str:
    """Return what to give instead of an example on which a model does not run."""
    if is_image_list(example):
        return (
            "A list of images (C, H, W) is one argument, as detectors take it. Give other models a "
            "batch: torch.stack(images)."
        )
    if isinstance(example, Tensor) and example.ndim == 3:
        return "Give a batch (B, C, H, W). For a single image, add the dimension: image[None]."
    return (
        "Give images that the model accepts, for example torch.randn(1, 3, 224, 224). Give several "
        "arguments as a tuple, keyword arguments as a dict, and a detector's images as a list of "
        "(C, H, W)."
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode inside ``with``; afterwards restore the mode of each module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _tensors(nested: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_flatten(nested)[0]
    return [tensor for leaf in leaves for tensor in tensors_of(leaf).values()]


def _beside_boxes(result: Any) -> list[Tensor]:
    """Return the tensors of each mapping with boxes, as torchvision's detectors return them."""

    def has_boxes(nested: Any) -> bool:
        return isinstance(nested, Mapping) and "boxes" in nested

    leaves = torch.utils._pytree.tree_leaves(result, is_leaf=has_boxes)
    return [tensor for leaf in leaves if has_boxes(leaf) for tensor in _tensors(dict(leaf))]


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
    blocks = residual_blocks(records, recorder.calls)
    return Trace(model_name, tuple(sites), links, scores, counts, outputs, blocks)


def _steps(through: tuple[str, ...]) -> tuple[str, ...]:
    """Return the steps without their sites: "batch_norm@norm:0:3" gives "batch_norm"."""
    return tuple(dict.fromkeys(step.partition(labels.AT)[0] for step in through))


def _name(record: Record, role: str, leaf_modules: frozenset[str]) -> str:
    if record.parameter is not None:
        return record.parameter.removesuffix(".weight")
    if record.module in leaf_modules:
        return record.module
    own = {"query_key": "query_key", "attention_value": "attention_value"}
    label = own.get(role, record.function if record.kind == "opaque" else record.kind)
    return f"{record.module}.{label}" if record.module else label
