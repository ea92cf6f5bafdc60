"""What ``deploy.py`` measures: the quantized model of each tool, and its runtime.

Every tool gets the same float ONNX file or torch model and the same calibration images. It uses
the settings that its own documentation recommends. Tools are imported on first use, because not
every environment has all of them.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import quietvit
from quietvit.deployment import export
from quietvit.deployment.for_onnx.file import float_onnx as float_graph
from quietvit.deployment.for_onnx.file import write_onnx
from quietvit.deployment.for_onnx.runtime import OnnxRuntime
from quietvit.deployment.for_openvino.runtime import OpenVINO
from quietvit.deployment.processor import vnni
from quietvit.deployment.targets import files_of
from quietvit.quantization.method import get_method

Run = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Model:
    """A model to measure: its tool, the settings, and the number of images.

    ``make`` writes the file of this name, or returns a module if the tool has no file.
    ``suffix`` is "" for a model in memory. ``needs`` lists packages beside quietvit's own.
    """

    tool: str
    setting: str
    make: Callable[..., Any]
    suffix: str
    calibration: int = 32
    needs: tuple[str, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass
class Made:
    """What a tool gets: the float model, its ONNX file, the calibration images."""

    model: nn.Module
    floating: Path
    images: Tensor


def float_onnx(model: nn.Module, shape: tuple[int, ...], path: Path) -> None:
    write_onnx(float_graph(model, shape), path)


def ours(made: Made, path: Path, *, method: str, weights: int, **fields: Any) -> None:
    chosen = get_method(method)(weight_bits=weights, activation_bits=8, **fields)
    quantized = quietvit.quantize(made.model, chosen, made.images, progress=False)
    export(quantized, path, force=True)


def quantize_static(
    made: Made,
    path: Path,
    *,
    products_only: bool = False,
    constant_only: bool = False,
    **fields: Any,
) -> None:
    """onnxruntime's quantizer in the format QDQ, after its recommended pre-processing.

    ``products_only``: quantize only MatMul, Gemm and Conv, and outputs of the convolution.
    ``constant_only``: leave products of two activations in float.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(made.images.split(1))

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.left, None)
            return None if image is None else {"images": image.numpy()}

    extra: dict[str, Any] = {"MatMulConstBOnly": constant_only}
    kinds = ["MatMul", "Gemm", "Conv"] if products_only else None
    if products_only:
        extra["OpTypesToExcludeOutputQuantization"] = ["MatMul", "Gemm"]
    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(made.floating), str(prepared))
    quantization.quantize_static(
        str(prepared),
        str(path),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        op_types_to_quantize=kinds,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        extra_options=extra,
        **fields,
    )
    prepared.unlink()


def nncf_quantize(made: Made, path: Path) -> None:
    """NNCF on the OpenVINO model of the float ONNX file, with its settings for transformers."""
    import nncf
    import openvino

    images = [image.numpy() for image in made.images.split(1)]
    with contextlib.redirect_stdout(io.StringIO()):
        quantized = nncf.quantize(
            openvino.Core().read_model(str(made.floating)),
            nncf.Dataset(images),
            subset_size=len(images),
            model_type=nncf.ModelType.TRANSFORMER,
        )
    openvino.save_model(quantized, str(path))


def torch_float(made: Made) -> nn.Module:
    return made.model


def torchao_static(made: Made) -> nn.Module:
    """torchao's Int8StaticActivationInt8WeightConfig on every linear layer.

    Each tensor of activations has one scale, from torchao's observer of minimum and maximum. Each
    row of the weights has one scale.
    """
    from torchao.quantization import Int8StaticActivationInt8WeightConfig, quantize_
    from torchao.quantization.granularity import PerRow, PerTensor
    from torchao.quantization.observer import AffineQuantizedMinMaxObserver
    from torchao.quantization.quant_primitives import MappingType

    model = copy.deepcopy(made.model)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    seen: dict[str, tuple[Any, int]] = {}

    def watch(name: str) -> Callable[..., None]:
        observer = AffineQuantizedMinMaxObserver(
            MappingType.SYMMETRIC,
            torch.int8,
            granularity=PerTensor(),
            eps=torch.finfo(torch.float32).eps,
            scale_dtype=torch.float32,
            zero_point_dtype=torch.float32,
        )

        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            observer(inputs[0])
            seen[name] = observer, inputs[0].ndim

        return hook

    hooks = [m.register_forward_pre_hook(watch(name)) for name, m in linears.items()]
    with torch.no_grad():
        for batch in made.images.split(8):
            model(batch)
    for handle in hooks:
        handle.remove()
    for name, linear in linears.items():
        observer, axes = seen[name]
        scale = observer.calculate_qparams()[0].reshape((1,) * axes)
        config = Int8StaticActivationInt8WeightConfig(
            act_quant_scale=scale, granularity=[PerTensor(), PerRow()]
        )
        quantize_(linear, config, filter_fn=lambda *_: True)
    return model


