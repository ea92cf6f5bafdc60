"""Create models with weights from local files, strictly; a new head or image size is logged.

``checkpoints`` reads the files. Nothing is downloaded.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quietvit.classes import name_classes, take_names, unname_classes
from quietvit.data.checkpoints import class_names_in, read_weights
from quietvit.data.differences import differences, shown
from quietvit.data.huggingface import create_hf_model
from quietvit.data.prefixes import unwrapped
from quietvit.errors import QuietvitError, nearest

logger = logging.getLogger("quietvit")

# Parts that only pre-training uses: MAE's decoder, the heads of DINO and iBOT.
_PRETRAINING = (
    "decoder", "mask_token", "dino_head", "ibot_head", "projection_head", "projector", "predictor",
)  # fmt: skip
_PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


class UnknownModelError(QuietvitError):
    """timm has no model of the given name."""


def create_model(
    name: str,
    num_classes: int | None = None,
    weights: str | Path | None = None,
    *,
    preprocessing: Mapping[str, Any] | None = None,
    untrained: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Build a timm model, with the weights of a local file if one is given.

    ``hf:/folder`` builds the transformers classifier or encoder of that folder with its weights;
    ``kwargs`` are then keys of its config, see ``huggingface.create_hf_model``.

    Args:
        name: a timm model, such as ``deit_tiny_patch16_224``, or ``hf:`` and a folder.
        num_classes: classes of the head; None uses the number in the weights, or timm's. If the
            weights have another number or no head, the head is random and a log line says so. 0
            removes the head: the model gives features. An ``hf:`` folder of an encoder has no head.
        weights: ``.safetensors`` or a file that ``torch.load(weights_only=True)`` reads; see
            ``checkpoints.read_weights``. Weights of a quietvit run also bring class names.
        preprocessing: overrides in the model's data config: mean, std, interpolation, crop_pct,
            crop_mode.
        untrained: use random weights and ignore those in an ``hf:`` folder.
        kwargs: passed to timm. For another ``img_size``, timm's own filter resamples the position
            table, and a log line says so.

    Raises:
        QuietvitError: unknown model, arguments that timm refuses, or weights that are missing or
            of another architecture (the message names the first differing keys and shapes).
    """
    import timm

    state = read_weights(weights) if weights is not None else None
    facts = class_names_in(weights) if weights is not None and num_classes != 0 else {}
    if not name.startswith("hf:") and not timm.is_model(name):
        raise UnknownModelError(
            f"timm has no model named {name!r}{nearest(name, timm.list_models())}; "
            "timm.list_models('*vit*') lists them."
        )
    unknown = [key for key in preprocessing or {} if key not in _PREPROCESSING]
    if unknown:
        raise QuietvitError(
            f"preprocessing has no key {unknown[0]!r}{nearest(unknown[0], _PREPROCESSING)}; it has "
            f"{', '.join(_PREPROCESSING)}."
        )
    if name.startswith("hf:"):
        built = create_hf_model(
            name[3:], num_classes, kwargs, preprocessing, state, untrained=untrained
        )
        if num_classes != 0:
            take_names(built, facts)
        return built
    if num_classes is None and state is not None:
        num_classes = _classes_in(state, timm.get_pretrained_cfg(name))
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    model = _built(name, kwargs, preprocessing or {})
    name_classes(model, None)  # of a random head
    if state is not None:
        _load(model, state, str(weights), facts)
    return model


def _built(name: str, kwargs: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> nn.Module:
    """Build a timm model with random weights and the data config of these arguments."""
    import timm

    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **kwargs)
    except (
        TypeError, AssertionError, ValueError, RuntimeError, ArithmeticError, LookupError,
        AttributeError,
    ) as error:  # fmt: skip
        arguments = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
        raise QuietvitError(
            f"timm could not build {name} with {arguments or 'its defaults'}: {error}; change or "
            "remove that argument."
        ) from error
    config: dict[str, Any] = {**getattr(model, "pretrained_cfg", {}), **preprocessing}
    if kwargs.get("img_size") is not None:
        size = kwargs["img_size"]
        sides = (size, size) if isinstance(size, int) else tuple(size)
        config["input_size"] = (int(kwargs.get("in_chans", 3)), *sides)
    config["arguments"] = dict(kwargs)
    model.pretrained_cfg = config  # type: ignore[assignment]
    return model


