"""Simulated quantization on the traced sites: quantizers, ranges, methods, ``quantize``, ``load``.

Training against outliers lives in ``decay``, their measurement in ``measure``.
"""

from quietvit.quantization.apply import quantize
from quietvit.quantization.companding import TanQuantizer, TwinQuantizer
from quietvit.quantization.coverage import Coverage
from quietvit.quantization.listing import method_rows, methods_markdown
from quietvit.quantization.method import Method, get_method, list_methods, register
from quietvit.quantization.methods.rtn import RTN
from quietvit.quantization.nonuniform import LogQuantizer
from quietvit.quantization.quantized import QuantizedModel
from quietvit.quantization.quantizers import AffineQuantizer, Quantizer, register_quantizer
from quietvit.quantization.storage import load

__all__ = [
    "RTN",
    "AffineQuantizer",
    "Coverage",
    "LogQuantizer",
    "Method",
    "QuantizedModel",
    "Quantizer",
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
