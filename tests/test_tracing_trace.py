"""Laws of the trace: every product is a site, counts agree with torch's, passes can be replayed."""

from __future__ import annotations

import gc
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import quietvit
from quietvit.errors import QuietvitError
from quietvit.tracing import SITE_KINDS, call, intercept
from zoo import ZOO, build, outputs


@pytest.fixture(params=list(ZOO))
def built(request):
    torch.backends.mha.set_fastpath_enabled(False)
    yield build(request.param)
    torch.backends.mha.set_fastpath_enabled(True)


def test_macs_equal_torchs_count_exactly(built):
    model, example = built
    traced = quietvit.trace(model, example)
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),  # torch 2.11 does not count the fused one on the CPU
        FlopCounterMode(display=False) as counter,
    ):
        call(model, example)
    assert 2 * traced.macs == counter.get_total_flops() > 0
    assert not [site for site in traced.sites if site.kind == "opaque"]


@pytest.mark.parametrize("attention", ["fused", "explicit"])
def test_timm_attention_gives_the_same_sites_fused_or_not(attention):
    timm.layers.set_fused_attn(attention == "fused")
    try:
        model, example = build("timm-vit")
        roles = [site.role for site in quietvit.trace(model, example).matmuls]
    finally:
        timm.layers.set_fused_attn(True)
    block = ["post_norm", "query_key", "attention_value", "attention_output", "post_norm"]
    assert roles == ["patch_embed", *block, "post_gelu", *block, "post_gelu", "head"]


def test_every_site_passes_through_intercept_and_nothing_changes(built):
    model, example = built
    traced = quietvit.trace(model, example)
    seen = []

    def handler(site, operands, run):
        seen.append(site.name)
        for operand, tensor in zip(site.operands, operands, strict=False):
            assert operand.shape == tuple(tensor.shape)
        return run(*operands)

    with torch.no_grad():
        expected = outputs(call(model, example))
        with intercept(traced, handler, kinds=SITE_KINDS):
            got = outputs(call(model, example))
    assert seen == [site.name for site in traced.sites]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_names_are_unique_and_edges_agree(built):
    model, example = built
    traced = quietvit.trace(model, example)
    names = [site.name for site in traced.sites]
    assert len(set(names)) == len(names)
    for site in traced.sites:
        for name in site.feeds:
            assert any(site.name in operand.fed_by for operand in traced[name].operands)
        for operand in site.operands:
            assert all(site.name in traced[source].feeds for source in operand.fed_by)


def test_weights_of_sites_are_views_of_parameters(built):
    model, example = built
    traced = quietvit.trace(model, example)
    weights = {}

    def handler(site, operands, run):
        if site.weight is not None and site.kind in ("linear", "conv"):
            weights[site.name] = operands[1].flatten(1)
        return run(*operands)

    with torch.no_grad(), intercept(traced, handler):
        call(model, example)
    assert weights
    for name, weight in weights.items():
        assert torch.equal(traced[name].weight.read(model), weight)


def test_every_linear_of_torchvision_is_seen():
    model, example = build("tv-vit")
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    traced = quietvit.trace(model, example)
    seen = [site for site in traced.matmuls if site.kind == "linear"]
    assert len(seen) == len(linears) + 2  # the two packed in_proj weights are no nn.Linear


def test_model_is_left_as_it_was():
    model, example = build("timm-hybrid")
    model.train()
    model.blocks[0].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    quietvit.trace(model, example)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not nn.modules.module._global_forward_pre_hooks


def test_only_one_sample_is_run():
    model, example = build("timm-vit")
    assert quietvit.trace(model, example.repeat(3, 1, 1, 1)) == quietvit.trace(model, example)


def test_any_batch_size_passes_through_intercept():
    model, example = build("timm-swin")
    traced = quietvit.trace(model, example)
    images = example.repeat(3, 1, 1, 1)
    with torch.no_grad(), intercept(traced, lambda site, operands, run: run(*operands)):
        got = model(images)
    with torch.no_grad():
        torch.testing.assert_close(got, model(images))


def test_gradients_flow_through_intercept():
    model, example = build("timm-vit")
    traced = quietvit.trace(model, example)
    with intercept(traced, lambda site, operands, run: run(*operands)):
        model(example).sum().backward()
    got = model.blocks[0].attn.qkv.weight.grad.clone()
    model.zero_grad()
    model(example).sum().backward()
    torch.testing.assert_close(got, model.blocks[0].attn.qkv.weight.grad)


