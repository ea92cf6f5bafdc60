"""The terms of the generators against direct formulas, and the laws of their steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.coat import CoaT
from torch import nn

import quietvit
import zoo
from quietvit.synthesis import DGH, PSAQ
from quietvit.synthesis.dgh import Pipeline, Plateau, Statistics, WholeSet, stretching_weight
from quietvit.synthesis.psaq import PatchSimilarity, rate
from quietvit.synthesis.scale import PixelScale
from quietvit.synthesis.terms import (
    Moments,
    _Kernels,
    alignment,
    image_spread,
    moments,
    patch_entropy,
    stretch,
    total_variation,
)
from quietvit.synthesis.watching import Norms, Patches, output_sites
from test_synthesis import Convolutions

SCALE = PixelScale((3, 16, 16), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def direct_entropy(x: np.ndarray, h: float, points: int) -> float:
    """PSAQ's entropy of one sample (N, D), pair by pair."""
    n = len(x)
    s = np.array(
        [
            x[i] @ x[j] / (np.linalg.norm(x[i]) * np.linalg.norm(x[j]))
            for i in range(n)
            for j in range(n)
        ]
    )
    grid = np.linspace(s.min(), s.max(), points)
    p = np.array(
        [np.exp(-((g - s) ** 2) / (2 * h**2)).mean() / (h * math.sqrt(2 * math.pi)) for g in grid]
    )
    p = p + 1e-4
    return float(np.trapezoid(-p * np.log(p), grid))


@pytest.mark.parametrize(("h", "points"), [(0.01, 10), (0.1, 7)])
def test_the_entropy_is_the_direct_formula(h, points):
    x = torch.randn(3, 6, 4, generator=random(), dtype=torch.float64)
    found = patch_entropy(x, h, points)
    for sample, entropy in zip(x, found, strict=True):
        assert float(entropy) == pytest.approx(direct_entropy(sample.numpy(), h, points), rel=2e-3)


def test_the_kernels_have_the_gradient_of_finite_differences():
    grid = torch.rand(2, 3, generator=random(), dtype=torch.float64)
    x = torch.rand(2, 5, generator=random(1), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: _Kernels.apply(grid, s, 0.2), x)


def test_the_entropy_is_larger_for_patches_that_differ_and_its_gradient_raises_it():
    same = torch.ones(1, 12, 4) + 1e-3 * torch.randn(1, 12, 4, generator=random())
    varied = torch.randn(1, 12, 4, generator=random())
    assert float(patch_entropy(varied, 0.1)) > float(patch_entropy(same, 0.1))
    x = varied.requires_grad_()
    before = patch_entropy(x, 0.1)
    (gradient,) = torch.autograd.grad(before.sum(), x)
    after = patch_entropy(x.detach() + 1e-3 * gradient / gradient.norm(), 0.1)
    assert float(after) > float(before.detach())


def test_total_variation_does_not_depend_on_the_number_or_size_of_images():
    one = torch.randn(1, 3, 8, 8, generator=random())
    many = one.repeat(5, 1, 1, 1)
    torch.testing.assert_close(total_variation(one), total_variation(many))
    whole = torch.randn(32, 3, 224, 224, generator=random())
    parts = (
        (whole[..., 1:] - whole[..., :-1]).norm()
        + (whole[..., 1:, :] - whole[..., :-1, :]).norm()
        + (whole[..., 1:, 1:] - whole[..., :-1, :-1]).norm()
        + (whole[..., 1:, :-1] - whole[..., :-1, 1:]).norm()
    )
    torch.testing.assert_close(total_variation(whole), parts)


