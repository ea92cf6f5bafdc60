"""Bits of single roles and sites: what decides, what is refused, that it is kept and shown."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import quietvit
import zoo
from method_cases import configured
from quietvit.errors import QuietvitError
from quietvit.measure.sqnr import sqnr
from quietvit.quantization import GPTQ, RTN, get_method, quantize
from quietvit.quantization.settings import parse_method
from quietvit.quantization.slot import Slot

FOUR = {"weight_bits": 4, "activation_bits": 4}


@pytest.fixture(scope="module")
def trace():
    model, example = zoo.build("timm-vit")
    return quietvit.trace(model, example)


def bits(trace, site, **fields):
    """Bits of both operands of a site under RTN W4A4."""
    method = RTN(**FOUR | fields)
    method.check_sites(trace)
    return tuple(method.slot_bits(Slot(trace[site], index)) for index in (0, 1))


def first(trace, role):
    return next(site.name for site in trace.sites if site.role == role)


def test_a_role_of_an_operand_means_that_operand_and_a_role_of_a_site_both(trace):
    maps = first(trace, "attention_value")
    assert bits(trace, maps, overrides={"post_softmax": 8}) == (8, 4)
    assert bits(trace, maps, overrides="attention-maps-8") == (8, 4)
    assert bits(trace, maps, overrides={"attention_value": 8, "value": 6}) == (8, 6)
    assert bits(trace, "blocks.0.mlp.fc2", overrides={"post_gelu": 8}) == (8, 8)
    assert bits(trace, "blocks.0.mlp.fc2", overrides={"post_gelu": "W3A6"}) == (6, 3)
    assert bits(trace, "blocks.0.mlp.fc2", overrides={"post_gelu": "float"}) == (None, None)
    assert bits(trace, "blocks.0.mlp.fc2", overrides={"post_gelu": [3, None]}) == (None, 3)
    assert bits(trace, first(trace, "patch_embed"), overrides={"patch_embed": 6}) == (6, 6)
    edges = {"patch_embed_bits": 6, "head_bits": None}
    for same in ("repq-vit-detection", {"head": "same", "patch_embed": ["same", 8]}):
        assert bits(trace, first(trace, "patch_embed"), overrides=same, **edges) == (8, 4)
        assert bits(trace, "head", overrides=same, **edges) == (4, 4)


@pytest.mark.parametrize("turned", [False, True])
def test_a_name_goes_before_patterns_and_those_before_roles_in_any_order(trace, turned):
    pairs = {"post_gelu": 8, "*.fc2": 6, "blocks.0.mlp.fc2": 5}
    given = dict(reversed(pairs.items())) if turned else pairs
    assert bits(trace, "blocks.0.mlp.fc2", overrides=given) == (5, 5)
    assert bits(trace, "blocks.1.mlp.fc2", overrides=given) == (6, 6)
    assert RTN(overrides=given) == RTN(overrides=pairs)
    assert hash(RTN(overrides=given)) == hash(RTN(overrides=pairs))


@pytest.mark.parametrize("turned", [False, True])
def test_a_name_with_its_operand_goes_before_the_name_of_the_site(trace, turned):
    maps = first(trace, "attention_value")
    pairs = {"blocks.0.*": 5, "*:left": 8, maps: 6, f"{maps}:left": 7, "*.fc2:weight": 3}
    given = dict(reversed(pairs.items())) if turned else pairs
    assert bits(trace, maps, overrides=given) == (7, 6)
    assert bits(trace, first(trace, "query_key"), overrides=given) == (8, 5)
    assert bits(trace, "blocks.0.mlp.fc2", overrides=given) == (5, 3)
    assert bits(trace, "blocks.1.mlp.fc2", overrides=given) == (4, 3)
    assert bits(trace, "blocks.0.mlp.fc2", overrides={"*.fc2:input": "W3A6"}) == (6, 4)


def test_exclude_goes_before_all_and_an_override_before_the_other_fields(trace):
    given = {"blocks.*": 8, "head": 4}
    assert bits(trace, "blocks.0.mlp.fc1", overrides=given, exclude="*.fc1") == (None, None)
    assert bits(trace, "head", overrides=given, head_bits=None) == (4, 4)
    given = {"blocks.*": 8}
    assert bits(trace, "blocks.0.mlp.fc1", overrides=given, weight_bits=None) == (8, 8)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"overrides": {"post_sofmax": 8}}, "did you mean 'post_softmax'"),
        ({"overrides": {"blocks.0.mlp.fc9": 8}}, r"did you mean .*blocks\.0\.mlp\.fc"),
        ({"overrides": {"blocks.0.mlp.fc2:left": 8}}, r"did you mean 'blocks\.0\.mlp\.fc2:"),
        ({"overrides": {"*.fc1:*": 8, "*:weight": 6}}, r"both match blocks\.0\.mlp\.fc1:weight"),
        ({"overrides": {"blocks.0.norm1": 8}}, "matches none of its"),
        ({"overrides": {"weight": 8}}, "is not a role of this model"),
        ({"overrides": {"*.fc1": 8}, "exclude": "*.mlp.*"}, "Remove one of the two"),
        ({"overrides": {"*.fc1": 8, "blocks.0.*": 6}}, "Narrow one pattern"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(trace, fields, text):
    method = GPTQ(base=RTN(**fields))
    with pytest.raises(QuietvitError, match=text):
        method.check_sites(trace)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"head": 1}, "'head': bits are"),
        ({"head": True}, "'head': bits are"),
        ({"head": "W4A99"}, "'head': bits are"),
        ({"head": "eight"}, "'head': bits are"),
        ({"head": (4, 4, 4)}, "'head': bits are"),
        ({"": 8}, "neither a role nor a pattern"),
        ({3: 8}, "neither a role nor a pattern"),
        (8, "give a mapping"),
        ("attention-maps", "did you mean 'attention-maps-8'"),
    ],
)
def test_what_is_no_mapping_to_bits_is_refused(given, text):
    with pytest.raises(QuietvitError, match=text):
        RTN(overrides=given)


def test_they_are_saved_shown_and_those_of_the_base(tmp_path):
    model, example = zoo.build("timm-vit")
    base = RTN(**FOUR, overrides={"post_softmax": 8, "*.fc1": "W4A6", "*.proj": "float"})
    whole = quietvit.quantize(model, GPTQ(base=base), example.repeat(2, 1, 1, 1), progress=False)
    assert "post_softmax 8 bits, *.fc1 W4A6, *.proj float" in whole.report()
    assert dict(whole.coverage.untouched)["blocks.0.attn.proj"].count("overrides['*.proj']") == 2
    assert whole.quantizer("blocks.0.mlp.fc1", "input").bits == 6
    again = quietvit.load(whole.save(tmp_path / "m.qvit"), model=model)
    assert again.method == whole.method
    assert again.method.overrides == base.overrides
    with pytest.raises(QuietvitError, match="differs from the base's"):
        GPTQ(base=base, overrides="attention-maps-8")


def test_they_can_be_given_on_the_command_line():
    wanted = get_method("rtn")(overrides="attention-maps-8").overrides
    for name in ("repq-vit", "repq-vit+gptq"):
        assert parse_method(name, "W4A4", ['overrides={"post_softmax": 8}']).overrides == wanted
        for keep in ("post_softmax=8", "attention-maps-8", " post_softmax = W8A8 "):
            assert parse_method(name, "W4A4", keep=[keep]).overrides == wanted
    kept = parse_method("rtn", "W4A4", keep=["*.fc1=W4A8", "head=float"]).overrides
    assert kept.plain() == {"*.fc1": "W4A8", "head": None}
    kept = parse_method("rtn", keep=["repq-vit-detection"]).overrides
    assert RTN(overrides=kept.plain()).overrides == kept
    assert str(kept) == (
        "patch_embed W at the working bits, A 8 bits, head at the working bits, "
        "conv_transpose2d float"
    )


@pytest.mark.parametrize(
    ("options", "keep", "text"),
    [
        ([], ["post_softmax"], "post_softmax=8"),
        ([], ["attention-maps"], "did you mean 'attention-maps-8'"),
        ([], ["=8"], "does not say"),
        ([], ["head="], "does not say"),
        ([], ["head=8", "head=6"], "give it once"),
        ([], ["head=99"], "'head': bits are"),
        (["overrides={}"], ["head=8"], "one of the two"),
    ],
)
def test_what_the_command_line_refuses(options, keep, text):
    with pytest.raises(QuietvitError, match=text):
        parse_method("rtn", "W4A4", options, keep)


@pytest.mark.parametrize("name", ["repq-vit", "dopq-vit", "adalog", "smoothquant", "erq"])
def test_consumers_of_one_norm_may_differ_in_bits(name):
    """Query, key and value are linears of their own here, re-parametrized as one."""
    model, example = zoo.build("hf-vit")
    trace = quietvit.trace(model, example)
    inputs = [s.name for s in trace.sites if s.role == "post_norm" and "attention" in s.name][:3]
    images = torch.randn(6, *example["pixel_values"].shape[1:])
    given = {inputs[0]: 8, inputs[1]: "float"}
    method = configured(name, **FOUR, overrides=given)
    whole = quietvit.quantize(model, method, images, trace=trace, progress=False)
    found = [whole.quantizer(site, "input") for site in inputs]
    assert [quantizer and quantizer.bits for quantizer in found] == [8, None, 4]
    with torch.no_grad():
        noise = sqnr(model, whole, images, local=True)
    assert noise[inputs[0]] > noise[inputs[2]] + 6
    assert noise[inputs[1]] > noise[inputs[0]]


def test_coverage_tells_the_bits_of_the_multiplications():
    model, example = zoo.build("timm-vit")
    method = RTN(weight_bits=4, activation_bits=6, overrides="attention-maps-8", exclude="*.fc2")
    coverage = quantize(model, method, example, progress=False).coverage
    sites = quietvit.trace(model, example).matmuls
    expected = Counter()
    for site in sites:
        if site.name.endswith(".fc2"):
            label = "float"
        elif site.kind == "matmul":
            label = "A8A6" if site.operands[0].role == "post_softmax" else "A6A6"
        else:
            label = "W8A8" if site.role in ("patch_embed", "head") else "W4A6"
        expected[label] += site.macs
    left = expected.pop("float")
    assert dict(coverage.by_bits) == expected
    assert coverage.total_macs - coverage.quantized_macs == left
    assert str(coverage).splitlines()[1] == coverage.shares()
    assert f" {100 * expected['W4A6'] / coverage.total_macs:.0f} % W4A6, " in coverage.shares()
    assert coverage.shares().endswith(f"{100 * left / coverage.total_macs:.0f} % float")
