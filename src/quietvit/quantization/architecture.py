"""How timm or transformers builds a saved model, and whether another model has the same structure.

``storage`` reads and writes the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.tracing import Site, Trace

_IDLE = ("Dropout", "DropPath", "Identity")


def signature(trace: Trace) -> list[list[Any]]:
    """Name, kind and multiply-accumulates of every matrix product."""
    return [[site.name, site.kind, _fixed_macs(site)] for site in trace.matmuls]


def _fixed_macs(site: Site) -> int:
    """Multiply-accumulates that do not depend on the image.

    The rows of a matrix are images, or boxes that a detector proposes in one. Their number is no
    part of the architecture, so one row counts.
    """
    shape = site.operands[0].shape if site.kind == "linear" and site.operands else ()
    return site.macs if len(shape) != 2 else shape[-1] * site.output_shape[-1]


def _modules(model: nn.Module) -> list[tuple[str, str, str]]:
    """All modules, except those that do nothing in eval mode."""
    return [
        (name, type(module).__name__, module.extra_repr())
        for name, module in model.named_modules()
        if type(module).__name__ not in _IDLE
    ]


def architecture_of(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Any] | None:
    """Return how timm or transformers builds this exact structure, or None.

    For timm that is the name and the arguments, for transformers the class and its config. Neither
    needs the folder or the weights that the model came from.
    """
    if type(model).__module__.startswith("transformers.models."):
        return _of_transformers(model)
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
    noted = (config or {}).get("arguments")  # as ``quietvit.data.create_model`` notes them
    if isinstance(noted, dict) and _is_json(noted):
        candidates.insert(0, noted)
    wanted = _structure(model)
    for arguments in candidates:
        architecture = {"library": "timm", "name": name, "arguments": arguments}
        built = _unweighted(architecture)
        if built is not None and _structure(built) == wanted:
            return architecture
    return None


def _of_transformers(model: nn.Module) -> dict[str, Any] | None:
    config: Any = getattr(model, "config", None)
    content = config.to_dict() if hasattr(config, "to_dict") else None
    if content is None or not _is_json(content):
        return None
    architecture = {
        "library": "transformers",
        "name": type(model).__name__,
        "arguments": json.loads(json.dumps(content)),
        "attention": getattr(config, "_attn_implementation", None),
        "without": ["pooler"] if getattr(model, "pooler", model) is None else [],
    }
    built = _unweighted(architecture)
    return architecture if built is not None and _structure(built) == _structure(model) else None


def _structure(model: nn.Module) -> tuple[dict[str, tuple[int, ...]], list[tuple[str, str, str]]]:
    return {n: tuple(t.shape) for n, t in model.state_dict().items()}, _modules(model)


def _is_json(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) is not None)
    except (TypeError, ValueError):
        return False


def _unweighted(architecture: dict[str, Any]) -> nn.Module | None:
    """Build the model, on the meta device if possible (no memory for weights); None if it fails.

    Some models read a number from a tensor while they are built, such as the drop path rates in
    older timm. They need the CPU. The state of the random generators is restored.
    """
    for device in ("meta", "cpu"):
        try:
            with torch.random.fork_rng(devices=[]), torch.device(device):
                return _built(architecture)
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError):
            continue
    return None


def _built(architecture: dict[str, Any]) -> nn.Module:
    """Build the model with random weights. Raises what the library raises."""
    name, arguments = architecture["name"], architecture["arguments"]
    if architecture["library"] == "timm":
        import timm

        return timm.create_model(name, pretrained=False, **arguments)  # type: ignore[no-any-return]
    import transformers

    kind = getattr(transformers, name)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise TypeError(f"transformers.{name} is not a model")
    config_class: Any = kind.config_class
    config = config_class.from_dict(arguments)
    if architecture.get("attention") is not None:
        config._attn_implementation = architecture["attention"]
    model: nn.Module = kind(config)
    for part in architecture.get("without", ()):
        setattr(model, part, None)
    return model


def preprocessing_of(model: nn.Module) -> dict[str, Any] | None:
    """timm's data config of the model (mean, std, size, interpolation); None if it has none."""
    if not isinstance(getattr(model, "pretrained_cfg", None), dict):
        return None
    from timm.data.config import resolve_model_data_config

    config: dict[str, Any] = resolve_model_data_config(model)
    return json.loads(json.dumps(config))  # type: ignore[no-any-return]


def build(path: Path, facts: dict[str, Any]) -> nn.Module:
    """Build the architecture from ``architecture_of``. Raises QuietvitError if that was None."""
    architecture = facts["architecture"]
    if architecture is None:
        raise QuietvitError(
            f"{path} holds a {facts['model_class']} that neither timm nor transformers build by "
            "name; build the architecture yourself and give it: quietvit.load(path, "
            "model=my_model). On the command line, --model takes hf:FOLDER or a training run."
        )
    with torch.random.fork_rng(devices=[]):
        try:
            built = _built(architecture)
        except ImportError as error:
            raise QuietvitError(
                f"{path} holds a model of transformers, which cannot be imported ({error}); "
                "pip install 'quietvit[transformers]'."
            ) from error
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise QuietvitError(
                f"{path} holds a {facts['model_class']} that this {architecture['library']} does "
                f"not build ({type(error).__name__}: {error}); install the version that it was "
                "saved with, or give the model: quietvit.load(path, model=my_model)."
            ) from error
    prepared = facts.get("preprocessing")
    if architecture["library"] == "timm":
        config = {**getattr(built, "pretrained_cfg", {}), **(prepared or {})}
        config["arguments"] = architecture["arguments"]
        built.pretrained_cfg = config  # type: ignore[assignment]
    elif prepared is not None:
        built.pretrained_cfg = dict(prepared)  # type: ignore[assignment]
    return built


def all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all parameters and buffers by name, including buffers outside the state dict."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def set_dtypes(model: nn.Module, dtypes: dict[str, str]) -> None:
    """Convert parameters and buffers to the dtypes they had when they were saved."""
    for name, tensor in all_tensors(model):
        dtype = getattr(torch, dtypes.get(name, "torch.float32").removeprefix("torch."))
        if tensor.dtype != dtype and name in dtypes:
            tensor.data = tensor.data.to(dtype)


def compare_weights(path: Path, model: nn.Module, stored: dict[str, Tensor]) -> None:
    """Raise QuietvitError with the first differing keys if names or shapes differ."""
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
    """Raise QuietvitError with the first difference if the matrix products differ."""
    own = signature(trace)
    # Files of earlier versions count every row of a linear.
    counted = [[site.name, site.kind, site.macs] for site in trace.matmuls]
    for mine, whole, theirs in zip(own, counted, stored, strict=False):
        if theirs not in (mine, whole):
            raise QuietvitError(
                f"{path} was saved from a model whose matrix products differ from this one's, "
                f"first {theirs} in the file against {mine} here (name, kind, multiply-"
                "accumulates). Build it with the same arguments and "
                "library version, and give it: quietvit.load(path, model=my_model)."
            )
    if len(own) != len(stored):
        raise QuietvitError(
            f"{path} was saved from a model with {len(stored)} matrix products, this one has "
            f"{len(own)}; build it with the same arguments and library "
            "version, and give it: quietvit.load(path, model=my_model)."
        )
