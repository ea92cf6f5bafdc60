"""Training a quantized model: straight-through gradients, and steps that are learned as in LSQ."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import quietvit
import zoo
from method_cases import METHODS, configured
from quietvit.errors import QuietvitError
from quietvit.quantization import AffineQuantizer, LearnedAffine
from quietvit.train.qat import QATConfig, restored_model, state_of
from test_methods_table import built, logits, quantized

SHARE = 0.3


def affine(bits=4, symmetric=False, axis=None):
    low, high = (-1.7, 2.3) if axis is None else ([-1.7, -0.2, -3.0], [2.3, 1.0, 0.1])
    ends = torch.tensor(low), torch.tensor(high)
    return AffineQuantizer.from_range(*ends, bits=bits, symmetric=symmetric, axis=axis)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("symmetric", "axis"), [(True, None), (False, None), (True, 1), (False, 1)]
)
def test_the_gradient_of_a_step_is_that_of_lsq(bits, symmetric, axis):
    """Equation 3, with the zero point of an asymmetric range: z - s. Its sum over the values."""
    calibrated = affine(bits, symmetric, axis)
    learned = LearnedAffine(calibrated, SHARE)
    x = (4 * torch.randn(64, 3)).requires_grad_()
    given = torch.randn(64, 3)
    assert torch.equal(learned(x), calibrated(x.detach()))
    (learned(x) * given).sum().backward()
    scale, zero = calibrated.scale, calibrated.zero_point
    low, high = calibrated.code_range
    steps = x.detach() / scale
    inside = (steps > low - zero) & (steps < high - zero)
    equation = torch.where(inside, steps.round() - steps, steps.clamp(low - zero, high - zero))
    of_step = (given * equation).sum(() if axis is None else 0)
    torch.testing.assert_close(learned.log_ratio.grad, SHARE * of_step / scale)
    torch.testing.assert_close(x.grad, given * inside)


def test_outside_the_range_the_gradient_is_the_slope_of_the_output():
    """There the output is linear in the step, so finite differences are defined."""
    learned = LearnedAffine(affine(), 1.0)
    x = torch.tensor([-30.0, 20.0, 9.0])
    learned(x).sum().backward()
    moved = [copy.deepcopy(learned) for _ in range(2)]
    with torch.no_grad():
        moved[0].log_ratio -= 1e-3
        moved[1].log_ratio += 1e-3
        rise = moved[1](x).double().sum() - moved[0](x).double().sum()
        slope = rise / (moved[1].scale - moved[0].scale)
    torch.testing.assert_close(learned.log_ratio.grad * learned.scale.detach(), slope.float())


def test_a_step_of_sgd_moves_the_step_as_in_lsq():
    learned = LearnedAffine(affine(), SHARE)
    optimizer = torch.optim.SGD(learned.parameters(), lr=1e-4)
    before, x = learned.scale.detach(), torch.randn(100)
    scale = before.clone().requires_grad_()
    plain = AffineQuantizer(scale, learned.zero_point, bits=4, signed=False)
    del plain.scale
    plain.scale = scale
    plain(x).square().sum().backward()
    learned(x).square().sum().backward()
    optimizer.step()
    wanted = -1e-4 * SHARE * scale.grad
    torch.testing.assert_close(learned.scale.detach() - before, wanted, rtol=0.02, atol=0)


def test_a_step_stays_positive_and_weight_decay_pulls_it_back():
    learned = LearnedAffine(affine(axis=1), SHARE)
    with torch.no_grad():
        learned.log_ratio.fill_(-30.0)
    assert bool((learned.scale > 0).all())
    assert torch.equal(learned.fixed().scale, learned.scale)
    optimizer = torch.optim.AdamW(learned.parameters(), lr=0.5, weight_decay=1.0)
    for _ in range(60):
        learned.log_ratio.grad = torch.zeros(3)
        optimizer.step()
    torch.testing.assert_close(learned.scale.detach(), learned.start)


def trained(whole, images, steps=6, lr=3e-3):
    """Train on random labels, and return the losses."""
    labels = torch.arange(len(images)) % min(5, logits(whole, images).shape[-1])
    optimizer = torch.optim.AdamW(whole.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(zoo.outputs(whole.train()(images))[0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    whole.eval()
    return losses


@pytest.mark.parametrize("name", METHODS)
def test_a_model_of_any_method_trains_and_is_saved_as_trained(name, tmp_path):
    model, example, images = built("cnn" if name == "hptq" else "timm-vit")
    whole = quantized(model, name, images, example, weight_bits=4, activation_bits=4)
    before, gradients = logits(whole, images), logits_with_gradients(whole, images)
    steps = [] if name == "hptq" else quietvit.learn_steps(whole)
    assert torch.equal(gradients, before)
    assert torch.equal(logits(whole, images), before)
    assert torch.equal(logits_with_gradients(whole, images), before)
    losses = trained(whole, images)
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in whole.parameters())
    assert all(bool(p.grad.any()) for p in steps)
    loaded = quietvit.load(whole.save(tmp_path / "m.qvit"), model)
    assert torch.equal(logits(loaded, images), logits(whole, images))
    assert not any(isinstance(q, LearnedAffine) for q in loaded.quantizers.values())
    assert loaded.report() == whole.report()


def logits_with_gradients(model, images):
    return zoo.outputs(model(images))[0].detach()


def test_learned_steps_survive_copies_and_a_second_call():
    model, example, images = built("timm-vit")
    whole = quantized(model, "rtn", images, example, weight_bits=4, activation_bits=4)
    steps = quietvit.learn_steps(whole)
    assert [id(p) for p in quietvit.learn_steps(whole)] == [id(p) for p in steps]
    assert len(steps) == len(whole.quantizers)
    names = {name for name, _ in whole.named_parameters() if name.startswith("quantizers.")}
    assert len(names) == len(steps)
    trained(whole, images, steps=2)
    for other in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert torch.equal(logits(other, images), logits(whole, images))
    again = quantized(model, "rtn", images, example, weight_bits=4, activation_bits=4)
    quietvit.learn_steps(again)
    again.load_state_dict(whole.state_dict())
    assert torch.equal(logits(again, images), logits(whole, images))


def test_the_share_counts_the_values_of_one_image():
    """LSQ, section 2.2: N features of a layer, or the weights of one channel; Q_P levels above."""
    model, example, images = built("timm-vit")
    whole = quantized(model, "rtn", images, example, weight_bits=4, activation_bits=4)
    quietvit.learn_steps(whole)
    tokens = 4 * 4 + 1
    for operand, values, top in (("input", tokens * 32, 15), ("weight", 32, 7)):
        quantizer = whole.quantizer("blocks.0.mlp.fc1", operand)
        assert quantizer.share == pytest.approx(1 / math.sqrt(values * top)), operand


def three_readers(whole):
    """The inputs of the first query, key and value, which read one tensor."""
    readers = {}
    for slot in whole.slots():
        if slot.operand == "input":
            readers.setdefault(slot.site.operands[0].fed_by, []).append(slot)
    return next(slots for slots in readers.values() if len(slots) == 3)


def test_sites_that_read_one_tensor_learn_one_step_as_their_file_has_one(tmp_path):
    onnx = pytest.importorskip("onnx")
    model, example, images = built("hf-vit")
    whole = quantized(model, "rtn", images, example)
    steps = quietvit.learn_steps(whole)
    inputs = [q_of(whole, slot) for slot in three_readers(whole)]
    assert inputs[0] is inputs[1] is inputs[2]
    assert len(steps) == len({id(step) for step in steps}) == len(whole.quantizers) - 4
    trained(whole, images)
    assert bool(inputs[0].log_ratio)
    config = QATConfig(method="rtn", bits="W8A8")
    restored = restored_model(config, copy.deepcopy(whole.model), state_of(whole))
    assert torch.equal(logits(restored, images), logits(whole, images))
    assert len({id(q_of(restored, slot)) for slot in three_readers(restored)}) == 1
    quietvit.export(whole, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    read = [node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(read) == len(set(read)) > 10


def test_sites_that_were_calibrated_differently_keep_a_step_each():
    model, example, images = built("hf-vit")
    whole = quantized(model, "rtn", images, example)
    first, second, _ = three_readers(whole)
    whole.quantizers[second.key].scale.mul_(1.5)
    quietvit.learn_steps(whole)
    assert q_of(whole, first) is not q_of(whole, second)
    state = state_of(whole)
    config = QATConfig(method="rtn", bits="W8A8")
    restored = restored_model(config, copy.deepcopy(whole.model), state)
    assert q_of(restored, first) is not q_of(restored, second)
    assert torch.equal(logits(restored, images), logits(whole, images))


def test_a_method_keeps_the_steps_that_it_restricts():
    model, example, images = built("timm-vit")
    whole = quantized(model, "fq-vit", images, example)
    quietvit.learn_steps(whole)
    learned = {s.site.kind for s in whole.slots() if isinstance(q_of(whole, s), LearnedAffine)}
    assert learned == {"conv", "linear", "matmul", "softmax"}
    fixed = {s.site.kind for s in whole.slots()} - learned
    assert fixed == {"norm", "add"}


def q_of(whole, slot):
    return whole.quantizers[slot.key]


def test_where_there_is_nothing_to_learn():
    model, example, images = built("cnn")
    with pytest.raises(QuietvitError, match=r"a TinyCNN has no steps to learn"):
        quietvit.learn_steps(model)
    whole = quietvit.quantize(model, configured("hptq"), images, example=example, progress=False)
    with pytest.raises(
        QuietvitError, match=r"none of its .* quantizers is uniform with a free step"
    ):
        quietvit.learn_steps(whole)


def test_a_regularizer_acts_on_the_weights_of_a_quantized_model():
    model, example, images = built("timm-vit")
    whole = quantized(model, "rtn", images, example)
    quietvit.learn_steps(whole)
    weight, other = whole.model.blocks[0].mlp.fc2.weight, model.blocks[0].mlp.fc2.weight
    for module, parameters in ((whole.model, whole.parameters()), (model, model.parameters())):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        quietvit.ColinearityDecay(module, example, strength=1.0).attach(optimizer)
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert torch.equal(weight, other)


def test_a_trained_model_is_exported_and_checked(tmp_path):
    pytest.importorskip("onnxruntime")
    model, example, images = built("timm-vit")
    whole = quantized(model, "rtn", images, example, weight_bits=4, activation_bits=8)
    quietvit.learn_steps(whole)
    trained(whole, images)
    artifact = quietvit.export(whole, tmp_path / "m.onnx")
    found = artifact.check(whole, [(images, logits(whole, images).argmax(-1))], seconds=0)
    assert found.ok, found.failures
    assert found.proof.integer_share == 1
    assert found.classes.agreement == 100
