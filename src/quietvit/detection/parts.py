"""Name the parts of a detector (backbone, neck, RPN, heads, encoder, decoder) and their sites.

``by_part`` measures what each part loses. ``static_parts`` cuts a detector for export.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from quietvit.detection.detectors import PREDICTORS
from quietvit.errors import QuietvitError, nearest
from quietvit.quantization import Method, OnTop
from quietvit.quantization.overrides import Overrides
from quietvit.tracing import MATMUL_KINDS, Trace, trace

PREFIX = "part:"

# Of torchvision's detectors: the start of a module's path decides. The first match counts.
_TORCHVISION = {
    "backbone.neck": "neck",
    "backbone": "backbone",
    "rpn": "rpn",
    "roi_heads.mask_head": "mask_head",
    "roi_heads.mask_predictor": "mask_head",
    "roi_heads": "box_head",
    "head": "heads",
}
# Of transformers' detectors: the first of these names that is in a module's path decides, but a
# predictor is a head wherever it is. A backbone may hold an "encoder" of its own.
_TRANSFORMERS = {
    "projector": "neck",  # in the backbone of RF-DETR and LW-DETR
    "encoder_input_proj": "encoder",  # RT-DETR, D-FINE; in the backbone of DEIMv2
    "fusion_proj": "encoder",  # in the backbone of DEIMv2
    "backbone": "backbone",
    "conv_encoder": "backbone",  # DEIMv2
    "vit": "backbone",  # YOLOS
    "input_projection": "encoder",  # DETR
    "input_proj": "encoder",  # Deformable DETR
    "encoder": "encoder",
    "decoder_input_proj": "decoder",
    "enc_output": "decoder",  # chooses the queries
    "pos_trans": "decoder",
    "reference_points": "decoder",
    "decoder": "decoder",
}
_HEADS = frozenset({*PREDICTORS, "pre_bbox_head", "integral", "lqe_layers"})


def part_of_each(model: nn.Module, traced: Trace) -> dict[str, str]:
    """Return the part of each site by name, in the order of the forward pass.

    torchvision's detectors have ``backbone``, ``neck``, ``rpn`` and ``box_head``, or ``heads``. A
    Mask R-CNN also has ``mask_head``.
    transformers' have ``backbone``, ``neck``, ``encoder``, ``decoder`` and ``heads``, as far as
    they exist.
    The module of a site tells its part. Without a known module, the site belongs to the part that
    feeds it. Sites that compute boxes, behind the last part, may be missing.

    Raises:
        QuietvitError: a product belongs to no part, or all to one.
    """
    parts: dict[str, str] = {}
    for site in traced.sites:
        found = part_of(site.name) or next(
            (parts[name] for operand in site.operands for name in operand.fed_by if name in parts),
            None,
        )
        if found is not None:
            parts[site.name] = found
    lost = [s.name for s in traced.sites if s.kind in MATMUL_KINDS and s.name not in parts]
    if lost or len(set(parts.values())) < 2:
        why = f"{lost[0]} belongs to none" if lost else "it has no backbone and heads"
        raise QuietvitError(
            f"the parts of {type(model).__name__} are unknown ({why}). Give a detector of "
            "quietvit.detection: torchvision's, or one of transformers by hf_detector."
        )
    return parts


def sites_by_part(model: nn.Module, traced: Trace) -> dict[str, tuple[str, ...]]:
    """Return the names of the matrix products of each part. See ``part_of_each``."""
    products = {site.name for site in traced.sites if site.kind in MATMUL_KINDS}
    grouped: dict[str, list[str]] = {}
    for site, part in part_of_each(model, traced).items():
        if site in products:
            grouped.setdefault(part, []).append(site)
    return {part: tuple(names) for part, names in grouped.items()}


def with_parts(method: Method, model: nn.Module, example: Any) -> Method:
    """Return ``method`` with names like ``part:decoder`` replaced by the names of the part's sites.

    They may stand in ``overrides`` and ``exclude``.

    Args:
        example: images that the model takes, as for ``quietvit.trace``.

    Raises:
        QuietvitError: the model has no such part.
    """
    if not any(key.startswith(PREFIX) for key in (*method.overrides, *method.exclude)):
        return method
    parts = sites_by_part(model, trace(model, example))

    def sites(key: str) -> tuple[str, ...]:
        name = key.removeprefix(PREFIX)
        if not key.startswith(PREFIX):
            return (key,)
        if name not in parts:
            raise QuietvitError(
                f"{type(model).__name__} has no part {name!r}{nearest(name, parts)}, so {key!r} "
                f"means nothing. Its parts are {', '.join(parts)}."
            )
        return parts[name]

    return _replaced(method, sites)


def _replaced(method: Method, sites: Callable[[str], tuple[str, ...]]) -> Method:
    bits = {site: pair for key, pair in method.overrides.items() for site in sites(key)}
    changed: dict[str, Any] = {
        "overrides": Overrides(bits),
        "exclude": tuple(site for key in method.exclude for site in sites(key)),
    }
    if isinstance(method, OnTop):
        changed["base"] = _replaced(method.base, sites)
    return method.model_copy(update=changed)


def part_of(site: str) -> str | None:
    """Return the part that the module path of a site tells, or None."""
    for start, part in _TORCHVISION.items():
        if f"{site}.".startswith(f"{start}."):
            return part
    steps = [step.partition("#")[0] for step in site.split(".")]
    if not _HEADS.isdisjoint(steps):
        return "heads"
    return next((part for name, part in _TRANSFORMERS.items() if name in steps), None)
