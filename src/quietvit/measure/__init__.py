"""Measuring a model: outlier statistics, colinearity of pairs, root causes, per-site SQNR.

Nothing here changes a model or knows how quantizers work.
"""

from quietvit.measure.diagnose import diagnose
from quietvit.measure.diagnosis import Diagnosis
from quietvit.measure.sqnr import sqnr

__all__ = ["Diagnosis", "diagnose", "sqnr"]
