"""Advice before quantizing: what each part of a model costs, and what to do about it.

Nothing is trained or exported here.
"""

from quietvit.advice.effects import Effect
from quietvit.advice.result import Part, Sensitivity
from quietvit.advice.sensitivity import sensitivity

__all__ = ["Effect", "Part", "Sensitivity", "sensitivity"]
