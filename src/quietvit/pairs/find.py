"""Find the pairs of a model: follow channels from one matrix to the next."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Set
from dataclasses import replace
from typing import Any

from torch import nn

from quietvit.errors import QuietvitError, nearest
from quietvit.pairs.adapters import adapters_of
from quietvit.pairs.maps import inputs, is_matrix, is_whole, outputs, shaping
from quietvit.pairs.pair import (
    ADAPTED,
    COMPUTED,
    DEFAULT_KINDS,
    KINDS,
    Finding,
    FoundPairs,
    MatrixPair,
)
from quietvit.pairs.scales import between_of
from quietvit.pairs.stream import folded, residual
from quietvit.tracing import Link, Scores, Site, Trace, WeightView, trace
from quietvit.tracing.weights import select_cols, select_rows


def find_pairs(
    model: nn.Module,
    example: Any = None,
    *,
    kinds: Collection[str] = DEFAULT_KINDS,
    trace: Trace | None = None,
    fold_gains: bool = False,
) -> FoundPairs:
    """Find the ordered matrix pairs of ``model`` by following channels through one forward pass.

    ``example``: an input of the model, for example images of shape (1, 3, 224, 224). It is not
    needed if a ``trace`` of this model is given. ``kinds``, with A the first and B the second
    matrix:

    - ``mlp``: fc1 -> fc2, with an activation (or an elementwise self-gate) between;
    - ``value_output``: for each head, the rows of V -> the columns of the output projection that
      read this head. This is exact, because attention only averages over tokens. With grouped
      key/value heads, the rows of V form one pair for each query head. Attention over channels
      (XCA) mixes only the channels of a head, so each head is still one pair;
    - ``gated_mlp``: up -> down and gate -> down;
    - ``norm_linear``: the gain of a norm, as a diagonal matrix -> the linear that reads it;
    - ``residual``: what writes the residual stream (proj, fc2) -> what reads it next through a norm
      (fc1, qkv), with the norm's gain between;
    - ``query_key``: per head, A = W_K, B = W_Qᵀ.

    A BatchNorm between A and B is the diagonal map gamma / sqrt(running_var + eps). The pair holds
    its name (``between``), and each update reads its present value. This is the running variance
    also in train mode. A depthwise convolution before the BatchNorm counts as the Euclidean norm of
    each kernel. BatchNorms in parallel branches or without stored statistics make no pair.

    With ``fold_gains`` the gain of the norm that A reads becomes part of A (``before``), in the
    kinds mlp, value_output and gated_mlp.

    The two maps of an adapter (LoRA's ``W x + B A x``) are in no pair, since neither is the whole
    map. W can be the second matrix of a pair; ``skipped`` names it. The head, which writes the
    logits, is never the second matrix.

    Raises QuietvitError for an unknown kind, or if no pair is found. Source: ``mlp`` and
    ``value_output`` are the paper's kinds (arXiv 2605.01330, abstract: pairs within Transformer
    blocks). The other kinds, and the search, are derived here.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise QuietvitError(
                f"unknown kind of pair {kind!r}{nearest(kind, KINDS)}; choose from {KINDS}."
            )
    if trace is None:
        if example is None:
            raise QuietvitError(
                "find_pairs needs an example input to follow the data flow. Give an input of the "
                "model, for example torch.randn(1, 3, 224, 224)."
            )
        trace = _trace(model, example)
    findings = dict.fromkeys(_findings(trace, kinds))
    pairs = tuple(finding for finding in findings if isinstance(finding, MatrixPair))
    skipped = tuple(finding for finding in findings if not isinstance(finding, MatrixPair))
    if not pairs:
        raise _no_pairs(trace, kinds, skipped)
    return FoundPairs(folded(pairs, trace) if fold_gains else pairs, skipped)


ATTENTION = frozenset({"attention", "channel_attention"})
_trace = trace  # find_pairs has an argument called trace


def _findings(trace: Trace, kinds: Collection[str]) -> Iterator[Finding]:
    adapted, adapters = adapters_of(trace)
    yield from ((name, ADAPTED) for name in adapted)
    yield from _linked(trace, kinds, adapters)
    if "residual" in kinds:
        yield from residual(trace, adapters)
    for scores in trace.scores if "query_key" in kinds else ():
        if reason := _rotated(scores) or _computed(trace[scores.query], trace[scores.key]):
            yield f"{scores.query} x {scores.key}", reason
        else:
            yield from _query_key(scores, trace)


def _linked(trace: Trace, kinds: Collection[str], adapters: Set[str]) -> Iterator[Finding]:
    """Yield the pairs that links of the trace connect."""
    gated = Counter(
        link.consumer
        for link in trace.links
        if "gate" in link.through and "pooled" not in link.through
    )
    for link in trace.links:
        if adapters & {link.source, link.consumer}:
            continue
        whole, link = link, replace(link, through=shaping(link.through))
        first, second = trace[link.source], trace[link.consumer]
        kind, reason = _kind(link, first, second, gated[link.consumer])
        if kind and kind not in kinds:
            continue
        if reason:
            yield f"{first.name} -> {second.name}", reason
        elif kind:
            scale = between_of(whole, trace)
            if isinstance(scale, str):
                yield f"{first.name} -> {second.name}", scale
            else:
                yield from _pairs(link, first, second, kind, scale)