def test_stretching_and_hinges_are_their_formulas():
    outputs = torch.tensor([[1.0, 4.0, 2.0], [0.0, -2.0, 0.5]])
    assert float(stretch([outputs, torch.empty(0, 3)])) == pytest.approx(-(3.0 + 2.5) / 2)
    x = torch.randn(4, 5, 6, 7, generator=random()) * 2 + 1
    mean, variance = torch.randn(5, generator=random(1)), torch.rand(5, generator=random(2))
    expected = []
    for image in x:
        flat = image.reshape(5, -1)
        apart = ((flat.mean(1) - mean) ** 2).sum() / 5
        spread = ((flat.std(1, unbiased=True) - variance.sqrt()) ** 2).sum() / 5
        expected.append(max(float(apart) - 0.5, 0) + max(float(spread) - 0.5, 0))
    found = image_spread(x, 4, mean, variance)
    torch.testing.assert_close(found, torch.tensor(expected))
    rows = x.flatten(2).transpose(1, 2).reshape(-1, 5)
    torch.testing.assert_close(image_spread(rows, 4, mean, variance), found)


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 3, 5), (8, 3)])
def test_alignment_vanishes_at_the_stored_statistics_alone(shape):
    x = torch.randn(shape, generator=random(), dtype=torch.float64)
    flat = x.movedim(1, 0).reshape(3, -1)
    mean, variance = flat.mean(1), flat.var(1, correction=0)
    found = moments(x)
    assert float(alignment(found, mean.float(), variance.float())) < 1e-10
    assert float(alignment(found, mean.float() + 1, variance.float())) == pytest.approx(1, rel=1e-5)
    own = (variance + 1e-6).sqrt()
    apart = ((own - (4 * variance + 1e-6).sqrt()) ** 2).sum() / 3
    assert float(alignment(found, mean.float(), 4 * variance.float())) == pytest.approx(
        10 * float(apart), rel=1e-4
    )


def test_cached_moments_equal_those_of_the_whole_set_and_only_one_batch_has_gradients():
    batches = [torch.randn(4, 3, 5, 5, generator=random(i)) for i in range(3)]
    whole = WholeSet([[moments(batch)] for batch in batches])
    live = batches[1].clone().requires_grad_()
    (merged,) = whole.with_batch(1, [moments(live)])
    together = moments(torch.cat(batches))
    torch.testing.assert_close(merged.mean, together.mean)
    torch.testing.assert_close(merged.second, together.second)
    (own,) = torch.autograd.grad(merged.mean.sum(), live)
    torch.testing.assert_close(own, torch.full_like(own, 1 / (3 * 4 * 25)))
    moved = Moments(torch.ones(3), torch.full((3,), 2.0))
    whole.keep(0, [moved])
    (merged,) = whole.with_batch(1, [moments(live)])
    rest = moments(torch.cat(batches[1:]))
    torch.testing.assert_close(merged.mean, (2 * rest.mean + 1) / 3)


def test_the_pipeline_flips_smooths_crops_and_clips_in_this_order():
    pipeline = Pipeline(SCALE, sigma=1.25, margin=0.25, device=torch.device("cpu"))
    assert pipeline.size == (20, 20)
    x = 3 * torch.randn(2, 3, 20, 20, generator=random())
    line = [math.exp(-(d**2) / (2 * 1.25**2)) for d in (-1, 0, 1)]
    kernel = torch.tensor([[a * b for a in line] for b in line])
    kernel = kernel / kernel.sum()
    padded = F.pad(x, (1, 1, 1, 1))
    smooth = sum(
        kernel[i, j] * padded[..., i : i + 20, j : j + 20] for i in range(3) for j in range(3)
    )
    low, high = SCALE.bounds(x.device)
    torch.testing.assert_close(pipeline.finished(x), smooth[..., 2:18, 2:18].clamp(low, high))
    candidates = [
        picture[..., top : top + 16, left : left + 16].clamp(low, high)
        for picture in (smooth, smooth.flip(3))
        for top in range(5)
        for left in range(5)
    ]
    seen = set()
    for seed in range(40):
        drawn = pipeline.drawn(x, random(seed))
        seen |= {i for i, c in enumerate(candidates) if torch.allclose(drawn, c, atol=1e-5)}
    assert any(i < 25 for i in seen)
    assert any(i >= 25 for i in seen)
    assert len(seen) > 10
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(pipeline.finished(x).sum(), x)
    inner = gradient[..., 4:16, 4:16]  # clipping lets all of it through
    torch.testing.assert_close(inner, torch.ones_like(inner))
    far = pipeline.finished(1e9 * x.detach())  # as after a step with a large gradient
    assert bool((far >= low).all() & (far <= high).all())


def test_the_plateau_halves_after_its_patience_and_forgets_the_best():
    parameter = nn.Parameter(torch.zeros(1))
    plateau = Plateau(torch.optim.RAdam([parameter], lr=16.0), patience=3)
    rates = []
    for loss in [1.0, *[2.0] * 4, 3.0, *[3.0] * 3, 2.9]:
        plateau.step(loss)
        rates.append(plateau.optimizer.param_groups[0]["lr"])
    # 2.0 is no progress on 1.0. After the cut, 3.0 is the first loss, and 2.9 is progress on it.
    assert rates == [16.0] * 4 + [8.0] * 6
    assert plateau.best == 2.9
    assert plateau.threshold == 1e-4


