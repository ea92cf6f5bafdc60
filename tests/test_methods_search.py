"""PTQ4ViT and AdaLog: what their search finds, what it is given, where their quantizers stand."""

from __future__ import annotations

import copy
import itertools

import pytest
import timm
import torch
from torch import nn

import quietvit
import zoo
from quietvit.errors import QuietvitError
from quietvit.quantization.companding import TwinQuantizer
from quietvit.quantization.fitting import search, search_method
from quietvit.quantization.fitting.search import Affine, Groups, Log, Output, TwinGelu, TwinSoftmax
from quietvit.quantization.method import get_method
from quietvit.quantization.methods.adalog import even_out
from quietvit.quantization.nonuniform import LogQuantizer
from quietvit.quantization.slot import Slot

PTQ4ViT, AdaLog = get_method("ptq4vit"), get_method("adalog")
METHODS = {
    "ptq4vit": lambda **more: PTQ4ViT(**({"candidates": 6, "rounds": 2, "rows": 64} | more)),
    "adalog": lambda **more: AdaLog(**({"rounds": 1, "rows": 64} | more)),
}
FOUR = {"weight_bits": 4, "activation_bits": 4}


def images(count: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


def tiny_vit(**more) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, **(zoo.TINY | more)
    ).eval()


def matrices(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_pair(bits: int = 4, *, per_channel: bool = False):
    """A product, its sides, tables of candidates and starts."""
    left, right = matrices(1, 1, 40, 12).exp(), matrices(1, 1, 12, 5, seed=1)
    groups = Groups.along(right, 1, 3) if per_channel else Groups.along(right)
    sides = (
        Affine(left, Groups.along(left), bits, torch.float32, signed=True),
        Affine(right, groups, bits, torch.float32, signed=True),
    )
    start = tuple(search.symmetric_start(side.groups.largest(side.x.abs()), bits) for side in sides)
    steps = search.factors(7, 0.2, 1.3)
    tables = tuple(steps[:, None, None] * each for each in start)
    return left, right, sides, tables, start


def brute(left, right, weight, left_quantizer, right_quantizer) -> float:
    off = left @ right - left_quantizer(left) @ right_quantizer(right)
    return (off * (1 if weight is None else weight)).double().square().sum().item()


def test_a_search_of_one_operand_finds_the_best_of_all_its_candidates():
    left, right, sides, tables, start = a_pair()
    gradient = matrices(1, 1, 40, 5, seed=2)
    output = Output.of(left, right, gradient)
    found, totals = search.alternate(
        output, sides, (search.fixed(tables[0]), ()), start, rounds=3, order=(0, 1)
    )
    other = sides[1].quantizer(start[1])
    errors = [
        brute(left, right, output.weight, sides[0].quantizer(each), other) for each in tables[0]
    ]
    assert brute(left, right, output.weight, sides[0].quantizer(found[0]), other) == pytest.approx(
        min(errors), rel=1e-4
    )
    assert totals[-1] == pytest.approx(min(errors), rel=1e-4)
    assert torch.equal(found[1], start[1])


def test_each_channel_gets_the_best_of_its_own_candidates():
    left, right, sides, tables, start = a_pair(per_channel=True)
    output = Output.of(left, right)
    found, _ = search.alternate(
        output, sides, ((), search.fixed(tables[1])), start, rounds=1, order=(1, 0)
    )
    fake = sides[0].quantizer(start[0])(left)
    for channel in range(5):
        errors = []
        for parameters in tables[1]:
            off = fake @ sides[1].quantizer(parameters, 3)(right) - left @ right
            errors.append(off[..., channel].double().square().sum().item())
        best = tables[1][torch.tensor(errors).argmin(), channel]
        assert torch.equal(found[1][channel], best)


def test_both_operands_end_where_neither_can_do_better_alone():
    left, right, sides, tables, start = a_pair()
    output = Output.of(left, right)
    found, totals = search.alternate(
        output, sides, tuple(map(search.fixed, tables)), start, rounds=20, order=(1, 0)
    )
    for index, table in enumerate(tables):
        for parameters in table:
            tried = [*found]
            tried[index] = parameters
            pair = [side.quantizer(each) for side, each in zip(sides, tried, strict=True)]
            assert brute(left, right, None, *pair) >= totals[-1] * (1 - 1e-4)


def test_gradients_change_what_is_chosen():
    left = torch.tensor([[0.1, 0.2, 0.3], [10.0, 9.0, 8.0]]).view(1, 1, 2, 3)
    right = torch.eye(3)[None, None]
    side = Affine(left, Groups.along(left), 3, torch.float32, signed=True)
    steps = torch.tensor([[[0.1, 0.0]], [[3.0, 0.0]]])
    chosen = []
    for heavy in (0, 1):
        gradient = torch.full((1, 1, 2, 3), 1e-3)
        gradient[0, 0, heavy] = 1.0
        found, _ = search.alternate(
            Output.of(left, right, gradient),
            (side, search.Float(right, torch.float32)),
            (search.fixed(steps), ()),
            (torch.tensor([[100.0, 0.0]]), torch.zeros(1, 0)),
            rounds=1,
            order=(0, 1),
        )
        chosen.append(found[0][0, 0].item())
    assert chosen == pytest.approx([0.1, 3.0])


@pytest.mark.parametrize("name", METHODS)
def test_more_rounds_never_raise_the_criterion(name, monkeypatch):
    seen = []
    alternate = search.alternate

    def watched(*args, **kwargs):
        found, totals = alternate(*args, **kwargs)
        seen.append(totals)
        return found, totals

    monkeypatch.setattr(search_method, "alternate", watched)
    quietvit.quantize(tiny_vit(), METHODS[name](rounds=4, **FOUR), images(), progress=False)
    assert len(seen) == 14
    for totals in seen:
        assert len(totals) == 5
        assert all(b <= a * (1 + 1e-4) for a, b in itertools.pairwise(totals))
        assert totals[-1] < totals[0] or totals[-1] == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("family", ["affine", "gelu", "softmax", "log", "shifted log"])
def test_what_is_searched_is_what_the_quantizer_gives(bits, family):
    x = matrices(2, 3, 16, 10)
    none = Groups.along(x)
    if family == "affine":
        side = Affine(x, Groups.along(x, 1), bits, torch.float32, signed=False)
        parameters = torch.tensor([[0.1, 1.0], [0.3, 2.0], [0.05, 0.0]])
    elif family == "gelu":
        side = TwinGelu(nn.functional.gelu(x), none, bits, torch.float32)
        parameters = torch.tensor([[0.12]])
    elif family == "softmax":
        side = TwinSoftmax(x.softmax(-1), none, bits, torch.float32)
        parameters = torch.tensor([[0.125]])
    else:
        shift = 0.16997 if family == "shifted log" else 0.0
        values = nn.functional.gelu(x) if shift else x.softmax(-1)
        side = Log(values, none, bits, torch.float32, shift=shift)
        parameters = torch.tensor([[1.7 if shift else 1.0, 11.0]])
    values, scale = side.fake(parameters)
    values = values if scale is None else values * scale
    fake = side.quantizer(parameters, 1 if family == "affine" else None)(side.x)
    assert (values - fake).abs().gt(1e-5).sum() <= 1  # a value on the very edge of two cells
    other = parameters * 2
    together = side.fake(torch.stack((parameters, other)))
    for place, each in enumerate((parameters, other)):
        for all_of_it, alone in zip(together, side.fake(each), strict=True):
            assert alone is None or torch.equal(all_of_it[place], alone)


@pytest.mark.parametrize("weighted", [False, True])
def test_candidates_are_judged_alike_one_by_one_and_together(weighted, monkeypatch):
    left, right = matrices(2, 3, 7, 4), matrices(2, 3, 4, 5, seed=1)
    gradient = matrices(2, 3, 7, 5, seed=2) if weighted else None
    output = Output.of(left, right, gradient)
    sides = tuple(
        Affine(x, Groups.along(x, 1), 4, torch.float32, signed=True) for x in (left, right)
    )
    starts = [search.symmetric_start(side.groups.largest(side.x.abs()), 4) for side in sides]
    for index in (0, 1):
        table = search.factors(6, 0.3, 1.2)[:, None, None] * starts[index]
        other = sides[1 - index].fake(starts[1 - index])
        found = [search.evaluate(output, sides, index, table, other)]
        monkeypatch.setattr(search, "_AT_ONCE", 1)
        found.append(search.evaluate(output, sides, index, table, other))
        monkeypatch.undo()
        assert found[0].shape == (6, 3)
        assert torch.allclose(found[0], found[1], rtol=1e-5)
        for head in range(3):
            pair = [sides[i].quantizer(starts[i], 1) for i in (0, 1)]
            pair[index] = sides[index].quantizer(table[4], 1)
            off = left @ right - pair[0](left) @ pair[1](right)
            off = off if output.weight is None else off * output.weight
            wanted = off[:, head].double().square().sum()
            assert float(found[0][4, head]) == pytest.approx(float(wanted), rel=1e-4)


def test_two_ranges_behind_softmax_lie_where_the_operand_does():
    side = TwinSoftmax(
        matrices(1, 1, 6, 6).softmax(-1), Groups.along(torch.ones(1, 1, 6, 6)), 4, torch.float32
    )
    split = torch.ones(1, 1) / 8
    with torch.device("meta"):  # what is made elsewhere cannot be computed with
        values = side.fake(split)[0]
    assert torch.equal(values, TwinQuantizer.softmax(1 / 8, bits=4)(side.x))


def test_codes_up_to_eight_bits_survive_bfloat16():
    x = matrices(1, 1, 50, 20)
    for signed in (True, False):
        exact = Affine(x, Groups.along(x), 8, torch.float32, signed=signed)
        short = Affine(x, Groups.along(x), 8, torch.bfloat16, signed=signed)
        parameters = torch.tensor([[0.02, 0.0 if signed else 131.0]])
        assert torch.equal(exact.fake(parameters)[0], short.fake(parameters)[0].float())
    assert search.product_dtype(torch.device("cpu"), (9, 4)) == torch.float32
    assert search.product_dtype(torch.device("cpu"), (None, 4)) == torch.float32


def test_all_rows_are_the_same_as_no_limit():
    for name, make in METHODS.items():
        whole, many = (
            quietvit.quantize(
                tiny_vit(), make(rows=rows, **FOUR), images(), progress=False
            ).quantizers.state_dict()
            for rows in (None, 10**6)
        )
        assert whole, name
        assert all(torch.equal(value, many[key]) for key, value in whole.items())


@pytest.mark.parametrize("name", METHODS)
def test_special_quantizers_stand_behind_softmax_and_gelu_and_nowhere_else(name):
    quantized = quietvit.quantize(tiny_vit(), METHODS[name](), images(), progress=False)
    special = TwinQuantizer if name == "ptq4vit" else LogQuantizer
    expected, found = set(), set()
    for site in quantized.trace.matmuls:
        for index, operand in enumerate(site.operands):
            if operand.role in ("post_softmax", "post_gelu"):
                expected.add(Slot(site, index).key)
    for key, quantizer in quantized.quantizers.items():
        if isinstance(quantizer, special):
            found.add(key)
    assert found == expected
    assert len(found) == 4


def test_a_joint_weight_has_one_step_for_each_of_query_key_and_value():
    model = tiny_vit()
    with torch.no_grad():
        for factor, rows in ((1, slice(0, 32)), (10, slice(32, 64)), (100, slice(64, 96))):
            model.blocks[0].attn.qkv.weight[rows] *= factor
    quantized = quietvit.quantize(model, METHODS["ptq4vit"](), images(), progress=False)
    scale = quantized.quantizers["blocks/0/attn/qkv:weight"].scale
    assert [len(part.unique()) for part in scale.split(32)] == [1, 1, 1]
    assert len(scale.unique()) == 3
    assert quantized.quantizers["blocks/0/attn/proj:weight"].scale.shape == ()
    assert len(quantized.quantizers["patch_embed/proj:weight"].scale.unique()) > 3
    each = METHODS["ptq4vit"](weight_granularity="per_channel")
    quantized = quietvit.quantize(model, each, images(), progress=False)
    assert quantized.quantizers["blocks/0/attn/proj:weight"].scale.shape == (32,)


@pytest.mark.parametrize("name", METHODS)
def test_it_is_decided_by_the_seed_alone(name):
    def made(seed):
        torch.manual_seed(torch.seed())
        method = METHODS[name](seed=seed, rows=24, **FOUR)
        return quietvit.quantize(tiny(), method, batch, progress=False).quantizers.state_dict()

    model, batch = tiny_vit(), images(6)

    def tiny():
        return model

    first, again, other = made(0), made(0), made(1)
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert any(not torch.equal(value, other[key]) for key, value in first.items())


@pytest.mark.parametrize("name", METHODS)
def test_the_model_keeps_its_flags_and_gets_no_gradient(name):
    model = tiny_vit()
    model.blocks[0].requires_grad_(False)
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        quantized = quietvit.quantize(model, METHODS[name](hessian=True), images(), progress=False)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for each in (model, quantized.model):
        assert all(parameter.grad is None for parameter in each.parameters())
        assert {key: p.requires_grad for key, p in each.named_parameters()} == flags
    assert not any(buffer.requires_grad for buffer in quantized.buffers())


def test_inference_mode_is_refused_where_gradients_are_needed():
    model = tiny_vit()
    with torch.inference_mode(), pytest.raises(QuietvitError, match="inference_mode"):
        quietvit.quantize(model, METHODS["ptq4vit"](), images(), progress=False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "size"),
    [("hf-vit", 32), ("hf-detr", 32), ("timm-swin", 64), ("timm-convit-cached-table", 32)],
)
def test_it_works_on_other_models(method, name, size):
    model, example = zoo.build(name)
    chosen = METHODS[method](rounds=1, weight_bits=8, activation_bits=8)
    batch = images(2, size)
    quantized = quietvit.quantize(model, chosen, batch, example=example, progress=False)
    with torch.no_grad():
        exact = zoo.outputs(model(batch))[0]
        close = zoo.outputs(quantized(batch))[0]
    assert ((close - exact).norm() / exact.norm()) < 0.1
    assert len(quantized.quantizers) >= 2 * len(quantized.trace.matmuls) - 2


