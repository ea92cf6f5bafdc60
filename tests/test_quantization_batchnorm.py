"""BatchNorms folded into weights, and channels equalized through ReLU: exact in float."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import quietvit
import zoo
from quietvit.quantization import get_method
from quietvit.quantization.calibrated import Calibrated
from quietvit.quantization.calibration import Calibration, ImageStream
from quietvit.quantization.fitting.batchnorm import fold_batchnorms
from quietvit.quantization.fitting.equalize import equalize, std_after_relu
from quietvit.tracing import MATMUL_KINDS, SITE_KINDS, intercept, trace


class CNN(nn.Module):
    """Convolution, depthwise, pointwise, linear, each with a BatchNorm."""

    def __init__(self, activation=nn.ReLU, affine=True, pool=None):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8, affine=affine)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn2 = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 12, 3, groups=2)
        self.bn3 = nn.BatchNorm2d(12)
        self.flat = nn.Linear(12, 10)
        self.bn4 = nn.BatchNorm1d(10)
        self.head = nn.Linear(10, 5)
        self.act = activation()
        self.pool = pool or nn.Identity()

    def forward(self, x):
        x = self.pool(self.act(self.bn1(self.stem(x))))
        x = self.act(self.bn2(self.deep(x)))
        x = self.act(self.bn3(self.wide(x))).mean((2, 3))
        return self.head(self.act(self.bn4(self.flat(x))))


class Wrapped(nn.Module):
    """A body, and what its forward does with the parts in ``parts``."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.way = forward

    def forward(self, x):
        return self.way(self.parts, x)


def randomized(model):
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            channels = module.num_features
            module.running_mean.copy_(torch.randn(channels, generator=generator))
            module.running_var.copy_(torch.rand(channels, generator=generator) + 0.3)
            if module.affine:
                gain = torch.randn(channels, generator=generator)
                module.weight.data.copy_(gain + 1.5 * gain.sign())
                module.bias.data.copy_(2 * torch.randn(channels, generator=generator))
    return model.eval()