class Fickle(nn.Module):
    """Goes another way when told."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.twice, self.swapped = False, False

    def forward(self, x):
        if self.swapped:
            return self.second(x.transpose(0, 1) @ x)
        x = self.second(F.gelu(self.first(x)))
        return self.second(x) if self.twice else x


@pytest.mark.parametrize("way", ["twice", "swapped"])
def test_changed_control_flow_is_refused(way):
    model = Fickle()
    traced = quietvit.trace(model, torch.randn(1, 4))
    setattr(model, way, True)
    with (
        pytest.raises(QuietvitError, match=r"control flow of Fickle changed.*Trace it again"),
        intercept(traced, lambda site, operands, run: run(*operands)),
    ):
        model(torch.randn(1, 4))


def test_missing_calls_are_refused():
    model = Fickle()
    model.twice = True
    traced = quietvit.trace(model, torch.randn(1, 4))
    model.twice = False
    with (
        pytest.raises(QuietvitError, match="made 2 matmul calls"),
        intercept(traced, lambda site, operands, run: run(*operands)),
    ):
        model(torch.randn(1, 4))


def test_one_interception_can_be_entered_again():
    model, example = build("timm-vit")
    again = intercept(quietvit.trace(model, example), lambda site, operands, run: run(*operands))
    with torch.no_grad():
        for _ in range(2):
            with again:
                got = model(example)
        torch.testing.assert_close(got, model(example))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_refused_where_it_would_train_another_model(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    model, x = Checkpointed(), torch.randn(1, 4, requires_grad=True)
    traced = quietvit.trace(model, x.detach())
    spare = intercept(traced, lambda site, operands, run: run(*operands))
    with pytest.raises(QuietvitError, match="inner of Checkpointed runs under gradient"), spare:
        model(x)
    with torch.no_grad(), spare:
        model(x)


def test_what_is_written_through_a_view_depends_on_the_input():
    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            room = torch.zeros(len(x), 6, 4)
            room[:, :5].copy_(self.first(x))
            return self.second(F.gelu(room))

    traced = quietvit.trace(Buffered(), torch.randn(1, 5, 4))
    assert [site.role for site in traced.matmuls] == ["patch_embed", "head"]


def test_complex_rotations_keep_the_input_in_sight():
    class Rotated(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            q = torch.view_as_complex(self.q(x).unflatten(-1, (4, 2)))
            turn = torch.polar(torch.ones(4), torch.arange(4.0))
            q = torch.view_as_real(q * turn).flatten(-2)
            return (q @ self.k(x).mT).softmax(-1) @ x

    traced = quietvit.trace(Rotated(), torch.randn(1, 5, 8))
    assert [site.role for site in traced.matmuls][2:] == ["query_key", "attention_value"]


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("i,j->ij", [(5,), (8,)], 0),
        ("bij,jk", [(2, 3, 4), (4, 5)], 2 * 3 * 4 * 5),
        ("...ij,...kj->...i", [(2, 3, 4), (2, 5, 4)], 2 * 3 * 4),
        ("bij,bkj->bik", [(2, 3, 4), (2, 5, 4)], 2 * 3 * 4 * 5),
    ],
)
def test_einsum_counts_what_torch_multiplies(equation, shapes, macs):
    class Product(nn.Module):
        def forward(self, x):
            left, right = torch.ones(shapes[0]) * x.sum(), torch.ones(shapes[1])
            return torch.einsum(equation, left, right)

    model, x = Product(), torch.ones(1, 2)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert quietvit.trace(model, x).macs == macs == counter.get_total_flops() // 2


def test_a_scaled_weight_is_no_view_of_the_parameter():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return F.linear(x, self.weight * 2.0) + F.linear(x, self.weight.data)

    first, second = quietvit.trace(Scaled(), torch.randn(1, 4)).matmuls
    assert first.weight is None
    assert second.weight.parameter_name == "weight"


def test_activations_are_not_kept():
    class Deep(nn.Module):
        def forward(self, x):
            refs.append(weakref.ref(F.gelu(x)))
            gc.collect()
            alive.append(refs[0]() is not None)
            return x

    refs, alive = [], []
    quietvit.trace(Deep(), torch.randn(1, 4))
    assert alive == [False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_makes_the_same_trace(dtype):
    model, example = build("timm-vit")
    expected = quietvit.trace(model, example)
    with torch.autocast("cpu", torch.bfloat16):
        assert quietvit.trace(model, example) == expected
    assert quietvit.trace(model.to(dtype), example.to(dtype)) == expected


def test_products_that_cannot_be_taken_apart_are_counted_as_opaque():
    class Distances(nn.Module):
        def forward(self, x):
            return torch.tensordot(x, torch.ones(4, 3), dims=1)

    traced = quietvit.trace(Distances(), torch.randn(2, 4))
    assert [site.kind for site in traced.sites] == ["opaque"]
    assert traced.macs == 1 * 4 * 3


def test_error_names_the_shapes():
    model, _ = build("timm-vit")
    with pytest.raises(QuietvitError, match=r"\(1, 3, 33, 33\).*Give images"):
        quietvit.trace(model, torch.randn(1, 3, 33, 33))


def test_table_and_lookup():
    model, example = build("timm-vit")
    traced = quietvit.trace(model, example)
    assert "blocks.1.attn.query_key" in str(traced)
    assert traced["blocks.0.mlp.fc2"].operands[0].fed_by == ("blocks.0.mlp.act",)
    with pytest.raises(QuietvitError, match=r"blocks\.0\.mlp\.fc1"):
        traced["blocks.0.mlp.fc"]


def test_compiled_model_is_traced_through():
    model, example = build("timm-vit")
    assert quietvit.trace(torch.compile(model), example) == quietvit.trace(model, example)


class Detector(nn.Module):
    """Takes a list of images, as torchvision's detectors do, and may take boxes too."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 8, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)

    def forward(self, images, shift=None):
        x = self.embed(torch.stack(images)).flatten(2).mT
        return self.layer(x if shift is None else x + shift)


