"""Quantized models on disk: a folder of safetensors and JSON, written atomically.

A weight is stored as int8 or int16 codes if the codes reproduce it exactly, else as float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quietvit
from quietvit.classes import facts_of_names, take_names
from quietvit.errors import QuietvitError
from quietvit.plugins import METHODS, how_to_get, load_plugins, origin_of
from quietvit.quantization.adjustments import (
    Adjustment,
    Compensation,
    build_adjustment,
    module_key,
)
from quietvit.quantization.architecture import (
    all_tensors,
    architecture_of,
    build,
    compare_sites,
    compare_weights,
    preprocessing_of,
    set_dtypes,
    signature,
)
from quietvit.quantization.coverage import Coverage
from quietvit.quantization.folder import FolderFormat
from quietvit.quantization.method import Method, get_method, list_methods
from quietvit.quantization.quantizers import Quantizer, build_quantizer
from quietvit.quantization.slot import Slot
from quietvit.tracing import Site, Trace, plain_copy
from quietvit.tracing import trace as trace_model

FORMAT = FolderFormat(
    "quietvit quantized model",
    version=2,
    facts="quantization.json",
    earlier="save of quietvit",
    suffix=".qvit",
    missing="give the folder that QuantizedModel.save wrote",
    damaged="save it again",
    foreign="was not written by quietvit",
    outdated="load it with the version that wrote it",
)


@dataclass(frozen=True)
class Contents:
    """A saved model: quantizers by slot, adjustments by site, compensations by block."""

    model: nn.Module
    trace: Trace
    method: Method
    quantizers: Mapping[Slot, Quantizer]
    adjustments: Mapping[str, Adjustment]
    compensations: Mapping[str, Compensation]
    input_shape: tuple[int, ...]
    notes: tuple[str, ...]
    origin: Mapping[str, Any] | None = None

    def modules(self) -> dict[str, nn.Module]:
        """All modules except the model, by the prefix of their tensors in the file."""
        return {
            **{_quantizer_prefix(slot): q for slot, q in self.quantizers.items()},
            **{_prefix("adjustments", name): a for name, a in self.adjustments.items()},
            **{_prefix("compensations", name): c for name, c in self.compensations.items()},
        }


def _quantizer_prefix(slot: Slot) -> str:
    return f"quantizers.{slot.key}."


def _prefix(part: str, name: str) -> str:
    return f"{part}.{module_key(name)}."


def write(path: Path, contents: Contents, used: Mapping[str, Tensor], coverage: Coverage) -> None:
    """Write ``path``, see ``QuantizedModel.save``; ``used``: each site's actual weight, by name."""
    model = contents.model
    codes = _weight_codes(contents, used)
    tensors = {f"codes.{name}": stored for name, (stored, _) in codes.items()}
    for name, tensor in model.state_dict().items():
        if name not in codes:
            tensors[f"model.{name}"] = tensor
    for prefix, module in contents.modules().items():
        for name, tensor in module.state_dict().items():
            tensors[f"{prefix}{name}"] = tensor
    facts = {
        "method": {"name": contents.method.name, "fields": contents.method.model_dump()},
        "plugins": _plugins_of(contents.method),
        "architecture": architecture_of(model, contents.input_shape),
        "model_class": type(model).__name__,
        "input_shape": list(contents.input_shape),
        "sites": signature(contents.trace),
        **parts_of(contents.quantizers, contents.adjustments, contents.compensations),
        "coded_weights": {name: slots for name, (_, slots) in codes.items()},
        "dtypes": {name: str(t.dtype) for name, t in all_tensors(model)},
        "preprocessing": preprocessing_of(model),
        **facts_of_names(model),
        "notes": list(contents.notes),
        "calibration": contents.origin,
        "coverage": coverage.to_dict(),
        "versions": {"quietvit": quietvit.__version__, "torch": torch.__version__},
    }
    FORMAT.write(path, facts, tensors)


def _plugins_of(method: Method) -> dict[str, dict[str, str]]:
    """Return the origin of each method that is not quietvit's own, base methods included."""
    found = {}
    own: Method | None = method
    while own is not None:
        origin = origin_of(type(own))
        if origin is not None:
            found[own.name] = origin
        own = getattr(own, "base", None)
    return found


def _refuse_without_plugins(path: Path, facts: Mapping[str, Any]) -> None:
    plugins = facts.get("plugins")  # earlier versions did not write it
    for name, origin in plugins.items() if isinstance(plugins, dict) else ():
        if name not in list_methods():
            broken = " ".join(load_plugins(METHODS))
            raise QuietvitError(
                f"{path} was quantized with the method {name!r} of {origin.get('module')}, which "
                f"is not part of quietvit. {how_to_get(origin)}. {broken}".rstrip()
            )


