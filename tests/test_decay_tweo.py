"""TWEO and the watch of activations: the formula on recorded outputs, and which passes count."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zoo
from quietvit import QuietvitError
from quietvit.decay.activations import ActivationWatch, largest_activation
from quietvit.decay.tweo import TWEO
from quietvit.tracing import call, trace
from quietvit.tracing.block_modules import first_tensor, watching_modules

MODELS = ("timm-vit", "timm-swin", "timm-dinov2-layerscale", "hf-vit", "hf-swin", "tv-vit")
STRENGTH, THRESHOLD, POWER = 0.5, 0.3, 4.0
SMALL = {"strength": STRENGTH, "threshold": THRESHOLD}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class Stack(nn.Module):
    """Three residual blocks; ``how`` says whether they are checkpointed."""

    def __init__(self, how: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            if self.how == "plain":
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.how == "reentrant")
        return self.head(x).mean(1)


def batch(seed: int = 0, count: int = 6) -> Tensor:
    return torch.randn(count, 5, 4, generator=torch.Generator().manual_seed(seed))


def by_hand(outputs: list[Tensor], power: float = POWER) -> Tensor:
    terms = [((out.float().abs() / (THRESHOLD + 1e-6)) ** power).mean() for out in outputs]
    return STRENGTH * torch.stack(terms).mean()


def recorded(model: nn.Module, example: Any) -> tuple[list[Tensor], Any]:
    """The outputs of the residual blocks in one pass, with their graph, and the model's output."""
    outputs: list[Tensor] = []
    names = trace(model, example).blocks
    with watching_modules(model, names, lambda *seen: outputs.append(first_tensor(seen[3]))):
        result = call(model, example)
    return outputs, result


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("power", [4.0, 3.0, 2.5])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradient_are_those_of_the_formula_added_by_hand(name: str, power: float) -> None:
    model, example = zoo.build(name)
    model.train()
    torch.manual_seed(3)
    outputs, _ = recorded(model, example)
    wanted = by_hand(outputs, power)
    wanted.backward()
    expected = gradients(model)
    model.zero_grad()
    tweo = TWEO(model, example, power=power, **SMALL)
    torch.manual_seed(3)
    call(model, example)
    loss = tweo.loss()
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    loss.backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    largest = max(float(value.norm()) for value in expected.values())
    for key, value in found.items():
        assert float((value - expected[key]).norm()) < 1e-6 * largest, key
    assert tweo.penalty() * STRENGTH == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert list(tweo.penalties()) == list(tweo.blocks)


def test_double_precision_gradient_is_exact() -> None:
    model = Stack().double().train()
    x = batch().double()
    tweo = TWEO(model, x, **SMALL)
    names = [n for n, _ in model.named_parameters()]

    def value(*parameters: Tensor) -> Tensor:
        torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))
        return tweo.loss()

    values = [p.detach().clone().requires_grad_() for p in model.parameters()]
    assert torch.autograd.gradcheck(value, values, fast_mode=True)