def settled(model, images):
    """Gains and biases random, statistics those of the images, so that errors do not grow."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            module.bias.data.copy_(torch.randn(module.num_features, generator=generator))
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    return model.eval()


def calibration_of(model, images):
    traced = trace(model, images[:1])
    return Calibration(model, traced, ImageStream(images, model), progress=False)


def run(calibration, calibrated, images):
    with torch.no_grad(), intercept(calibration.trace, calibrated.handle, kinds=SITE_KINDS):
        return calibration.model(images)


def folded(model, images, equalized=True):
    """Outputs before and after, what was folded and what equalized."""
    with torch.no_grad():
        wanted = model(images)
    calibration, calibrated = calibration_of(model, images), Calibrated()
    folds = fold_batchnorms(calibration, calibrated, images[:1])
    found = equalize(calibration, calibrated, folds, images[:1]) if equalized else None
    return wanted, run(calibration, calibrated, images), folds, found, calibrated


def images_of(size=16):
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(2)).double()


def far(one, other):
    return float((one - other).abs().max() / one.abs().max())


TIMM = ["tf_efficientnet_lite0", "resnet10t", "efficientnet_b0", "tf_mobilenetv3_small_minimal_100"]


@pytest.mark.parametrize("name", TIMM)
def test_folding_and_equalization_are_exact_on_timms_models(name):
    images = images_of(64)
    model = settled(timm.create_model(name, num_classes=5).double(), images)
    wanted, got, folds, found, _ = folded(model, images)
    assert far(wanted, got) < 1e-5
    batchnorms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(folds.folded) == len(batchnorms)
    assert folds.skipped == ()
    relu = name in ("resnet10t", "tf_mobilenetv3_small_minimal_100")
    assert bool(found.scales) is relu


def test_weights_are_scaled_as_the_batchnorm_says_and_the_kernel_needs_an_offset_only():
    model = randomized(CNN()).double()
    images = images_of()
    before = {name: p.clone() for name, p in model.named_parameters()}
    _, _, folds, _, calibrated = folded(model, images, equalized=False)
    assert [f.source.name for f in folds.folded] == ["stem", "deep", "wide", "flat"]
    for fold in folds.folded:
        bn = model.get_submodule(fold.norm.module)
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        shape = [-1] + [1] * (before[f"{fold.source.name}.weight"].dim() - 1)
        expected = before[f"{fold.source.name}.weight"] * scale.view(shape)
        torch.testing.assert_close(model.get_submodule(fold.source.name).weight, expected)
        whole = calibrated.adjustments[fold.source.name].gain * scale
        torch.testing.assert_close(whole, torch.ones_like(whole), rtol=1e-6, atol=0)


def test_equalization_scales_by_what_lies_behind_the_relu():
    model = randomized(CNN()).double()
    gains = {n: m.weight.detach().abs() for n, m in model.named_modules() if "bn" in n}
    wanted, got, folds, found, _ = folded(model, images_of())
    assert far(wanted, got) < 1e-5
    assert list(found.scales) == ["bn1", "bn2", "bn3", "bn4"]
    for fold in folds.folded:
        torch.testing.assert_close(fold.std, gains[fold.norm.name], rtol=1e-4, atol=0)
        spread = std_after_relu(fold.mean, fold.std)
        torch.testing.assert_close(found.scales[fold.norm.name], 1 / spread.clamp(min=1))
    assert any(bool((scale < 0.9).any()) for scale in found.scales.values())


def test_the_standard_deviation_behind_a_relu_is_that_of_samples():
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([-3.0, -0.5, 0.0, 1.0, 4.0])
    std = torch.tensor([1.0, 2.0, 1.0, 0.5, 1.5])
    sampled = torch.randn(400_000, 5, generator=generator).mul(std).add(mean).relu().std(0)
    torch.testing.assert_close(std_after_relu(mean, std).float(), sampled, rtol=0.05, atol=1e-3)
    assert std_after_relu(torch.tensor([1.0, -1.0]), torch.zeros(2)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish])
def test_other_activations_are_not_equalized_with_the_reason(activation):
    wanted, got, folds, found, _ = folded(randomized(CNN(activation)).double(), images_of())
    assert far(wanted, got) < 1e-5
    assert len(folds.folded) == 4
    assert found.scales == {}
    notes = " ".join(found.notes("hptq"))
    assert "not positively homogeneous" in notes
    assert "3 more" in notes


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.ZeroPad2d(1)])
def test_scales_pass_through_pooling_and_zero_padding(pool):
    wanted, got, _, found, _ = folded(randomized(CNN(pool=pool)).double(), images_of())
    assert far(wanted, got) < 1e-5
    assert "bn1" in found.scales


@pytest.mark.parametrize("pool", [nn.ConstantPad2d(1, 0.7), nn.Hardtanh(0, 0.5), nn.Softshrink()])
def test_scales_do_not_pass_through_what_bends_or_adds(pool):
    wanted, got, _, found, _ = folded(randomized(CNN(pool=pool)).double(), images_of())
    assert far(wanted, got) < 1e-5
    assert "bn1" not in found.scales
    assert "bn1" in dict(found.skipped)


def test_a_constant_added_behind_the_relu_is_seen():
    parts = {"a": nn.Conv2d(3, 4, 3), "bn": nn.BatchNorm2d(4), "b": nn.Conv2d(4, 5, 1)}
    model = Wrapped(lambda p, x: p["b"](p["bn"](p["a"](x)).relu() + 1.0), **parts)
    wanted, got, folds, found, _ = folded(randomized(model).double(), images_of())
    assert far(wanted, got) < 1e-5
    assert (len(folds.folded), len(found.scales)) == (1, 0)


def test_a_batchnorm_without_gain_is_folded():
    wanted, got, folds, _, _ = folded(randomized(CNN(affine=False)).double(), images_of())
    assert far(wanted, got) < 1e-5
    assert folds.folded[0].norm.module == "bn1"


def test_a_gain_of_zero_stays():
    model = randomized(CNN()).double()
    model.bn1.weight.data[3] = 0.0
    model.bn2.weight.data.fill_(0.0)
    wanted, got, folds, _, _ = folded(model, images_of())
    assert far(wanted, got) < 1e-5
    assert len(folds.folded) == 4


def conv(bias=True):
    return nn.Conv2d(3, 3, 1, bias=bias)


def bn(**kwargs):
    return nn.BatchNorm2d(3, **kwargs)


def feeds_two(p, x):
    y = p["a"](x)
    return p["bn"](y) + y


def shares_weight(p, x):
    return p["bn"](p["a"](p["a"](x)))


SKIPPED = {
    "it feeds a residual too": (feeds_two, "feeds other sites"),
    "its weight is read twice": (shares_weight, "is shared by"),
    "a residual in front": (lambda p, x: p["bn"](p["a"](x) + p["b"](x)), "kind add"),
    "nothing in front": (lambda p, x: p["a"](p["bn"](x)), "fed by the input"),
    "scaled on the way": (lambda p, x: p["bn"](p["a"](x) * 2), "not the unchanged output"),
    "turned on the way": (
        lambda p, x: p["bn"](p["a"](x).transpose(1, 2)),
        "not the unchanged output",
    ),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_what_cannot_be_folded_is_skipped_with_the_reason(case):
    way, reason = SKIPPED[case]
    model = randomized(Wrapped(way, a=conv(), b=conv(), bn=bn())).double()
    images = torch.randn(2, 3, 3, 3).double()
    wanted, got, folds, _, calibrated = folded(model, images)
    torch.testing.assert_close(wanted, got, rtol=0, atol=0)
    assert folds.folded == ()
    assert reason in folds.skipped[0][1]
    assert reason in folds.notes("hptq")[0]
    assert calibrated.adjustments == {}


def test_standardized_weights_are_no_batchnorms():
    model, example = zoo.build("timm-hybrid")
    wanted, got, folds, _, _ = folded(model.double(), example.double())
    assert far(wanted, got) < 1e-12  # attention in other words
    assert (folds.folded, folds.skipped) == ((), ())


def test_statistics_of_the_batch_are_not_folded():
    model = Wrapped(lambda p, x: p["bn"](p["a"](x)), a=conv(), bn=bn(track_running_stats=False))
    _, _, folds, _, _ = folded(model.eval(), torch.randn(2, 3, 4, 4))
    assert "batch's own statistics" in folds.skipped[0][1]


def test_one_batchnorm_behind_two_convolutions_is_folded_into_both():
    model = Wrapped(lambda p, x: p["bn"](p["b"](p["bn"](p["a"](x)))), a=conv(), b=conv(), bn=bn())
    wanted, got, folds, _, _ = folded(randomized(model).double(), images_of())
    assert far(wanted, got) < 1e-5
    assert len(folds.folded) == 2


def test_sites_are_observed_in_the_coordinates_of_the_float_model():
    model, images = randomized(CNN()), images_of().float()
    bits = dict.fromkeys(("weight_bits", "activation_bits", "patch_embed_bits", "head_bits"), 16)
    method = get_method("hptq")(**bits)
    quantized = quietvit.quantize(model, method, images, progress=False)
    plain, seen = {}, {}

    def into(kept):
        def handler(site, operands, run):
            kept[site.name] = operands[0], run(*operands)
            return kept[site.name][1]

        return handler

    with torch.no_grad():
        with intercept(quantized.trace, into(plain), kinds=MATMUL_KINDS):
            model(images)
        with quantized.observe(into(seen)):
            quantized(images)
    assert any("equalized the channels of 4 layers" in note for note in quantized.notes)
    for name, (given, result) in plain.items():
        torch.testing.assert_close(seen[name][0], given, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(seen[name][1], result, rtol=1e-2, atol=1e-2)
