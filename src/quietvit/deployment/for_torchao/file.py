"""``TorchAO``: a model with torchao's linears, saved as a folder of safetensors and JSON.

It loads bit for bit. torchao's own safetensors code is a prototype and stores no architecture.
``model`` converts a quantized model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quietvit
from quietvit.classes import name_classes
from quietvit.deployment.extras import need
from quietvit.deployment.facts import Facts
from quietvit.deployment.for_torchao.linear import INSTALL, IntegerLinear, int8_tensor
from quietvit.errors import QuietvitError
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


@dataclass(frozen=True, repr=False)
class TorchAO:
    """A torch model with integer linears, called like the float model: ``made(images)``.

    ``model`` is float except for linears whose weight is torchao's ``Int8Tensor``. ``integer``
    lists the sites that multiply int8 by int8, ``integer_share`` their share of all
    multiply-accumulates. ``left_float`` lists with reasons all other products, and operands whose
    quantizer is not applied here. ``made`` lists parameters that the float model does not have.
    ``architecture`` tells how timm or transformers builds the float model; None if neither does.
    """

    model: nn.Module
    integer: tuple[str, ...]
    integer_share: float
    left_float: tuple[tuple[str, str], ...]
    made: tuple[str, ...] = ()
    architecture: dict[str, Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of ``model`` without gradients."""
        with torch.no_grad():
            return self.model(*args, **kwargs)

    def __repr__(self) -> str:
        share = 100 * self.integer_share
        return f"TorchAO({type(self.model).__name__}, {share:.2f} % in integers)"

    def __str__(self) -> str:
        lines = [
            f"{100 * self.integer_share:.2f} % of the multiply-accumulates in integers, "
            f"{len(self.integer)} linears"
        ]
        return "\n".join([*lines, *(f"float: {site}, {why}" for site, why in self.left_float)])

    def save(self, path: str | Path, force: bool = False) -> Path:
        """Write the folder ``path`` for ``load_torchao`` and return it.

        Raises QuietvitError if ``path`` exists. ``force`` replaces an earlier export, but no other
        file or folder.
        """
        path = Path(path)
        FORMAT.refuse(path, force)
        write_folder(self, path)
        return path


def write_folder(converted: TorchAO, path: Path, facts: Facts | None = None) -> None:
    """Write ``model.safetensors`` and ``torchao.json`` (with the facts) to the folder ``path``.

    The folder appears only when it is complete, and replaces an earlier one.
    """
    tensors, int8 = {}, {}
    for name, tensor in converted.model.state_dict().items():
        parts = _parts(tensor)
        if parts is None:
            tensors[name] = tensor
            continue
        int8[name] = [part for part in PARTS if parts[part] is not None]
        tensors |= {f"{name}:{part}": parts[part] for part in int8[name]}
    content = {
        "architecture": converted.architecture,
        "model_class": type(converted.model).__name__,
        "dtypes": {name: str(tensor.dtype) for name, tensor in tensors.items()},
        "int8": int8,
        "extended": [n for n, m in converted.model.named_modules() if isinstance(m, IntegerLinear)],
        "made": list(converted.made),
        "integer": list(converted.integer),
        "integer_share": converted.integer_share,
        "left_float": [list(entry) for entry in converted.left_float],
        "facts": None if facts is None else json.loads(facts.to_json()),
        "versions": {"quietvit": quietvit.__version__, "torch": torch.__version__},
    }
    FORMAT.write(path, content, tensors)


def load_torchao(path: str | Path, model: nn.Module | None = None) -> TorchAO:
    """Read a folder written by an export or ``TorchAO.save``. Outputs are equal bit for bit.

    Call the result like the float model, with transformed images (N, C, H, W):
    ``load_torchao(folder)(images)``.

    timm or transformers builds the architecture if it comes from there. Otherwise give ``model``,
    a float model of the same architecture with any weights. It is copied.

    Raises QuietvitError for a missing extra, a missing, truncated or foreign file, or another
    architecture (with the first keys that differ).
    """
    need("torchao", install=INSTALL)
    path = Path(path)
    content, tensors = FORMAT.read(path)
    if model is None and content.get("architecture") is None:
        raise QuietvitError(
            f"{path} holds a {content.get('model_class')}, which neither timm nor transformers "
            "builds by name. Build the float model yourself and give it: "
            "load_torchao(path, model=my_model)."
        )
    try:
        own = build(path, content) if model is None else plain_copy(model)
        own.eval()
        for name in content["made"]:
            _set(own, name, tensors[name])
        parts = {f"{name}:{part}" for name, kept in content["int8"].items() for part in kept}
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
            pieces = [tensors.get(f"{name}:{part}") for part in PARTS]
            assert pieces[0] is not None
            assert pieces[1] is not None
            _set(own, name, int8_tensor(pieces[0], pieces[1], *pieces[2:]))
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
            f"{path} is not consistent ({type(error).__name__}: {error}); it was changed or "
            "truncated after it was written. Export it again."
        ) from error


def _parts(tensor: Tensor) -> dict[str, Any] | None:
    """Return the tensors inside an Int8Tensor by ``PARTS``, or None for a plain tensor."""
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
