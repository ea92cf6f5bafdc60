"""Blocks found from the trace: they cover every weight, and run alone as inside the model."""

from __future__ import annotations

import pytest
import torch

import zoo
from quietvit.quantization.blocks import find_blocks, run_block
from quietvit.tracing import call, trace
from quietvit.tracing.block_modules import first_tensor, watching_modules


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_weight_is_in_exactly_one_block(name):
    model, example = zoo.build(name)
    traced = trace(model, example)
    weights = [s.name for s in traced.matmuls if s.kind in ("linear", "conv")]
    held = [s.name for b in find_blocks(traced) for s in b.sites if s.name in set(weights)]
    assert sorted(held) == sorted(weights)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_block_alone_computes_what_it_computes_in_the_model(name):
    model, example = zoo.build(name)
    blocks = {block.name: block for block in find_blocks(trace(model, example))}
    seen = {}

    def look(name, args, kwargs, output):
        seen[name] = args, kwargs, first_tensor(output).clone()

    with torch.no_grad(), watching_modules(model, blocks, look):
        call(model, example)
    assert seen.keys() == blocks.keys()
    for name, (args, kwargs, wanted) in seen.items():
        sites = []

        def handler(site, operands, run, sites=sites):
            sites.append(site.name)
            return run(*operands)

        with torch.no_grad():
            got = first_tensor(run_block(model, blocks[name], args, kwargs, handler))
        torch.testing.assert_close(got, wanted)
        assert sites == [site.name for site in blocks[name].trace.matmuls]


@pytest.mark.parametrize(
    ("name", "count"),
    [("timm-vit", 2), ("timm-swin", 4), ("hf-vit", 2), ("hf-swin", 4), ("tv-vit", 2)],
)
def test_transformer_blocks_are_the_residual_ones(name, count):
    model, example = zoo.build(name)
    assert sum(block.residual for block in find_blocks(trace(model, example))) == count
