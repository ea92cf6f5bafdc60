"""Train with and without Colinearity Decay with the same seeds, quantize both, and report.

This package runs the steps in order and resumes them. Training, quantization and report are below.
"""

from __future__ import annotations

from quietvit.compare.config import CompareConfig
from quietvit.compare.run import Comparison, compare

__all__ = ["CompareConfig", "Comparison", "compare"]
