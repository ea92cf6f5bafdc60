"""Read weights from checkpoint files of many kinds: tensors by name, and no pickled code.

This module selects the state dict in a file; ``weights`` checks whether it fits a model.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quietvit.classes import names_in
from quietvit.errors import QuietvitError
from quietvit.files import refuse_other_bytes

logger = logging.getLogger("quietvit")

# In order of preference. timm's loader uses the first two; the others come from other trainers.
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict")
_CONTAINERS = (*_AVERAGES, "state_dict", "model", "model_state_dict", "teacher", "module")
# torch inserts these into the names of a compiled, sharded or checkpointed module.
_INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict, name -> tensor, from safetensors or ``torch.load(weights_only=True)``.

    If a checkpoint holds several, the moving average is used, as in timm's loader
    (``state_dict_ema``, then ``model_ema``); otherwise ``state_dict``, ``model``, DINO's
    ``teacher`` and the like. A log line reports each choice. Names lose the parts that
    torch.compile and FSDP insert.

    Raises:
        QuietvitError: the file is missing, damaged, or holds anything but tensors by name.
    """
    path = Path(path).expanduser()
    _check_kind(path)
    content = _loaded(path)
    taken: list[str] = []
    while isinstance(content, Mapping) and not _is_state(content):
        containers = [str(key) for key, value in content.items() if _holds_tensors(value)]
        key = next((name for name in _CONTAINERS if name in containers), None)
        if key is None:
            raise _unknown(path, content, containers, taken)
        others = [name for name in containers if name != key]
        if others or key in _AVERAGES:
            why = ", the moving average," if key in _AVERAGES else ""
            besides = f"; left out: {', '.join(others)}" if others else ""
            logger.warning("%s: the weights under '%s'%s are used%s.", path, key, why, besides)
        taken.append(key)
        content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise QuietvitError(f"{path} holds no tensors by name; save the model's state_dict().")
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise QuietvitError(
                f"{path} holds {type(value).__name__} under {key!r} where a tensor is expected; "
                "save the model's state_dict() alone."
            )
    return {_bare(str(key)): value for key, value in content.items()}


def class_names_in(path: str | Path) -> dict[str, Any]:
    """Return the class names (``classes.KEY``) in a weights file of quietvit, or {}."""
    path = Path(path).expanduser()
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return names_in(file.metadata())


def _check_kind(path: Path) -> None:
    refuse_other_bytes(path)
    if path.is_dir():
        raise QuietvitError(
            f"the weights {path} are a folder; name the file in it, such as model.safetensors. For "
            f"a transformers model, give the folder as the model's name: 'hf:{path}'."
        )
    if not path.is_file():
        raise QuietvitError(f"the weights {path} do not exist; check the path.")
    if path.name.endswith(".index.json"):
        raise QuietvitError(
            f"{path} is an index of weights that are stored in several files. Load the model with "
            "the library that wrote it, and save its state_dict() as one safetensors file."
        )


def _loaded(path: Path) -> Any:
    remedy = (
        "it must be safetensors, or a file that torch.load(weights_only=True) accepts: load it "
        "where you trust it, and save the model's state_dict() alone"
    )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # timm's and DeiT's trainers store their arguments beside the weights, as plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        objects = _foreign_objects(path)
        reason = f"it holds objects that are not tensors: {objects}" if objects else _first(error)
        raise QuietvitError(f"{path} could not be read as weights ({reason}); {remedy}.") from error


def _foreign_objects(path: Path) -> str:
    """Name the first classes and functions that loading the file would run."""
    if path.suffix == ".safetensors":
        return ""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            objects = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a torch file
        return ""
    return ", ".join(objects[:3]) + (f" and {len(objects) - 3} more" if len(objects) > 3 else "")


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _is_state(content: Mapping[Any, Any]) -> bool:
    """Whether a mapping holds tensors by name, and no known container of other tensors."""
    return any(isinstance(value, Tensor) for value in content.values()) and not any(
        _holds_tensors(content.get(key)) for key in _CONTAINERS
    )


def _holds_tensors(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    return any(
        isinstance(inner, Tensor) or (key in _CONTAINERS and _holds_tensors(inner))
        for key, inner in value.items()
    )


def _unknown(
    path: Path, content: Mapping[Any, Any], containers: list[str], taken: list[str]
) -> QuietvitError:
    inside = "".join(f" under '{key}'" for key in taken)
    if containers:
        shown = ", ".join(map(repr, containers[:5]))
        what = f"state dicts under {shown}, none of which is a known name"
        return QuietvitError(f"{path} holds{inside} {what}; save the model's state_dict() alone.")
    entries = ", ".join(f"{key!r} ({type(v).__name__})" for key, v in list(content.items())[:5])
    return QuietvitError(
        f"{path} holds no tensors by name{inside}, but {entries or 'nothing'}; save the model's "
        "state_dict()."
    )


def _bare(key: str) -> str:
    for wrapper in _INSIDE:
        key = key.replace(wrapper, "")
    return key
