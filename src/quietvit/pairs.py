"""Ordered matrix pairs: which weight acts first, which second, and through what.

Pairs hold names, never tensors, so that they survive ``.to()``, ``load_state_dict(assign=True)``,
compilation and sharding. How pairs act on weights lives in ``decay``.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, overload

from torch import nn

from quietvit.errors import QuietvitError, nearest
from quietvit.tracing import Link, Operand, Scores, Site, Trace, WeightView, trace
from quietvit.tracing.ops import norm_channel_dim
from quietvit.tracing.weights import select_cols, select_rows

KINDS = ("mlp", "value_output", "gated_mlp", "norm_linear", "residual", "query_key")
DENSE_KINDS = ("mlp", "value_output", "gated_mlp")
_MAPS = ("linear", "conv")
DEFAULT_KINDS = (*DENSE_KINDS, "norm_linear")

# Why a weight is not, or only in part, in pairs.
COMPUTED = "a weight is computed in the forward pass and is no parameter"
ADAPTED = "an adapter adds to its output: pairs know its own weight alone, and none follows the sum"


@dataclass(frozen=True)
class MatrixPair:
    """An ordered pair: ``first`` (A) acts before ``second`` (B), and B A is defined.

    ``kind`` is one of ``KINDS``, see ``find_pairs``. ``head`` counts attention heads, ``through``
    names what stands between the two. ``before`` and ``between`` are gains of norms, as diagonal
    matrices, in front of A and between A and B: the map is then B diag(between) A diag(before).
    They are read by an update, not moved.
    """

    first: WeightView
    second: WeightView
    kind: str
    head: int | None = None
    through: tuple[str, ...] = ()
    before: WeightView | None = None
    between: WeightView | None = None

    @property
    def name(self) -> str:
        head = "" if self.head is None else f" head {self.head}"
        return f"{self.kind}: {self.first.parameter_name} -> {self.second.parameter_name}{head}"


@dataclass(frozen=True)
class FoundPairs(Sequence[MatrixPair]):
    """The pairs of a model, and those that look like one but are not, each with the reason."""

    pairs: tuple[MatrixPair, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    @overload
    def __getitem__(self, index: int) -> MatrixPair: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[MatrixPair, ...]: ...
    def __getitem__(self, index: int | slice) -> MatrixPair | tuple[MatrixPair, ...]:
        return self.pairs[index]

    def __len__(self) -> int:
        return len(self.pairs)

    def __str__(self) -> str:
        rows = [("kind", "first (A)", "second (B)", "heads", "through")]
        for (kind, first, second, through), heads in _by_weights(self.pairs).items():
            shown = "" if heads[0].head is None else str(len(heads))
            single = heads[0] if len(heads) == 1 else None
            a, b = (str(single.first), str(single.second)) if single else (first, second)
            rows.append((kind, a, b, shown, ", ".join(through)))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        counts = Counter(pair.kind for pair in self.pairs)
        total = ", ".join(f"{n} {kind}" for kind, n in counts.items())
        lines.append(f"{len(self)} pairs: {total}")
        alike: Counter[tuple[str, str]] = Counter()
        for name, reason in self.skipped:
            alike[re.sub(r"\b\d+\b", "*", name), reason] += 1
        lines += [f"no pair ({n}): {name}: {reason}" for (name, reason), n in alike.items()]
        return "\n".join(lines)


def _by_weights(
    pairs: Iterable[MatrixPair],
) -> dict[tuple[str, str, str, tuple[str, ...]], list[MatrixPair]]:
    groups = defaultdict(list)
    for pair in pairs:
        names = (pair.kind, pair.first.parameter_name, pair.second.parameter_name, pair.through)
        groups[names].append(pair)
    return groups


def find_pairs(
    model: nn.Module,
    example: Any = None,
    *,
    kinds: Collection[str] = DEFAULT_KINDS,
    trace: Trace | None = None,
    fold_gains: bool = False,
) -> FoundPairs:
    """Find the ordered matrix pairs of ``model`` by following channels through one forward pass.

    ``example``: what the model takes, for example images of shape (1, 3, 224, 224); not needed if a
    ``trace`` of this model is given. ``kinds``, with A the first and B the second matrix:

    - ``mlp``: fc1 -> fc2, an activation (or an elementwise self-gate) between;
    - ``value_output``: one pair a head, the rows of V -> the columns of the output projection that
      read this head. Exact: attention only averages over tokens. With grouped key/value heads the
      rows of V take part in one pair for each query head;
    - ``gated_mlp``: up -> down and gate -> down;
    - ``norm_linear``: the gain of a norm, as a diagonal matrix -> the linear that reads it;
    - ``residual``: what writes the residual stream (proj, fc2) -> what reads it next through a norm
      (fc1, qkv), the norm's gain between;
    - ``query_key``: per head, A = W_K, B = W_Qᵀ.

    With ``fold_gains`` the gain of the norm that A reads becomes part of A (``before``) in the
    kinds mlp, value_output and gated_mlp.

    The two maps of an adapter (``W x + B A x``, as LoRA adds them) are in no pair: neither is the
    whole map. W is, where it is the second matrix, and ``skipped`` names it.

    What writes the logits (the head) is never the second of a pair. Raises QuietvitError for an
    unknown kind, and where no pair is found (saying what was seen instead). The kinds ``mlp`` and
    ``value_output`` are the paper's (arXiv 2605.01330, abstract: pairs within Transformer blocks);
    the others, and the way they are found, are derived here.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise QuietvitError(
                f"unknown kind of pair {kind!r}{nearest(kind, KINDS)}; known: {KINDS}."
            )
    if trace is None:
        if example is None:
            raise QuietvitError(
                "find_pairs needs an example input to follow the data flow: give images as the "
                "model takes them, for example torch.randn(1, 3, 224, 224)."
            )
        trace = _trace(model, example)
    findings = dict.fromkeys(_findings(trace, kinds))
    pairs = tuple(found for found in findings if isinstance(found, MatrixPair))
    skipped = tuple(found for found in findings if not isinstance(found, MatrixPair))
    if not pairs:
        raise _no_pairs(trace, kinds, skipped)
    return FoundPairs(_folded(pairs, trace) if fold_gains else pairs, skipped)


