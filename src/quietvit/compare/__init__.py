"""Compare training with and without Colinearity Decay, or quantization methods on one model.

This package runs the steps in order and resumes them. Training, quantization and report are below.
"""

from __future__ import annotations

from quietvit.compare.config import CompareConfig
from quietvit.compare.methods import MethodComparison, compare_methods
from quietvit.compare.run import Comparison, compare

__all__ = ["CompareConfig", "Comparison", "MethodComparison", "compare", "compare_methods"]
