"""Configs of methods on top of another: bits follow the base, and saved configs come back."""

from __future__ import annotations

from typing import ClassVar

import pytest

from quietvit.errors import QuietvitError
from quietvit.quantization import RTN
from quietvit.quantization.on_top import OnTop


class Refined(OnTop):
    name: ClassVar[str] = "refined"

    def calibrate(self, calibration):
        return self.calibrate_base(calibration)


@pytest.mark.parametrize("base", [RTN(weight_bits=4, exclude="head"), "rtn", None])
def test_it_has_the_bits_of_its_base(base):
    method = Refined(base=base, weight_bits=4) if not isinstance(base, RTN) else Refined(base=base)
    assert method.weight_bits == method.base.weight_bits == 4
    assert method.exclude == method.base.exclude
    assert method.label == "W4A8"


def test_what_is_stored_builds_the_same_method():
    method = Refined(base=RTN(weight_bits=3, exclude=("head", "patch*")))
    assert Refined(**method.model_dump(mode="json")) == method


@pytest.mark.parametrize("given", [{"weight_bits": 8}, {"exclude": "head"}, {"head_bits": None}])
def test_other_bits_beside_a_base_are_refused(given):
    with pytest.raises(QuietvitError, match="differs from the base's"):
        Refined(base=RTN(weight_bits=4), **given)


@pytest.mark.parametrize(("base", "text"), [(3, "config of a method"), ("rtm", "rtn")])
def test_a_base_that_is_no_method_is_refused(base, text):
    with pytest.raises(QuietvitError, match=text):
        Refined(base=base)