def test_a_list_of_images_is_one_argument_and_keeps_its_channels():
    model, images = Detector(), [torch.randn(3, 32, 32), torch.randn(3, 32, 32)]
    traced = quietvit.trace(model, images)
    assert traced["embed"].operands[0].shape == (1, 3, 32, 32)
    assert quietvit.trace(model, {"images": images}) == traced
    assert len(quietvit.find_pairs(model, images)) > 0


@pytest.mark.parametrize(
    ("example", "remedy"),
    [
        (torch.randn(3, 32, 32), r"image\[None\]"),
        ((torch.randn(3, 32, 32),), "several arguments as a tuple"),
        ([torch.randn(3, 32, 32)], r"torch\.stack\(images\)"),
    ],
)
def test_the_error_of_a_lone_image_shows_its_shape_and_the_remedy(example, remedy):
    model, _ = build("tv-vit")
    with pytest.raises(QuietvitError, match=rf"shapes \[\(3, 32, 32\)\].*{remedy}"):
        quietvit.trace(model, example)


class Integral(nn.Module):
    """The mean of a distribution: a linear whose weight is one vector, as in D-FINE."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(8, 8), nn.Linear(2, 3)
        self.register_buffer("points", torch.linspace(-1, 1, 4))

    def forward(self, x):
        p = self.layer(x).unflatten(-1, (2, 4)).softmax(-1)
        return self.out(F.linear(p, self.points) + p @ self.points + torch.mv(p[0, 0], self.points))


def test_a_product_with_a_vector_is_no_site_and_counts_nothing():
    model, x = Integral(), torch.randn(2, 5, 8)
    traced = quietvit.trace(model, x)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x[:1])
    assert 2 * traced.macs == counter.get_total_flops()
    assert [site.name for site in traced.matmuls] == ["layer", "out"]
    assert "out" in traced.outputs  # what comes of the vector still depends on the input
    assert traced["out"].role != "constant"


class Expanded(nn.Module):
    """Gives a layer a view of a parameter, at which torch's counter fails without gradients."""

    def __init__(self):
        super().__init__()
        self.query, self.layer = nn.Parameter(torch.randn(1, 4)), nn.Linear(4, 4)

    def forward(self, x):
        return x @ self.layer(self.query.expand(3, 4)).mT


def test_no_bare_error_of_torchs_counter():
    with FlopCounterMode(display=False), pytest.raises(QuietvitError, match="trace outside of it"):
        quietvit.trace(Expanded(), torch.randn(2, 4))
