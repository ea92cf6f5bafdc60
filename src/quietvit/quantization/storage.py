"""Quantized models on disk: a folder of safetensors and JSON, written whole or not at all.

Weights whose codes say everything are stored as int8 or int16 codes, all else as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import quietvit
from quietvit.classes import facts_of_names, take_names
from quietvit.errors import QuietvitError
from quietvit.quantization.adjustments import Compensation, build_adjustment
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
from quietvit.quantization.calibration import run_model
from quietvit.quantization.folder import FolderFormat
from quietvit.quantization.method import get_method
from quietvit.quantization.quantized import QuantizedModel, module_key
from quietvit.quantization.quantizers import Quantizer, build_quantizer
from quietvit.quantization.slot import Slot
from quietvit.tracing import Site, evaluating, plain_copy
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
PARTS = ("quantizers", "adjustments", "compensations")


def save(quantized: QuantizedModel, path: str | Path, force: bool = False) -> Path:
    """Write ``path``, a folder with ``model.safetensors`` and ``quantization.json``; returns it.

    The weights stored are the quantized ones: float weights behind them are not kept, but where a
    weight is shared, computed or transposed. Codes take one byte up to 8 bits, two above. The
    folder appears whole, under a temporary name first.

    Raises QuietvitError where ``path`` exists: with ``force`` an earlier save is replaced, any
    other file or folder is refused all the same.
    """
    path = Path(path)
    FORMAT.refuse(path, force)
    codes = _weight_codes(quantized)
    tensors = {f"codes.{name}": stored for name, (stored, _) in codes.items()}
    for name, tensor in quantized.model.state_dict().items():
        if name not in codes:
            tensors[f"model.{name}"] = tensor
    for part in PARTS:
        for name, tensor in getattr(quantized, part).state_dict().items():
            tensors[f"{part}.{name}"] = tensor
    dtypes = {name: str(t.dtype) for name, t in all_tensors(quantized.model)}
    facts = {
        "method": {"name": quantized.method.name, "fields": quantized.method.model_dump()},
        "architecture": architecture_of(quantized.model, quantized.input_shape),
        "model_class": type(quantized.model).__name__,
        "input_shape": list(quantized.input_shape),
        "sites": signature(quantized.trace),
        "quantizers": [
            {
                "site": slot.site.name,
                "index": slot.index,
                "kind": quantizer.kind,
                "config": quantizer.config(),
            }
            for slot, quantizer in _pairs(quantized)
        ],
        "adjustments": [
            {"site": name, "kind": adjustment.kind, "config": adjustment.config()}
            for name, adjustment in quantized.adjusted().items()
        ],
        "compensations": [
            {"block": name, "config": compensation.config()}
            for name, compensation in quantized.compensated().items()
        ],
        "coded_weights": {name: slots for name, (_, slots) in codes.items()},
        "dtypes": dtypes,
        "preprocessing": preprocessing_of(quantized.model),
        **facts_of_names(quantized.model),
        "notes": list(quantized.notes),
        "coverage": quantized.coverage.to_dict(),
        "versions": {"quietvit": quietvit.__version__, "torch": torch.__version__},
    }
    FORMAT.write(path, facts, tensors)
    return path


def load(path: str | Path, model: nn.Module | None = None) -> QuantizedModel:
    """Read what ``QuantizedModel.save`` wrote; its outputs are the same bit for bit.

    The architecture is built by timm or transformers where it came from there, else give ``model``,
    a float model of the same architecture with any weights (a copy of it is used). The names of its
    classes are those in the file, where it has any.

    Raises QuietvitError for a missing, truncated or foreign file, and for a model of another
    architecture, naming the first keys that differ.
    """
    path = Path(path)
    facts, tensors = FORMAT.read(path)
    try:
        method = get_method(facts["method"]["name"])(**facts["method"]["fields"])
        own = build(path, facts) if model is None else plain_copy(model)
        own.eval()
        take_names(own, facts)
        set_dtypes(own, facts["dtypes"])
        state = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
        coded = {n.removeprefix("codes."): t for n, t in tensors.items() if n.startswith("codes.")}
        compare_weights(path, own, state | coded)
        trace = trace_model(own, _zeros(own, facts["input_shape"]))
        compare_sites(path, trace, facts["sites"])
        sites = {site.name: site for site in trace.sites}
        quantizers: dict[Slot, Quantizer] = {}
        for entry in facts["quantizers"]:
            slot = Slot(sites[entry["site"]], entry["index"])
            quantizer = build_quantizer(entry["kind"], entry["config"])
            quantizers[slot] = _filled(quantizer, f"quantizers.{slot.key}.", tensors)
        adjustments = {
            entry["site"]: _filled(
                build_adjustment(entry["kind"], entry["config"]),
                f"adjustments.{module_key(entry['site'])}.",
                tensors,
            )
            for entry in facts["adjustments"]
        }
        compensations = {
            entry["block"]: _filled(
                Compensation.from_config(entry["config"]),
                f"compensations.{module_key(entry['block'])}.",
                tensors,
            )
            for entry in facts["compensations"]
        }
        for name, stored in coded.items():
            dtype = own.state_dict()[name].dtype
            whole = torch.zeros(stored.shape, dtype=dtype)
            for site, index in facts["coded_weights"][name]:
                slot = Slot(sites[site], index)
                values = _decode(stored, slot.site, quantizers[slot], dtype)
                _view(slot.site).scatter_add_(whole, values)
            state[name] = whole
        own.load_state_dict(state)
        loaded = QuantizedModel(
            own,
            trace,
            method,
            quantizers,
            adjustments=adjustments,
            compensations=compensations,
            input_shape=tuple(facts["input_shape"]),
            notes=tuple(facts["notes"]),
        )
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise QuietvitError(
            f"{path} is not consistent ({type(error).__name__}: {error}); it was changed or cut "
            "short after it was written. Save the model again."
        ) from error
    device = next((p.device for p in own.parameters()), torch.device("cpu"))
    return loaded.to(device).eval()  # type: ignore[no-any-return]


M = TypeVar("M", bound=nn.Module)


def _filled(module: M, prefix: str, tensors: dict[str, Tensor]) -> M:
    module.load_state_dict(
        {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    )
    return module


def _pairs(quantized: QuantizedModel) -> list[tuple[Slot, Quantizer]]:
    found = [(slot, quantized.quantizers[slot.key]) for slot in quantized.slots()]
    return [(slot, q) for slot, q in found if isinstance(q, Quantizer)]


def _view(site: Site) -> Any:
    return site.weight


def _weight_codes(quantized: QuantizedModel) -> dict[str, tuple[Tensor, list[tuple[str, int]]]]:
    """Codes shaped like the parameter, for each parameter that its sites' codes reproduce wholly.

    A parameter stays float where a part of it is float, where two sites disagree about an entry,
    or where what a site multiplies is not the parameter itself (a standardized weight).
    """
    model = quantized.model
    used = weights_in_use(quantized)
    by_name: dict[str, list[tuple[Slot, Quantizer]]] = {}
    for slot, quantizer in _pairs(quantized):
        view = slot.site.weight
        if slot.is_weight and view is not None and not view.transposed and not view.diagonal:
            by_name.setdefault(view.parameter_name, []).append((slot, quantizer))
    state = model.state_dict()
    coded: dict[str, tuple[Tensor, list[tuple[str, int]]]] = {}
    for name, readers in by_name.items():
        if name not in state:
            continue
        dtype = torch.int8 if all(q.bits <= 8 for _, q in readers) else torch.int16
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
    """Values of the site's part of a parameter, (rows, columns)."""
    view = _view(site)
    codes = view.select(stored).to(torch.int32).reshape(site.weight_shape) + _middle(quantizer)
    device = next((b.device for b in quantizer.buffers()), codes.device)
    return quantizer.dequantize(codes.to(device), dtype).flatten(1).cpu()


def _middle(quantizer: Quantizer) -> int:
    """What is taken off codes so that they fit a signed integer of the same width."""
    low, high = quantizer.code_range
    return (low + high + 1) // 2


def weights_in_use(quantized: QuantizedModel) -> dict[str, Tensor]:
    """The weight that each quantizer of weights gets in one pass over zeros, by site.

    Everything else is quantized as in every pass: a weight that the model computes, for example
    divided by its spectral norm, is then the one that the simulated model reads.
    """
    seen: dict[str, Tensor] = {}

    def keep(slot: Slot, x: Tensor) -> Tensor:
        if slot.is_weight:
            seen[slot.site.name] = x.detach()
        result: Tensor = quantized.quantizers[slot.key](x)
        return result

    with evaluating(quantized), torch.no_grad(), quantized.replacing(keep):
        run_model(quantized, _zeros(quantized.model, quantized.input_shape))
    return seen


def _zeros(model: nn.Module, shape: Any) -> Tensor:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(1, *shape, device=like.device, dtype=like.dtype)
