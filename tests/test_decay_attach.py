"""Attachment to optimizers: when the update runs, at which rate, and when it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm.optim import Lookahead
from torch import Tensor, nn

from decay_cases import HEADS, WIDTH, Block
from quietvit import QuietvitError
from quietvit.decay import PENALTIES, ColinearityDecay, DecoupledUpdate, NormGainDecay
from quietvit.decay.penalties import Energy, Top
from quietvit.pairs import MatrixPair
from quietvit.tracing import WeightView


def block_pairs(norms: bool = True) -> list[MatrixPair]:
    size = WIDTH // HEADS
    found = [MatrixPair(WeightView("fc1"), WeightView("fc2"), "mlp")]
    for head in range(HEADS):
        rows = range(2 * WIDTH + head * size, 2 * WIDTH + (head + 1) * size)
        cols = range(head * size, (head + 1) * size)
        first, second = WeightView("qkv", rows=rows), WeightView("proj", cols=cols)
        found.append(MatrixPair(first, second, "value_output", head=head))
    if norms:
        for norm, linear in (("norm1", "qkv"), ("norm2", "fc1")):
            first = WeightView(norm, diagonal=True)
            found.append(MatrixPair(first, WeightView(linear), "norm_linear"))
    return found


def block(dtype: torch.dtype = torch.float64) -> Block:
    torch.manual_seed(1)
    made = Block()
    for norm in (made.norm1, made.norm2):
        nn.init.uniform_(norm.weight, 0.5, 2.0)
    return made.to(dtype)


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, 5, WIDTH, dtype=dtype)


def expected(
    model: Block, pairs: list[MatrixPair], step: Callable[[str, MatrixPair], float]
) -> dict[str, Tensor]:
    """Every weight after one energy step, pair by pair, all from the values before."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = {name: p.clone() for name, p in before.items()}
    for pair in pairs:
        A, B = (view.select(before[view.parameter_name]) for view in (pair.first, pair.second))
        directions = Energy().directions(A[None], B[None])
        for view, direction in zip((pair.first, pair.second), directions, strict=True):
            name = view.parameter_name
            view.scatter_add_(after[name], -step(name, pair) * direction[0])
    return after


def rate_of(rates: dict[str, float], name: str, pair: MatrixPair) -> float:
    return rates[name]


