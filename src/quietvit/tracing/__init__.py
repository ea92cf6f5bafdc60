"""The trace: one recorded forward pass that tells every method what a model computes.

This package imports nothing from the layers above it.
"""

from quietvit.tracing.inputs import EndOfPass, call, refusing
from quietvit.tracing.intercept import intercept
from quietvit.tracing.ops import MATMUL_KINDS, SITE_KINDS
from quietvit.tracing.sites import Link, Operand, Scores, Site, Trace
from quietvit.tracing.trace import evaluating, trace, trace_images
from quietvit.tracing.weights import WeightView
from quietvit.tracing.wrappers import eagerly, plain_copy, plain_model

__all__ = [
    "MATMUL_KINDS",
    "SITE_KINDS",
    "EndOfPass",
    "Link",
    "Operand",
    "Scores",
    "Site",
    "Trace",
    "WeightView",
    "call",
    "eagerly",
    "evaluating",
    "intercept",
    "plain_copy",
    "plain_model",
    "refusing",
    "trace",
    "trace_images",
]