def dgh(settings: DGH, count: int = 4) -> Statistics:
    torch.manual_seed(0)
    model = Convolutions().eval().requires_grad_(False)
    found = quietvit.trace(model, torch.randn(1, *SCALE.size))
    return Statistics(model, found, settings, count, SCALE, random(), torch.device("cpu"))


def test_a_step_of_dgh_descends_its_loss_and_refreshes_only_the_input():
    given = DGH(iterations=10, batch_size=2, lr=0.05, margin=0.0, stretching=0)
    work = dgh(given.model_copy(update={"precision": "float32"}))
    images = work.batches[0]
    loss, found = work.loss(work.pipeline.finished(images), 0)
    (gradient,) = torch.autograd.grad(loss, images)
    with torch.no_grad():
        moved = images - 0.1 * gradient / gradient.norm()
        assert float(work.loss(work.pipeline.finished(moved), 0)[0]) < float(loss)
    assert len(found) == 3  # the input and two BatchNorms
    before = [m.clone() for m in work._whole._means]
    used = {}
    inner = work.loss

    def seen(images, index):
        result = inner(images, index)
        used["found"] = result[1]
        return result

    work.loss = seen
    work.step(0, 0.0)
    after = work._whole._means
    torch.testing.assert_close(after[0][0], moments(work.finished()[0]).mean)
    for layer in (1, 2):
        torch.testing.assert_close(after[layer][0], used["found"][layer].mean.detach())
        assert torch.equal(after[layer][1], before[layer][1])


def test_the_outputs_are_weighted_by_the_published_model():
    for name, weight in (("resnet18", 3e-7), ("resnet50.a1_in1k", 1e-7), ("mobilenetv2_100", 3e-5)):
        model = nn.Identity()
        model.pretrained_cfg = {"architecture": name}
        assert stretching_weight(model) == weight
    assert stretching_weight(nn.Identity()) == 3e-5
    plain, stretched = (dgh(DGH(stretching=weight, precision="float32")) for weight in (0, 0.5))
    image = plain.pipeline.finished(plain.batches[0])
    with torch.no_grad():
        model = plain._model
        logits = model(SCALE.to_model(image))
        norm = model.body[4]
        x = model.body[:4](SCALE.to_model(image))
        hinge = image_spread(x, len(image), norm.running_mean, norm.running_var).mean()
        expected = 0.5 * (-(logits.amax(1) - logits.amin(1)).mean() + hinge)
        gap = stretched.loss(image, 0)[0] - plain.loss(image, 0)[0]
    torch.testing.assert_close(gap, expected)


def test_frozen_and_flat_batch_norms_count_and_the_last_has_positions():
    import torchvision

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.frozen = torchvision.ops.FrozenBatchNorm2d(4)
            self.flat = nn.BatchNorm1d(4)
            self.instance = nn.InstanceNorm2d(4, track_running_stats=True)
            self.last = nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.instance(self.frozen(self.conv(x)))
            x = self.flat(x.flatten(2).transpose(1, 2).flatten(0, 1)).view(len(x), -1, 4)
            return self.last(x.mean(1))

    model = Mixed().eval()
    norms = Norms(model, model, torch.randn(2, 3, 8, 8))
    assert len(norms.stored) == 3
    norms.start(3)
    model(torch.randn(3, 3, 8, 8))
    assert [m.mean.shape for m in norms.moments] == [(4,)] * 3
    assert norms.spread.shape == (3,)
    assert norms.spread.isfinite().all()


def psaq(settings: PSAQ, name: str = "timm-vit") -> PatchSimilarity:
    model, example = zoo.build(name)
    image = example["pixel_values"] if isinstance(example, dict) else example
    model.requires_grad_(False)
    scale = PixelScale(tuple(image.shape[1:]), SCALE.mean, SCALE.std)
    start = torch.randn(4, *scale.size, generator=random())
    return PatchSimilarity(model, quietvit.trace(model, image), settings, start, scale, random())


