"""``trace``: what a model multiplies, in which roles, and what feeds what.

The public records live here; how calls are watched is ``record``'s business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError, nearest
from quietvit.tracing import labels
from quietvit.tracing.inputs import call, one_sample, refusing
from quietvit.tracing.ops import FAMILIES
from quietvit.tracing.record import Record, Recorder
from quietvit.tracing.weights import WeightView
from quietvit.tracing.wrappers import eagerly, plain_model


@dataclass(frozen=True)
class Operand:
    """One activation that enters a site: role, shape at batch 1, and the sites it comes from."""

    role: str
    shape: tuple[int, ...]
    fed_by: tuple[str, ...]


@dataclass(frozen=True)
class Site:
    """One operation of a forward pass.

    ``kind``: linear, conv, matmul, einsum, softmax, norm, activation, add, or opaque (a product
    inside a function that cannot be taken apart). ``role``: what the site is in the transformer:
    patch_embed, post_norm, post_gelu, post_activation, attention_output, residual, head, constant
    (does not depend on the input) or other for weights; query_key, attention_value or other for
    products of activations. ``macs`` counts multiply-accumulates at batch 1. ``ordinal`` is the
    place among the calls of its family, the same in every pass. ``has_scale``: a BatchNorm with
    stored statistics, which multiplies each channel by a factor of its own.
    """

    name: str
    kind: str
    role: str
    module: str
    function: str
    ordinal: int
    operands: tuple[Operand, ...]
    output_shape: tuple[int, ...]
    macs: int
    weight: WeightView | None = None
    weight_shape: tuple[int, ...] | None = None
    feeds: tuple[str, ...] = ()
    has_scale: bool = False


@dataclass(frozen=True)
class Link:
    """Output channels of ``source`` that arrive at the input columns of ``consumer``.

    ``channels[j]`` is the channel that column j carries, -1 for none; ``heads[j]`` its attention
    head, -1 where no attention lies between. ``through`` names what stands between. ``partial``:
    some positions carry no channel, as padding or a class token joined on the way. ``scales``: the
    BatchNorms and depthwise convolutions between, in order.
    """

    source: str
    consumer: str
    channels: tuple[int, ...]
    heads: tuple[int, ...]
    through: tuple[str, ...]
    partial: bool = False
    scales: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scores:
    """Output channels of ``query`` and ``key`` that meet at ``site``: one (rows, rows) a head.

    ``through`` names what stands between either of them and the scores.
    """

    site: str
    query: str
    key: str
    heads: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    through: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trace:
    """All sites of one forward pass in order, and how channels flow between them.

    ``outputs``: the sites whose values leave the model as they are, or as functions that are no
    sites made them.
    """

    model_name: str
    sites: tuple[Site, ...]
    links: tuple[Link, ...]
    scores: tuple[Scores, ...]
    counts: dict[str, int]
    outputs: tuple[str, ...] = ()

    @property
    def matmuls(self) -> tuple[Site, ...]:
        """Every site that multiplies matrices, opaque ones included."""
        return tuple(site for site in self.sites if site.macs > 0)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image, as torch's FlopCounterMode counts them (halved).

        Products with a lone vector count nothing.
        """
        return sum(site.macs for site in self.sites)

    def __getitem__(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        known = [site.name for site in self.sites]
        raise QuietvitError(f"{self.model_name} has no site {name!r}{nearest(name, known)}.")

    def __repr__(self) -> str:
        sites, macs = len(self.sites), self.macs / 1e6
        return f"Trace({self.model_name}, {sites} sites, {macs:.2f} MMACs an image)"

    def __str__(self) -> str:
        rows = [
            (site.name, site.kind, site.role, "x".join(map(str, site.output_shape)), site.macs)
            for site in self.sites
        ]
        width = max((len(row[0]) for row in rows), default=4)
        lines = [f"{'site':<{width}}  {'kind':<10} {'role':<16} {'output':<16} {'MMACs':>9}"]
        lines += [
            f"{n:<{width}}  {k:<10} {r:<16} {s:<16} {m / 1e6:>9.2f}" for n, k, r, s, m in rows
        ]
        lines.append(f"{len(self.matmuls)} matrix products, {self.macs / 1e6:.1f} MMACs an image")
        return "\n".join(lines)


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
    roles = {record.key: _role(record, by_key) for record in records}
    operand_roles = {record.key: _operand_roles(record, roles, by_key) for record in records}
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
                operand_roles[record.key], record.shapes, record.inputs, strict=True
            )
        )
        sites.append(
            Site(
                name=names[record.key],
                kind=record.kind,
                role=roles[record.key],
                module=record.module,
                function=record.function,
                ordinal=record.ordinal,
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
    counts = {family: recorder.counters[family] for family in sorted(set(FAMILIES.values()))}
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


def _reaches_softmax(record: Record, by_key: dict[str, Record], depth: int = 4) -> bool:
    """Whether scores lead to a softmax, perhaps through layers that mix heads."""
    for key in record.feeds:
        fed = by_key[key]
        if fed.kind == "softmax":
            return True
        between = ("linear", "conv", "norm", "add", "activation")
        if depth and fed.kind in between and _reaches_softmax(fed, by_key, depth - 1):
            return True
    return False


def _role(record: Record, by_key: dict[str, Record]) -> str:
    if record.kind in ("matmul", "einsum"):
        probabilities = [value.probability is not None for value in record.inputs]
        if not any(value.depends for value in record.inputs):
            return "constant"
        if any(probabilities):
            return "attention_value"
        flowing = all(value.depends or value.origin for value in record.inputs)
        return "query_key" if flowing and _reaches_softmax(record, by_key) else "other"
    if record.kind not in ("linear", "conv"):
        return record.kind
    if not record.inputs[0].depends:
        return "constant"
    if _is_head(record, by_key):
        return "head"
    return _input_role(record.inputs[0], by_key)


def _is_head(record: Record, by_key: dict[str, Record]) -> bool:
    """A weight whose output leaves the model, perhaps squashed, or summed with other such."""
    pointwise = record.weight_shape is not None and all(n == 1 for n in record.weight_shape[2:])
    if not pointwise or not record.inputs[0].origin:
        return False
    for key in record.feeds:
        fed = by_key[key]
        if fed.feeds or fed.kind not in ("add", "activation", "softmax"):
            return False
        if not all(value.origin for value in fed.inputs):
            return False
        others = [by_key[k] for value in fed.inputs for k in value.origin]
        if any(other.kind != "linear" or other.feeds != {key} for other in others):
            return False
    return True


def _input_role(value: labels.Value, by_key: dict[str, Record]) -> str:
    """What kind of activation this is, told by the sites it comes from."""
    if not value.depends:
        return "constant"
    if not value.origin:
        return "patch_embed"
    origins = [by_key[key] for key in value.origin]
    kinds = {origin.kind for origin in origins}
    activations = {origin.function for origin in origins if origin.kind == "activation"}
    if activations:
        return "post_gelu" if activations == {"gelu"} else "post_activation"
    if value.probability is not None:
        return "post_softmax"
    if "matmul" in kinds and any(
        v.probability for origin in origins if origin.kind == "matmul" for v in origin.inputs
    ):
        return "attention_output"
    return (
        {"norm": "post_norm", "add": "residual"}.get(next(iter(kinds)), "other")
        if (len(kinds) == 1)
        else "other"
    )


def _operand_roles(
    record: Record, roles: dict[str, str], by_key: dict[str, Record]
) -> tuple[str, ...]:
    role = roles[record.key]
    if role == "query_key":
        return ("query", "key")
    if role == "attention_value":
        first = record.inputs[0].probability is not None
        return ("post_softmax", "value") if first else ("value", "post_softmax")
    if role in ("patch_embed", "head"):
        return (role,)
    return tuple(_input_role(value, by_key) for value in record.inputs)
