"""What ``model`` makes, on disk: safetensors and JSON in a folder, whole or not at all.

torchao's own safetensors code is a prototype and keeps no architecture; this reads back bit for
bit.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quietvit
from quietvit.classes import name_classes
from quietvit.deployment.extras import need
from quietvit.deployment.facts import Facts
from quietvit.deployment.for_torchao.model import IntegerLinear, TorchAO, int8_tensor, to_torchao
from quietvit.errors import QuietvitError
from quietvit.quantization import QuantizedModel
from quietvit.quantization.architecture import build, compare_weights, set_dtypes
from quietvit.quantization.folder import FolderFormat
from quietvit.tracing import plain_copy

FORMAT = FolderFormat(
    "quietvit torchao model",
    version=1,
    facts="torchao.json",
    earlier="export for torchao",
    suffix=".torchao",
    missing="give the folder that 'quietvit export --to torchao' wrote",
    damaged="export it again",
    foreign="was not written by 'quietvit export --to torchao'",
    outdated="export it again",
)
PARTS = ("codes", "scale", "input_scale", "input_zero_point")


def save_torchao(
    made: TorchAO, path: str | Path, *, facts: Facts | None = None, force: bool = False
) -> Path:
    """Write ``path``, a folder with ``model.safetensors`` and ``torchao.json``; returns it.

    ``facts`` travel along. The folder appears whole. Raises QuietvitError where ``path`` exists:
    with ``force`` an earlier export is replaced, any other file or folder is refused all the same.
    """
    path = Path(path)
    FORMAT.refuse(path, force)
    tensors, int8 = {}, {}
    for name, tensor in made.model.state_dict().items():
        parts = _parts(tensor)
        if parts is None:
            tensors[name] = tensor
            continue
        int8[name] = [part for part in PARTS if parts[part] is not None]
        tensors |= {f"{name}:{part}": parts[part] for part in int8[name]}
    content = {
        "architecture": made.architecture,
        "model_class": type(made.model).__name__,
        "dtypes": {name: str(tensor.dtype) for name, tensor in tensors.items()},
        "int8": int8,
        "extended": [n for n, m in made.model.named_modules() if isinstance(m, IntegerLinear)],
        "made": list(made.made),
        "integer": list(made.integer),
        "integer_share": made.integer_share,
        "left_float": [list(entry) for entry in made.left_float],
        "facts": None if facts is None else json.loads(facts.to_json()),
        "versions": {"quietvit": quietvit.__version__, "torch": torch.__version__},
    }
    FORMAT.write(path, content, tensors)
    return path


def write_torchao(quantized: QuantizedModel, path: Path, facts: Facts, *, force: bool) -> Facts:
    """Convert and save a quantized model; returns its facts, with what is left in float."""
    made = to_torchao(quantized)
    why = dict(made.left_float)
    products = tuple(
        replace(product, why_float=why.get(product.name, product.why_float))
        for product in facts.products
    )
    facts = replace(facts, products=products)
    save_torchao(made, path, facts=facts, force=force)
    return facts


def load_torchao(path: str | Path, model: nn.Module | None = None) -> TorchAO:
    """Read what ``save_torchao`` wrote; its outputs are the same bit for bit.

    The result is called as the float model is, with images (N, C, H, W) after its transform:
    ``load_torchao(folder)(images)``.

    The architecture is built by timm or transformers where it came from there, else give ``model``,
    a float model of the same architecture with any weights (a copy of it is used).

    Raises QuietvitError for a missing extra, a missing, truncated or foreign file, and a model of
    another architecture, naming the first keys that differ.
    """
    need("torchao")
    path = Path(path)
    content, tensors = FORMAT.read(path)
    if model is None and content.get("architecture") is None:
        raise QuietvitError(
            f"{path} holds a {content.get('model_class')} that neither timm nor transformers build "
            "by name; build the architecture yourself and give it: "
            "load_torchao(path, model=my_model)."
        )
    try:
        own = build(path, content) if model is None else plain_copy(model)
        own.eval()
        for name in content["made"]:
            _set(own, name, tensors[name])
        parts = {f"{name}:{part}" for name, held in content["int8"].items() for part in held}
        state = {name: t for name, t in tensors.items() if name not in parts}
        codes = {name: tensors[f"{name}:codes"] for name in content["int8"]}
        for name in content["extended"]:
            ends = [tensors.get(f"{name}.{what}") for what in ("low", "high", "offset")]
            module = own.get_submodule(name)
            assert isinstance(module, nn.Linear)
            IntegerLinear.in_place_of(module, *ends)
            if ends[2] is not None:
                codes[f"{name}.weight"] = codes[f"{name}.weight"][:-1]
        compare_weights(path, own, state | codes)
        set_dtypes(own, content["dtypes"])
        own.load_state_dict(state, strict=False)
        for name in content["int8"]:
            given = [tensors.get(f"{name}:{part}") for part in PARTS]
            assert given[0] is not None
            assert given[1] is not None
            _set(own, name, int8_tensor(given[0], given[1], *given[2:]))
        for parameter in own.parameters():
            parameter.requires_grad_(False)
        if content["facts"] is not None:
            name_classes(own, content["facts"]["labels"])
        left = tuple((site, why) for site, why in content["left_float"])
        integer, made = tuple(content["integer"]), tuple(content["made"])
        share, architecture = content["integer_share"], content["architecture"]
        return TorchAO(own, integer, share, left, made, architecture)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        raise QuietvitError(
            f"{path} is not consistent ({type(error).__name__}: {error}); it was changed or cut "
            "short after it was written. Export it again."
        ) from error


def facts_of_folder(path: Path) -> Facts:
    """The facts that travel in a folder. Raises QuietvitError where there are none."""
    content = FORMAT.read(path)[0]
    return Facts.from_json(json.dumps(content["facts"]), path)


def _parts(tensor: Tensor) -> dict[str, Any] | None:
    """The tensors inside an Int8Tensor, by ``PARTS``; None for a plain tensor."""
    codes = getattr(tensor, "qdata", None)
    if codes is None:
        return None
    whole: Any = tensor
    values = codes, whole.scale, whole.act_quant_scale, whole.act_quant_zero_point
    return dict(zip(PARTS, values, strict=True))


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    module, _, attribute = name.rpartition(".")
    parameter = nn.Parameter(tensor, requires_grad=False)
    model.get_submodule(module).register_parameter(attribute, parameter)