@pytest.mark.parametrize("how", ["checkpointed", "compiled", "accumulated"])
def test_checkpointing_compilation_and_accumulation_train_the_same(how: str) -> None:
    x, y = batch(), torch.tensor([0, 1, 2, 0, 1, 2])
    plain, other = Stack(), Stack("checkpointed" if how == "checkpointed" else "plain")
    for model in (plain, other):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        tweo = TWEO(model, x, **SMALL).attach(optimizer)
        criterion = tweo.around(F.cross_entropy)
        run: Any = model
        if model is other and how == "compiled":
            run = torch.compile(model, backend="aot_eager", fullgraph=True)
        for _ in range(4):
            if model is other and how == "accumulated":
                for part in (slice(0, 3), slice(3, 6)):
                    (criterion(run(x[part]), y[part]) / 2).backward()
            else:
                criterion(run(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert tweo.steps == 4
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_reentrant_checkpointing_is_refused_with_its_remedy() -> None:
    model = Stack("reentrant")
    tweo = TWEO(model, batch(), **SMALL)
    model(batch()).sum().backward()
    with pytest.raises(QuietvitError, match="use_reentrant=False"):
        tweo.loss()


def test_under_autocast_the_penalty_is_of_the_low_precision_outputs_in_float32() -> None:
    model, example = zoo.build("timm-vit")
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs, _ = recorded(model, example)
        tweo = TWEO(model, example, **SMALL)
        call(model, example)
        loss = tweo.loss()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, by_hand(outputs), rtol=1e-6, atol=0)


def test_half_precision_outputs_do_not_overflow() -> None:
    x = torch.full((4, 4), 3000.0, dtype=torch.float16, requires_grad=True)
    from quietvit.decay.tweo import _MeanPower

    term = _MeanPower.apply(x, 3.0, 4.0)
    assert float(term.detach()) == pytest.approx(1e12, rel=1e-5)
    (term * 1e-9).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_passes_without_gradient_or_in_eval_mode_do_not_count() -> None:
    model, x = Stack(), batch()
    tweo = TWEO(model, x, **SMALL)
    model.eval()
    model(x)
    model.train()
    with torch.no_grad():
        model(x)
    with pytest.raises(QuietvitError, match="found no forward pass"):
        tweo.loss()
    model(x)
    alone = float(tweo.loss().detach())
    model(x)
    with torch.no_grad():
        model(3 * x)
    assert float(tweo.loss().detach()) == alone


def test_several_passes_are_averaged() -> None:
    model = Stack()
    tweo = TWEO(model, batch(), **SMALL)
    single = []
    for seed in (1, 2):
        model(batch(seed))
        single.append(tweo.loss().detach())
    for seed in (1, 2):
        model(batch(seed))
    torch.testing.assert_close(tweo.loss(), sum(single) / 2)


def test_around_adds_the_loss_in_training_alone() -> None:
    model, x, y = Stack(), batch(), torch.tensor([0, 1, 2, 0, 1, 2])
    tweo = TWEO(model, x, **SMALL)
    criterion = tweo.around(F.cross_entropy)
    logits = model(x)
    total, task = criterion(logits, y), F.cross_entropy(logits, y)
    model(x)
    torch.testing.assert_close(total, task + tweo.loss())
    model.eval()
    assert torch.equal(criterion(model(x), y), F.cross_entropy(model(x), y))
    with torch.no_grad():
        assert torch.equal(criterion(model.train()(x), y), F.cross_entropy(model(x), y))


def test_where_items_of_a_step_are_counted_its_passes_sum_to_the_penalty_of_their_images() -> None:
    model, x, y = Stack().double(), batch().double(), torch.tensor([0, 1, 2, -100, 1, 2])
    tweo = TWEO(model, x, **SMALL)
    criterion = tweo.around(lambda logits, labels, num_items_in_batch: logits.sum() * 0)
    model(x[y >= 0])
    whole = tweo.loss()
    parts = [
        criterion(model(x[part]), labels=y[part], num_items_in_batch=torch.tensor(5))
        for part in (slice(0, 3), slice(4, 6))
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)
    none = criterion(model(x[3:4]), y[3:4], num_items_in_batch=5)
    assert none.item() == 0, "no item of this pass counts"
    with pytest.raises(QuietvitError, match=r"num_items_in_batch=5.*are a list"):
        criterion(model(x), [0] * 6, num_items_in_batch=5)


def test_nothing_of_a_step_is_kept_alive_by_the_next() -> None:
    model, x = Stack(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    tweo = TWEO(model, x, **SMALL).attach(optimizer)
    outputs: list[weakref.ref[Tensor]] = []
    model.blocks[1].register_forward_hook(lambda m, a, out: outputs.append(weakref.ref(out)))
    for used in (True, False):
        out = model(x).sum()
        (out + tweo.loss() if used else out).backward()
        optimizer.step()
        optimizer.zero_grad()
        del out
        gc.collect()
        assert outputs[-1]() is None
    model(x)
    assert outputs[-1]() is not None
    tweo.detach()
    assert outputs[-1]() is None


def test_steps_without_the_loss_raise_and_skipped_ones_do_not_count() -> None:
    model, x = Stack(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    tweo = TWEO(model, x, **SMALL).attach(optimizer)
    for used in (False, False, True, False, False):
        loss = model(x).sum()
        (loss + tweo.loss() if used else loss).backward()
        optimizer.step()
    with pytest.raises(QuietvitError, match="3 optimizer steps passed without"):
        optimizer.step()
    assert tweo.steps == 6
    tweo.detach()
    optimizer.step()
    assert tweo.steps == 6


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_grad_scaler_skips_is_not_counted(fused: bool) -> None:
    model, x = Stack(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    tweo = TWEO(model, x, **SMALL).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for bad in (False, True, True, True, True, False):
        loss = model(x).sum() * (float("inf") if bad else 1.0) + tweo.loss()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert tweo.steps == 2


def test_many_passes_without_the_loss_are_refused() -> None:
    model, x = Stack(), batch(count=1)
    tweo = TWEO(model, x, **SMALL)

    def passes(count: int) -> None:
        for _ in range(count):
            model(x)

    with pytest.raises(QuietvitError, match="64 forward passes in training mode"):
        passes(65)
    assert len(tweo.blocks) == 3


def test_schedule_follows_the_steps_and_needs_an_optimizer() -> None:
    model, x = Stack(), batch()
    tweo = TWEO(model, x, schedule=lambda step: float(step == 1), **SMALL)
    model(x)
    with pytest.raises(QuietvitError, match="Call attach"):
        tweo.loss()
    model.zero_grad()
    tweo.detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    tweo.attach(optimizer)
    values = []
    for _ in range(3):
        loss = model(x).sum() * 0 + tweo.loss()
        loss.backward()
        values.append(float(loss.detach()))
        optimizer.step()
    assert values[0] == values[2] == 0 < values[1]
    tweo.schedule = lambda step: -1.0
    model(x)
    with pytest.raises(QuietvitError, match=r"schedule\(3\) returned -1"):
        tweo.loss()


def test_copies_and_pickles_of_the_model_are_free_of_the_hooks() -> None:
    model, x = Stack(), batch()
    tweo = TWEO(model, x, **SMALL)
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    stored = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(model), stored, pickle.loads(pickle.dumps(model))):
        twin.train()(x)
        with pytest.raises(QuietvitError, match="found no forward pass"):
            tweo.loss()


def test_state_is_restored_and_refused_where_settings_differ() -> None:
    model, x = Stack(), batch()
    tweo = TWEO(model, x, **SMALL)
    tweo.steps = 7
    other = TWEO(model, x, **SMALL)
    other.load_state_dict(copy.deepcopy(tweo.state_dict()))
    assert other.steps == 7
    with pytest.raises(QuietvitError, match=r"saved with threshold=0\.3"):
        TWEO(model, x, strength=STRENGTH).load_state_dict(tweo.state_dict())
    with pytest.raises(QuietvitError, match="no state of a TWEO"):
        other.load_state_dict({"a": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1.0}, "strength=-1.0"),
        ({"strength": {"mlp": 1.0}}, "strength={'mlp': 1.0}"),
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"power": 0.5}, "power=0.5"),
        ({"schedule": 3}, "schedule=3"),
        ({"schedule": {"mlp": float}}, "takes one function"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(QuietvitError, match=message):
        TWEO(Stack(), batch(), **options)


def test_a_model_without_residual_blocks_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
    with pytest.raises(QuietvitError, match="Sequential has no residual block"):
        TWEO(model, torch.randn(1, 4))
    with pytest.raises(QuietvitError, match="Sequential has no residual block"):
        ActivationWatch(model, trace(model, torch.randn(1, 4)))


def test_attaching_twice_is_refused() -> None:
    model, x = Stack(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    tweo = TWEO(model, x).attach(optimizer)
    with pytest.raises(QuietvitError, match="already attached"):
        tweo.attach(optimizer)
    with pytest.raises(QuietvitError, match="seen no forward pass"):
        tweo.penalty()


def test_what_trains_in_front_of_a_frozen_model_may_be_followed() -> None:
    model, prompt = Stack().requires_grad_(False), torch.zeros(1, 5, 4, requires_grad=True)
    optimizer = torch.optim.SGD([prompt], lr=0.01)
    tweo = TWEO(model, batch(), **SMALL).attach(optimizer)
    model(batch() + prompt)
    tweo.loss().backward()
    optimizer.step()
    assert tweo.steps == 1
    assert prompt.abs().max() > 0


@pytest.mark.usefixtures("process")
def test_an_optimizer_of_parts_is_known_after_a_pass_that_left_the_model_whole() -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    model, x = Stack(), batch()
    tweo = TWEO(model, x, **SMALL)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(QuietvitError, match="none of the"):
        tweo.attach(torch.optim.SGD(Stack().parameters(), lr=0.01))
    with torch.no_grad():
        model(x)
    tweo.attach(optimizer)
    (model(x).sum() + tweo.loss()).backward()
    optimizer.step()
    assert tweo.steps == 1


@pytest.mark.parametrize("name", MODELS)
def test_the_watch_sees_the_largest_output_of_any_block(name: str) -> None:
    model, example = zoo.build(name)
    outputs, _ = recorded(model, example)
    wanted = [float(out.detach().abs().max()) for out in outputs]
    watch = ActivationWatch(model, trace(model, example))
    with watch:
        call(model, example)
    assert list(watch.peaks().values()) == wanted
    assert watch.largest() == (watch.blocks[wanted.index(max(wanted))], max(wanted))
    assert largest_activation(model, example) == watch.largest()


def test_the_watch_keeps_the_largest_of_its_passes_and_only_those() -> None:
    model, x = Stack(), batch()
    watch = ActivationWatch(model, trace(model, x))
    with pytest.raises(QuietvitError, match="no forward pass"):
        watch.largest()
    model(10 * x)
    with watch:
        model(x)
        small = watch.largest()
    model(10 * x)
    assert watch.largest() == small
    with watch:
        model(10 * x)
        model(x)
    assert watch.largest()[1] > small[1]
    watch.reset()
    with watch, torch.no_grad():
        model(x * float("nan"))
    assert watch.largest()[0] == "blocks.0"
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("frozen", ["blocks", "all before the head"])
def test_a_penalty_that_reaches_no_parameter_that_trains_is_told_once(
    frozen: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Stack()
    model.blocks.requires_grad_(False)
    if frozen != "blocks":
        model.embed.requires_grad_(False)
    tweo = TWEO(model, batch(), **SMALL)
    for _ in range(2):
        (model(batch()).sum() + tweo.loss()).backward()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (frozen != "blocks")
    assert all("no output of its 3 blocks depends on a parameter that trains" in t for t in told)
    assert (model.embed.weight.grad is None) == (frozen != "blocks")


def test_a_penalty_read_without_gradients_is_no_reason_to_warn(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Stack()
    tweo = TWEO(model, batch(), **SMALL)
    model(batch())
    with torch.no_grad():
        tweo.loss()
    assert not caplog.records