_trace = trace  # the function, where an argument of that name hides it
_Finding = MatrixPair | tuple[str, str]  # a pair, or the name of what is none and the reason


def _findings(trace: Trace, kinds: Collection[str]) -> Iterator[_Finding]:
    adapted, adapters = _adapters(trace)
    yield from ((name, ADAPTED) for name in adapted)
    yield from _linked(trace, kinds, adapters)
    if "residual" in kinds:
        yield from _residual(trace, adapters)
    for scores in trace.scores if "query_key" in kinds else ():
        if reason := _rotated(scores) or _computed(trace[scores.query], trace[scores.key]):
            yield f"{scores.query} x {scores.key}", reason
        else:
            yield from _query_key(scores, trace)


def _linked(trace: Trace, kinds: Collection[str], adapters: Set[str]) -> Iterator[_Finding]:
    """Pairs whose channels flow from the one to the other."""
    gated = Counter(
        link.consumer
        for link in trace.links
        if "gate" in link.through and "pooled" not in link.through
    )
    for link in trace.links:
        if adapters & {link.source, link.consumer}:
            continue
        link = replace(link, through=_steps(link.through))
        first, second = trace[link.source], trace[link.consumer]
        kind, reason = _kind(link, first, second, gated[link.consumer])
        if kind and kind not in kinds:
            continue
        if reason:
            yield f"{first.name} -> {second.name}", reason
        elif kind:
            yield from _pairs(link, first, second, kind)


def _steps(through: tuple[str, ...]) -> tuple[str, ...]:
    """What stands between, but for what leaves the alignment of two matrices alone."""
    return tuple(step for step in through if step not in ("offset", "factor", "summed"))


def _kind(link: Link, first: Site, second: Site, gates: int) -> tuple[str, str]:
    """The kind of pair a link makes, "" for none, and why a likely one is none."""
    kind, reason = _kind_of_maps(link, first, second, gates)
    return kind, _computed(first, second) if kind else reason


def _computed(first: Site, second: Site) -> str:
    return COMPUTED if first.weight is None or second.weight is None else ""


