"""BRECQ and QDrop: how blocks are fed, and block reconstruction on tiny models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import quietvit
from block_cases import Doubling, built, quantize
from quietvit.errors import QuietvitError
from quietvit.quantization import RTN, load
from quietvit.quantization.blocks import find_blocks
from quietvit.quantization.calibrated import Calibrated
from quietvit.quantization.calibration import Calibration, ImageStream
from quietvit.quantization.fitting import reconstruct
from quietvit.quantization.fitting.block_data import BlockData, by_image, chunks, layouts
from quietvit.quantization.methods.brecq import BRECQ
from quietvit.quantization.methods.qdrop import QDrop
from quietvit.quantization.methods.qwt import QwT
from quietvit.quantization.weights import read_weight
from quietvit.tracing import trace
from quietvit.tracing.block_modules import first_tensor, watching_modules

MODELS = ["timm-vit", "timm-swin", "hf-vit", "tv-vit", "timm-hybrid"]
QUICK = {"weight_bits": 4, "activation_bits": 4, "iterations": 30, "batch_size": 4}


# ---- feeding blocks


@pytest.mark.parametrize("name", [*MODELS, "hf-swin", "hf-detr", "timm-beit"])
def test_blocks_alone_on_collected_inputs_make_the_models_output(name):
    """Arguments that hold images are told from those that do not, masks and numbers included."""
    model, images = built(name, 5)
    traced = trace(model, images[:1])
    data = BlockData(model, model, traced, Calibrated(), ImageStream(images, model))
    blocks = find_blocks(traced)
    known, missing = layouts(model, blocks, images[:1])
    assert not missing
    outputs = {}

    def look(name, args, kwargs, output):
        outputs[name] = known[name].split_output(output)

    with torch.no_grad(), watching_modules(model, known, look):
        model(images)
    previous = None
    for block in blocks[-4:]:
        layout = known[block.name]
        given = data.reach(block.name, layout, quantized=False)
        if layout.chained and previous is not None:
            torch.testing.assert_close(given[0], outputs[previous])
        with torch.no_grad():
            alone = torch.cat([data.quantized(block, layout, part) for part in chunks(given)])
        torch.testing.assert_close(alone, outputs[block.name], rtol=1e-4, atol=1e-4)
        previous = block.name


def test_images_are_found_along_any_dim():
    x = torch.arange(24).view(2, 6, 2)
    split = by_image(x, 1, 3)
    assert split.shape == (2, 3, 2, 2)
    assert torch.equal(split[1, 0], x[:, 3])


# ---- reconstruction


def errors(model, quantized, images):
    """Mean squared error at each block's output, of the whole quantized model."""
    blocks = [block.name for block in find_blocks(quantized.trace)]
    found = []
    for which in (model, quantized.model):
        seen = {}

        def look(name, args, kwargs, output, seen=seen):
            seen[name] = first_tensor(output).clone()

        with torch.no_grad(), watching_modules(which, blocks, look):
            quantized(images) if which is quantized.model else model(images)
        found.append(seen)
    return {b: float((found[0][b] - found[1][b]).square().mean()) for b in blocks}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", [BRECQ, QDrop])
def test_reconstruction_brings_the_first_changed_block_nearer(name, kind):
    model, images = built(name)
    base = RTN(weight_bits=4, activation_bits=4)
    method = kind(base=base, iterations=6 if name == "timm-hybrid" else 20, batch_size=4)
    quantized = quantize(model, method, images)
    base = quantize(model, method.base, images)
    after, before = errors(model, quantized, images), errors(model, base, images)
    changed = [block for block in after if after[block] != before[block]]
    assert changed
    assert after[changed[0]] < before[changed[0]]
    assert "reconstructed in" in quantized.report()


def test_weights_end_on_the_grid_within_one_step_of_the_float_ones():
    model, images = built("timm-vit")
    quantized = quantize(model, BRECQ(**QUICK), images)
    moved = 0
    for slot in quantized.slots():
        if not slot.is_weight:
            continue
        quantizer = quantized.quantizers[slot.key]
        weight = read_weight(quantized.model, slot.site)
        before = read_weight(model, slot.site)
        if torch.equal(weight, before):
            continue
        moved += 1
        assert torch.equal(quantizer(weight), weight)
        low, high = quantizer.code_range
        inside = (quantizer.codes(before) > low) & (quantizer.codes(before) < high)
        off = (
            (weight - before)
            / quantizer.scale[:, None, None, None].view(-1, *[1] * (weight.dim() - 1))
        ).abs()
        assert (off[inside] <= 1 + 1e-4).all()
    assert moved >= 8


