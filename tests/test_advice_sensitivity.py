"""What sites and roles cost: exact effects, the estimate, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import quietvit
import zoo
from quietvit.advice import Part, Sensitivity, estimate
from quietvit.advice.places import depths_of, place_of
from quietvit.advice.switches import Switches
from quietvit.detection.canvas import Canvas
from quietvit.detection.hf_detectors import HFDetector
from quietvit.errors import QuietvitError

W4A4 = {"bits": "W4A4", "progress": False}


def model_and_images(name: str = "timm-vit", count: int = 8) -> tuple[nn.Module, torch.Tensor]:
    model, example = zoo.build(name)
    example = example["pixel_values"] if isinstance(example, dict) else example
    if isinstance(getattr(model, "head", None), nn.Linear):
        model.head.weight.data.mul_(100)  # logits of a trained model differ by more
    return model, torch.randn(count, *example.shape[1:])


@pytest.fixture(scope="module")
def exact() -> Sensitivity:
    torch.manual_seed(0)
    model, images = model_and_images()
    return quietvit.sensitivity(model, "rtn", images, **W4A4)


def by_name(parts: tuple[Part, ...]) -> dict[str, Part]:
    return {part.name: part for part in parts}


def kl(y: torch.Tensor, z: torch.Tensor) -> float:
    return float(
        nn.functional.kl_div(
            z.double().log_softmax(-1),
            y.double().log_softmax(-1),
            log_target=True,
            reduction="batchmean",
        )
    )


def test_a_part_alone_is_what_quantizing_it_anew_gives(exact):
    torch.manual_seed(0)
    model, images = model_and_images()
    with torch.no_grad():
        y = model(images)
        names = [site.name for site in quietvit.trace(model, images[:1]).matmuls]
        for chosen, part in (
            ("blocks.1.mlp.fc2", by_name(exact.sites)["blocks.1.mlp.fc2"]),
            ("attention_value", by_name(exact.roles)["attention_value"]),
        ):
            own = {name for name in names if name == chosen or name.endswith("." + chosen)}
            for effect, left_out in ((part.alone, set(names) - own), (part.without, own)):
                method = quietvit.RTN(weight_bits=4, activation_bits=4, exclude=sorted(left_out))
                z = quietvit.quantize(model, method, images, progress=False)(images)
                assert effect.kl == pytest.approx(kl(y, z), rel=1e-3)
                assert effect.error == pytest.approx(float((z - y).norm() / y.norm()), rel=1e-3)
                assert effect.changed == float((z.argmax(1) != y.argmax(1)).float().mean())


def test_a_role_is_what_an_override_of_it_changes(exact):
    torch.manual_seed(0)
    model, images = model_and_images()
    roles = by_name(exact.roles)
    assert {"post_softmax", "value", "attention_value", "query_key", "post_gelu"} <= roles.keys()
    for role in ("post_softmax", "post_gelu", "head"):
        method = quietvit.RTN(weight_bits=4, activation_bits=4, overrides={role: "float"})
        z = quietvit.quantize(model, method, images, progress=False)(images)
        with torch.no_grad():
            assert roles[role].without.kl == pytest.approx(kl(model(images), z), rel=1e-3)


@pytest.mark.parametrize("name", ["timm-vit", "hf-siglip"])
def test_the_estimate_ranks_like_the_exact_measure(name):
    model, images = model_and_images(name)
    exact, guess = found = [
        quietvit.sensitivity(model, "rtn", images, bits="W6A6", estimate=e, progress=False)
        for e in (False, True)
    ]
    assert exact.measure == ("kl" if name == "timm-vit" else "error")
    assert guess.whole == exact.whole
    for kind in ("sites", "roles"):
        costs = [[s.cost(p) for p in getattr(s, kind)] for s in found]
        assert spearmanr(*costs).statistic > 0.9
    largest = exact.worst_roles[0]
    same = by_name(guess.roles)[largest.name]
    assert guess.cost(same) == pytest.approx(exact.cost(largest), rel=0.5)


def test_the_estimate_is_right_behind_operations_in_place():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act = nn.Linear(12, 64), nn.ReLU(inplace=True)
            self.head = nn.Linear(64, 10)

        def forward(self, x):
            return self.head(self.act(self.first(x.flatten(1))))

    torch.manual_seed(0)
    model, images = Net().eval(), torch.randn(256, 3, 2, 2)
    exact, guess = (
        quietvit.sensitivity(model, "rtn", images, estimate=e, progress=False)
        for e in (False, True)
    )
    for part, same in zip(exact.sites, guess.sites, strict=True):
        assert guess.cost(same) == pytest.approx(exact.cost(part), rel=0.15)
        assert guess.gain(same) == pytest.approx(exact.gain(part), rel=0.15)


def test_tables_json_and_plot_hold_the_parts(exact, tmp_path):
    text = str(exact)
    assert "blocks.1.mlp.fc2" in text
    assert "post_softmax" in text
    held = json.loads(exact.to_json(tmp_path / "s.json").read_text())
    assert held["measure"] == "kl"
    assert len(held["sites"]) == len(exact.sites)
    assert held["roles"][0]["alone"]["kl"] == pytest.approx(exact.roles[0].alone.kl)
    costs = [exact.cost(site) for site in exact.worst_sites]
    assert costs == sorted(costs, reverse=True)
    assert [path.name for path in exact.plot(tmp_path)] == ["sensitivity.png"]


def test_ctrl_c_returns_what_was_measured(monkeypatch, tmp_path):
    model, images = model_and_images(count=2)
    effect, calls = Switches.effect, []

    def interrupted(self, slots):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return effect(self, slots)

    monkeypatch.setattr(Switches, "effect", interrupted)
    found = quietvit.sensitivity(model, "rtn", images, **W4A4)
    assert not found.complete
    assert sum(part.alone is not None for part in found.roles) == 3
    assert all(part.without is None for part in found.sites)
    assert "stopped early" in str(found)
    assert found.plot(tmp_path)


def test_ctrl_c_leaves_the_estimate_of_the_images_so_far(monkeypatch):
    model, images = model_and_images(count=6)
    fields = {"calibration": images, "estimate": True, **W4A4}
    first = quietvit.sensitivity(model, "rtn", images[:4], **fields)
    follow, calls = estimate._follow, []

    def interrupted(*given):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return follow(*given)

    monkeypatch.setattr(estimate, "_follow", interrupted)
    stop = 3
    found = quietvit.sensitivity(model, "rtn", images, **fields)
    assert (found.complete, found.part_images) == (False, 4)
    assert "parts are estimated on 4 of the images" in str(found)
    for part, same in zip(found.sites, first.sites, strict=True):
        assert found.cost(part) == first.cost(same)
    calls.clear()
    stop = 1
    found = quietvit.sensitivity(model, "rtn", images, **fields)
    assert found.whole.kl > 0
    assert found.cost(found.sites[0]) is None
    assert "stopped early" in str(found)


def test_two_heads_that_are_averaged_make_a_classifier():
    model, images = model_and_images("timm-deit-distilled", count=2)
    found = quietvit.sensitivity(model, "rtn", images, estimate=True, **W4A4)
    assert found.measure == "kl"


def test_a_transformers_detector_is_measured_and_gets_bits():
    model, example = zoo.build("hf-detr")
    images = torch.randn(16, *example["pixel_values"].shape[1:])
    whole = HFDetector(model, Canvas((32, 32), (0.5,) * 3, (0.5,) * 3)).eval()
    found = quietvit.sensitivity(whole, "rtn", images[:2].sigmoid(), estimate=True, **W4A4)
    assert found.measure == "error"
    assert all(found.cost(site) >= 0 for site in found.sites)
    choice = quietvit.choose_bits(model, "rtn", images[:2], average=6, progress=False)
    assert len(set(choice.overrides.values())) > 1
    advice = quietvit.advise(model, images, methods=("rtn",), bits=("W8A8",), progress=False)
    assert advice.rows[0].effect.error < 0.1


def test_boxes_in_varying_number_are_refused_and_the_backbone_is_measured():
    model, images = zoo.detector(), torch.rand(16, 3, 64, 64)
    for measure in (
        lambda: quietvit.sensitivity(model, "rtn", images, **W4A4),
        lambda: quietvit.choose_bits(model, "rtn", images, average=6, progress=False),
        lambda: quietvit.advise(model, images, progress=False),
    ):
        with pytest.raises(QuietvitError, match=r"such as model\.backbone"):
            measure()
    found = quietvit.sensitivity(model.backbone, "rtn", images[:2], **W4A4)
    assert found.cost(found.sites[0]) > 0


def test_a_half_precision_model_is_estimated():
    model, images = model_and_images(count=4)
    found = quietvit.sensitivity(model.bfloat16(), "rtn", images, estimate=True, **W4A4)
    assert all(found.cost(site) > 0 for site in found.sites)


def test_nothing_changes_in_the_model(exact):
    model, images = model_and_images(count=2)
    before = copy.deepcopy(model.state_dict())
    quietvit.sensitivity(model, "rtn", images, estimate=True, **W4A4)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "method", "text"),
    [
        (lambda m: m.train(), "rtn", "Call model.eval()"),
        (lambda m: m.blocks[1].train(), "rtn", "blocks.1 is in training mode"),
        (lambda m: m, "gptq", "gptq changes weights or outputs to compensate for rounding"),
        (lambda m: m, quietvit.RTN(exclude="*"), "leaves every site in float"),
        (lambda m: m.head.weight.data.fill_(torch.nan), "rtn", "NaN"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, method, text):
    model, images = model_and_images(count=2)
    change(model)
    bits = "W4A4" if isinstance(method, str) else None
    with pytest.raises(QuietvitError, match=text.replace("(", r"\(").replace(")", r"\)")):
        quietvit.sensitivity(model, method, images, bits=bits, progress=False)


@pytest.mark.parametrize(
    ("name", "pattern", "depth"),
    [
        ("blocks.3.attn.qkv", "blocks.*.attn.qkv", "3"),
        ("layers.0.blocks.1.mlp.fc1", "layers.*.blocks.*.mlp.fc1", "0.1"),
        ("features.1.0.mlp.0", "features.*.*.mlp.0", "1.0"),
        ("encoder.layers.encoder_layer_3.mlp.0", "encoder.layers.encoder_layer_*.mlp.0", "3"),
        ("patch_embed.proj", "patch_embed.proj", ""),
    ],
)
def test_a_place_is_read_from_the_name(name, pattern, depth):
    assert place_of(name) == (pattern, depth)
    assert depths_of(["a", name, "b"])[::2] == (["stem", "head"] if depth else ["stem", "stem"])


def test_only_a_float_model_is_measured():
    model, images = model_and_images(count=2)
    quantized = quietvit.quantize(model, "rtn", images, progress=False)
    for given, text in ((quantized, "is quantized already"), (None, "the model is a NoneType")):
        with pytest.raises(QuietvitError, match=text):
            quietvit.sensitivity(given, "rtn", images, progress=False)
        with pytest.raises(QuietvitError, match=text):
            quietvit.advise(given, images, progress=False)
        with pytest.raises(QuietvitError, match=text):
            quietvit.choose_bits(given, "rtn", images, average=6, progress=False)