def _kind_of_maps(link: Link, first: Site, second: Site, gates: int) -> tuple[str, str]:
    """As ``_kind``, whether or not the weights are parameters."""
    through = set(link.through)
    if "constant" in (first.role, second.role) or second.role == "head":
        return "", ""
    if not _is_matrix(second) or _columns(second) != len(link.channels):
        return "", ""
    if first.kind == "norm":
        return ("", "") if through else ("norm_linear", "")
    if not _is_whole(first) or "pooled" in through:
        return "", ""
    shaped = bool(through - {"norm", "scale", "depthwise", "matmul"})
    if "mixed_heads" in through:
        return "", "attention heads are mixed between V and the output projection"
    if "matmul" in through and first.operands[0].role != "post_softmax":
        return "", "a product of activations without softmax stands between"
    if through & {"norm", "matmul"}:
        return "", "a norm stands between, which rescales what A makes" if shaped else ""
    if "mixing_gate" in through:
        return "", "a gate computed from what A makes stands between"
    if "attention" in through:
        return "value_output", ""
    if "gate" in through and gates > 1:
        return "gated_mlp", ""
    return ("mlp", "") if shaped else ("", "")


def _is_matrix(site: Site) -> bool:
    """Whether a site multiplies channels by a plain matrix: a linear, or a 1x1 convolution."""
    shape = site.weight_shape or ()
    if site.kind == "linear":
        return len(shape) == 2
    return site.kind == "conv" and all(size == 1 for size in shape[2:]) and shape[1] > 1


def _is_whole(site: Site) -> bool:
    """Whether every output channel of a site sees every input channel: no convolution in groups."""
    shape = site.weight_shape or ()
    if site.kind != "conv":
        return True
    return shape[1] == site.operands[0].shape[1 - len(shape)]


def _columns(site: Site) -> int:
    return (site.weight_shape or (0, 0))[1]


def _rotated(scores: Scores) -> str:
    """Why the scores are no product of the two weights alone, "" where they are."""
    between = set(_steps(scores.through)) - {"scale"}
    if "norm" in between:
        return "a norm stands between a weight and the scores"
    return f"{', '.join(sorted(between))} between a weight and the scores" if between else ""


def _pairs(link: Link, first: Site, second: Site, kind: str) -> Iterator[MatrixPair]:
    """One pair a head; a channel read several times (grouped heads) makes one for each reading."""
    groups: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    readings: Counter[tuple[int, int]] = Counter()
    for column, (channel, head) in enumerate(zip(link.channels, link.heads, strict=True)):
        if channel < 0:
            continue
        groups[head, readings[head, channel]].append((channel, column))
        readings[head, channel] += 1
    assert first.weight is not None
    assert second.weight is not None
    for number, ((head, _), entries) in enumerate(sorted(groups.items())):
        channels, columns = zip(*entries, strict=True)
        a = select_rows(first.weight, channels, _height(first))
        b = select_cols(second.weight, columns, len(link.channels))
        yield MatrixPair(a, b, kind, number if head >= 0 else None, link.through)


def _norm_readers(trace: Trace) -> Iterator[tuple[Site, Site, WeightView, tuple[int, ...]]]:
    """Each norm with gains, a linear that reads it, the gains it reads, and their channels."""
    for link in trace.links:
        norm, reader = trace[link.source], trace[link.consumer]
        if norm.kind != "norm" or _steps(link.through) or norm.weight is None:
            continue
        if not _is_matrix(reader) or reader.role in ("constant", "head"):
            continue
        if _columns(reader) == len(link.channels) and min(link.channels) >= 0:
            gains = select_rows(norm.weight, link.channels, _height(norm))
            yield norm, reader, gains, link.channels


def _residual(trace: Trace, adapters: Set[str]) -> Iterator[_Finding]:
    """What writes the stream in front of each norm -> what reads that norm."""
    sites = {site.name: site for site in trace.sites}
    for norm, reader, gains, channels in _norm_readers(trace):
        for writer in (sites[name] for name in _writers(norm, sites)):
            if adapters & {writer.name, reader.name}:
                continue
            if not _is_matrix(writer) or not _is_whole(writer):
                continue
            if writer.role == "patch_embed" or _height(writer) != _height(norm):
                continue
            if writer.weight is None or reader.weight is None:
                yield f"{writer.name} -> {reader.name}", COMPUTED
                continue
            first = select_rows(writer.weight, channels, _height(writer))
            through = ("residual", "norm")
            yield MatrixPair(first, reader.weight, "residual", through=through, between=gains)


