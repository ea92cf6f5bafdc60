"""Simulated quantization on the traced sites: quantizers, ranges, methods, ``quantize``, ``load``.

Training against outliers is in ``decay``; measuring them is in ``measure``.
"""

from quietvit.quantization.apply import quantize
from quietvit.quantization.calibrated import Calibrated
from quietvit.quantization.calibration import Calibration
from quietvit.quantization.companding import TanQuantizer, TwinQuantizer
from quietvit.quantization.coverage import Coverage
from quietvit.quantization.floating import BlockFloatQuantizer, ScaledFloatQuantizer
from quietvit.quantization.learned import LearnedAffine, learn_steps
from quietvit.quantization.listing import method_rows
from quietvit.quantization.method import Method, get_method, list_methods, register_method
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
from quietvit.quantization.on_top import OnTop
from quietvit.quantization.quantized import QuantizedModel, load
from quietvit.quantization.quantizers import AffineQuantizer, Quantizer, register_quantizer
from quietvit.quantization.slot import Slot

__all__ = [
    "BRECQ",
    "ERQ",
    "GPTQ",
    "HPTQ",
    "RTN",
    "AdaLog",
    "AffineQuantizer",
    "BlockFloatQuantizer",
    "Calibrated",
    "Calibration",
    "Coverage",
    "DopQViT",
    "FQViT",
    "LearnedAffine",
    "LogQuantizer",
    "Method",
    "OnTop",
    "PTQ4ViT",
    "QDrop",
    "QuantizedModel",
    "Quantizer",
    "QwT",
    "RepQViT",
    "ScaledFloatQuantizer",
    "Slot",
    "SmoothQuant",
    "TanQuantizer",
    "TwinQuantizer",
    "get_method",
    "learn_steps",
    "list_methods",
    "load",
    "method_rows",
    "quantize",
    "register_method",
    "register_quantizer",
]
