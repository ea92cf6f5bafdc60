"""The public surface: its names, what ``help`` shows of its classes, and methods from outside."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator

import pytest
import torch
from pydantic import BaseModel
from torch import Tensor

import quietvit
import zoo
from quietvit.errors import QuietvitError
from quietvit.quantization import (
    AffineQuantizer,
    Calibrated,
    Calibration,
    Method,
    Slot,
    get_method,
    list_methods,
)
from quietvit.quantization.method import _METHODS

PUBLIC = """
    BRECQ ERQ GPTQ HPTQ RTN TWEO AdaLog ColinearityDecay DopQViT FQViT KurtosisRegularization
    MatrixPair Method NormGainDecay PTQ4ViT PairWeightDecay QDrop QuietvitError QwT RepQViT
    SmoothQuant SpectralDecay StrengthSchedule Task WeightView advise check choose_bits diagnose
    evaluate export find_pairs learn_steps list_methods load predict quantize register_method
    register_regularizer register_target register_task sensitivity sqnr strength_for_total
    synthesize trace
"""
ROOMS = (
    *("quietvit", "quietvit.advice", "quietvit.compare", "quietvit.data", "quietvit.decay"),
    "quietvit.deployment",
    *("quietvit.measure", "quietvit.pairs", "quietvit.quantization", "quietvit.report"),
    *("quietvit.synthesis", "quietvit.tasks", "quietvit.tracing", "quietvit.train"),
)


def public_classes() -> list[type]:
    """All classes that a room names in ``__all__``, and those of the methods."""
    rooms = [importlib.import_module(name) for name in ROOMS]
    named = [getattr(room, name) for room in rooms for name in room.__all__]
    named += [get_method(name) for name in list_methods()]
    classes = [
        found for found in named if isinstance(found, type) and not issubclass(found, BaseException)
    ]
    return sorted(dict.fromkeys(classes), key=lambda cls: cls.__name__)


def test_the_public_names_are_these() -> None:
    assert sorted(quietvit.__all__) == sorted(PUBLIC.split())
    for name in quietvit.__all__:
        assert getattr(quietvit, name).__doc__, name


@pytest.mark.parametrize("cls", public_classes(), ids=lambda cls: cls.__name__)
def test_a_signature_shows_plain_types(cls: type) -> None:
    shown = str(inspect.signature(cls))
    for inside in ("Annotated", "Validator", "FieldInfo", "<function", "ForwardRef"):
        assert inside not in shown, shown
    if issubclass(cls, BaseModel):
        assert "**fields" not in shown
        assert "Fields:" in (cls.__doc__ or "")


@pytest.mark.parametrize("name", list_methods())
def test_every_field_of_a_method_is_explained(name: str) -> None:
    for field, info in get_method(name).model_fields.items():
        assert info.description, f"{name}: {field} has no docstring"


@pytest.fixture
def absmax() -> Iterator[type[Method]]:
    """A method as somebody writes it who has only the public names: one class and one line."""

    @quietvit.register_method("absmax")
    class AbsMax(quietvit.Method):
        """Symmetric, by the largest magnitude."""

        summary = "by the largest magnitude"
        share: float = 1.0
        """Share of the magnitude that the range spans."""

        def calibrate(self, calibration: Calibration) -> Calibrated:
            largest: dict[Slot, Tensor] = {}

            def look(slot: Slot, x: Tensor) -> None:
                if self.slot_bits(slot) is not None:
                    largest[slot] = torch.maximum(largest.get(slot, x.new_zeros(())), x.abs().max())

            calibration.watch(look)
            calibrated = Calibrated()
            for slot, top in largest.items():
                ends = -top * self.share, top * self.share
                bits = self.slot_bits(slot)
                calibrated.quantizers[slot] = AffineQuantizer.from_range(
                    *ends, bits=bits, symmetric=True
                )
            return calibrated

    yield AbsMax
    del _METHODS["absmax"]


def test_a_method_from_outside_quantizes_saves_and_loads(absmax, tmp_path) -> None:
    model, example = zoo.build("timm-vit")
    by_name = quietvit.quantize(model, "absmax", example, bits="W4A6", progress=False)
    assert by_name.method == absmax(weight_bits=4, activation_bits=6)
    assert by_name.deployable
    assert by_name.coverage.fraction == 1
    loaded = quietvit.load(by_name.save(tmp_path / "own.qvit"), model)
    assert loaded.method == by_name.method
    assert torch.equal(loaded(example), by_name(example))
    assert "absmax" in quietvit.list_methods()
    assert "Share of the magnitude" in absmax.__doc__
    with pytest.raises(QuietvitError, match="registered already"):
        quietvit.register_method("absmax")(get_method("rtn"))


def test_a_saved_method_that_is_not_registered_is_refused(absmax, tmp_path) -> None:
    model, example = zoo.build("timm-vit")
    path = quietvit.quantize(model, absmax(), example, progress=False).save(tmp_path / "own.qvit")
    kept = _METHODS.pop("absmax")
    try:
        with pytest.raises(QuietvitError, match="Import test_public first"):
            quietvit.load(path, model)
    finally:
        _METHODS["absmax"] = kept


@pytest.mark.parametrize(
    ("name", "bits", "same"),
    [
        ("rtn", None, lambda: quietvit.RTN()),
        ("repq-vit", "W4A6", lambda: quietvit.RepQViT(weight_bits=4, activation_bits=6)),
        ("rtn-omse", "w8a8", lambda: quietvit.RTN(activation_range="omse")),
        ("rtn+qwt", "W4A8", lambda: quietvit.QwT(base=quietvit.RTN(weight_bits=4))),
    ],
)
def test_a_name_and_bits_stand_for_a_config(
    name: str, bits: str | None, same: Callable[[], Method]
) -> None:
    model, example = zoo.build("timm-vit")
    quantized = quietvit.quantize(model, name, example, bits=bits, progress=False)
    assert quantized.method == same()


@pytest.mark.parametrize(
    ("method", "bits", "text"),
    [
        ("rnt", "W4A4", "did you mean 'rtn'"),
        ("rtn", "4", "like W8A8 or W4A8"),
        ("rtn", "W1A4", "outside 2..16"),
        (lambda: quietvit.RTN(), "W4A4", "Set weight_bits and activation_bits there"),
        (lambda: quietvit.RTN, None, "the class RTN; give a config"),
    ],
)
def test_what_stands_for_no_config_is_refused(method, bits, text) -> None:
    model, example = zoo.build("timm-vit")
    given = method if isinstance(method, str) else method()
    with pytest.raises(QuietvitError, match=text):
        quietvit.quantize(model, given, example, bits=bits, progress=False)
