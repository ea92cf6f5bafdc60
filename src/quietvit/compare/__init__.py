"""Train with and without Colinearity Decay under the same seeds, quantize both, report.

How each part works lives in the rooms below; here they are put in order and kept resumable.
"""

from __future__ import annotations

from quietvit.compare.config import CompareConfig
from quietvit.compare.run import Comparison, compare

__all__ = ["CompareConfig", "Comparison", "compare"]
