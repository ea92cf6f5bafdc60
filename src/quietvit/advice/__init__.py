"""Advice before quantizing: sensitivity, choice of bits, and recommended next steps.

Nothing is trained or exported here.
"""

from quietvit.advice.advice import Advice
from quietvit.advice.advise import advise
from quietvit.advice.bits import BitChoice, BitCosts, bit_costs, choose_bits
from quietvit.advice.causes import Cause
from quietvit.advice.effects import Effect
from quietvit.advice.ladder import Row
from quietvit.advice.result import Part, Sensitivity
from quietvit.advice.sensitivity import sensitivity
from quietvit.advice.steps import Step

__all__ = [
    "Advice",
    "BitChoice",
    "BitCosts",
    "Cause",
    "Effect",
    "Part",
    "Row",
    "Sensitivity",
    "Step",
    "advise",
    "bit_costs",
    "choose_bits",
    "sensitivity",
]
