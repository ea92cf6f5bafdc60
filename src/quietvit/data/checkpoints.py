"""Weights out of checkpoint files of many kinds: tensors by name, nothing else, no pickled code.

Which state dict of a file is taken is decided here; whether it fits a model, in ``weights``.
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

# timm's own loader takes the first that is there; the others are those of other trainers.
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict")
_CONTAINERS = (*_AVERAGES, "state_dict", "model", "model_state_dict", "teacher", "module")
# torch puts these into the names of a compiled, sharded or checkpointed module.
_INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict, name -> tensor, from safetensors or ``torch.load(weights_only=True)``.

    Of a checkpoint that holds several the moving average is taken, as timm's loader does
    (``state_dict_ema``, then ``model_ema``), else ``state_dict``, ``model``, DINO's ``teacher`` and
    the like; a log line says which wherever there is a choice. Wrappers of torch.compile and FSDP
    are taken off the names.

    Raises:
        QuietvitError: the file is missing, damaged, or holds anything but tensors by name.
    """
    path = Path(path).expanduser()
    _check_kind(path)
    content = _loaded(path)
    taken: list[str] = []
    while isinstance(content, Mapping) and not _is_state(content):
        held = [str(key) for key, value in content.items() if _holds_tensors(value)]
        key = next((name for name in _CONTAINERS if name in held), None)
        if key is None:
            raise _unknown(path, content, held, taken)
        others = [name for name in held if name != key]
        if others or key in _AVERAGES:
            why = ", the moving average," if key in _AVERAGES else ""
            besides = f"; left out: {', '.join(others)}" if others else ""
            logger.warning("%s: the weights under '%s'%s are taken%s.", path, key, why, besides)
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
    """Return what a weights file of ours says of class names (``classes.KEY``), else nothing."""
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
            f"the weights {path} are a folder; name the file in it, such as model.safetensors. A "
            f"transformers model is given as a whole: 'hf:{path}' in place of the model's name."
        )
    if not path.is_file():
        raise QuietvitError(f"the weights {path} do not exist; check the path.")
    if path.name.endswith(".index.json"):
        raise QuietvitError(
            f"{path} lists the parts of weights that are stored in several files; load the model "
            "with the library that wrote it, and save its state_dict() as one safetensors file."
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
        # timm's and DeiT's trainers keep their arguments beside the weights; they are mere values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        objects = _foreign_objects(path)
        reason = f"it holds objects that are no tensors: {objects}" if objects else _first(error)
        raise QuietvitError(f"{path} could not be read as weights ({reason}); {remedy}.") from error


def _foreign_objects(path: Path) -> str:
    """Name the first classes and functions that a file would make torch run."""
    if path.suffix == ".safetensors":
        return ""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # it is no file of torch at all
        return ""
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _is_state(content: Mapping[Any, Any]) -> bool:
    """Whether there are tensors by name, and none of the known entries that hold more."""
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
    path: Path, content: Mapping[Any, Any], held: list[str], taken: list[str]
) -> QuietvitError:
    inside = "".join(f" under '{key}'" for key in taken)
    if held:
        what = f"state dicts under {', '.join(map(repr, held[:5]))}, none of which is known as the"
        return QuietvitError(
            f"{path} holds{inside} {what} model's; save the one that is, alone, as safetensors."
        )
    entries = ", ".join(f"{key!r} ({type(v).__name__})" for key, v in list(content.items())[:5])
    return QuietvitError(
        f"{path} holds no tensors by name{inside}, but {entries or 'nothing'}; save the model's "
        "state_dict()."
    )


def _bare(key: str) -> str:
    for wrapper in _INSIDE:
        key = key.replace(wrapper, "")
    return key