def _writers(norm: Site, sites: Mapping[str, Site]) -> Iterator[str]:
    """The linears that wrote to the residual stream since something read it last."""

    def fed(name: str) -> set[str]:
        return {sites[to].kind for to in sites[name].feeds}

    first = norm.operands[0].fed_by
    waiting = [name for name in first if sites[name].kind == "add"]
    yield from (name for name in first if sites[name].kind != "add" and "add" in fed(name))
    while waiting:
        add = sites[waiting.pop()]
        for name in (name for operand in add.operands for name in operand.fed_by):
            if fed(name) == {"add"}:
                if sites[name].kind == "add":
                    waiting.append(name)
                else:
                    yield name


def _adapters(trace: Trace) -> tuple[list[str], frozenset[str]]:
    """Maps W to whose output that of an adapter is added, and the two maps of each adapter.

    An adapter, as LoRA has it, is B (A x) beside W x: of the same input, with nothing but a factor
    between, and of a lower rank than W may have. Several may be added one after another.
    """
    sites = {site.name: site for site in trace.sites}
    adapted: dict[str, None] = {}
    adapters: set[str] = set()

    def only(operand: Operand, *kinds: str) -> Site | None:
        site = sites[operand.fed_by[0]] if len(operand.fed_by) == 1 else None
        return site if site is not None and site.kind in kinds else None

    for add in (site for site in trace.sites if site.kind == "add"):
        for own, other in (add.operands, add.operands[::-1]):
            up, base = only(own, *_MAPS), only(other, "add", *_MAPS)
            down = None if up is None else only(up.operands[0], *_MAPS)
            while base is not None and base.kind == "add":
                base = only(base.operands[0], "add", *_MAPS)
            if up is None or down is None or base is None or not _is_narrow(down, up):
                continue
            if base.operands[0].fed_by == down.operands[0].fed_by and base is not up:
                adapters |= {up.name, down.name}
                if base.role not in ("head", "constant"):
                    adapted[base.name] = None
    return list(adapted), frozenset(adapters)


def _is_narrow(down: Site, up: Site) -> bool:
    """Whether a map makes fewer channels than it reads, and than the map behind it makes."""
    one, other = down.weight_shape or (), up.weight_shape or ()
    return len(one) >= 2 and one[0] < min(one[1], other[0])


def _folded(pairs: tuple[MatrixPair, ...], trace: Trace) -> tuple[MatrixPair, ...]:
    """The pairs with the gain in front of their first matrix, where a norm is read by it."""
    gains = {
        reader.weight.parameter_name: found
        for _, reader, found, _ in _norm_readers(trace)
        if reader.weight is not None
    }
    return tuple(
        replace(pair, before=gains.get(pair.first.parameter_name))
        if pair.kind in DENSE_KINDS
        else pair
        for pair in pairs
    )


def _query_key(scores: Scores, trace: Trace) -> Iterator[MatrixPair]:
    query, key = trace[scores.query], trace[scores.key]
    if query.weight is None or key.weight is None:
        return
    for head, (q, k) in enumerate(scores.heads):
        first = select_rows(key.weight, k, _height(key))
        second = select_rows(query.weight, q, _height(query))
        second = replace(second, transposed=not second.transposed)
        yield MatrixPair(first, second, "query_key", head, ("scores",))


def _height(site: Site) -> int:
    """Number of output channels of a site with a weight."""
    if site.kind == "norm":
        return site.output_shape[norm_channel_dim(site.function)]
    assert site.weight_shape is not None
    return site.weight_shape[0]


def _no_pairs(
    trace: Trace, kinds: Collection[str], skipped: Iterable[tuple[str, str]]
) -> QuietvitError:
    counts = Counter(site.kind for site in trace.sites)
    seen = ", ".join(f"{n} {kind}" for kind, n in counts.most_common()) or "no matrix product"
    left_out = "; ".join(f"{name}: {reason}" for name, reason in list(skipped)[:5])
    return QuietvitError(
        f"{trace.model_name} has no matrix pair of the kinds {tuple(kinds)}. Seen instead: {seen}. "
        + (f"Left out: {left_out}. " if left_out else "")
        + "Is this a transformer? If it is, choose other kinds, or give the pairs yourself: "
        "pairs=[MatrixPair(WeightView('blocks.0.mlp.fc1'), WeightView('blocks.0.mlp.fc2'), 'mlp')]."
    )
