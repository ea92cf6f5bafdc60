"""RMSNorms written in single steps are norms: found by data flow, with their true gain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quietvit
from quietvit import QuietvitError
from quietvit.quantization import RepQViT, SmoothQuant, quantize
from quietvit.tracing import intercept

EPS = 1e-3
Steps = Callable[["Norm", Tensor], Tensor]


def llama(own: Norm, x: Tensor) -> Tensor:
    """As transformers writes it, for AIMv2 too: in float32."""
    wide = x.to(torch.float32)
    variance = wide.pow(2).mean(-1, keepdim=True)
    return own.weight * (wide * torch.rsqrt(variance + EPS)).to(x.dtype)


def timm_style(own: Norm, x: Tensor) -> Tensor:
    mean = torch.mean(torch.square(x), dim=(-1,), keepdim=True)
    return x.mul(torch.rsqrt(EPS + mean)) * own.weight


def divided(own: Norm, x: Tensor) -> Tensor:
    return x / (x * x).mean(dim=2, keepdim=True).add(torch.tensor(EPS)).sqrt() * own.weight


def reciprocal(own: Norm, x: Tensor) -> Tensor:
    return own.weight * ((1 / ((x**2).mean(-1, keepdim=True) + EPS) ** 0.5) * x)


def gemma(own: Norm, x: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (wide * (1.0 + own.weight.float())).type_as(x)


def with_bias(own: Norm, x: Tensor) -> Tensor:
    return llama(own, x) + own.bias


def over_tokens(own: Norm, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS) * own.weight


def euclidean(own: Norm, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS) * own.weight


def cubed(own: Norm, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + EPS) * own.weight


def of_another(own: Norm, x: Tensor) -> Tensor:
    return x.sigmoid() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * own.weight


def shifted(own: Norm, x: Tensor) -> Tensor:
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) + 1) * own.weight


def written(own: Norm, x: Tensor) -> Tensor:
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    y += 1
    return y * own.weight


def scaled_late(own: Norm, x: Tensor) -> Tensor:
    x = x.clone()
    inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    x *= 2
    return x * inverse * own.weight


def without_gain(own: Norm, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def gain_of_tokens(own: Norm, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * own.weight[: x.shape[1], None]


NORMS = [llama, timm_style, divided, reciprocal, gemma, with_bias]
OTHERS = [
    *(over_tokens, euclidean, cubed, of_another, shifted, written, scaled_late, without_gain),
    gain_of_tokens,
]


class Norm(nn.Module):
    def __init__(self, steps: Steps) -> None:
        super().__init__()
        self.steps = steps
        self.weight, self.bias = nn.Parameter(0.5 + torch.rand(8)), nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(self, x)


class Net(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.norm = norm()
        self.fc1, self.fc2, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).mT
        x = x + self.fc2(F.gelu(self.fc1(self.norm(x))))
        return self.head(x.mean(1))


def net(steps: Steps) -> Net:
    return Net(lambda: Norm(steps)).eval()


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("steps", NORMS)
def test_a_norm_in_steps_is_a_norm_in_every_pass(steps: Steps) -> None:
    model = net(steps)
    trace = quietvit.trace(model, IMAGES)
    (norm,) = (site for site in trace.sites if site.kind == "norm")
    assert trace["fc1"].role == "post_norm"
    assert norm.operands[0].fed_by == ("embed",)
    calls: list[Any] = []

    def handler(site: Any, operands: Any, run: Any) -> Tensor:
        (x,) = operands
        gain = model.norm.weight + (steps is gemma)
        normalized = F.rms_norm(x, (8,), gain, EPS)
        assert torch.allclose(run(x), normalized, atol=1e-6)
        assert torch.allclose(run(3 * x + 1), F.rms_norm(3 * x + 1, (8,), gain, EPS), atol=1e-6)
        calls.append(site.name)
        return run(x)

    for batch in (IMAGES, IMAGES[:1]):
        expected = model(batch)
        with intercept(trace, handler, kinds={"norm"}):
            assert torch.equal(model(batch), expected)
    assert calls == [norm.name] * 2


@pytest.mark.parametrize("steps", NORMS)
def test_its_pairs_are_those_of_torchs_rms_norm(steps: Steps) -> None:
    expected = quietvit.find_pairs(Net(lambda: nn.RMSNorm(8)).eval(), IMAGES)
    found = quietvit.find_pairs(net(steps), IMAGES)
    if steps is gemma:  # the gain 1 + weight is no parameter
        assert "norm_linear" not in {pair.kind for pair in found}
    else:
        assert list(found) == list(expected)


@pytest.mark.parametrize("steps", OTHERS)
def test_what_is_no_rms_norm_is_not_taken_for_one(steps: Steps) -> None:
    model = net(steps)
    trace = quietvit.trace(model, IMAGES)
    assert all(site.kind != "norm" for site in trace.sites)
    assert trace["fc1"].role != "post_norm"
    with pytest.raises(QuietvitError, match="norm_linear"):
        quietvit.find_pairs(model, IMAGES, kinds=("norm_linear",))


@pytest.mark.parametrize("steps", [llama, divided, gemma, with_bias])
@pytest.mark.parametrize("method", [SmoothQuant, RepQViT])
def test_methods_fold_its_gain_as_that_of_torchs(method: Any, steps: Steps, tmp_path: Any) -> None:
    model = net(steps)
    quantized = quantize(model, method(weight_bits=8, activation_bits=8), IMAGES)
    skipped = steps in (gemma, with_bias)
    assert ("norm" in quantized.adjusted()) != skipped
    assert any("skipped 1 norms" in note for note in quantized.notes) == skipped
    if not skipped:
        torchs = Net(lambda: nn.RMSNorm(8, EPS)).eval()
        torchs.load_state_dict(model.state_dict(), strict=False)
        expected = quantize(torchs, method(weight_bits=8, activation_bits=8), IMAGES)
        assert torch.allclose(quantized(IMAGES), expected(IMAGES), atol=1e-5)
    loaded = quietvit.load(quantized.save(tmp_path / "net.qvit"), model=net(steps))
    assert torch.equal(loaded(IMAGES), quantized(IMAGES))


def test_torchao_folds_a_scale_into_its_gain() -> None:
    pytest.importorskip("torchao")
    from quietvit.deployment.for_torchao.fold import fold_adjustments

    quantized = quantize(net(llama), SmoothQuant(), IMAGES)
    folded = copy.deepcopy(quantized.model)
    assert fold_adjustments(folded, quantized) == ()
    assert not torch.equal(folded.norm.weight, net(llama).norm.weight)
    assert torch.allclose(folded(IMAGES), net(llama)(IMAGES), atol=1e-6)


def test_a_half_precision_model_keeps_its_casts() -> None:
    model, images = net(llama).bfloat16(), IMAGES.bfloat16()
    trace, expected = quietvit.trace(model, images), model(images)
    with intercept(trace, lambda site, operands, run: run(operands[0].clone()), kinds={"norm"}):
        assert torch.equal(model(images), expected)
    assert trace["norm"].operands[0].fed_by == ("embed",)
