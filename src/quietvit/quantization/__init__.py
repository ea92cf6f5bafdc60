"""Simulated quantization on the traced sites: quantizers, ranges, methods, ``quantize``, ``load``.

Training against outliers lives in ``decay``, their measurement in ``measure``.
"""

from quietvit.quantization.apply import quantize
from quietvit.quantization.companding import TanQuantizer, TwinQuantizer
from quietvit.quantization.coverage import Coverage
from quietvit.quantization.listing import method_rows, methods_markdown
from quietvit.quantization.method import Method, get_method, list_methods, register
from quietvit.quantization.methods.adalog import AdaLog
from quietvit.quantization.methods.brecq import BRECQ
from quietvit.quantization.methods.dopq_vit import DopQViT
from quietvit.quantization.methods.erq import ERQ
from quietvit.quantization.methods.fq_vit import FQViT
from quietvit.quantization.methods.gptq import GPTQ
from quietvit.quantization.methods.hptq import HPTQ
from quietvit.quantization.methods.ptq4vit import PTQ4ViT
from quietvit.quantization.methods.qdrop import QDrop
from quietvit.quantization.methods.qwt import QwT
from quietvit.quantization.methods.repq_vit import RepQViT
from quietvit.quantization.methods.rtn import RTN
from quietvit.quantization.methods.smoothquant import SmoothQuant
from quietvit.quantization.nonuniform import LogQuantizer
from quietvit.quantization.quantized import QuantizedModel, load
from quietvit.quantization.quantizers import AffineQuantizer, Quantizer, register_quantizer

__all__ = [
    "BRECQ",
    "ERQ",
    "GPTQ",
    "HPTQ",
    "RTN",
    "AdaLog",
    "AffineQuantizer",
    "Coverage",
    "DopQViT",
    "FQViT",
    "LogQuantizer",
    "Method",
    "PTQ4ViT",
    "QDrop",
    "QuantizedModel",
    "Quantizer",
    "QwT",
    "RepQViT",
    "SmoothQuant",
    "TanQuantizer",
    "TwinQuantizer",
    "get_method",
    "list_methods",
    "load",
    "method_rows",
    "methods_markdown",
    "quantize",
    "register",
    "register_quantizer",
]
