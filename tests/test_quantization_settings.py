"""Settings by name: methods, ranges, methods on top of others, options."""

from __future__ import annotations

import pytest

from quietvit.errors import QuietvitError
from quietvit.quantization import RTN, get_method
from quietvit.quantization.settings import parse_method, setting_names


def test_names_of_methods_may_hold_hyphens():
    method = parse_method("FQ-ViT", "W6A4")
    assert type(method) is get_method("fq-vit")
    assert (method.weight_bits, method.activation_bits) == (6, 4)


def test_options_set_fields():
    method = parse_method(
        "rtn-omse", "W4A8", ["weight_symmetric=false", "percentile=0.999", "exclude=head"]
    )
    assert method == RTN(
        weight_bits=4,
        activation_bits=8,
        activation_range="omse",
        weight_symmetric=False,
        percentile=0.999,
        exclude=("head",),
    )
    assert parse_method("rtn", "W4A8", ["head_bits=none"]).head_bits is None
    assert parse_method("rtn", "W4A8", ['exclude=["a*", "b"]']).exclude == ("a*", "b")


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("rtn", ["percentil=1"], "percentile"),
        ("rtn", ["percentile"], "field=value"),
        ("rtn", ["percentile=3"], "at most 1"),
        ("rtn+rtn", [], "does not work on top"),
        ("fq-vit-omse", [], "no activation range"),
        ("fq-vot", [], "fq-vit"),
    ],
)
def test_what_makes_no_method_is_refused(name, options, text):
    with pytest.raises(QuietvitError, match=text):
        parse_method(name, "W8A8", options)


def test_bits_may_name_what_keeps_others():
    kept = RTN(weight_bits=4, activation_bits=4, overrides={"post_softmax": 8, "*.fc1": "W4A6"})
    assert parse_method("rtn", "W4A4+post_softmax=8+*.fc1=W4A6") == kept
    assert parse_method("rtn", "w4a4 + post_softmax=8", keep=["*.fc1=W4A6"]) == kept
    names = setting_names(["w4a4 + attention-maps-8"], ["RTN-omse"])
    assert names == ("W4A4+attention-maps-8 rtn-omse",)
    for bits in ("W4A4+attention-map-8", "W4A4+post_softmax=8+post_softmax=6", "+W4A4"):
        with pytest.raises(QuietvitError):
            parse_method("rtn", bits)
