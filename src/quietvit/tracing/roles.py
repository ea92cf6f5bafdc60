"""Derive a site's role in the transformer from the sites before and behind it.

``sites.Site`` describes the roles.
"""

from __future__ import annotations

from quietvit.tracing.labels import Value
from quietvit.tracing.raw import Record

ROLES = (
    *("patch_embed", "post_norm", "post_gelu", "post_activation", "post_softmax"),
    *("attention_output", "residual", "head", "query_key", "attention_value", "other"),
)
"""Roles of matrix products and their operands that ``Method.overrides`` may name."""


def _reaches_softmax(record: Record, by_key: dict[str, Record], depth: int = 4) -> bool:
    """Whether scores lead to a softmax, directly or through layers that mix heads."""
    for key in record.feeds:
        fed = by_key[key]
        if fed.kind == "softmax":
            return True
        between = ("linear", "conv", "norm", "add", "activation")
        if depth and fed.kind in between and _reaches_softmax(fed, by_key, depth - 1):
            return True
    return False


def role_of(record: Record, by_key: dict[str, Record]) -> str:
    """Return the role of a site; ``by_key`` holds all records of the trace."""
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
    """Whether the output of a matrix leaves the model, through sums and activations at most.

    A sum at the end may only add outputs of heads, so the last residual block has no head. A filter
    larger than 1 x 1 is a head only in front of boxes. Otherwise it computes feature maps.
    """
    tail = _tail(record, by_key)
    if tail is None or not record.inputs[0].origin:
        return False
    size = record.weight_shape and record.weight_shape[2:]
    if size is None or (any(n > 1 for n in size) and not _detects(record, tail)):
        return False
    for fed in tail.values():
        if not all(value.origin for value in fed.inputs):
            return False
        for key in {key for value in fed.inputs for key in value.origin} - {*tail, record.key}:
            other = by_key[key]
            behind = _tail(other, by_key)
            joined = other.kind == "linear" or (fed.kind != "add" and other.kind == "conv")
            if behind is None or not (joined or _detects(other, behind)):
                return False
    return True


def _tail(record: Record, by_key: dict[str, Record]) -> dict[str, Record] | None:
    """Return all sites behind a site; None unless all are sums, activations or softmaxes."""
    tail: dict[str, Record] = {}
    waiting = list(record.feeds)
    while waiting:
        key = waiting.pop()
        fed = by_key[key]
        if fed.kind not in ("add", "activation", "softmax"):
            return None
        if key not in tail:
            tail[key] = fed
            waiting += fed.feeds
    return tail


def _detects(record: Record, tail: dict[str, Record]) -> bool:
    """Whether a site predicts the boxes that the model returns, or what lies beside them."""
    return any(each.found for each in (record, *tail.values()))


def _input_role(value: Value, by_key: dict[str, Record]) -> str:
    """Return the kind of an activation, given the sites that it comes from."""
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


def operand_roles(
    record: Record, roles: dict[str, str], by_key: dict[str, Record]
) -> tuple[str, ...]:
    """Return the role of each activation that enters a site; ``roles``: of all sites, by key."""
    role = roles[record.key]
    if role == "query_key":
        return ("query", "key")
    if role == "attention_value":
        first = record.inputs[0].probability is not None
        return ("post_softmax", "value") if first else ("value", "post_softmax")
    if role in ("patch_embed", "head"):
        return (role,)
    return tuple(_input_role(value, by_key) for value in record.inputs)