def still(model: nn.Module, **options: Any) -> torch.optim.SGD:
    """An optimizer whose own step changes nothing: all gradients are zero."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return torch.optim.SGD(model.parameters(), lr=0.01, **options)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> None:
    for name in one:
        difference = (one[name] - other[name]).norm() / other[name].norm().clamp_min(1e-30)
        assert float(difference) <= tolerance, name


def test_one_step_is_the_sum_over_pairs_from_the_values_before() -> None:
    model = block()
    wanted = expected(model, block_pairs(), lambda name, pair: 0.01 * 2.0)
    optimizer = still(model)
    ColinearityDecay(model, strength=2.0, pairs=block_pairs()).attach(optimizer)
    optimizer.step()
    assert_equal(weights(model), wanted, 1e-14)
    size = 2 * WIDTH
    query_key = block().qkv.weight[:size] - model.qkv.weight[:size]
    assert float(query_key.detach().norm()) > 0, "norm_linear reads all of qkv"


class Halved(DecoupledUpdate):
    """The least that a decoupled update has: what it acts on, what it is, how it writes."""

    def parameter_names(self) -> tuple[str, ...]:
        return ("fc1.weight",)

    def settings(self) -> dict[str, Any]:
        return {}

    def penalties(self) -> dict[str, float]:
        return {}

    def _write(self, rates: dict[str, float]) -> None:
        for name, rate in rates.items():
            self._read(name).mul_(1 - rate / 2)


def test_an_update_is_asked_for_no_more_than_every_class_has() -> None:
    model = block()
    before = weights(model)
    optimizer = still(model)
    Halved(model, every=3, schedule=None).attach(optimizer)
    for _ in range(3):
        optimizer.step()
    before["fc1.weight"] *= 1 - 0.01 * 3 / 2
    assert_equal(weights(model), before)


def test_flat_spectrum_gives_the_arithmetic_of_decoupled_weight_decay() -> None:
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 3, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.qr(torch.randn(6, 4).double()).Q.mT * 3.7)
    twin = copy.deepcopy(model)
    model[0].weight.requires_grad_(False)
    adam = {"lr": 0.01, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(model[1].parameters(), **adam)
    decayed = torch.optim.AdamW(twin[1].parameters(), **(adam | {"weight_decay": 0.7}))
    pairs = [MatrixPair(WeightView("0"), WeightView("1"), "mlp")]
    ColinearityDecay(model, strength=0.7, pairs=pairs).attach(optimizer)
    model[1].weight.grad = torch.zeros_like(model[1].weight)
    twin[1].weight.grad = torch.zeros_like(twin[1].weight)
    for _ in range(5):
        optimizer.step()
        decayed.step()
    assert torch.allclose(model[1].weight, twin[1].weight, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_each_parameter_follows_its_own_groups_learning_rate(tensor_lr: bool) -> None:
    model = block()
    make = torch.tensor if tensor_lr else float
    optimizer = still(model)
    optimizer = torch.optim.SGD(
        [
            {"params": [model.fc1.weight, model.qkv.weight], "lr": make(0.02)},
            {"params": [model.fc2.weight, model.proj.weight], "lr": make(0.03)},
        ],
        lr=1.0,
    )
    ColinearityDecay(model, strength=1.0, pairs=block_pairs(norms=False)).attach(optimizer)
    for scale in (1.0, 0.5):
        for group, lr in zip(optimizer.param_groups, (0.02, 0.03), strict=True):
            group["lr"] = make(lr * scale)
        slow, fast = 0.02 * scale, 0.03 * scale
        rates = {"fc1.weight": slow, "qkv.weight": slow, "fc2.weight": fast, "proj.weight": fast}
        wanted = expected(model, block_pairs(norms=False), partial(rate_of, rates))
        optimizer.step()
        assert_equal(weights(model), wanted, 1e-7 if tensor_lr else 1e-14)


def test_strength_by_kind() -> None:
    model = block()
    strengths = {"mlp": 3.0, "value_output": 0.0, "norm_linear": 0.5}
    pairs = [pair for pair in block_pairs() if pair.kind != "value_output"]
    wanted = expected(model, pairs, lambda _, pair: 0.01 * strengths[pair.kind])
    optimizer = still(model)
    decay = ColinearityDecay(model, strength=strengths, pairs=block_pairs()).attach(optimizer)
    assert {pair.kind for pair in decay.pairs} == {"mlp", "norm_linear"}
    optimizer.step()
    assert_equal(weights(model), wanted, 1e-14)


def test_every_n_steps_with_n_fold_strength_and_schedule() -> None:
    model = block()
    optimizer = still(model)
    decay = ColinearityDecay(
        model,
        strength=1.0,
        every=3,
        pairs=block_pairs(),
        schedule=lambda step: {2: 0.5, 5: 0.0}[step],
    ).attach(optimizer)
    before = weights(model)
    optimizer.step()
    optimizer.step()
    assert_equal(weights(model), before)
    wanted = expected(model, block_pairs(), lambda *_: 0.01 * 3 * 0.5)
    optimizer.step()
    assert_equal(weights(model), wanted, 1e-14)
    for _ in range(3):
        optimizer.step()
    assert_equal(weights(model), wanted, 1e-14)
    assert decay.steps == 6


def test_bad_schedule_value_is_refused() -> None:
    model = block()
    optimizer = still(model)
    ColinearityDecay(
        model, strength=1.0, pairs=block_pairs(), schedule=lambda step: float("nan")
    ).attach(optimizer)
    with pytest.raises(QuietvitError, match=r"schedule\(0\) returned nan"):
        optimizer.step()


def test_frozen_and_foreign_parameters_are_left_alone_and_their_partner_moves() -> None:
    model = block()
    optimizer = still(model)
    model.fc1.weight.requires_grad_(False)
    optimizer.param_groups[0]["params"] = [
        p for p in optimizer.param_groups[0]["params"] if p is not model.proj.weight
    ]
    decay = ColinearityDecay(model, strength=1.0, pairs=block_pairs(norms=False))
    with pytest.warns(UserWarning, match=r"1 of 4 .*in no group .*first: proj.weight"):
        decay.attach(optimizer)
    before, wanted = weights(model), expected(model, block_pairs(norms=False), lambda *_: 0.01)
    optimizer.step()
    after = weights(model)
    for name in ("fc1.weight", "proj.weight"):
        assert torch.equal(after[name], before[name])
    for name in ("fc2.weight", "qkv.weight"):
        assert torch.allclose(after[name], wanted[name], rtol=1e-13)
        assert not torch.equal(after[name], before[name])


def test_tied_parameter_moves_once_by_the_sum() -> None:
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(3))).double()
    model[2].weight = model[0].weight
    pairs = [
        MatrixPair(WeightView("0"), WeightView("1"), "mlp"),
        MatrixPair(WeightView("1"), WeightView("2"), "mlp"),
    ]
    W, V = model[0].weight.detach().clone(), model[1].weight.detach().clone()
    first_W, first_V = Energy().directions(W[None], V[None])
    second_V, second_W = Energy().directions(V[None], W[None])
    optimizer = still(model)
    ColinearityDecay(model, strength=1.0, pairs=pairs).attach(optimizer)
    optimizer.step()
    assert torch.allclose(model[0].weight, W - 0.01 * (first_W + second_W)[0], rtol=1e-13)
    assert torch.allclose(model[1].weight, V - 0.01 * (first_V + second_V)[0], rtol=1e-13)
    assert model[2].weight is model[0].weight


@pytest.mark.filterwarnings("ignore:learning rate x strength")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_low_precision_weights_are_computed_in_float32_and_rounded_once(
    dtype: torch.dtype, penalty: str
) -> None:
    low, high = block(dtype), block(dtype).float()
    for model in (low, high):
        optimizer = still(model)
        ColinearityDecay(model, strength=20.0, penalty=penalty, pairs=block_pairs()).attach(
            optimizer
        )
        optimizer.step()
    for one, other in zip(low.parameters(), high.parameters(), strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other.to(dtype))


def test_batched_is_pair_by_pair() -> None:
    together, alone = block(), block()
    optimizer = still(together)
    ColinearityDecay(together, strength=1.0, pairs=block_pairs(norms=False)).attach(optimizer)
    optimizer.step()
    optimizer = still(alone)
    for pair in block_pairs(norms=False):
        ColinearityDecay(alone, strength=1.0, pairs=[pair]).attach(optimizer)
    optimizer.step()
    assert_equal(weights(together), weights(alone), 1e-14)


def test_gradient_accumulation_decays_once_per_optimizer_step() -> None:
    model = block()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    decay = ColinearityDecay(model, strength=1.0, pairs=block_pairs()).attach(optimizer)
    for _ in range(2):
        for _ in range(9):
            model(images()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert decay.steps == 2


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_grad_scaler_skips_decays_nothing(fused: bool) -> None:
    model = block(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused, weight_decay=0.0)
    decay = ColinearityDecay(model, strength=1.0, pairs=block_pairs()).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for bad in (False, True, True, True, True, False):
        before = weights(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(images(torch.float32)).square().mean()
        scaler.scale(loss * (float("inf") if bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert bad == all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert decay.steps == 2


def test_autocast_around_the_step_does_not_lower_the_precision() -> None:
    one, other = block(torch.float32), block(torch.float32)
    for model, enabled in ((one, True), (other, False)):
        optimizer = still(model)
        ColinearityDecay(model, strength=1.0, pairs=block_pairs()).attach(optimizer)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            optimizer.step()
    assert_equal(weights(one), weights(other))


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_or_infinity_names_the_pair_and_changes_no_weight(penalty: str, value: float) -> None:
    model = block()
    optimizer = still(model)
    ColinearityDecay(model, strength=1.0, penalty=penalty, pairs=block_pairs()).attach(optimizer)
    with torch.no_grad():
        model.proj.weight[2, 5] = value
    before = weights(model)
    with pytest.raises(QuietvitError, match=r"qkv.weight -> proj.weight head 1: 1 values") as error:
        optimizer.step()
    assert "no weight was changed" in str(error.value)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num())


def test_overflow_is_named_too() -> None:
    model = block(torch.float32)
    optimizer = still(model)
    ColinearityDecay(model, strength=1.0, pairs=block_pairs(norms=False)).attach(optimizer)
    with torch.no_grad():
        model.fc1.weight.mul_(1e30)
    before = weights(model)
    with pytest.raises(QuietvitError, match=r"mlp: fc1.weight -> fc2.weight: .* overflows"):
        optimizer.step()
    assert_equal(weights(model), before)


def test_lookahead_is_unwrapped() -> None:
    model = block()
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = Lookahead(inner, k=2)
    decay = ColinearityDecay(model, strength=1.0, pairs=block_pairs()).attach(optimizer)
    for _ in range(4):
        model(images()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert decay.steps == 4


def test_accelerate_is_unwrapped() -> None:
    from accelerate import Accelerator

    model = block(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    decay = ColinearityDecay(model, strength=1.0, pairs=block_pairs()).attach(optimizer)
    for _ in range(6):
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(images(torch.float32)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    assert decay.steps == 3


class Stranger:
    """Holds parameters and steps, and calls no hooks."""

    def __init__(self, parameters: Any, lr: float = 0.01) -> None:
        self.param_groups = [{"params": list(parameters), "lr": lr}]

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=group["lr"])


def test_an_optimizer_without_hooks_is_refused_and_explicit_steps_work() -> None:
    model = block()
    optimizer: Any = Stranger(model.parameters())
    decay = ColinearityDecay(model, strength=1.0, pairs=block_pairs())
    with pytest.raises(QuietvitError, match="Stranger does not call step hooks"):
        decay.attach(optimizer)
    with pytest.raises(QuietvitError, match="does not know the learning rate"):
        decay.step()
    wanted = expected(model, block_pairs(), lambda *_: 0.01)
    decay.step(optimizer)
    assert_equal(weights(model), wanted, 1e-14)


@pytest.mark.parametrize("given", [True, False])
def test_a_step_by_hand_beside_the_hooks_is_refused(given: bool) -> None:
    model = block()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    decay = ColinearityDecay(model, strength=1.0, pairs=block_pairs()).attach(optimizer)
    before = weights(model)
    with pytest.raises(QuietvitError, match="acts at each of its steps"):
        decay.step(optimizer) if given else decay.step()
    assert_equal(weights(model), before, 0)
    decay.detach()
    decay.step(optimizer)
    assert decay.steps == 1


def test_weights_below_float32_are_told_of() -> None:
    model = block().to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    decay = ColinearityDecay(model, strength=1.0, pairs=block_pairs())
    with pytest.warns(UserWarning, match=r"are torch.bfloat16 \(first: .*below about 0.0039"):
        decay.attach(optimizer)


def test_steps_that_pass_without_a_call_raise() -> None:
    model = block()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    decay = ColinearityDecay(model, strength=1.0, pairs=block_pairs()).attach(optimizer)
    other = torch.optim.AdamW(model.parameters(), lr=0.01)

    def train(steps: int) -> None:
        for _ in range(steps):
            model(images()).square().mean().backward()
            other.step()
            other.zero_grad()

    train(3)
    with pytest.raises(QuietvitError, match="changed 3 times between backward passes"):
        train(1)
    decay.detach()
    decay.attach(other)
    train(5)
    assert decay.steps == 5


def test_weights_loaded_between_steps_do_not_count_as_missed_steps() -> None:
    model = block()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ColinearityDecay(model, strength=1.0, pairs=block_pairs()).attach(optimizer)
    for _ in range(5):
        model.load_state_dict(block().state_dict())
        model(images()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_lbfgs_whose_closure_runs_many_times_is_one_step() -> None:
    model = block()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=8)
    decay = ColinearityDecay(model, strength=1.0, pairs=block_pairs()).attach(optimizer)
    x = images()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert decay.steps == 3


def test_copies_of_the_model_are_free_of_the_attachment() -> None:
    model = block()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ColinearityDecay(model, strength=1.0, pairs=block_pairs()).attach(optimizer)
    twin = copy.deepcopy(model)
    alone = torch.optim.SGD(twin.parameters(), lr=0.01)
    for _ in range(6):
        twin(images()).square().mean().backward()
        alone.step()


def test_assigned_weights_ask_for_a_new_optimizer() -> None:
    model = block()
    optimizer = still(model)
    decay = ColinearityDecay(model, strength=1.0, pairs=block_pairs()).attach(optimizer)
    optimizer.step()
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(QuietvitError, match="was in the optimizer when ColinearityDecay"):
        optimizer.step()
    decay.detach()
    wanted = expected(model, block_pairs(), lambda *_: 0.01)
    optimizer = still(model)
    decay.attach(optimizer)
    optimizer.step()
    assert_equal(weights(model), wanted, 1e-14)


def test_optimizer_state_may_be_loaded() -> None:
    model = block()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    decay = ColinearityDecay(model, strength=1.0, pairs=block_pairs()).attach(optimizer)
    model(images()).square().mean().backward()
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    assert decay.steps == 2


def test_attaching_twice_or_to_nothing_is_refused_and_detach_stops() -> None:
    model = block()
    optimizer = still(model)
    decay = ColinearityDecay(model, strength=1.0, pairs=block_pairs())
    with pytest.raises(QuietvitError, match="none of the 6 parameters"):
        decay.attach(torch.optim.SGD(block().parameters(), lr=0.1))
    decay.attach(optimizer)
    with pytest.raises(QuietvitError, match="already attached"):
        decay.attach(optimizer)
    decay.detach()
    before = weights(model)
    optimizer.step()
    assert_equal(weights(model), before)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(penalty: str) -> None:
    rule = Top(count=2, refresh=4) if penalty == "top" else penalty

    def made(model: Block) -> tuple[torch.optim.Optimizer, ColinearityDecay]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        decay = ColinearityDecay(
            model, strength=1.0, penalty=rule, every=2, pairs=block_pairs()
        ).attach(optimizer)
        return optimizer, decay

    def train(model: Block, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            model(images()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole = block()
    optimizer, _ = made(whole)
    train(whole, optimizer, range(12))
    part = block()
    optimizer, decay = made(part)
    train(part, optimizer, range(5))
    saved = copy.deepcopy((part.state_dict(), optimizer.state_dict(), decay.state_dict()))
    resumed = block()
    resumed.load_state_dict(saved[0])
    optimizer, decay = made(resumed)
    optimizer.load_state_dict(saved[1])
    decay.load_state_dict(saved[2])
    train(resumed, optimizer, range(5, 12))
    assert_equal(weights(resumed), weights(whole))
    assert decay.steps == 12


def test_state_of_other_settings_is_refused() -> None:
    model = block()
    state = ColinearityDecay(model, strength=1.0, pairs=block_pairs()).state_dict()
    for other, key in (
        ({"penalty": "peak"}, "penalty"),
        ({"kinds": ("mlp",)}, "kinds"),
        ({"strength": 2.0}, "strength"),
        ({"every": 2}, "every"),
    ):
        options: dict[str, Any] = {"strength": 1.0, "pairs": block_pairs()} | other
        with pytest.raises(QuietvitError, match=f"saved with {key}="):
            ColinearityDecay(model, **options).load_state_dict(state)
    with pytest.raises(QuietvitError, match="no state of a ColinearityDecay"):
        ColinearityDecay(model, strength=1.0, pairs=block_pairs()).load_state_dict({"a": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1.0}, "strength=-1.0"),
        ({"strength": float("nan")}, "strength=nan"),
        ({"strength": {"mlp": -2.0}}, "strength=-2.0 for mlp"),
        ({"strength": "much"}, "strength='much'"),
        ({"penalty": "enery"}, "did you mean 'energy'"),
        ({"every": 0}, "every=0"),
        ({"every": 1.5}, "every=1.5"),
        ({"schedule": 3}, "schedule=3"),
        ({"pairs": []}, "no pairs"),
        ({"pairs": None}, "needs an example"),
        ({"kinds": "mlp"}, "kinds='mlp'"),
        ({"kinds": ("mpl",)}, "did you mean 'mlp'"),
        ({"strength": {"mlp": 0.0}}, "no kind is left"),
        ({"strength": {"mlp": 0.0, "norm_linear": 1.0}, "kinds": ("mlp",)}, "no kind is left"),
        ({"kinds": ()}, "no kind is left"),
        ({"strength": {"mlp": 1.0}, "kinds": ("norm_linear",)}, "has no strength"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"strength": 1.0, "pairs": block_pairs()} | options
    with pytest.raises(QuietvitError, match=message):
        ColinearityDecay(block(), **given)


def test_penalty_is_the_sum_of_the_pairs_and_falls() -> None:
    model = block()
    optimizer = still(model)
    decay = ColinearityDecay(model, strength=1.0, pairs=block_pairs()).attach(optimizer)
    each = decay.penalties()
    assert set(each) == {pair.name for pair in block_pairs()}
    assert decay.penalty() == pytest.approx(sum(each.values()))
    A, B = (model.fc1.weight.detach(), model.fc2.weight.detach())
    assert each[block_pairs()[0].name] == pytest.approx(float(Energy().penalty(A[None], B[None])))
    optimizer.step()
    assert decay.penalty() < sum(each.values())


def test_norm_gain_decay_is_its_formula_and_moves_each_gain_once() -> None:
    model = block()
    g = model.norm2.weight.detach().clone()
    others = {n: p for n, p in weights(model).items() if not n.startswith("norm")}
    pairs = block_pairs()
    pairs.append(MatrixPair(WeightView("norm2", diagonal=True), WeightView("qkv"), "norm_linear"))
    optimizer = still(model)
    decay = NormGainDecay(model, strength=3.0, pairs=pairs).attach(optimizer)
    before = decay.penalty()
    optimizer.step()
    wanted = g * (1 - 0.01 * 3.0 * g**2 / (g**2).mean())
    assert torch.allclose(model.norm2.weight, wanted, rtol=1e-13)
    for name, value in others.items():
        assert torch.equal(value, model.get_parameter(name))
    assert decay.penalty() < before


def test_norm_gain_decay_never_flips_and_refuses_nan_and_pairs_without_gains() -> None:
    model = block()
    sign = model.norm1.weight.detach().sign()
    optimizer = still(model)
    NormGainDecay(model, strength=1e9, pairs=block_pairs()).attach(optimizer)
    optimizer.step()
    assert (model.norm1.weight * sign >= 0).all()
    with torch.no_grad():
        model.norm1.weight.fill_(0.0)
        model.norm2.weight.fill_(1.0)
        model.norm2.weight[0] = float("nan")
    with pytest.raises(QuietvitError, match=r"^norm2\.weight: 1 of its values are NaN"):
        optimizer.step()
    assert (model.norm1.weight == 0).all()
    assert (model.norm2.weight[1:] == 1).all()
    with pytest.raises(QuietvitError, match="there is no gain to decay"):
        NormGainDecay(model, strength=1.0, pairs=block_pairs(norms=False))