def torchao_pt2e(made: Made) -> nn.Module:
    """torchao's export-based quantization for x86, to be compiled by inductor.

    Without VNNI, weights and activations use 7 bits, as its documentation says.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(reduce_range=not vnni()))
    with torch.no_grad():
        shapes = ({0: torch.export.Dim("batch")},)
        exported = torch.export.export(made.model, (made.images[:2],), dynamic_shapes=shapes)
        prepared = prepare_pt2e(exported.module(), quantizer)
        for batch in made.images.split(8):
            prepared(batch)
        converted: nn.Module = convert_pt2e(prepared)
    return converted


class TorchModel:
    """A torch module with the interface of a runtime. One compiled program for each batch size."""

    def __init__(self, module: nn.Module, compiled: bool) -> None:
        if compiled:
            import torch._inductor.config

            torch._inductor.config.freezing = True
        self.run = torch.compile(module, dynamic=False) if compiled else module

    def __call__(self, images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.run(torch.from_numpy(images)).numpy()


def _rtn(estimator: str) -> dict[str, Any]:
    ranges = dict.fromkeys(("weight_range", "activation_range"), estimator)
    return {"method": "rtn", "weights": 8} | ranges


STATIC, NNCF, AO = "onnxruntime quantize_static", "NNCF", "torchao"
TRANSFORMER = "model_type=TRANSFORMER"
MODELS: dict[str, Model] = {
    "float": Model("float32", "", float_onnx, ".onnx", 0),
    "float-torch": Model("float32", "", torch_float, "", 0),
    **{
        f"ours-{name}": Model("quietvit", shown, ours, ".onnx", fields=fields)
        for name, shown, fields in (
            ("minmax", "W8A8 rtn-minmax", _rtn("minmax")),
            ("omse", "W8A8 rtn-omse", _rtn("omse")),
            ("smoothquant", "W8A8 smoothquant", {"method": "smoothquant", "weights": 8}),
            ("gptq4", "W4A8 gptq on rtn", {"method": "gptq", "weights": 4, "base": "rtn"}),
        )
    },
    "static": Model(STATIC, "every operator", quantize_static, ".onnx"),
    "static-reduced": Model(
        STATIC,
        "every operator, reduce_range",
        quantize_static,
        ".onnx",
        fields={"reduce_range": True},
    ),
    "static-products": Model(
        STATIC, "products only", quantize_static, ".onnx", fields={"products_only": True}
    ),
    "static-constant": Model(
        STATIC,
        "products only, MatMulConstBOnly",
        quantize_static,
        ".onnx",
        fields={"products_only": True, "constant_only": True},
    ),
    "nncf": Model(NNCF, TRANSFORMER, nncf_quantize, ".xml", needs=("nncf",)),
    "nncf-300": Model(NNCF, TRANSFORMER, nncf_quantize, ".xml", 300, needs=("nncf",)),
    "torchao": Model(AO, "Int8StaticActivationInt8Weight", torchao_static, "", needs=("torchao",)),
    "torchao-pt2e": Model(AO, "PT2E X86InductorQuantizer", torchao_pt2e, "", needs=("torchao",)),
}


def opened(source: Path | nn.Module, runtime: str, session: str, threads: int) -> Run:
    """Load a model into a runtime. ``session``, for onnxruntime: ``exact`` or ``default``."""
    if isinstance(source, nn.Module):
        return TorchModel(source, compiled=runtime == "torch.compile")
    if runtime == "openvino":
        return OpenVINO(source, threads=threads)
    return OnnxRuntime(source, threads=threads, exact=session == "exact")


def bytes_of(source: Path | nn.Module) -> int:
    """Bytes on disk: of a file, of both files of an IR, or of the saved state of a module."""
    if isinstance(source, nn.Module):
        buffer = io.BytesIO()
        torch.save(source.state_dict(), buffer)
        return buffer.tell()
    return sum(file.stat().st_size for file in files_of(source))
