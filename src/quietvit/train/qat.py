"""Quantization-aware training: the recipe section, and the quantized model of a run.

``quantization.learned`` makes steps trainable. ``setup`` builds the run around the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from quietvit.errors import QuietvitError
from quietvit.quantization import (
    AffineQuantizer,
    Method,
    QuantizedModel,
    Slot,
    learn_steps,
    quantize,
)
from quietvit.quantization.overrides import Overrides, OverridesField
from quietvit.quantization.overrides_file import is_overrides_file
from quietvit.quantization.settings import parse_method
from quietvit.quantization.storage import build_parts, parts_of, zero_image
from quietvit.section import Section
from quietvit.tracing import MATMUL_KINDS, Trace, evaluating, intercept, plain_copy, trace
from quietvit.train.order import generator_states, set_generator_states


class QATConfig(Section):
    """Quantization-aware training: quantize the model with ``method``, then continue training.

    ``method`` and ``bits`` are written as for ``quietvit quantize``: ``rtn-omse``, ``W4A4`` or
    ``W4A4+attention-maps-8``. ``overrides`` sets other bits for roles or sites, and ``options``
    sets other fields of the method. The run trains in float until ``start_epoch``, counted from 0.
    Then it calibrates on ``images`` training images, drawn with the run's ``seed``. With ``steps =
    "learned"``, the steps of uniform quantizers train as in LSQ; ``"fixed"`` keeps them.
    """

    method: str = "rtn-omse"
    bits: str
    overrides: OverridesField = Overrides()
    options: dict[str, Any] = Field(default={})
    start_epoch: int = Field(default=0, ge=0)
    steps: Literal["learned", "fixed"] = "learned"
    images: int = Field(default=32, ge=1)

    def configured(self) -> Method:
        """Return the method's config. Raises QuietvitError for an unknown method or bad field."""
        options = [f"{key}={json.dumps(value)}" for key, value in self.options.items()]
        if self.overrides:
            options.append(f"overrides={json.dumps(self.overrides.plain())}")
        return parse_method(self.method, self.bits, options)

    @model_validator(mode="after")
    def _method_is_known(self) -> Self:
        file = next(filter(is_overrides_file, self.bits.split("+")), None)
        if file is not None:
            raise ValueError(
                f"bits names the file {file}, which may change before the run is resumed; set "
                f"overrides = {file!r} instead, so that the run keeps its content"
            )
        try:
            self.configured()
        except QuietvitError as error:
            raise ValueError(str(error)) from error
        return self


def core_of(model: nn.Module) -> nn.Module:
    """Return the model inside a QuantizedModel, or any other model unchanged."""
    return model.model if isinstance(model, QuantizedModel) else model


def refuse_unfit_sites(
    config: QATConfig, model: nn.Module, example: Any, training_pass: Callable[[nn.Module], Any]
) -> None:
    """Raise QuietvitError before any training if quantization-aware training would fail.

    It fails if ``exclude`` or ``overrides`` match nothing, if no step can be learned, or if the
    model computes other products in training than in evaluation.

    Args:
        example: one image as the model takes it.
        training_pass: calls a model in training mode on a batch, with its targets.
    """
    method = config.configured()
    with evaluating(model):
        recorded = trace(model, example)
    method.check_sites(recorded)
    slots = [Slot(site, index) for site in recorded.matmuls for index in (0, 1)]
    quantized = [slot for slot in slots if method.slot_bits(slot) is not None]
    if config.steps == "learned" and not any(map(method.may_learn_step, quantized)):
        raise QuietvitError(
            f"{method.name} with these settings has no step that can be learned. Set qat.steps to "
            "'fixed', or choose another qat.method."
        )
    _refuse_other_products(model, recorded, training_pass)


def _refuse_other_products(
    model: nn.Module, recorded: Trace, training_pass: Callable[[nn.Module], Any]
) -> None:
    """Refuse a model that has other products in training, such as D-FINE and RF-DETR.

    A copy runs, so that running statistics and the run's random numbers stay as they are.
    """
    trained = plain_copy(model).train()
    device = next(trained.parameters()).device
    states = generator_states(device)
    products = intercept(recorded, lambda site, operands, run: run(*operands), kinds=MATMUL_KINDS)
    try:
        with torch.no_grad(), products:
            training_pass(trained)
    except QuietvitError as error:
        raise QuietvitError(
            f"{type(model).__name__} computes other products in training than in evaluation, so "
            "quantization-aware training does not work. Leave qat out, and quantize the trained "
            f"model. ({error})"
        ) from error
    finally:
        set_generator_states(states, device)


def quantized_model(config: QATConfig, model: nn.Module, images: Any) -> QuantizedModel:
    """Return a quantized copy of ``model`` for training, calibrated on ``images``."""
    with evaluating(model):
        quantized = quantize(model, config.configured(), images, progress=False)
    if config.steps == "learned":
        learn_steps(quantized)
    quantized.notes += (f"trained after calibration, with {config.steps} steps",)
    return quantized


def state_of(model: nn.Module) -> dict[str, Any] | None:
    """Return what ``restored_model`` needs besides the weights, or None for a float model."""
    if not isinstance(model, QuantizedModel):
        return None
    quantizers = {slot: model.quantizer(slot.site.name, slot.operand) for slot in model.slots()}
    learned = {slot: quantizer for slot, quantizer in quantizers.items() if quantizer is not None}
    return {
        "parts": parts_of(learned, model.adjusted(), model.compensated()),
        "input_shape": list(model.input_shape),
        "notes": list(model.notes),
        "tensors": {
            name: tensor
            for name, tensor in model.state_dict().items()
            if not name.startswith("model.")
        },
    }


def restored_model(config: QATConfig, model: nn.Module, state: Mapping[str, Any]) -> QuantizedModel:
    """Rebuild a quantized model from ``state_of`` and the weights of ``model``."""
    with evaluating(model):
        recorded = trace(model, zero_image(model, state["input_shape"]))
    quantizers, adjustments, compensations = build_parts(state["parts"], recorded)
    restored = QuantizedModel(
        model,
        recorded,
        config.configured(),
        quantizers,
        adjustments=adjustments,
        compensations=compensations,
        input_shape=tuple(state["input_shape"]),
        notes=tuple(state["notes"]),
    )
    device = next(model.parameters()).device
    restored.to(device)
    if config.steps == "learned":
        _start(restored, state["tensors"])
        learn_steps(restored)
    own = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    restored.load_state_dict(own | state["tensors"])
    return restored


def _start(model: QuantizedModel, tensors: Mapping[str, Any]) -> None:
    """Give uniform quantizers their calibrated steps, which decide what sites share a step."""
    for key, quantizer in model.quantizers.items():
        start = tensors.get(f"quantizers.{key}.start")
        if isinstance(quantizer, AffineQuantizer) and start is not None:
            quantizer.scale = start.to(quantizer.scale.device)
            quantizer.zero_point = tensors[f"quantizers.{key}.zero_point"].to(start.device)
