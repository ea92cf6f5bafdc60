"""Models with weights from local files, strict; another head or image size is said aloud.

Nothing is downloaded and nothing unpickled: safetensors, or ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError, nearest

logger = logging.getLogger("quietvit")

_PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


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

    ``hf:/folder`` builds the transformers image classifier of that folder with the weights there,
    and ``kwargs`` are keys of its config: see ``huggingface.create_hf_model``.

    Args:
        name: a timm model, such as ``deit_tiny_patch16_224``, or ``hf:`` and a folder.
        num_classes: classes of the head; None takes the number in the weights, or timm's. Where the
            weights have another number, the head starts anew and a log line says so.
        weights: ``.safetensors`` or a file that ``torch.load(weights_only=True)`` reads.
        preprocessing: overrides in the model's data config: mean, std, interpolation, crop_pct,
            crop_mode.
        untrained: start from random weights also where an ``hf:`` folder has some, which are not
            looked at then.
        kwargs: go to timm. With another ``img_size`` than the weights', the position table is
            resampled by timm's own filter, and a log line says so.

    Raises:
        QuietvitError: unknown model, arguments timm refuses, weights missing or of another
            architecture (the first differing keys and shapes are named).
    """
    import timm

    state = read_weights(weights) if weights is not None else None
    if not name.startswith("hf:") and not timm.is_model(name):
        raise QuietvitError(
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
        from quietvit.data.huggingface import create_hf_model

        return create_hf_model(
            name[3:], num_classes, kwargs, preprocessing, state, untrained=untrained
        )
    if num_classes is None and state is not None:
        num_classes = _classes_in(state, timm.get_pretrained_cfg(name))
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    model = _built(name, kwargs, preprocessing or {})
    if state is not None:
        load_weights(model, state, source=str(weights))
    return model


def _built(name: str, kwargs: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> nn.Module:
    """Let timm build the model, from random; its data config is that of these arguments."""
    import timm

    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **kwargs)
    except (
        TypeError, AssertionError, ValueError, RuntimeError, ArithmeticError, LookupError,
        AttributeError,
    ) as error:  # fmt: skip
        given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
        raise QuietvitError(
            f"timm could not build {name} with {given or 'its defaults'}: {error}; change or leave "
            "out that argument."
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
    """Load weights into ``model`` in place, strictly up to a head of other size and another grid.

    Raises:
        QuietvitError: the file is missing or damaged, or belongs to another architecture. The
            model is then as it was.
    """
    if not isinstance(weights, Mapping):
        weights, source = read_weights(weights), str(weights)
    own = model.state_dict()
    state = _without_other_head(model, own, dict(weights), source)
    problems = differences(own, state)
    if problems:
        state = _filtered(model, state)
        if differences(own, state):
            shown = "; ".join(problems[:3])
            more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise QuietvitError(
                f"{source} holds weights of another architecture than {type(model).__name__} as "
                f"built here: {shown}{more}. Give the timm name and arguments the weights were "
                "made with."
            )
        logger.warning("%s: adapted by timm to this model (%s).", source, "; ".join(problems[:2]))
    model.load_state_dict(state, strict=True)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict, name -> tensor, from safetensors or ``torch.load(weights_only=True)``.

    Raises:
        QuietvitError: the file is missing, damaged, or holds anything but tensors by name.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise QuietvitError(f"the weights {path} do not exist; check the path.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise QuietvitError(
            f"{path} could not be read as weights ({str(error).splitlines()[0]}); it must be "
            "safetensors, or a file that torch.load(weights_only=True) accepts."
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content:
        raise QuietvitError(f"{path} holds no tensors by name; save the model's state_dict().")
    state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if len(state) != len(content):
        other = next(key for key in content if key not in state)
        raise QuietvitError(
            f"{path} holds {type(content[other]).__name__} under {other!r} where a tensor is "
            "expected; save the model's state_dict() alone."
        )
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _heads(config: Any) -> tuple[str, ...]:
    named = config.get("classifier") if isinstance(config, dict) else config.classifier
    return (named,) if isinstance(named, str) else tuple(named or ())


def _classes_in(state: Mapping[str, Tensor], config: Any) -> int | None:
    for head in _heads(config) if config is not None else ():
        if f"{head}.weight" in state:
            return int(state[f"{head}.weight"].shape[0])
    return None


def _without_other_head(
    model: nn.Module, own: Mapping[str, Tensor], state: dict[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Put the model's own, new head where the file's has the same inputs but other classes."""
    for head in _heads(getattr(model, "pretrained_cfg", {})):
        key = f"{head}.weight"
        if key not in own or key not in state or own[key].shape[1:] != state[key].shape[1:]:
            continue
        classes, there = own[key].shape[0], state[key].shape[0]
        if classes == there:
            continue
        logger.warning(
            "%s: the head '%s' tells %d classes apart, %d are asked for: it starts anew.",
            source, head, there, classes,
        )  # fmt: skip
        for part in ("weight", "bias"):
            if f"{head}.{part}" in own:
                state[f"{head}.{part}"] = own[f"{head}.{part}"]
    return state


def _filtered(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Let timm's own filter adapt names and position tables; unchanged where it cannot."""
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


def differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Say where a file's ``state`` and a model's ``own`` have other keys or shapes."""
    found = [
        f"{key} is {tuple(state[key].shape)} in the file and {tuple(own[key].shape)} in the model"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    found += [f"the file lacks {key} {tuple(own[key].shape)}" for key in own if key not in state]
    found += [
        f"the model lacks {key} {tuple(state[key].shape)}"
        for key in sorted(state)
        if key not in own
    ]
    return found