def test_without_drop_qdrop_is_brecq():
    model, images = built("timm-vit")
    fields = QUICK | {"iterations": 5}
    one, two = (quantize(model, m, images) for m in (QDrop(drop=0, **fields), BRECQ(**fields)))
    three = quantize(model, QDrop(**fields), images)
    with torch.no_grad():
        assert torch.equal(one(images), two(images))
        assert not torch.equal(one(images), three(images))


@pytest.mark.parametrize("fields", [{}, {"drop": 0.3}, {"dtype": "bfloat16"}])
def test_the_seed_decides_and_nothing_else(fields):
    model, images = built("timm-vit")
    made = []
    for seed, around in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(around)
        state = torch.get_rng_state()
        method = QDrop(**QUICK | {"iterations": 4, "seed": seed} | fields)
        made.append(quantize(model, method, images))
        assert torch.equal(torch.get_rng_state(), state)
    states = [m.state_dict() for m in made]
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states[:2]), strict=True))
    assert any(
        not torch.equal(a, b) for a, b in zip(states[0].values(), states[2].values(), strict=True)
    )


@pytest.mark.parametrize("fast", [False, True])
def test_auto_is_bfloat16_only_where_that_is_fast(fast, monkeypatch, caplog):
    for module in ("quietvit.tensors", "quietvit.quantization.fitting.reconstruct"):
        monkeypatch.setattr(f"{module}.has_fast_bfloat16", lambda device: fast)
    model, images = built("timm-vit")
    made = {
        dtype: quantize(model, QDrop(**QUICK | {"iterations": 2, "dtype": dtype}), images)
        for dtype in ("auto", "bfloat16")
    }
    told = "in bfloat16" if fast else "in float32"
    assert any(f"2 iterations each, {told}" in note for note in made["auto"].notes)
    assert ("set dtype to 'auto'" in caplog.text) is not fast


def test_fisher_weights_change_the_fit():
    model, images = built("timm-vit")
    fields = QUICK | {"iterations": 5}
    plain, weighted = (quantize(model, BRECQ(fisher=f, **fields), images) for f in (False, True))
    with torch.no_grad():
        assert not torch.equal(plain(images), weighted(images))


def test_fisher_weights_pass_layers_that_work_in_place():
    parts = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 3)
    model, images = nn.Sequential(*parts), torch.rand(4, 3, 4, 4)
    quantized = quantize(model, BRECQ(fisher=True, **(QUICK | {"iterations": 2})), images)
    report = quantized.report()
    assert "reconstructed" in report or "not better" in report


@pytest.mark.parametrize("bits", [(None, 4), (4, None), (None, None)])
def test_a_float_side_stays_float(bits):
    model, images = built("timm-vit")
    fields = {"iterations": 3, "batch_size": 4, "patch_embed_bits": "same", "head_bits": "same"}
    method = QDrop(weight_bits=bits[0], activation_bits=bits[1], **fields)
    quantized = quantize(model, method, images)
    assert {slot.is_weight for slot in quantized.slots()} == {
        side for side, b in ((True, bits[0]), (False, bits[1])) if b
    }
    if bits[0] is None:
        assert all(
            torch.equal(a, b)
            for a, b in zip(model.parameters(), quantized.model.parameters(), strict=True)
        )


@pytest.mark.parametrize("method", [QwT, QDrop, BRECQ])
def test_saved_and_loaded_it_computes_the_same(method, tmp_path):
    model, images = built("timm-vit")
    fields = {"weight_bits": 4, "activation_bits": 4}
    fields |= {} if method is QwT else {"iterations": 3, "batch_size": 4}
    quantized = quantize(model, method(**fields), images)
    again = load(quantized.save(tmp_path / "saved"), model=copy.deepcopy(model))
    assert again.method == quantized.method
    with torch.no_grad():
        torch.testing.assert_close(again(images), quantized(images))


@pytest.mark.parametrize("method", [QwT, QDrop])
def test_one_image_constant_images_and_generators(method):
    fields = {"weight_bits": 4, "activation_bits": 4}
    fields |= {} if method is QwT else {"iterations": 3, "batch_size": 4}
    model, images = built("timm-vit")
    for source in (images[:1], torch.zeros_like(images), (batch for batch in images.split(3))):
        quantized = quantize(model, method(**fields), source)
        with torch.no_grad():
            assert torch.isfinite(quantized(images)).all()


