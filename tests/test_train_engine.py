"""Regularizers of a recipe in the loop, schedules in epochs, compilation, the dry run."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from quietvit.data import evaluation_transform
from quietvit.decay import TWEO, ColinearityDecay, NormGainDecay, StrengthSchedule
from quietvit.errors import QuietvitError
from quietvit.tasks import classification
from quietvit.train import estimate
from quietvit.train.checkpoint import load_checkpoint, save_checkpoint
from quietvit.train.config import Rates
from quietvit.train.engine import make_accelerator
from quietvit.train.prepare import _scheduler
from quietvit.train.setup import build, drawn_images, task_of
from quietvit.train.step import forward_backward
from test_cli import run as command
from test_train_loop import EVERYTHING, MODEL, assert_same, config, interrupt, lines, run

REGULARIZERS = {
    "cd": {"strength": 3.0, "schedule": {"shape": "cosine", "warmup_epochs": 0.5}},
    "norm_gains": {"strength": 1.0},
    "weight": {"strength": 0.5, "schedule": {"start_epoch": 1.0}},
    "s2d": {"images": 4, "refresh": 3, "threshold": 0.1, "strength": 0.01},
    "kure": {"strength": 0.1},
    "tweo": {"strength": 0.1, "threshold": 0.5},
    "watch_every": 2,
}
ON_WEIGHTS = ("cd", "norm_gains", "weight", "s2d", "kure")


@pytest.mark.parametrize("at", [5, 9])
def test_with_every_regularizer_a_run_resumes_bit_for_bit(tmp_path, monkeypatch, at):
    changes = {**EVERYTHING, "decay": REGULARIZERS}
    expected = run(tmp_path / "whole", **changes)
    interrupt(tmp_path / "run", monkeypatch, at, **changes)
    assert_same(run(tmp_path / "run", resume=True, **changes), expected)
    logged = [json.loads(t) for t in (expected.output / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in logged if "loss" in line]
    for name in ("cd", "norm_gains", "weight", "s2d", "kure", "tweo"):
        assert all(line[f"penalty_{name}"] >= 0 for line in logged)
    seen = [line["step"] for line in logged if "worst_pair" in line]
    assert seen == list(range(2, 15, 2))
    assert all(line["largest_activation"] > 0 for line in logged if line["step"] in seen)
    again = [json.loads(t) for t in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    kept = ("worst_amplification", "worst_pair", "largest_activation", "largest_block")
    assert [[line.get(key) for key in kept] for line in again] == [
        [line.get(key) for key in kept]
        for line in map(json.loads, (expected.output / "metrics.jsonl").read_text().splitlines())
    ]


@pytest.mark.parametrize("name", ["cd", "norm_gains", "weight", "s2d", "kure", "tweo"])
def test_each_regularizer_changes_the_weights_and_watching_does_not(tmp_path, name):
    section = {key: v for key, v in REGULARIZERS[name].items() if key != "schedule"}
    plain = run(tmp_path / "plain", epochs=1, decay={"watch_every": 0})
    watched = run(tmp_path / "watched", epochs=1, decay={"watch_every": 1})
    assert_same(watched, plain)
    regularized = run(tmp_path / "own", epochs=1, decay={name: section})
    one, other = load_file(plain.weights), load_file(regularized.weights)
    assert any(not torch.equal(one[key], other[key]) for key in one)
    assert regularized.decay_seconds > 0


def test_schedules_in_epochs_are_steps_of_the_strength(tmp_path):
    decay = {
        "cd": {
            "strength": {"mlp": 1.0, "value_output": 2.0},
            "schedule": {
                "mlp": {"shape": "linear", "start_epoch": 0.5, "warmup_epochs": 1, "final": 0.1},
                "value_output": {"warmup_epochs": 0.3},
            },
        },
        "norm_gains": {"schedule": {"shape": "cosine"}},
    }
    parts = build(config(tmp_path, epochs=4, decay=decay)).training
    assert list(parts.optim.regularizers) == ["cd", "norm_gains"]
    assert parts.steps_per_epoch == 7
    assert parts.optim.regularizers["cd"].schedule == {
        "mlp": StrengthSchedule("linear", start=4, warmup=7, total=28, final=0.1),
        "value_output": StrengthSchedule(warmup=2),
    }
    assert parts.optim.regularizers["norm_gains"].schedule == StrengthSchedule("cosine", total=28)


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        ({"start_epoch": 2}, r"start_epoch \(2\) must be below epochs \(2\)"),
        ({"shape": "cosine", "start_epoch": 1, "warmup_epochs": 1}, "has no way down"),
    ],
)
def test_a_strength_that_would_act_after_the_end_is_refused(tmp_path, schedule, told):
    with pytest.raises(QuietvitError, match=rf"decay\.cd\.schedule: .*{told}"):
        config(tmp_path, decay={"cd": {"schedule": schedule}})
    each = {"mlp": {}, "value_output": schedule}
    with pytest.raises(QuietvitError, match=rf"decay\.cd\.schedule\.value_output: .*{told}"):
        config(tmp_path, decay={"cd": {"schedule": each}})
    config(tmp_path, decay={"cd": {"schedule": schedule}}, epochs=3)


def test_regularizers_act_in_the_order_of_the_configuration(tmp_path):
    turned = dict(reversed(list(REGULARIZERS.items())))
    parts = build(config(tmp_path, decay=turned)).training
    assert list(parts.optim.regularizers) == ["cd", "norm_gains", "weight", "s2d", "kure", "tweo"]


def test_every_regularizer_of_weights_may_act_every_few_steps(tmp_path):
    decay = {
        name: {**section, "every": 3}
        for name, section in REGULARIZERS.items()
        if name in ON_WEIGHTS
    }
    parts = build(config(tmp_path, decay=decay)).training
    assert {name: part.every for name, part in parts.optim.regularizers.items()} == dict.fromkeys(
        ON_WEIGHTS, 3
    )
    with pytest.raises(QuietvitError, match=r"there is no key 'decay\.tweo\.every'"):
        config(tmp_path, decay={"tweo": {"every": 3}})
    with pytest.raises(QuietvitError, match=r"decay\.kure\.every: .*greater than or equal to 1"):
        config(tmp_path, decay={"kure": {"every": 0}})


def test_gains_are_folded_and_products_taken_as_configured(tmp_path):
    def made(**cd):
        return build(config(tmp_path, decay={"cd": cd})).training.optim.regularizers["cd"]

    assert made().products == "auto"
    assert not any(pair.before for pair in made().pairs)
    folded = made(fold_gains=True, products="float32", strength={"mlp": 1.0, "gated_mlp": 2.0})
    assert folded.products == "float32"
    assert folded.pairs
    assert all(pair.before is not None for pair in folded.pairs)
    with pytest.raises(QuietvitError, match=r"decay\.cd\.products: .*'bfloat16'.*given: 'half'"):
        config(tmp_path, decay={"cd": {"products": "half"}})


def test_a_run_begun_before_a_key_existed_resumes_exactly(tmp_path, monkeypatch):
    changes = {**EVERYTHING, "decay": REGULARIZERS}
    expected = run(tmp_path / "whole", **changes)
    interrupt(tmp_path / "run", monkeypatch, 5, **changes)
    path = tmp_path / "run" / "config.json"
    content = json.loads(path.read_text())
    for name in ON_WEIGHTS:
        if name != "cd":
            del content["decay"][name]["every"]
    del content["decay"]["cd"]["fold_gains"], content["decay"]["cd"]["products"]
    path.write_text(json.dumps(content))
    folder = tmp_path / "run" / "checkpoints"
    state = load_checkpoint(folder)
    del state["bad_images"]
    save_checkpoint(folder, state["step"], state, keep=1)
    assert_same(run(tmp_path / "run", resume=True, **changes), expected)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_the_log_tells_how_many_layers_s2d_acts_on(tmp_path, caplog, threshold):
    decay = {"s2d": {"images": 4, "threshold": threshold}}
    result = run(tmp_path / "run", epochs=1, decay=decay)
    logged = [json.loads(t) for t in (result.output / "metrics.jsonl").read_text().splitlines()]
    counts = {line["layers_s2d"] for line in logged if "loss" in line}
    assert counts == ({0} if threshold else {8})
    assert ("SpectralDecay selects none of its 8 layers" in caplog.text) == bool(threshold)


def test_more_images_for_s2d_than_there_are_are_refused(tmp_path):
    with pytest.raises(QuietvitError, match=r"needs 100 images .*decay\.s2d\.images.* has 60"):
        run(tmp_path / "run", decay={"s2d": {"images": 100}})


def test_layer_decay_scales_the_schedule_of_each_group(tmp_path):
    parts = build(config(tmp_path, optimizer={"lr": 1e-2, "layer_decay": 0.5})).training
    parts.optim.scheduler.step_update(3)
    rates = {group["lr_scale"]: group["lr"] for group in parts.optim.inner.param_groups}
    assert len(rates) > 2
    for scale, rate in rates.items():
        assert rate == pytest.approx(scale * rates[1.0])
    result = run(tmp_path / "run", optimizer={"lr": 1e-2, "layer_decay": 0.5}, epochs=1)
    assert lines(result.output)[0]["lr"] == 1e-2


def test_one_step_after_the_warm_up_has_the_full_rate_without_a_warning(tmp_path, caplog):
    made = config(tmp_path, epochs=2, schedule={"warmup_epochs": 1, "warmup_lr": 1e-4})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    scheduler = _scheduler(made, Rates(1e-2, 1e-4, 1e-5), optimizer, steps_per_epoch=1)
    found = []
    for step in range(2):
        scheduler.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx([1e-4, 1e-2])
    assert not caplog.records


def test_milestones_are_those_of_torchs_multi_step_schedule(tmp_path):
    """The rate depends on the step alone, so a resumed run has the rates of the whole one."""
    schedule = {"warmup_epochs": 0.5, "warmup_lr": 1e-4, "milestones": [2, 3.5], "gamma": 0.2}
    optimizer = {"lr": 1e-2, "layer_decay": 0.5}
    made = config(tmp_path, epochs=4, schedule=schedule, optimizer=optimizer)
    parts = build(made).training
    per_epoch, found = parts.steps_per_epoch, []
    for step in range(parts.total_steps):
        parts.optim.scheduler.step_update(step)
        found.append(max(group["lr"] for group in parts.optim.inner.param_groups))
    warm, drops = round(0.5 * per_epoch), [2 * per_epoch, round(3.5 * per_epoch)]
    reference = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    torchs = torch.optim.lr_scheduler.MultiStepLR(reference, drops, gamma=0.2)
    expected = []
    for step in range(parts.total_steps):
        rate = torchs.get_last_lr()[0]
        expected.append(1e-4 + (1e-2 - 1e-4) * step / warm if step < warm else rate)
        reference.step()
        torchs.step()
    assert found == pytest.approx(expected)
    parts.optim.scheduler.step_update(drops[0])
    for group in parts.optim.inner.param_groups:
        assert group["lr"] == pytest.approx(2e-3 * group["lr_scale"])


def test_frozen_blocks_stay_as_they_are(tmp_path):
    model = {**MODEL, "freeze_blocks": 1}
    start = build(config(tmp_path / "a", model=model)).training.models.plain.state_dict()
    result = run(tmp_path / "b", model=model, epochs=1, decay={"cd": {"strength": 10.0}})
    end = load_file(result.weights)
    same = {key for key in end if torch.equal(start[key], end[key])}
    assert {key for key in end if key.startswith("blocks.0.")} <= same
    assert not any(key.startswith("blocks.1.") for key in same)


def test_a_linear_probe_wants_no_decay_of_pairs_and_is_told(tmp_path):
    model = {**MODEL, "freeze_blocks": 2}
    with pytest.raises(QuietvitError, match=r"frozen .* Unfreeze some, or remove .*cd=none"):
        build(config(tmp_path, model=model, decay={"cd": {}}))
    parts = build(config(tmp_path, model=model, decay={"cd": None})).training
    assert {name for name, p in parts.models.plain.named_parameters() if p.requires_grad} == {
        f"{layer}.{part}" for layer in ("norm", "head") for part in ("weight", "bias")
    }


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_plain_one_and_is_saved_by_plain_names(
    tmp_path, monkeypatch
):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="aot_eager"))
    changes = {
        "epochs": 1,
        "ema": {"decay": 0.9},
        "model": {**MODEL, "kwargs": {**MODEL["kwargs"], "drop_rate": 0.0, "drop_path_rate": 0.0}},
        "decay": {name: REGULARIZERS[name] for name in ("cd", "s2d", "tweo", "watch_every")},
        "optimizer": {"lr": 1e-3, "eps": 1e-4},
    }
    plain = run(tmp_path / "plain", **changes)
    fast = run(tmp_path / "fast", compile=True, **changes)
    one, other = load_file(plain.weights), load_file(fast.weights)
    assert list(one) == list(other)
    assert all(torch.allclose(one[key], other[key], atol=1e-5) for key in one)
    with monkeypatch.context() as patch:
        interrupt(tmp_path / "cut", patch, 5, compile=True, **changes)
    assert_same(run(tmp_path / "cut", resume=True, compile=True, **changes), fast)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler"
)
def test_the_default_compiler_trains_model_and_decay_as_without(tmp_path, monkeypatch):
    import torch._dynamo.utils as dynamo
    import torch._inductor.config as inductor

    compiled, asked = torch.compile, []

    def recorded(what, *args, **given):
        asked.append((type(what).__name__, "backend" in given))
        return compiled(what, *args, **given)

    monkeypatch.setattr(torch, "compile", recorded)
    monkeypatch.setattr(inductor, "compile_threads", 1)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    kwargs = {**MODEL["kwargs"], "depth": 1, "drop_rate": 0.0, "drop_path_rate": 0.0}
    changes = {
        "epochs": 1,
        "data": {"dataset": "embedded:digits", "train_images": 24, "test_images": 20},
        "model": {**MODEL, "kwargs": kwargs},
        "optimizer": {"lr": 1e-3, "eps": 1e-4},
    }
    plain = run(tmp_path / "plain", decay={"cd": {"strength": 3.0}}, **changes)
    without = run(tmp_path / "without", decay={"cd": None}, **changes)
    dynamo.counters.clear()
    cd = {"strength": 3.0, "compile": True}
    fast = run(tmp_path / "fast", compile=True, decay={"cd": cd}, **changes)
    assert ("VisionTransformer", False) in asked
    assert len(set(asked)) == 2, "the model, and a function of the decay"
    assert dynamo.counters["inductor"]
    one, other, bare = (load_file(result.weights) for result in (plain, fast, without))
    assert list(one) == list(other)
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5)
    assert any((bare[key] - value).abs().max() > 1e-4 for key, value in one.items())


def test_an_object_with_logits_is_trained_on(tmp_path, monkeypatch):

    class Outputs:
        def __init__(self, logits):
            self.logits = logits

    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.pretrained_cfg = inner, inner.pretrained_cfg

        def forward(self, images):
            return Outputs(self.inner(images))

    create = classification.create_model
    expected = run(tmp_path / "plain", epochs=1)
    monkeypatch.setattr(classification, "create_model", lambda *a, **k: Wrapped(create(*a, **k)))
    found = run(tmp_path / "run", epochs=1)
    losses = [
        [line["loss"] for line in lines(result.output) if "loss" in line]
        for result in (found, expected)
    ]
    # The wrapper does not pass on which parameters have no weight decay.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_dry_run_measures_and_writes_nothing(tmp_path):
    changes = {**EVERYTHING, "decay": REGULARIZERS, "epochs": 3}
    found = estimate(config(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
    assert found.effective_batch == 8
    assert (found.images, found.steps_per_epoch, found.total_steps) == (60, 7, 21)
    assert found.parameters == found.trainable > 20000
    assert found.memory > 2**20
    assert found.step_seconds > 0
    assert 0 < found.regularizer_share < 100
    assert found.seconds == 21 * found.step_seconds
    every = {**REGULARIZERS, "cd": {"strength": 1.0, "every": 4}}
    assert estimate(config(tmp_path / "run", decay=every)).measured_steps == 4


def test_a_dry_run_counts_each_regularizer_as_often_as_it_acts_in_few_steps(tmp_path, monkeypatch):
    clock, passes = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def takes(owner, name, seconds):
        original = getattr(owner, name)

        def slow(*args, **kwargs):
            clock[0] += seconds
            passes.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, slow)

    takes(sys.modules[estimate.__module__], "forward_backward", 1.0)
    takes(ColinearityDecay, "_write", 10.0)
    takes(NormGainDecay, "_write", 20.0)
    takes(TWEO, "loss", 0.5)
    decay = {
        "cd": {"strength": 1e-3, "every": 1000},
        "norm_gains": {"every": 5},
        "tweo": {"strength": 0.1},
    }
    found = estimate(config(tmp_path / "run", decay=decay))
    own = 10 / 1000 + 20 / 5 + 0.5
    assert found.step_seconds == pytest.approx(1 + own)
    assert found.regularizer_share == pytest.approx(100 * own / (1 + own))
    assert found.seconds == pytest.approx(14 * (1 + own))
    assert {name: passes.count(name) for name in passes} == {
        "forward_backward": found.measured_steps + 2,
        "loss": found.measured_steps + 2,
        "_write": 2 * (found.measured_steps + 2),
    }


@pytest.mark.parametrize("compiled", [False, True])
def test_a_dry_run_of_a_slow_model_measures_few_images_and_scales(tmp_path, monkeypatch, compiled):
    """A pass of 64 images would take 64 s here: four are measured, once, after the first of all."""
    clock, seen = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    module = sys.modules[estimate.__module__]

    def slow(parts, batch, step):
        clock[0] += len(batch[0]) if seen else 1000
        seen.append(len(batch[0]))

    judged = module.judged

    @contextmanager
    def slowly(parts, average=True):
        with judged(parts, average) as model:
            handle = model.register_forward_hook(lambda *_: clock.__setitem__(0, clock[0] + 2 / 3))
            yield model
            handle.remove()

    monkeypatch.setattr(module, "forward_backward", slow)
    monkeypatch.setattr(module, "judged", slowly)
    changes = {"batch_size": 64, "data": {"dataset": "embedded:digits", "num_classes": 10}}
    found = estimate(config(tmp_path / "run", compile=compiled, **changes))
    assert seen == [4 if compiled else 2, 4]
    assert (found.measured_images, found.measured_steps) == (4, 1)
    assert found.step_seconds == pytest.approx(64)
    assert "scaled from 4 images a pass to 64" in str(found)
    assert ", at 4 images a pass; 64 take more" in str(found)


def test_a_dry_run_of_a_slow_model_warms_up_with_a_step_of_one_pass(tmp_path, monkeypatch):
    module, seen = sys.modules[estimate.__module__], []

    def watched(parts, batch, step):
        loss = forward_backward(parts, batch, step)
        counted = {part.steps for part in parts.optim.regularizers.values()}
        seen.append((len(batch[0]), parts.accelerator.sync_gradients, counted))
        return loss

    monkeypatch.setattr(module, "forward_backward", watched)
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    decay = {"cd": {"every": 5}, "norm_gains": {"every": 5}}
    changes = {**EVERYTHING, "accumulation": 3, "batch_size": 8, "decay": decay}
    found = estimate(config(tmp_path / "run", **changes))
    assert seen == [
        (2, True, {5}),
        (2, False, {9}),
        (2, False, {9}),
        (2, True, {10}),
    ]
    assert (found.measured_images, found.measured_steps, found.effective_batch) == (2, 1, 24)


@pytest.mark.parametrize("fast", [True, False])
def test_a_processor_slow_in_bfloat16_is_told_of(tmp_path, monkeypatch, caplog, fast):
    monkeypatch.setattr("quietvit.train.engine.has_fast_bfloat16", lambda _: fast)
    make_accelerator(config(tmp_path, precision="bf16"))
    assert ("set precision to 'no'" in caplog.text) is not fast
    make_accelerator(config(tmp_path))
    assert caplog.text.count("set precision") == (not fast)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_model_that_one_process_keeps_whole_is_told_of(tmp_path, caplog, parallel):
    asked = config(tmp_path / "run", parallel=parallel)
    for tell in (build, estimate):
        caplog.clear()
        tell(asked)
        assert caplog.text.count("the model is not sharded") == (parallel == "fsdp2")


@pytest.mark.parametrize(
    ("full", "precision", "told", "other"),
    [
        ("forward_backward", "no", ["a pass with batch_size 8 ", "'bf16'"], "optimizer"),
        ("forward_backward", "bf16", ["a pass with batch_size 8 "], "'bf16'"),
        ("assemble", "no", ["vit_tiny_patch16_224 with its optimizer"], "batch_size"),
    ],
)
def test_a_dry_run_of_what_does_not_fit_says_so(
    tmp_path, monkeypatch, full, precision, told, other
):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(sys.modules[estimate.__module__], full, out_of_memory)
    with pytest.raises(QuietvitError, match=r"more memory than there is .*'fsdp2'") as caught:
        estimate(config(tmp_path, precision=precision))
    assert all(part in str(caught.value) for part in told)
    assert other not in str(caught.value)
    raises_accumulation = "raise accumulation by the same factor" in str(caught.value)
    assert raises_accumulation == (full == "forward_backward")


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ("imagefolder:{}/none", "does not exist"),
        ("table:{}/none.parquet,{}/none.parquet", "does not exist"),
        ("table:{}/none-*.parquet,{}/bad.parquet", "matches"),
        ("shards:{}/{{00..03}}.tar,{}/04.tar", "does not exist"),
        ("hf:{}/none", "could not be opened"),
    ],
)
def test_a_dry_run_without_the_data_says_so(tmp_path, form, told):
    if form.startswith("hf:"):
        pytest.importorskip("datasets")
    found = estimate(config(tmp_path / "run", data={"dataset": form.format(tmp_path, tmp_path)}))
    assert found.images is found.total_steps is found.seconds is None
    row = next(line for line in str(found).splitlines() if line.startswith("training images"))
    assert row.startswith("training images     not there: ")
    assert told in row


def test_a_dry_run_of_data_that_is_there_and_bad_says_what_is_wrong(tmp_path):
    tables = {
        "is 7, outside 0..4": {"image": [b"", b""], "label": [0, 7]},
        "has no column 'label'": {"image": [b""], "class": [0]},
        "could not be read as a parquet table": None,
    }
    path = tmp_path / "bad.parquet"
    for told, columns in tables.items():
        if columns is None:
            path.write_bytes(path.read_bytes()[:-20])
        else:
            pq.write_table(pa.table(columns), path)
        data = {"dataset": f"table:{path},{path}", "num_classes": 5}
        found = estimate(config(tmp_path / "run", data=data))
        assert found.images is None
        assert told in found.missing
        assert found.missing in str(found)
        assert "not there" not in str(found)
    few = {"dataset": "embedded:digits", "train_images": 5000}
    assert "5000 images were requested, but embedded:digits holds" in str(
        estimate(config(tmp_path, data=few))
    )


@pytest.mark.parametrize("batch", [4, 8, 32])
def test_the_rates_are_for_the_batch_that_they_are_stated_for(tmp_path, caplog, batch):
    changes = {
        "optimizer": {"lr": 1e-2, "lr_batch": 8},
        "schedule": {"warmup_epochs": 1, "warmup_lr": 1e-4, "min_lr": 1e-3},
        "batch_size": batch,
    }
    parts = build(config(tmp_path, **changes)).training
    ratio = batch / 8
    assert ("(optimizer.lr_batch), and steps have" in caplog.text) == (ratio != 1)
    found = []
    for step in (0, parts.steps_per_epoch, parts.total_steps):
        parts.optim.scheduler.step_update(step)
        found.append(parts.optim.inner.param_groups[0]["lr"])
    assert found == pytest.approx([1e-4 * ratio, 1e-2 * ratio, 1e-3 * ratio])
    told = str(estimate(config(tmp_path, **changes)))
    assert f"learning rate       {1e-2 * ratio:g}\n" in told


def test_the_images_for_s2d_are_drawn_from_all_and_bad_ones_replaced(tmp_path, monkeypatch):
    made = config(tmp_path, seed=3, data={**EVERYTHING["data"], "max_bad_images": 30})
    train, _ = task_of(made).open_data()
    model = build(made).training.models.plain
    found = drawn_images(task_of(made), train, model, 12)
    transform = evaluation_transform(model)
    every = torch.stack([transform(train[index][0]) for index in range(len(train))])
    drawn = [int((every == image).flatten(1).all(1).nonzero()[0]) for image in found]
    assert drawn != sorted(drawn)
    assert max(drawn) > 100, "not only the first ones"
    read = type(train).__getitem__

    def damaged(self, index):
        if index in drawn[:2]:
            raise QuietvitError(f"image {index} is damaged")
        return read(self, index)

    monkeypatch.setattr(type(train), "__getitem__", damaged)
    assert torch.equal(drawn_images(task_of(made), train, model, 12)[2:], found[2:])
    strict = config(tmp_path, seed=3)
    with pytest.raises(QuietvitError, match="is damaged"):
        drawn_images(task_of(strict), train, model, 12)


def test_a_step_that_a_gradient_scaler_skips_changes_nothing_and_the_scale_is_resumed(
    tmp_path, monkeypatch
):
    """fp16 needs a GPU, its scaler does not: the first scaled loss overflows float32."""
    import quietvit.train.setup as setup

    made = setup.make_accelerator

    def with_scaler(given):
        accelerator = made(given)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=4)
        return accelerator

    monkeypatch.setattr(setup, "make_accelerator", with_scaler)
    decay = {"cd": {"strength": 3.0}, "s2d": REGULARIZERS["s2d"], "kure": {"strength": 0.1}}
    changes = {"decay": decay, "epochs": 1, "optimizer": {"lr": 1e-2, "clip_grad": 1.0}}
    parts = build(config(tmp_path, **changes)).training
    batch = torch.randn(8, 3, 16, 16), torch.arange(8)
    before = {key: value.clone() for key, value in parts.models.plain.state_dict().items()}
    forward_backward(parts, batch, 1)
    assert parts.optim.wrapped.step_was_skipped
    assert all(
        torch.equal(value, before[key]) for key, value in parts.models.plain.state_dict().items()
    )
    assert [part.steps for part in parts.optim.regularizers.values()] == [0, 0, 0]
    while parts.optim.wrapped.step_was_skipped:
        forward_backward(parts, batch, 1)
    assert [part.steps for part in parts.optim.regularizers.values()] == [1, 1, 1]
    moved = parts.models.plain.state_dict()
    assert any(not torch.equal(value, before[key]) for key, value in moved.items())
    whole = run(tmp_path / "whole", **changes)
    interrupt(tmp_path / "cut", monkeypatch, 5, **changes)
    assert_same(run(tmp_path / "cut", resume=True, **changes), whole)


def test_the_command_prints_the_dry_run_and_else_writes_where_the_recipe_says(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(config(tmp_path / "run").model_dump_json())
    told = command("train", "--recipe", path, "--dry-run")
    assert told.exit_code == 0
    assert "effective batch     8\n" in told.output
    assert "of it regularizers" in told.output
    assert sorted(tmp_path.iterdir()) == [path]
    ran = command("train", "--recipe", path, "-s", "epochs=1")
    assert ran.exit_code == 0, ran.output
    assert (tmp_path / "run" / "result.json").exists()
    ran = command("train", "--recipe", path, "-s", "epochs=1", "--output", tmp_path / "other")
    assert ran.exit_code == 0, ran.output
    assert (tmp_path / "other" / "result.json").exists()


def test_the_command_takes_another_model_than_the_recipes(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(config(tmp_path / "run").model_dump_json())
    refused = command("train", "--recipe", path, "--model", "vit_tny_patch16_224", "--dry-run")
    assert refused.exit_code == 2
    assert "vit_tiny_patch16_224" in refused.stderr
