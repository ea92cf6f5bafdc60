"""Which model a saved one is: how timm builds it, and whether a given one is the same.

Reading and writing the files is ``storage``'s.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.tracing import Trace

_IDLE = ("Dropout", "DropPath", "Identity")


def signature(trace: Trace) -> list[list[Any]]:
    """Name, kind and multiply-accumulates of every matrix product."""
    return [[site.name, site.kind, site.macs] for site in trace.matmuls]


def _modules(model: nn.Module) -> list[tuple[str, str, str]]:
    """What a model is made of, but for modules that do nothing in eval mode."""
    return [
        (name, type(module).__name__, module.extra_repr())
        for name, module in model.named_modules()
        if type(module).__name__ not in _IDLE
    ]


def architecture_of(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Any] | None:
    """timm's name and arguments that build this very structure, or None."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    name = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(name, str):
        return None

    plain: dict[str, Any] = {}
    if isinstance(classes := getattr(model, "num_classes", None), int):
        plain["num_classes"] = classes
    if len(shape) == 3 and shape[0] != 3:
        plain["in_chans"] = shape[0]
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    candidates = [plain]
    if size is not None:
        candidates.insert(0, plain | {"img_size": list(size)})
    given = (config or {}).get("arguments")  # as ``quietvit.data.create_model`` notes them
    if isinstance(given, dict) and _is_json(given):
        candidates.insert(0, given)
    wanted = {n: tuple(t.shape) for n, t in model.state_dict().items()}, _modules(model)
    for arguments in candidates:
        built = _unweighted(name, arguments)
        if built is None:
            continue
        if ({n: tuple(t.shape) for n, t in built.state_dict().items()}, _modules(built)) == wanted:
            return {"library": "timm", "name": name, "arguments": arguments}
    return None


def _is_json(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) is not None)
    except (TypeError, ValueError):
        return False


def _unweighted(name: str, arguments: dict[str, Any]) -> nn.Module | None:
    """timm's model, without memory for its weights where its code allows that; None if it refuses.

    Models that read a number out of a tensor while they are built (drop path rates, in older
    releases of timm) cannot be built on the meta device. Random generators are left as they were.
    """
    import timm

    for device in ("meta", "cpu"):
        try:
            with torch.random.fork_rng(devices=[]), torch.device(device):
                return timm.create_model(name, pretrained=False, **arguments)  # type: ignore[no-any-return]
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            continue
    return None


def preprocessing_of(model: nn.Module) -> dict[str, Any] | None:
    """timm's data config of the model (mean, std, size, interpolation), None if it has none."""
    if not isinstance(getattr(model, "pretrained_cfg", None), dict):
        return None
    from timm.data.config import resolve_model_data_config

    found: dict[str, Any] = resolve_model_data_config(model)
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def build(path: Path, facts: dict[str, Any]) -> nn.Module:
    """Build the architecture that ``architecture_of`` found; QuietvitError where it found none."""
    architecture = facts["architecture"]
    if architecture is None:
        raise QuietvitError(
            f"{path} holds a {facts['model_class']} that timm does not build by name; build the "
            "architecture yourself and give it: quietvit.load(path, model=my_model)."
        )
    import timm

    with torch.random.fork_rng(devices=[]):
        built: nn.Module = timm.create_model(
            architecture["name"], pretrained=False, **architecture["arguments"]
        )
    config = {**getattr(built, "pretrained_cfg", {}), **(facts.get("preprocessing") or {})}
    config["arguments"] = architecture["arguments"]
    built.pretrained_cfg = config  # type: ignore[assignment]
    return built


def all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, buffers that are not in the state dict included."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def set_dtypes(model: nn.Module, dtypes: dict[str, str]) -> None:
    """Give parameters and buffers the data types they were saved in."""
    for name, tensor in all_tensors(model):
        dtype = getattr(torch, dtypes.get(name, "torch.float32").removeprefix("torch."))
        if tensor.dtype != dtype and name in dtypes:
            tensor.data = tensor.data.to(dtype)


def compare_weights(path: Path, model: nn.Module, stored: dict[str, Tensor]) -> None:
    """Raise QuietvitError, naming the first keys that differ, unless names and shapes agree."""
    have = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    want = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    differing = [
        f"{name} ({have.get(name, 'absent')} in the model, {want.get(name, 'absent')} in the file)"
        for name in dict.fromkeys([*want, *have])
        if have.get(name) != want.get(name)
    ]
    if differing:
        raise QuietvitError(
            f"{path} holds weights of another architecture than this {type(model).__name__}; "
            f"{len(differing)} keys differ, first {'; '.join(differing[:3])}. Give the model that "
            "was quantized, with the same image size and number of classes."
        )


def compare_sites(path: Path, trace: Trace, stored: list[list[Any]]) -> None:
    """Raise QuietvitError, naming the first, unless both make the same matrix products."""
    found = signature(trace)
    for mine, theirs in zip(found, stored, strict=False):
        if mine != theirs:
            raise QuietvitError(
                f"{path} was saved from a model whose matrix products differ from this one's, "
                f"first {theirs} in the file against {mine} here (name, kind, multiply-"
                "accumulates). Build it with the same arguments and "
                "library version, and give it: quietvit.load(path, model=my_model)."
            )
    if len(found) != len(stored):
        raise QuietvitError(
            f"{path} was saved from a model with {len(stored)} matrix products, this one has "
            f"{len(found)}; build it with the same arguments and library "
            "version, and give it: quietvit.load(path, model=my_model)."
        )