@pytest.mark.parametrize(
    ("name", "patches", "windows"),
    [
        ("timm-vit", 16, False),
        ("hf-yolos", 16, False),
        ("hf-detr", 16, False),
        ("tv-swin", 16, True),
    ],
)
def test_only_patches_are_compared(name, patches, windows):
    """Class tokens, detection tokens and queries of a decoder are left out, on every library."""
    model, example = zoo.build(name)
    image = example["pixel_values"] if isinstance(example, dict) else example
    trace = quietvit.trace(model, image)
    found = Patches(model, trace, torch.randn(2, *image.shape[1:], generator=random()))
    assert {len(kept) for kept in found._kept.values()} <= {patches}
    assert not any("decoder" in site for site in found.sites)
    assert found.windows is windows
    if name == "timm-vit":
        assert all(kept.tolist() == list(range(1, 17)) for kept in found._kept.values())
        assert len(found.sites) == 2


def test_attention_over_channels_compares_tokens():
    model = timm_xcit()
    trace = quietvit.trace(model, torch.randn(1, 3, 32, 32))
    found = Patches(model, trace, torch.randn(2, 3, 32, 32, generator=random()))
    assert {len(kept) for kept in found._kept.values()} == {4}


def test_linear_attention_compares_tokens_without_the_class_token():
    """CoaT multiplies the query by softmax(key)^T value, which has a row for each channel."""
    sizes = {"embed_dims": [16] * 4, "serial_depths": [1] * 4, "parallel_depth": 0}
    model = CoaT(32, patch_size=4, num_heads=8, mlp_ratios=[2] * 4, num_classes=3, **sizes).eval()
    trace = quietvit.trace(model, torch.randn(1, 3, 32, 32))
    found = Patches(model, trace, torch.randn(2, 3, 32, 32, generator=random()))
    assert [kept.tolist() for kept in found._kept.values()] == [
        list(range(1, 1 + side**2)) for side in (8, 4, 2)
    ]


def timm_xcit() -> nn.Module:
    import timm

    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 4, "cls_attn_layers": 1}
    return timm.create_model("xcit_nano_12_p16_224", img_size=32, num_classes=3, **sizes).eval()


def test_the_loss_of_psaq_is_the_sum_of_its_weighted_terms():
    weights = {"entropy": 0.7, "stretching": 0.3, "classes": 0.5, "variation": 0.05}
    images = torch.randn(4, 3, 32, 32, generator=random(5))
    only = [{**dict.fromkeys(weights, 0), key: weight} for key, weight in weights.items()]
    whole, *parts = (psaq(PSAQ(**given, precision="float32")) for given in (weights, *only))
    parts[-1]._variation = whole._variation
    parts[2]._labels = whole._labels
    found = [float(_total(part, images)) for part in parts]
    assert float(_total(whole, images)) == pytest.approx(sum(found), rel=1e-5)
    logits = whole._model(whole._scale.to_model(images))
    assert found[1] == pytest.approx(
        -0.3 * float((logits.amax(1) - logits.amin(1)).mean()), rel=1e-4
    )
    assert found[2] == pytest.approx(
        0.5 * float(F.cross_entropy(logits, whole._labels[0])), rel=1e-4
    )
    assert 2500 <= whole._variation <= 3000


def test_the_gradient_of_the_loss_of_psaq_is_that_of_finite_differences():
    work = psaq(PSAQ(bandwidth=0.2, precision="float32"))
    x = torch.randn(4, 3, 32, 32, generator=random(5), requires_grad=True)
    (gradient,) = torch.autograd.grad(work.loss(x), x)
    ahead = gradient / gradient.norm()
    with torch.no_grad():
        rise = [float(_total(work, x + step * ahead)) for step in (-5e-2, 5e-2)]
    assert (rise[1] - rise[0]) / 0.1 == pytest.approx(float(gradient.norm()), rel=0.05)


def _total(work: PatchSimilarity, images: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        return work.loss(images.detach().requires_grad_()).detach()


def test_batches_bound_the_memory_and_share_the_learning_rate_schedule():
    work = psaq(PSAQ(batch_size=3, iterations=10))
    assert [len(batch) for batch in work.batches] == [2, 2]
    assert work._lr == 0.2
    assert psaq(PSAQ(), "tv-swin")._lr == 0.25
    rates = [rate(i / 500, 1 / 500) for i in range(500)]
    assert rates[0] == pytest.approx(1 / 100)
    assert rates[99] == pytest.approx(1.0)
    assert rates[300] == pytest.approx(0.5, abs=5e-3)
    assert rates[499] < 1e-3


def test_the_outputs_are_the_heads_or_the_last_sites():
    expected = {"hf-siglip": {"post_layernorm"}, "timm-vit": {"head"}, "tv-swin": {"head"}}
    for name, sites in expected.items():
        assert set(output_sites(quietvit.trace(*zoo.build(name)))) == sites