def load_weights(
    model: nn.Module, weights: str | Path | Mapping[str, Tensor], source: str = "the weights"
) -> None:
    """Load weights into ``model`` in place, strictly apart from four exceptions.

    These are a head of another size or no head (the model's own stays), another grid of positions,
    a prefix of all names (``model.``, ``module.``, ``backbone.``), and parts that only pre-training
    uses (MAE's decoder, DINO's head). Log lines report what is changed or left out.

    Raises:
        QuietvitError: the file is missing or damaged, or belongs to another architecture. The
            model is then unchanged.
    """
    if isinstance(weights, Mapping):
        _load(model, weights, source, {})
    else:
        _load(model, read_weights(weights), str(weights), class_names_in(weights))


def _load(
    model: nn.Module, weights: Mapping[str, Tensor], source: str, facts: Mapping[str, Any]
) -> None:
    own = model.state_dict()
    state, prefix = unwrapped(own, weights, source)
    fitted, told, new_head = _fitted(model, own, state)
    if problems := differences(own, fitted):
        fitted, told, new_head = _fitted(model, own, _filtered(model, state))
        if differences(own, fitted):
            below = f" below '{prefix}'" if prefix else ""
            raise QuietvitError(
                f"{source} holds{below} weights of another architecture than "
                f"{type(model).__name__} as built here: {shown(problems)}. {_remedy(state)}"
            )
        told.append(f"adapted by timm to this model ({shown(problems, 2)})")
    for line in told:
        logger.warning("%s: %s.", source, line)
    model.load_state_dict(fitted, strict=True)
    if new_head:
        name_classes(model, None)
    elif facts:
        take_names(model, facts)
    else:
        unname_classes(model)


def _heads(config: Any) -> tuple[str, ...]:
    named = config.get("classifier") if isinstance(config, dict) else config.classifier
    return (named,) if isinstance(named, str) else tuple(named or ())


def _classes_in(state: Mapping[str, Tensor], config: Any) -> int | None:
    for head in _heads(config) if config is not None else ():
        for key, value in state.items():
            if f".{key}".endswith(f".{head}.weight"):
                return int(value.shape[0])
    return None


def _fitted(
    model: nn.Module, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str], bool]:
    """Return ``weights`` adapted to the model, the log messages, and whether a head is new.

    The model keeps its own head if the given one differs; parts of pre-training are left out.
    """
    state, told, new_head = dict(weights), list[str](), False
    heads = _heads(getattr(model, "pretrained_cfg", {}))
    for head in heads:
        key = f"{head}.weight"
        if key not in own:
            continue
        if key not in state:
            told.append(f"it has no head '{head}': it starts anew")
        elif own[key].shape[1:] == state[key].shape[1:] and len(own[key]) != len(state[key]):
            told.append(
                f"the head '{head}' has {len(state[key])} classes, but {len(own[key])} are "
                "requested: it starts anew"
            )
        else:
            continue
        new_head = True
        state |= {name: value for name, value in own.items() if name.startswith(f"{head}.")}
    extra = [
        name
        for name in state
        if name not in own
        and (name.startswith(_PRETRAINING) or name.startswith(tuple(f"{h}." for h in heads)))
    ]
    if extra:
        told.append(f"left out: {_named(extra)}, which this model does not have")
    return {name: value for name, value in state.items() if name not in extra}, told, new_head


def _filtered(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adapt names and position tables with timm's own filter; unchanged if it fails."""
    adapt: Any = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is None:
        from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

        adapt = checkpoint_filter_fn if isinstance(model, VisionTransformer) else None
    if adapt is None:
        return state
    try:
        adapted: dict[str, Tensor] = adapt(dict(state), model)
    except Exception:
        return state
    return adapted


def _remedy(state: Iterable[str]) -> str:
    if any("embeddings.patch_embeddings" in key or "encoder.layer." in key for key in state):
        return (
            "These are weight names of transformers, not of timm: give the folder with its "
            "config.json as the model, 'hf:/path/to/folder'."
        )
    first = {key.partition(".")[0] for key in state}
    wrapped = f"All names in the file begin with '{first.pop()}.'. " if len(first) == 1 else ""
    return f"{wrapped}Give the timm name and arguments of the model that has these weights."


def _named(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