def read(path: Path, model: nn.Module | None) -> Contents:
    """Read the folder ``path``; see ``load``."""
    facts, tensors = FORMAT.read(path)
    _refuse_without_plugins(path, facts)
    try:
        method = get_method(facts["method"]["name"])(**facts["method"]["fields"])
        own = build(path, facts) if model is None else plain_copy(model)
        own.eval()
        take_names(own, facts)
        set_dtypes(own, facts["dtypes"])
        state = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
        coded = {n.removeprefix("codes."): t for n, t in tensors.items() if n.startswith("codes.")}
        compare_weights(path, own, state | coded)
        trace = trace_model(own, zero_image(own, facts["input_shape"]))
        compare_sites(path, trace, facts["sites"])
        quantizers, adjustments, compensations = build_parts(facts, trace)
        for slot, quantizer in quantizers.items():
            _fill(quantizer, _quantizer_prefix(slot), tensors)
        for name, adjustment in adjustments.items():
            _fill(adjustment, _prefix("adjustments", name), tensors)
        for name, compensation in compensations.items():
            _fill(compensation, _prefix("compensations", name), tensors)
        for name, stored in coded.items():
            dtype = own.state_dict()[name].dtype
            whole = torch.zeros(stored.shape, dtype=dtype)
            for site, index in facts["coded_weights"][name]:
                slot = Slot(trace[site], index)
                values = _decode(stored, slot.site, quantizers[slot], dtype)
                _view(slot.site).scatter_add_(whole, values)
            state[name] = whole
        own.load_state_dict(state)
        input_shape, notes = tuple(facts["input_shape"]), tuple(facts["notes"])
        origin = facts.get("calibration")  # earlier versions did not write it
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise QuietvitError(
            f"{path} is not consistent ({type(error).__name__}: {error}); it was changed or cut "
            "short after it was written. Save the model again."
        ) from error
    return Contents(
        own, trace, method, quantizers, adjustments, compensations, input_shape, notes, origin
    )


Parts = tuple[dict[Slot, Quantizer], dict[str, Adjustment], dict[str, Compensation]]


def parts_of(
    quantizers: Mapping[Slot, Quantizer],
    adjustments: Mapping[str, Adjustment],
    compensations: Mapping[str, Compensation],
) -> dict[str, Any]:
    """Return, as JSON, what ``build_parts`` builds the same modules from, without tensors."""
    return {
        "quantizers": [
            {
                "site": slot.site.name,
                "index": slot.index,
                "kind": quantizer.kind,
                "config": quantizer.config(),
            }
            for slot, quantizer in quantizers.items()
        ],
        "adjustments": [
            {"site": name, "kind": adjustment.kind, "config": adjustment.config()}
            for name, adjustment in adjustments.items()
        ],
        "compensations": [
            {"block": name, "config": compensation.config()}
            for name, compensation in compensations.items()
        ],
    }


def build_parts(facts: Mapping[str, Any], trace: Trace) -> Parts:
    """Build what ``parts_of`` described, with placeholders for its tensors."""
    sites = {site.name: site for site in trace.sites}
    return (
        {
            Slot(sites[entry["site"]], entry["index"]): build_quantizer(
                entry["kind"], entry["config"]
            )
            for entry in facts["quantizers"]
        },
        {
            entry["site"]: build_adjustment(entry["kind"], entry["config"])
            for entry in facts["adjustments"]
        },
        {
            entry["block"]: Compensation.from_config(entry["config"])
            for entry in facts["compensations"]
        },
    )


def _fill(module: nn.Module, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    module.load_state_dict(
        {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    )


def _view(site: Site) -> Any:
    return site.weight


def _weight_codes(
    contents: Contents, used: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, list[tuple[str, int]]]]:
    """Return codes in the parameter's shape, for each parameter that its codes reproduce entirely.

    A parameter stays float if a part of it is float, or if two sites disagree about an entry. It
    also stays float if a site multiplies by something else, such as a standardized weight. Example:
    three sites that each read d rows of one (3d, d) parameter fill its codes together.
    """
    model = contents.model
    by_name: dict[str, list[tuple[Slot, Quantizer]]] = {}
    for slot, quantizer in contents.quantizers.items():
        view = slot.site.weight
        if slot.is_weight and view is not None and not view.transposed and not view.diagonal:
            by_name.setdefault(view.parameter_name, []).append((slot, quantizer))
    state = model.state_dict()
    coded: dict[str, tuple[Tensor, list[tuple[str, int]]]] = {}
    for name, readers in by_name.items():
        if name not in state:
            continue
        spans = [high - low for low, high in (q.code_range for _, q in readers)]
        dtype = torch.int8 if max(spans) < 1 << 8 else torch.int16
        stored = torch.zeros(state[name].shape, dtype=dtype)
        filled = torch.zeros(state[name].shape, dtype=torch.int32)
        slots = []
        for slot, quantizer in readers:
            view, shape = _view(slot.site), slot.site.weight_shape
            weight = view.read(model).detach().reshape(shape)
            if slot.site.name not in used or not torch.equal(used[slot.site.name], weight):
                break
            codes = (quantizer.codes(weight).cpu() - _middle(quantizer)).to(dtype).flatten(1)
            view.scatter_add_(stored, codes)
            view.scatter_add_(filled, torch.ones_like(codes, dtype=torch.int32))
            slots.append((slot.site.name, slot.index))
            fake = quantizer(weight)
            back = _decode(stored, slot.site, quantizer, weight.dtype).to(fake.device)
            if not torch.equal(quantizer(back.view_as(fake)), fake):
                break
        else:
            if bool((filled == 1).all()):
                coded[name] = (stored, slots)
    return coded


def _decode(stored: Tensor, site: Site, quantizer: Quantizer, dtype: torch.dtype) -> Tensor:
    """Return the values of the site's part of a parameter, (rows, columns)."""
    view = _view(site)
    codes = view.select(stored).to(torch.int32).reshape(site.weight_shape) + _middle(quantizer)
    device = next((b.device for b in quantizer.buffers()), codes.device)
    return quantizer.dequantize(codes.to(device), dtype).flatten(1).cpu()


def _middle(quantizer: Quantizer) -> int:
    """Offset to subtract from codes, so that they fit a signed integer of the same width."""
    low, high = quantizer.code_range
    return (low + high + 1) // 2


def zero_image(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """Return a batch of one image of zeros, on the model's device and in its dtype."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(1, *shape, device=like.device, dtype=like.dtype)