class Stopped(nn.Module):
    """A bar that is interrupted after some steps."""

    def __init__(self, after):
        super().__init__()
        self.left = after

    def __call__(self, calibration, steps, total, label):
        for step in steps:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield step


@pytest.mark.parametrize("after", [0, 7, 40])
@pytest.mark.parametrize("name", ["timm-vit", "hf-vit"])
def test_interrupted_it_leaves_the_model_as_it_was(after, name, monkeypatch):
    model, images = built(name)
    next(model.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stopped = Stopped(after)
    monkeypatch.setattr(Calibration, "track", lambda *args: stopped(*args))
    with pytest.raises(KeyboardInterrupt):
        quantize(model, QDrop(**QUICK), images)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("method", [QwT(), QDrop(iterations=2, batch_size=2)])
def test_nothing_is_left_hanging_on_the_quantized_model(method):
    model, images = built("timm-vit")
    next(model.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    own = quantize(model, method, images).model
    assert flags == [p.requires_grad for p in own.parameters()]
    assert all(p.grad is None for p in [*own.parameters(), *model.parameters()])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in own.modules())


@pytest.mark.parametrize("method", [BRECQ, QDrop, QwT])
def test_inference_mode_is_refused_by_name(method):
    model, images = built("timm-vit", 2)
    with torch.inference_mode(), pytest.raises(QuietvitError, match=r"torch\.inference_mode"):
        quantize(model, method(weight_bits=4), images)


def test_blocks_that_run_twice_and_sites_in_no_block_are_named():
    class Twice(Doubling):
        def __init__(self):
            super().__init__()
            self.free = nn.Parameter(torch.randn(6, 6))

        def forward(self, x):
            x = self.conv(x).flatten(2).mT
            x = self.blocks[1](self.blocks[0](self.blocks[0](x)))
            return self.head((x @ self.free).mean(1))

    images = torch.randn(6, 3, 4, 4)
    report = quantize(Twice().eval(), QDrop(**QUICK | {"iterations": 2}), images).report()
    assert "blocks.0" in report
    assert "as rtn left it" in report
    assert "in no block" in report
    assert "free" in report


def test_a_base_that_compensates_blocks_is_refused():
    model, images = built("timm-vit")
    with pytest.raises(QuietvitError, match="put qwt on top of qdrop"):
        quantize(model, QDrop(base=QwT(), iterations=2), images)
    both = QwT(base=QDrop(iterations=2, batch_size=2))
    assert quantize(model, both, images).compensated()


@pytest.mark.parametrize("fields", [{"drop": 1.5}, {"iterations": 0}, {"dtype": "float8"}])
def test_settings_that_make_no_sense_are_refused(fields):
    with pytest.raises(QuietvitError, match=next(iter(fields))):
        QDrop(**fields)


def test_the_default_base_has_omse_ranges_and_the_bits_given():
    assert QDrop(weight_bits=4).base == RTN(
        weight_bits=4, weight_range="omse", activation_range="omse"
    )


def test_images_of_a_loader_that_shuffles_are_read_once():
    model, images = built("timm-vit")

    class Loader:
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield from images.split(4)

    loader = Loader()
    quantized = quantize(model, QDrop(**QUICK | {"iterations": 2}), loader)
    assert "calibrated on 8 images" in quantized.report()
    assert loader.passes == 1


def test_it_says_beforehand_how_long_it_takes(monkeypatch):
    model, images = built("timm-vit")
    clock = iter(range(0, 10**9, 30))
    labels = []

    def track(self, steps, total, label):
        labels.append(label)
        yield from steps

    monkeypatch.setattr(Calibration, "track", track)
    monkeypatch.setattr(reconstruct.time, "monotonic", lambda: float(next(clock)))
    shown = quietvit.quantize(model, QDrop(**QUICK | {"iterations": 2}), images, progress=True)
    monkeypatch.undo()
    # 4 blocks and layers, two iterations each, half a minute an iteration.
    assert "qdrop W4A4, about 4 min" in labels
    silent = quantize(model, QDrop(**QUICK | {"iterations": 2}), images)
    with torch.no_grad():
        assert torch.equal(shown(images), silent(images))
