"""What every regularizer does alike: attach, count, resume, refuse, leave alone."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decay_cases import (
    COUPLED,
    MAKERS,
    ON_WEIGHTS,
    Tower,
    backward,
    changed,
    images,
    process_group,
    still,
    tower,
    train,
    weights,
)
from processes import run_in_processes
from quietvit import QuietvitError
from quietvit.decay import Regularizer, StrengthSchedule

every_one = pytest.mark.parametrize("name", MAKERS)
on_weights = pytest.mark.parametrize("name", ON_WEIGHTS)
SHARDED = [name for name in ON_WEIGHTS if name != "cd"]  # cd: test_decay_environments
coupled = pytest.mark.parametrize("name", COUPLED)


def adam(model: Tower, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.01, **options)


@every_one
def test_it_has_the_common_interface(name: str) -> None:
    model = tower()
    made = MAKERS[name](model, images())
    assert isinstance(made, Regularizer)
    backward(model, made)
    parts = made.penalties()
    assert made.penalty() > 0
    assert parts
    assert all(value >= 0 for value in parts.values())
    assert made.attach(adam(model)) is made


@every_one
def test_attached_it_changes_training_and_detached_it_does_not(name: str) -> None:
    with_it, without = tower(), tower()
    optimizer, plain = adam(with_it), adam(without)
    made = MAKERS[name](with_it, images()).attach(optimizer)
    train(with_it, optimizer, made)
    train(without, plain)
    assert made.steps == 4
    assert changed(with_it, weights(without))
    made.detach()
    made.detach()
    without.load_state_dict(with_it.state_dict())
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(with_it, optimizer, steps=range(4, 7))
    train(without, plain, steps=range(4, 7))
    assert made.steps == 4
    assert not changed(with_it, weights(without))


@every_one
def test_attaching_twice_is_refused(name: str) -> None:
    model = tower()
    optimizer = adam(model)
    made = MAKERS[name](model, images()).attach(optimizer)
    with pytest.raises(QuietvitError, match="already attached"):
        made.attach(optimizer)
    made.detach()
    made.attach(optimizer)


@every_one
@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf"), "much"])
def test_a_wrong_strength_is_refused(name: str, strength: Any) -> None:
    with pytest.raises(QuietvitError, match="strength="):
        MAKERS[name](tower(), images(), strength=strength)


@on_weights
@pytest.mark.parametrize("every", [0, 1.5, True])
def test_a_wrong_every_is_refused(name: str, every: Any) -> None:
    with pytest.raises(QuietvitError, match="every="):
        MAKERS[name](tower(), images(), every=every)


@every_one
def test_a_wrong_schedule_is_refused(name: str) -> None:
    with pytest.raises(QuietvitError, match="schedule=3"):
        MAKERS[name](tower(), images(), schedule=3)


@every_one
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(name: str) -> None:
    schedule = StrengthSchedule("cosine", start=1, warmup=3, total=12)
    options: dict[str, Any] = {"schedule": schedule} | ({} if name == "tweo" else {"every": 2})

    def made(model: Tower) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = adam(model)
        return optimizer, MAKERS[name](model, images(), **options).attach(optimizer)

    whole, part, resumed = tower(), tower(), tower()
    optimizer, regularizer = made(whole)
    train(whole, optimizer, regularizer, range(12))
    optimizer, regularizer = made(part)
    train(part, optimizer, regularizer, range(9))
    file = io.BytesIO()
    torch.save((part.state_dict(), optimizer.state_dict(), regularizer.state_dict()), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved[0])
    optimizer, regularizer = made(resumed)
    optimizer.load_state_dict(saved[1])
    regularizer.load_state_dict(saved[2])
    train(resumed, optimizer, regularizer, range(9, 12))
    assert not changed(resumed, weights(whole))
    assert regularizer.steps == 12


def copies(model: Tower) -> Iterator[Tower]:
    """The model copied, pickled, and saved whole and loaded."""
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)


@every_one
def test_a_copy_of_a_model_that_holds_it_is_detached_and_trains_on_alike(name: str) -> None:
    model = tower()
    optimizer = adam(model)
    model.made = MAKERS[name](model, images()).attach(optimizer)
    train(model, optimizer, model.made, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    twins = []
    for twin in copies(model):
        made = twin.made
        assert made.model is twin
        assert made.steps == 3
        own = adam(twin)
        train(twin, own, steps=range(3))  # no hook of the original is there, none complains
        twin.load_state_dict(model.state_dict())
        own.load_state_dict(copy.deepcopy(state))
        assert made.attach(own) is made
        twins.append((twin, own))
    before = weights(model)
    train(model, optimizer, model.made, range(3, 7))
    assert changed(model, before)
    for twin, own in twins:
        train(twin, own, twin.made, range(3, 7))
        assert twin.made.steps == model.made.steps == 7
        assert not changed(twin, weights(model))


@every_one
def test_a_state_of_other_settings_is_refused(name: str) -> None:
    model = tower()
    state = MAKERS[name](model, images(), schedule=StrengthSchedule(warmup=5)).state_dict()
    MAKERS[name](model, images(), schedule=StrengthSchedule(warmup=5)).load_state_dict(state)
    for other, key in (
        ({"schedule": StrengthSchedule(warmup=6)}, "schedule"),
        ({"schedule": None}, "schedule"),
        ({"schedule": StrengthSchedule(warmup=5), "strength": 0.7}, "strength"),
    ):
        with pytest.raises(QuietvitError, match=f"saved with {key}="):
            MAKERS[name](model, images(), **other).load_state_dict(state)
    with pytest.raises(QuietvitError, match="this is no state of a"):
        MAKERS[name](model, images()).load_state_dict({"a": 1})


@on_weights
def test_a_schedule_scales_what_is_applied_and_zero_applies_nothing(name: str) -> None:
    moved = {}
    for factor in (0.0, 0.5, 1.0):
        model = tower()
        before = weights(model)
        MAKERS[name](model, images(), schedule=lambda step, f=factor: f).attach(still(model))._act(
            still(model)
        )
        moved[factor] = torch.cat(
            [
                torch.cat([(p - before[n]).flatten(), p.grad.flatten()])
                for n, p in model.named_parameters()
            ]
        )
    assert not moved[0.0].any()
    assert moved[1.0].any()
    torch.testing.assert_close(moved[0.5] * 2, moved[1.0], rtol=1e-9, atol=1e-15)


@on_weights
def test_frozen_parameters_and_those_outside_the_optimizer_are_left_alone(name: str) -> None:
    model = tower()
    block = model.blocks[0]
    frozen = [block.fc1.weight, block.norm1.weight]
    outside = [block.qkv.weight, block.norm2.weight]
    for parameter in frozen:
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if all(p is not other for other in outside)], lr=0.01
    )
    with pytest.warns(UserWarning, match="in no group of this AdamW"):
        made = MAKERS[name](model, images()).attach(optimizer)
    before = weights(model)
    for step in range(3):
        model.zero_grad()
        backward(model, made, step)
        theirs = [parameter.grad.clone() for parameter in outside]
        optimizer.step()
        assert all(parameter.grad is None for parameter in frozen)
        for parameter, grad in zip(outside, theirs, strict=True):
            assert torch.equal(parameter.grad, grad)
    left = {f"blocks.0.{n}.weight" for n in ("fc1", "norm1", "qkv", "norm2")}
    assert changed(model, before) == set(before) - left


@every_one
def test_an_optimizer_with_none_of_the_parameters_is_refused(name: str) -> None:
    model = tower()
    made = MAKERS[name](model, images())
    with pytest.raises(QuietvitError, match=r"none of the \d+ .* build the optimizer"):
        made.attach(torch.optim.SGD(tower().parameters(), lr=0.1))
    made.attach(torch.optim.SGD(model.parameters(), lr=0.1))


@every_one
@pytest.mark.parametrize("kind", [list, tuple])
def test_one_regularizer_follows_one_optimizer(name: str, kind: type) -> None:
    model = tower()
    made = MAKERS[name](model, images())
    remedy = "attach TWEO to one that" if name == "tweo" else "build and attach one for each"
    with pytest.raises(QuietvitError, match=f"a {kind.__name__} of 2, but one .*; {remedy}"):
        made.attach(kind([adam(model), adam(model)]))


@on_weights
def test_where_all_is_frozen_the_remedy_is_another_one(name: str) -> None:
    model = tower()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is model.head.bias)
    made = MAKERS[name](model, images())
    message = rf"{type(made).__name__} has nothing to update: all \d+ .* frozen .* Unfreeze some"
    with pytest.raises(QuietvitError, match=message) as told:
        made.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    assert "decay.cd=none" in str(told.value)
    assert "build the optimizer" not in str(told.value)
    model.requires_grad_(True)
    with pytest.raises(QuietvitError, match="build the optimizer"):
        made.attach(torch.optim.SGD([model.head.bias], lr=0.1))


@every_one
def test_gradient_accumulation_is_one_step(name: str) -> None:
    model = tower()
    optimizer = adam(model)
    made = MAKERS[name](model, images()).attach(optimizer)
    for _ in range(2):
        for seed in range(5):
            backward(model, made, seed)
        optimizer.step()
        optimizer.zero_grad()
    assert made.steps == 2


@every_one
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_grad_scaler_skips_does_nothing(name: str, fused: bool) -> None:
    model = tower(torch.float32)
    optimizer = adam(model, fused=fused, weight_decay=0.0)
    made = MAKERS[name](model, images(torch.float32)).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for bad in (False, True, True, False):
        before = weights(model)
        backward(model, made, factor=scaler.get_scale())
        if bad:
            model.head.bias.grad[0] = float("inf")
        scaler.scale(torch.zeros((), requires_grad=True))  # makes the scaler know its scale
        grads = [p.grad.clone() for p in model.parameters()]
        scaler.step(optimizer)
        if fused and bad:  # else the scaler has unscaled them
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                assert torch.equal(parameter.grad, grad)
        scaler.update()
        optimizer.zero_grad()
        assert bool(changed(model, before)) != bad
    assert made.steps == 2


@every_one
@pytest.mark.parametrize("fused", [False, True])
def test_the_scale_of_a_grad_scaler_does_not_matter(name: str, fused: bool) -> None:
    moved = []
    for scale in (1.0, 1024.0):
        model = tower(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=fused)
        made = MAKERS[name](model, images(torch.float32)).attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for seed in range(3):
            backward(model, made, seed, factor=scale)
            scaler.scale(torch.zeros((), requires_grad=True))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        moved.append(weights(model))
    for key, value in moved[0].items():
        torch.testing.assert_close(moved[1][key], value, rtol=1e-5, atol=1e-6)


@on_weights
def test_steps_that_pass_without_a_call_raise(name: str) -> None:
    model = tower()
    made = MAKERS[name](model, images()).attach(adam(model))
    other = adam(model)
    train(model, other, steps=range(3))
    with pytest.raises(QuietvitError, match="changed 3 times between backward passes"):
        train(model, other, steps=range(3, 4))
    made.detach()
    made.attach(other)
    train(model, other, steps=range(5))
    assert made.steps == 5


@on_weights
def test_an_explicit_step_is_the_attached_one(name: str) -> None:
    attached, explicit = tower(), tower()
    optimizer = torch.optim.SGD(attached.parameters(), lr=0.01)
    MAKERS[name](attached, images()).attach(optimizer)
    train(attached, optimizer, steps=range(3))
    optimizer = torch.optim.SGD(explicit.parameters(), lr=0.01)
    made = MAKERS[name](explicit, images())
    for step in range(3):
        backward(explicit, seed=step)
        if name in COUPLED:
            made.step(optimizer)
        optimizer.step()
        if name not in COUPLED:
            made.step(optimizer)
        optimizer.zero_grad()
    assert made.steps == 3
    assert not changed(explicit, weights(attached))


@coupled
def test_a_missing_gradient_is_created_and_a_present_one_added_to(name: str) -> None:
    bare, given = tower(), tower()
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.0)
    MAKERS[name](bare, images()).attach(optimizer)
    optimizer.step()
    optimizer = still(given, lr=0.0)
    theirs = {n: torch.randn_like(p) for n, p in given.named_parameters()}
    for key, parameter in given.named_parameters():
        parameter.grad = theirs[key].clone()
    MAKERS[name](given, images()).attach(optimizer)
    optimizer.step()
    grads = {n: p.grad for n, p in bare.named_parameters() if p.grad is not None}
    assert grads
    assert not any("bias" in n or "norm" in n for n in grads)
    for key, parameter in given.named_parameters():
        added = grads.get(key, torch.zeros(()))
        torch.testing.assert_close(parameter.grad, theirs[key] + added, rtol=1e-12, atol=0)


@coupled
def test_a_closure_gets_the_gradient_once_for_each_call(name: str) -> None:
    plain, closed = tower(), tower()
    optimizer = adam(plain)
    MAKERS[name](plain, images()).attach(optimizer)
    train(plain, optimizer)
    optimizer = adam(closed)
    made = MAKERS[name](closed, images()).attach(optimizer)
    for step in range(4):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = closed(images(seed=step)).square().mean()
            loss.backward()
            return loss

        if step % 2:
            optimizer.step(closure)
        else:
            optimizer.step(closure=closure)
    assert made.steps == 4
    assert not changed(closed, weights(plain))


@coupled
def test_an_optimizer_that_maximizes_lowers_the_penalty_all_the_same(name: str) -> None:
    found = []
    for sign in (1.0, -1.0):
        model = tower()
        optimizer = adam(model, maximize=sign < 0)
        MAKERS[name](model, images()).attach(optimizer)
        for step in range(3):
            backward(model, seed=step, factor=sign)
            optimizer.step()
            optimizer.zero_grad()
        found.append((model, weights(model)))
    assert not changed(found[0][0], found[1][1])


@every_one
def test_a_step_that_calls_its_base_s_step_counts_once(name: str) -> None:
    """torch wraps the step of each class that was ever built, so both call the hooks."""
    adam(tower())

    class Nested(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    found = []
    for kind in (torch.optim.AdamW, Nested):
        model = tower()
        optimizer = kind(model.parameters(), lr=0.01)
        made = MAKERS[name](model, images()).attach(optimizer)
        train(model, optimizer, made)
        assert made.steps == 4
        found.append((model, weights(model)))
    assert not changed(found[0][0], found[1][1])


@every_one
def test_a_step_that_raised_leaves_the_next_ones_alone(name: str) -> None:
    class Nested(torch.optim.AdamW):
        fails = False

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise MemoryError
            return super().step(closure)

    adam(tower())
    model = tower()
    optimizer = Nested(model.parameters(), lr=0.01)
    made = MAKERS[name](model, images()).attach(optimizer)
    train(model, optimizer, made, range(1))
    optimizer.fails = True
    backward(model, made)
    with pytest.raises(MemoryError):
        optimizer.step()
    optimizer.fails = False
    optimizer.zero_grad()
    train(model, optimizer, made, range(2))
    assert made.steps == 3


@coupled
def test_a_step_that_takes_the_scaler_itself_is_refused(name: str) -> None:
    class Own(torch.optim.SGD):
        def step(self, closure: Any = None, *, grad_scaler: Any = None) -> None:
            super().step()

    model = tower()
    optimizer = Own(model.parameters(), lr=0.1)
    MAKERS[name](model, images()).attach(optimizer)
    backward(model)
    with pytest.raises(QuietvitError, match="takes a grad_scaler"):
        optimizer.step(grad_scaler=object())


@on_weights
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_computed_in_float32_and_rounded_once(
    name: str, dtype: torch.dtype
) -> None:
    low = tower(dtype)
    high = tower().load_state_dict(low.state_dict()) and tower(dtype).float()
    example = images(dtype)
    moved = []
    for model, x in ((low, example), (high, example.float())):
        made = MAKERS[name](model, x)
        if name.startswith("s2d"):  # which layers: not a matter of rounding
            made.images, made.threshold = x, 0.0
        optimizer = still(model)
        made.attach(optimizer)
        optimizer.step()
        moved.append({n: (p.detach(), p.grad) for n, p in model.named_parameters()})
    for key, (value, grad) in moved[0].items():
        assert value.dtype == grad.dtype == dtype
        other, other_grad = moved[1][key]
        assert torch.isfinite(value).all()
        if name in COUPLED:
            torch.testing.assert_close(grad, other_grad.to(dtype), rtol=0, atol=0)
        else:
            torch.testing.assert_close(value, other.to(dtype), rtol=0, atol=0)


@on_weights
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_names_the_parameter_and_changes_no_weight(name: str, value: float) -> None:
    model = tower()
    made = MAKERS[name](model, images())
    optimizer = still(model)
    made.attach(optimizer)
    bad = model.blocks[1].norm2 if name == "norm_gains" else model.blocks[1].fc2
    with torch.no_grad():
        bad.weight.view(-1)[3] = value
    before = weights(model)
    with pytest.raises(
        QuietvitError, match=r"blocks\.1\.(fc2|norm2)\.weight.*no weight was changed"
    ):
        optimizer.step()
    assert not changed(model, before)


@on_weights
def test_zero_matrices_stay_zero_and_nothing_is_divided_by_them(name: str) -> None:
    model = tower()
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
    optimizer = still(model)
    MAKERS[name](model, images()).attach(optimizer)
    for _ in range(3):
        optimizer.step()
    assert all((parameter == 0).all() for parameter in model.blocks.parameters())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@on_weights
def test_strength_zero_is_the_optimizer_alone(name: str) -> None:
    with_it, without = tower(), tower()
    optimizer, plain = adam(with_it), adam(without)
    MAKERS[name](with_it, images(), strength=0.0).attach(optimizer)
    train(with_it, optimizer)
    train(without, plain)
    assert not changed(with_it, weights(without))


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("name", SHARDED)
def test_parameters_sharded_by_fsdp2_move_as_whole_ones(name: str) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    whole, sharded = tower(), tower()
    optimizer = adam(whole)
    MAKERS[name](whole, images()).attach(optimizer)
    train(whole, optimizer, steps=range(6))
    made = MAKERS[name](sharded, images())
    mesh = init_device_mesh("cpu", (1,))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    optimizer = adam(sharded)
    made.attach(optimizer)
    train(sharded, optimizer, steps=range(6))
    wanted = weights(whole)
    for key, parameter in sharded.named_parameters():
        torch.testing.assert_close(parameter.full_tensor(), wanted[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("what", ["model", "step"])
def test_compiled_training_is_the_same(what: str) -> None:
    """All regularizers side by side, since compiling takes the time."""
    plain, compiled = tower(), tower()
    optimizer = adam(plain)
    for name in SHARDED:
        MAKERS[name](plain, images()).attach(optimizer)
    train(plain, optimizer)
    optimizer = adam(compiled)
    run = torch.compile(compiled, backend="aot_eager") if what == "model" else compiled
    made = [MAKERS[name](run, images()).attach(optimizer) for name in SHARDED]
    if what == "step":
        optimizer.step = torch.compile(optimizer.step, backend="aot_eager")  # type: ignore[method-assign]
    train(run, optimizer)
    assert {each.steps for each in made} == {4}
    wanted = weights(plain)
    for key, value in weights(compiled).items():
        # a compiled AdamW corrects its moments in float32
        torch.testing.assert_close(value, wanted[key], rtol=1e-5, atol=1e-6)


def _train_in_parts(rank: int, folder: str) -> None:
    """One of two processes: every regularizer under FSDP2, the result saved by the first."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    with process_group(Path(folder), rank, 2):
        found = {}
        for name in SHARDED:
            model = tower()
            made = MAKERS[name](model, images())
            mesh = init_device_mesh("cpu", (2,))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            optimizer = adam(model)
            made.attach(optimizer)
            train(model, optimizer, steps=range(5))
            found[name] = {key: p.full_tensor() for key, p in model.named_parameters()}
            made.penalties()
        if rank == 0:
            torch.save(found, Path(folder) / "weights.pt")


@pytest.mark.slow
def test_two_processes_that_hold_parts_train_the_weights_of_one(tmp_path: Path) -> None:
    run_in_processes(_train_in_parts, str(tmp_path))
    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    for name in SHARDED:
        whole = tower()
        optimizer = adam(whole)
        MAKERS[name](whole, images()).attach(optimizer)
        train(whole, optimizer, steps=range(5))
        for key, value in weights(whole).items():
            torch.testing.assert_close(found[name][key], value, rtol=1e-9, atol=1e-11)