class PostNorm(nn.Module):
    """Convolutions, a depthwise one too, then a post-norm encoder, and a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        )
        self.embed = nn.Conv2d(8, 16, 4, 4)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.mix = nn.Parameter(torch.randn(16, 6))

    def forward(self, x):
        tokens = self.encoder(self.embed(self.stem(x)).flatten(2).mT)
        return {"features": torch.einsum("bnc,cd->bd", tokens, self.mix), "more": tokens}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("count", [1, 3])
def test_post_norm_hybrids_with_dict_outputs_and_einsum_work(name, count):
    torch.manual_seed(0)
    model = PostNorm().eval()
    batch = images(count)
    quantized = quietvit.quantize(model, METHODS[name](), batch, progress=False)
    exact, close = model(batch)["features"], quantized(batch)["features"]
    assert ((close - exact).norm() / exact.norm()) < 0.15
    assert "stem/2:weight" in quantized.quantizers
    assert quantized.quantizers["stem/2:weight"].scale.shape == (8,)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_images_and_dead_channels_give_finite_outputs(name, value):
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[0].norm1.weight[3] = 0
        model.blocks[0].norm1.bias[3] = 0
        model.blocks[1].norm2.weight[5] = 0
        model.blocks[1].mlp.fc1.weight[2] = 0
        model.blocks[1].mlp.fc1.bias[2] = -40
    batch = torch.full((1, 3, 32, 32), value)
    quantized = quietvit.quantize(model, METHODS[name](), batch, progress=False)
    assert torch.isfinite(quantized(images())).all()
    exact, close = model(batch), quantized(batch)
    assert ((close - exact).norm() / exact.norm()) < 0.2


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "fields",
    [
        {"weight_bits": None},
        {"activation_bits": None},
        {"weight_bits": 2, "activation_bits": 16},
        {"weight_bits": 16, "activation_bits": 2},
        {"exclude": ("blocks.0*",)},
        {"patch_input_bits": 8},
        {"head_bits": None},
    ],
    ids=str,
)
def test_any_bits_and_exclusions(name, fields):
    method = METHODS[name](**fields)
    quantized = quietvit.quantize(tiny_vit(depth=1), method, images(2), progress=False)
    assert torch.isfinite(quantized(images())).all()
    for site in quantized.trace.matmuls:
        for index in range(2):
            slot = Slot(site, index)
            bits = method.slot_bits(slot)
            assert (slot.key in quantized.quantizers) == (bits is not None)
            assert bits is None or quantized.quantizers[slot.key].bits == bits
    assert ("patch_embed/proj:input" in quantized.quantizers) == ("patch_input_bits" in fields)


def test_the_norm_of_the_head_stays_as_it_is():
    """One token an image reads it: channel steps from so few values do not fit other images."""
    quantized = quietvit.quantize(tiny_vit(depth=1), AdaLog(), images(8), progress=False)
    moved = set(quantized.adjustments)
    assert len(moved) == 4, "two norms, qkv and fc1"
    assert all("blocks" in name for name in moved)


def test_re_parametrized_channels_have_one_step():
    scale = torch.tensor([0.01, 1.0, 30.0, 0.0])
    values = matrices(4, 500) * scale[:, None] + torch.tensor([[0.0], [2.0], [-9.0], [0.0]])
    gain, shift = even_out(values, 4)
    moved = values * gain[:, None] + shift[:, None]
    spans = moved.amax(1) - moved.amin(1)
    assert spans[:3].max() / spans[:3].min() < 1.6
    assert gain[3] == 1
    assert torch.isfinite(gain).all()
    assert (gain > 0).all()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("fields", [{"rows": 0}, {"rounds": 0}, {"rows": 1.5}, {"twins": True}])
def test_bad_settings_are_refused(name, fields):
    with pytest.raises(QuietvitError, match=next(iter(fields))):
        METHODS[name](**fields)