def _kind(link: Link, first: Site, second: Site, gates: int) -> tuple[str, str]:
    """Return the kind of pair of a link ("" for none), and why a likely pair is not one."""
    kind, reason = _kind_of_maps(link, first, second, gates)
    return kind, _computed(first, second) if kind else reason


def _computed(first: Site, second: Site) -> str:
    return COMPUTED if first.weight is None or second.weight is None else ""


def _kind_of_maps(link: Link, first: Site, second: Site, gates: int) -> tuple[str, str]:
    """Like ``_kind``, without the check that both weights are parameters."""
    through = set(link.through)
    if "constant" in (first.role, second.role) or second.role == "head":
        return "", ""
    if not is_matrix(second) or inputs(second) != len(link.channels):
        return "", ""
    if first.kind == "norm":
        return ("", "") if through else ("norm_linear", "")
    if not is_whole(first):
        grouped = (first.weight_shape or (0, 0))[1] > 1
        reason = "A is a grouped convolution: each of its output channels reads only some inputs"
        return "", reason if grouped and through & {*ATTENTION, "matmul"} else ""
    shaped = bool(through - {"norm", "batch_norm", "scale", "depthwise", "matmul", "branches"})
    if "scrambled" in through:
        return "", "the output channels of attention reach other columns at other tokens"
    if "added" in through:
        return "", "other channels of A are added to the output of attention"
    if "mixed_heads" in through:
        return "", "attention heads are mixed between V and the output projection"
    if "matmul" in through and first.operands[0].role != "post_softmax":
        return "", "a product of activations without softmax stands between"
    if "pooled" in through:
        return "", ""
    if through & {"norm", "matmul"}:
        return "", "a norm stands between and rescales the output of A" if shaped else ""
    if "mixing_gate" in through:
        return "", "a gate computed from the output of A stands between"
    if through & ATTENTION:
        return "value_output", ""
    if "gate" in through and gates > 1:
        return "gated_mlp", ""
    return ("mlp", "") if shaped else ("", "")


def _rotated(scores: Scores) -> str:
    """Return why the scores depend on more than the two weights; "" if they do not."""
    between = set(shaping(scores.through)) - {"scale"}
    if between & {"norm", "batch_norm"}:
        return "a norm stands between a weight and the scores"
    return f"{', '.join(sorted(between))} between a weight and the scores" if between else ""


def _pairs(
    link: Link, first: Site, second: Site, kind: str, scale: WeightView | None
) -> Iterator[MatrixPair]:
    """Yield one pair for each head, or a single one without attention.

    Example: V -> proj with 2 heads of 64 channels gives 2 pairs of 64 rows and 64 columns. If two
    query heads share a V head (grouped heads), each makes a pair with it. ``scale``: the diagonal
    map between, one factor for each column of the second matrix.
    """
    # (head, how often the channel was read before) -> (channel of A, column of B)
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
        a = select_rows(first.weight, channels, outputs(first))
        b = select_cols(second.weight, columns, len(link.channels))
        own = None if scale is None else select_rows(scale, columns, len(link.channels))
        number_of_head = number if head >= 0 else None
        yield MatrixPair(a, b, kind, number_of_head, link.through, between=own)


def _query_key(scores: Scores, trace: Trace) -> Iterator[MatrixPair]:
    query, key = trace[scores.query], trace[scores.key]
    if query.weight is None or key.weight is None:
        return
    for head, (q, k) in enumerate(scores.heads):
        first = select_rows(key.weight, k, outputs(key))
        second = select_rows(query.weight, q, outputs(query))
        second = replace(second, transposed=not second.transposed)
        yield MatrixPair(first, second, "query_key", head, ("scores",))


def _no_pairs(
    trace: Trace, kinds: Collection[str], skipped: Iterable[tuple[str, str]]
) -> QuietvitError:
    counts = Counter(site.kind for site in trace.sites)
    sites = ", ".join(f"{n} {kind}" for kind, n in counts.most_common()) or "no matrix product"
    left_out = "; ".join(f"{name}: {reason}" for name, reason in list(skipped)[:5])
    return QuietvitError(
        f"{trace.model_name} has no matrix pair of the kinds {tuple(kinds)}. Seen instead: "
        f"{sites}. "
        + (f"Left out: {left_out}. " if left_out else "")
        + "If this is a transformer, choose other kinds, or give the pairs yourself: "
        "pairs=[MatrixPair(WeightView('blocks.0.mlp.fc1'), WeightView('blocks.0.mlp.fc2'), 'mlp')]."
    )
