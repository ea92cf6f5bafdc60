"""Select which parameters train and how: freezing, weight decay groups, layer-wise rates.

``setup`` builds the optimizer from the groups.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quietvit.data import data_config
from quietvit.errors import QuietvitError, nearest
from quietvit.tracing import trace
from quietvit.tracing.block_modules import lies_within

if TYPE_CHECKING:
    from quietvit.train.config import OptimizerConfig


def freeze(model: nn.Module, patterns: Sequence[str] = (), blocks: int = 0) -> list[str]:
    """Freeze parameters (``requires_grad=False``) and return their names in the model's order.

    Frozen modules keep their mode: in training mode, dropout acts and running statistics change.

    Args:
        model: changed in place.
        patterns: wildcards for parameter names, such as ``patch_embed.*``; case-sensitive.
        blocks: freeze the first n residual blocks of the trace and everything before them.

    Raises:
        QuietvitError: a pattern matches nothing (the nearest names are given), the model has fewer
            blocks, or no trainable parameter is left. The model is then unchanged.
    """
    parameters = dict(model.named_parameters())
    frozen: set[str] = set()
    for pattern in patterns:
        matched = [name for name in parameters if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise QuietvitError(
                f"model.freeze: {pattern!r} matches no parameter of {type(model).__name__}"
                f"{nearest(pattern, _patterns(parameters))}; its first parameters are "
                f"{', '.join(list(parameters)[:3])}."
            )
        frozen |= set(matched)
    if blocks:
        depths, count = block_depths(model)
        if blocks > count:
            raise QuietvitError(
                f"model.freeze_blocks is {blocks}, but {type(model).__name__} has {count} residual "
                f"blocks; give 0 to {count}."
            )
        frozen |= {name for name, depth in depths.items() if depth <= blocks}
    if all(name in frozen or not p.requires_grad for name, p in parameters.items()):
        raise QuietvitError(
            f"model.freeze and model.freeze_blocks freeze all {len(parameters)} parameters of "
            f"{type(model).__name__}; freeze fewer."
        )
    for name in frozen:
        parameters[name].requires_grad_(False)
    return [name for name in parameters if name in frozen]


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return optimizer groups that hold every trainable parameter exactly once.

    Norms, biases (1-D) and the names in a timm model's ``no_weight_decay()`` get no weight decay,
    unless ``config.decay_norms_and_biases`` is set.

    With ``config.layer_decay`` = d each group has ``lr_scale`` = d ** (greatest depth - depth).
    timm's schedulers multiply the learning rate by it; the groups have no ``lr``. A model with
    ``group_matcher`` has timm's depths, which gives the scales of
    ``timm.optim.param_groups_layer_decay``. Other models count residual blocks: embeddings 0,
    blocks 1..n, the rest n + 1 (as BEiT's fine-tuning, arXiv 2106.08254). The factors of
    ``config.lr_scale`` are multiplied to it.

    Raises QuietvitError if a wildcard of ``config.lr_scale`` matches no parameter.
    """
    groups = _groups_of_decay(model, config)
    if config.layer_decay not in (None, 1):
        depths = _timm_depths(model) if hasattr(model, "group_matcher") else block_depths(model)[0]
        last = max(depths.values())
        scales = {name: config.layer_decay ** (last - depth) for name, depth in depths.items()}
        groups = _split(model, groups, scales)
    return _split(model, groups, _factors(model, config.lr_scale)) if config.lr_scale else groups


def _groups_of_decay(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]

    if config.decay_norms_and_biases:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [{"params": trainable, "weight_decay": config.weight_decay}]
    kept: Any = getattr(model, "no_weight_decay", set)()
    groups: list[dict[str, Any]] = param_groups_weight_decay(
        model, weight_decay=config.weight_decay, no_weight_decay_list=kept
    )
    return groups


def _factors(model: nn.Module, lr_scale: Mapping[str, float]) -> dict[str, float]:
    """The factor of each parameter's learning rate, 1 where no wildcard matches."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in lr_scale:
        if not fnmatch.filter(names, pattern):
            raise QuietvitError(
                f"optimizer.lr_scale: {pattern!r} matches no parameter of {type(model).__name__}"
                f"{nearest(pattern, _patterns(names))}."
            )
    return {
        name: next((f for p, f in lr_scale.items() if fnmatch.fnmatchcase(name, p)), 1.0)
        for name in names
    }


def _split(
    model: nn.Module, groups: Sequence[dict[str, Any]], scales: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Split groups by the scale of each parameter's rate; it multiplies a scale that is there."""
    scale_of = {id(p): scales[name] for name, p in model.named_parameters()}
    split: list[dict[str, Any]] = []
    for group in groups:
        by_scale: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_scale.setdefault(scale_of[id(parameter)], []).append(parameter)
        for scale, members in sorted(by_scale.items()):
            split.append(
                {**group, "params": members, "lr_scale": scale * group.get("lr_scale", 1.0)}
            )
    return split


def block_depths(model: nn.Module) -> tuple[dict[str, int], int]:
    """Return the depth of every parameter by name, and the number n of residual blocks.

    torchvision's detectors have blocks only in the backbone. So everything behind it has depth
    n + 1, as in ViTDet.

    0: before the first block. i: in block i (from 1), or between block i - 1 and block i.
    n + 1: after the last block. The trace does not see some parameters, such as position tables
    that are added. They have depth 0 if the model defines them before its first block, else n + 1.

    Raises QuietvitError if the model has no block or does not run on an image of its input size.
    """
    device = next(model.parameters()).device
    recorded = trace(model, torch.zeros(1, *data_config(model)["input_size"], device=device))
    blocks = recorded.blocks
    if not blocks:
        raise QuietvitError(
            f"{type(model).__name__} has no residual blocks, by which layers are counted; leave "
            "out model.freeze_blocks and optimizer.layer_decay."
        )
    starts = {block: len(recorded.sites) for block in blocks}
    used: dict[str, int] = {}
    for place, site in enumerate(recorded.sites):
        for block in blocks:
            if lies_within(site.module, block):
                starts[block] = min(starts[block], place)
        for module in (site.module, site.weight.module if site.weight is not None else site.module):
            used.setdefault(module, place)
    depths: dict[str, int] = {}
    passed = False
    for name, _ in model.named_parameters():
        owner = name.rpartition(".")[0]
        inside = [i for i, block in enumerate(blocks) if lies_within(owner, block)]
        passed = passed or bool(inside)
        if inside:
            depths[name] = inside[0] + 1
        elif owner in used:
            before = sum(start < used[owner] for start in starts.values())
            depths[name] = before + 1 if before else 0
        else:
            depths[name] = len(blocks) + 1 if passed else 0
    return depths, len(blocks)


def _timm_depths(model: Any) -> dict[str, int]:
    from timm.models import group_parameters  # type: ignore[attr-defined]

    depths: dict[str, int] = group_parameters(
        model, model.group_matcher(coarse=False), reverse=True
    )
    last = max(depths.values())
    return {name: depths.get(name, last) for name, _ in model.named_parameters()}


def _patterns(names: Sequence[str] | dict[str, Any]) -> list[str]:
    parts = [name.split(".") for name in names]
    folders = {".".join(p[:end]) + ".*" for p in parts for end in range(1, len(p))}
    return [*names, *sorted(folders)]
