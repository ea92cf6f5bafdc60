from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from quietvit.data import (
    create_model,
    evaluate,
    evaluation_loader,
    evaluation_transform,
    load_dataset,
    subset,
)
from quietvit.errors import QuietvitError
from quietvit.train import TrainResult, checkpoint, loop, metrics, train
from quietvit.train.recipe import parse_config
from quietvit.train.setup import build

MODEL = {
    "name": "vit_tiny_patch16_224",
    "kwargs": {
        "img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2,
        "drop_rate": 0.1, "drop_path_rate": 0.1,
    },
    "preprocessing": {"crop_pct": 1.0},
}  # fmt: skip


def config(output, **changes):
    content = {
        "model": MODEL,
        "data": {"dataset": "embedded:digits", "train_images": 60, "test_images": 20},
        "epochs": 2,
        "batch_size": 8,
        "log_every": 1,
        "tensorboard": False,
        "device": "cpu",
        "threads": 1,
        "checkpoint": {"every": 2, "keep": 2},
        "output": str(output),
        **changes,
    }
    return parse_config(content)


def run(output, resume=False, force=False, discard=False, **changes):
    given = {"resume": resume, "force": force, "discard": discard, "progress": False}
    return train(config(output, **changes), **given)


def lines(output):
    kept = ("step", "loss", "lr", "top1", "epoch", "penalty_cd")
    found = [json.loads(text) for text in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in kept if key in line} for line in found]


class StoppedError(Exception):
    pass


def interrupt(output, monkeypatch, at, resume=False, **changes):
    """Stop a run right after optimizer step ``at`` is counted, wherever that falls."""
    after_step = loop._Loop._after_step

    def stop(self, images):
        if self.step == at:
            raise StoppedError
        return after_step(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_after_step", stop)
        with pytest.raises(StoppedError):
            run(output, resume=resume, **changes)


EVERYTHING = {
    "accumulation": 2,
    "batch_size": 4,
    "ema": {"decay": 0.9},
    "mix": {"mixup": 0.8, "cutmix": 1.0},
    "label_smoothing": 0.1,
    "decay": {"cd": {"strength": 3.0}, "norm_gains": {"strength": 1.0}},
    "optimizer": {"lr": 3e-3, "clip_grad": 1.0},
    "schedule": {"warmup_epochs": 0.5},
    "data": {
        "dataset": "embedded:digits",
        "train_images": 60,
        "test_images": 20,
        "augmentation": {"auto_augment": "rand-m5-mstd0.5-inc1", "erasing": 0.3},
    },
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Undisturbed runs, by their changes."""
    made = {}

    def get(**changes):
        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            made[key] = run(tmp_path_factory.mktemp("whole"), **changes)
        return made[key]

    return get


def assert_same(result, expected):
    one, other = load_file(result.weights), load_file(expected.weights)
    assert list(one) == list(other)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert result.score == expected.score
    assert lines(result.output) == lines(expected.output)


@pytest.mark.parametrize("at", [1, 3, 7, 9, 13])
def test_an_interrupted_run_resumes_to_the_same_weights_bit_for_bit(
    tmp_path, monkeypatch, whole, at
):
    interrupt(tmp_path / "run", monkeypatch, at, **EVERYTHING)
    assert_same(run(tmp_path / "run", resume=True, **EVERYTHING), whole(**EVERYTHING))


def test_a_run_resumes_from_a_checkpoint_at_the_end_of_an_epoch(tmp_path, monkeypatch, whole):
    changes = {**EVERYTHING, "evaluate_every": 1}
    expected = whole(**changes)
    changes |= {"checkpoint": {"every": 7}}
    interrupt(tmp_path / "run", monkeypatch, 9, **changes)
    assert_same(run(tmp_path / "run", resume=True, **changes), expected)


def test_a_run_interrupted_twice_and_with_other_workers_ends_the_same(tmp_path, monkeypatch, whole):
    expected = whole(**EVERYTHING)
    output = tmp_path / "run"
    interrupt(output, monkeypatch, 5, **EVERYTHING, num_workers=2)
    interrupt(output, monkeypatch, 9, resume=True, **EVERYTHING)
    assert_same(run(output, resume=True, **EVERYTHING, num_workers=1), expected)


def test_a_damaged_checkpoint_costs_steps_and_no_exactness(tmp_path, monkeypatch, whole, caplog):
    caplog.set_level(logging.WARNING, "quietvit")
    interrupt(tmp_path / "run", monkeypatch, 7, **EVERYTHING)
    last = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    with (last / "tensors.safetensors").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\x01\x02\x03")
    result = run(tmp_path / "run", resume=True, **EVERYTHING)
    assert "is damaged" in caplog.text
    assert "resuming at step 4 of 14" in caplog.text
    assert_same(result, whole(**EVERYTHING))


SCRIPT = """
import sys
from quietvit.train import load_recipe, train
import quietvit.train.checkpoint as checkpoint
flush = checkpoint.flush
def slow(path):
    print("saving", flush=True)
    import time; time.sleep(0.2)
    flush(path)
checkpoint.flush = slow
train(load_recipe(sys.argv[1]), resume=True, progress=False)
"""


@pytest.mark.slow
def test_a_process_killed_in_the_middle_of_a_checkpoint_resumes_exactly(tmp_path, whole):
    output = tmp_path / "run"
    path = tmp_path / "config.json"
    path.write_text(config(output, **EVERYTHING).model_dump_json())
    for kills_after in (5, 11):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(kills_after):
            assert process.stdout.readline() == "saving\n"
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
    assert list((output / "checkpoints").glob(".step-*.partial"))
    assert_same(run(output, resume=True, **EVERYTHING), whole(**EVERYTHING))


def test_a_finished_run_is_returned_and_not_run_again(tmp_path, caplog):
    first = run(tmp_path / "run", epochs=1)
    caplog.set_level(logging.WARNING, "quietvit")
    again = run(tmp_path / "run", resume=True, epochs=1)
    assert "finished already" in caplog.text
    assert again == first


def test_what_is_left_behind_is_whole(tmp_path, monkeypatch):
    result = run(tmp_path / "run", ema={"decay": 0.5}, epochs=2, evaluate_every=1)
    content = json.loads((result.output / "result.json").read_text())
    assert content["seed"] == 0
    assert content["versions"]["torch"] == torch.__version__
    assert {"machine", "command", "train_seconds", "decay_seconds"} <= set(content)
    assert TrainResult.read(result.output) == result
    dataset = subset(load_dataset("embedded:digits", "test"), 20)
    model = result.load_model()
    again = evaluate(model, evaluation_loader(dataset, evaluation_transform(model)))
    assert again == result.top1
    assert [line["epoch"] for line in lines(result.output) if "top1" in line] == [1, 2]
    assert result.top1_without_ema is not None
    assert result.steps == 14


def test_the_time_of_the_decay_is_part_of_the_time_of_the_steps(tmp_path):
    result = run(tmp_path / "run", decay={"cd": {"strength": 1.0}})
    assert 0 < result.decay_seconds < result.train_seconds
    assert 0 < result.decay_overhead < 1000
    assert all(line["penalty_cd"] > 0 for line in lines(result.output) if "loss" in line)


def test_decay_changes_nothing_but_the_weights_it_decays(tmp_path):
    """Same seeds with and without: first loss and order of data are equal."""
    plain = run(tmp_path / "plain", epochs=1)
    zero = run(tmp_path / "zero", epochs=1, decay={"cd": {"strength": 0.0}})
    decayed = run(tmp_path / "decayed", epochs=1, decay={"cd": {"strength": 30.0}})
    assert_same(zero, plain)
    losses = [
        [line["loss"] for line in lines(r.output) if "loss" in line] for r in (plain, decayed)
    ]
    assert losses[0][0] == losses[1][0]
    assert losses[0][-1] != losses[1][-1]


def test_accumulation_equals_the_large_batch(tmp_path):
    quiet = {**MODEL, "kwargs": {**MODEL["kwargs"], "drop_rate": 0.0, "drop_path_rate": 0.0}}
    data = {"dataset": "embedded:digits", "train_images": 32, "test_images": 20}
    shared = {"model": quiet, "data": data, "epochs": 2, "optimizer": {"lr": 1e-3, "eps": 1e-3}}
    large = run(tmp_path / "large", batch_size=16, **shared)
    small = run(tmp_path / "small", batch_size=4, accumulation=4, **shared)
    assert large.steps == small.steps == 4
    one, other = load_file(large.weights), load_file(small.weights)
    for key in one:
        assert torch.allclose(one[key], other[key], atol=1e-6)


def test_warm_up_and_cosine_are_counted_in_optimizer_steps(tmp_path):
    result = run(
        tmp_path / "run",
        epochs=4,
        optimizer={"lr": 1e-3},
        schedule={"warmup_epochs": 1, "warmup_lr": 1e-4, "min_lr": 1e-5},
    )
    rates = [line["lr"] for line in lines(result.output) if "lr" in line]
    warm, total = 7, 28
    expected = [1e-4 + 9e-4 * step / warm for step in range(warm)]
    turns = np.arange(total - warm) / (total - warm)
    expected += list(1e-5 + (1e-3 - 1e-5) * (1 + np.cos(np.pi * turns)) / 2)
    assert rates == pytest.approx(expected)


def test_weight_decay_spares_norms_and_biases_unless_told(tmp_path):
    def shares(**optimizer):
        parts = build(config(tmp_path, optimizer=optimizer)).training
        decayed = {
            id(p)
            for group in parts.optim.inner.param_groups
            if group["weight_decay"] == 0.3
            for p in group["params"]
        }
        return {name for name, p in parts.models.plain.named_parameters() if id(p) in decayed}, {
            name for name, _ in parts.models.plain.named_parameters()
        }

    spared, names = shares(weight_decay=0.3)
    assert spared
    assert not [n for n in spared if "norm" in n or n.endswith("bias")]
    assert shares(weight_decay=0.3, decay_norms_and_biases=True)[0] == names


def test_the_average_follows_the_weights_after_the_decay(tmp_path):
    decay = {"cd": {"strength": 20.0}}
    follows = {"decay": 1e-9, "warmup": False}
    averaged = run(tmp_path / "a", ema=follows, decay=decay, epochs=1)
    plain = run(tmp_path / "b", decay=decay, epochs=1)
    one, other = load_file(averaged.weights), load_file(plain.weights)
    assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)


def test_fine_tuning_starts_from_the_weights_given(tmp_path):
    first = run(tmp_path / "a", epochs=1)
    model = {**MODEL, "weights": str(first.weights)}
    second = run(tmp_path / "b", epochs=1, model=model, optimizer={"lr": 1e-12})
    start, end = load_file(first.weights), load_file(second.weights)
    assert all(torch.allclose(start[key], end[key], atol=1e-6) for key in start)


def test_bf16_trains(tmp_path):
    result = run(tmp_path / "run", epochs=1, precision="bf16", decay={"cd": {"strength": 1.0}})
    assert all(value.dtype == torch.float32 for value in load_file(result.weights).values())
    assert np.isfinite([line["loss"] for line in lines(result.output) if "loss" in line]).all()


def test_tensorboard_gets_the_curves(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(tmp_path / "run", epochs=1, tensorboard=True)
    events = EventAccumulator(str(result.output / "tensorboard"))
    events.Reload()
    expected = [line["loss"] for line in lines(result.output) if "loss" in line]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(expected)


def test_a_folder_in_use_is_refused_and_force_replaces_only_the_runs_own_files(tmp_path):
    output = tmp_path / "run"
    run(output, epochs=1)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(QuietvitError, match="holds a finished run"):
        run(output, epochs=1)
    assert (output / "result.json").exists()
    result = run(output, epochs=1, seed=3, force=True)
    assert json.loads((output / "result.json").read_text())["seed"] == 3
    assert (output / "notes.txt").read_text() == "mine"
    assert result.config.seed == 3


def test_resuming_another_configuration_is_refused(tmp_path, monkeypatch):
    interrupt(tmp_path / "run", monkeypatch, 3)
    with pytest.raises(QuietvitError, match=r"optimizer\.eps was 1e-08 and is 1e-06"):
        run(tmp_path / "run", resume=True, optimizer={"eps": 1e-6})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").write_text("")
    with pytest.raises(QuietvitError, match="not empty"):
        run(tmp_path / "other", resume=True)


def test_a_loss_that_is_no_number_stops_and_names_the_last_checkpoint(tmp_path):
    with pytest.raises(QuietvitError, match=r"the loss became nan .*last checkpoint is .*step-"):
        run(tmp_path / "run", optimizer={"lr": 1e30}, schedule={"warmup_epochs": 1.5}, log_every=3)
    for path in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints"):
        state = checkpoint.load_checkpoint(path.parent)
        assert np.isfinite(state["loss"][0])


def test_too_few_images_and_bad_settings_are_refused_before_training(tmp_path):
    with pytest.raises(QuietvitError, match=r"one step takes 64 images .* has 60"):
        run(tmp_path / "a", batch_size=64)
    with pytest.raises(QuietvitError, match="set precision to 'bf16'"):
        run(tmp_path / "b", precision="fp16", device="cpu")
    with pytest.raises(QuietvitError, match="mlp"):
        run(tmp_path / "c", decay={"cd": {"kinds": ["mpl"]}})


def test_a_model_made_as_configured_is_the_model_trained(tmp_path):
    result = run(tmp_path / "run", epochs=1)
    made = create_model(MODEL["name"], 10, preprocessing={"crop_pct": 1.0}, **MODEL["kwargs"])
    assert {k: v.shape for k, v in made.state_dict().items()} == {
        k: v.shape for k, v in result.load_model().state_dict().items()
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_training_image_stops_the_run_naming_its_row(tmp_path, workers):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    images = [buffer.getvalue()] * 15 + [b"no image"]
    table = pa.table({"image": images, "label": [0, 1] * 8})
    pq.write_table(table, tmp_path / "a.parquet")
    path = tmp_path / "a.parquet"
    with pytest.raises(
        QuietvitError, match=r"^the image at row 15 of table .*a\.parquet could not"
    ):
        run(tmp_path / "run", data={"dataset": f"table:{path},{path}"}, num_workers=workers)


def test_force_removes_nothing_before_the_new_run_is_known_to_be_sound(tmp_path):
    output = tmp_path / "run"
    run(output, epochs=1)
    held = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(QuietvitError, match="does not exist"):
        run(output, force=True, data={"dataset": f"table:{tmp_path / 'no.parquet'}"})
    with pytest.raises(QuietvitError, match="do not exist"):
        run(output, force=True, model={**MODEL, "weights": str(tmp_path / "no.safetensors")})
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == held


def test_the_number_of_classes_can_be_stated(tmp_path):
    with pytest.raises(QuietvitError, match=r"outside 0\.\.4"):
        run(tmp_path / "a", data={"dataset": "embedded:digits", "num_classes": 5})
    with pytest.raises(QuietvitError, match=r"kwargs\.num_classes .*set data\.num_classes"):
        config(tmp_path / "b", model={**MODEL, "kwargs": {"num_classes": 5}})
    wider = build(config(tmp_path / "c", data={"dataset": "embedded:digits", "num_classes": 12}))
    assert wider.training.models.plain.num_classes == wider.test.num_classes == 12


def test_logging_the_penalty_counts_as_time_of_the_decay(tmp_path, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    watch = metrics.Stopwatch()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with watch.around_hooks(optimizer):
        optimizer.register_step_post_hook(lambda *_: next(ticks) and None)
    optimizer.step()
    with watch.running():
        next(ticks)
    assert watch.seconds == 1 + 2 + 2
    watch.unhook()
    optimizer.step()
    assert watch.seconds == 1 + 2 + 2


def test_the_events_of_a_gpu_do_not_pile_up_and_none_is_lost(monkeypatch):
    clock = iter(range(10**6))
    waited = []

    class Event:
        def record(self):
            self.at = next(clock)

        def synchronize(self):
            waited.append(self.at)

        def elapsed_time(self, later):
            return 1000.0 * (later.at - self.at)

    monkeypatch.setattr(metrics, "_event", Event)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    watch = metrics.Stopwatch(seconds=5.0)
    held = []
    for _ in range(1000):
        with watch.running():
            next(clock)
        held.append(len(watch._events))
    assert max(held) == metrics._PENDING
    newest = 3 * 1000 - 1
    assert max(waited) < newest - 3 * (metrics._PENDING - 2), "it waits for what is long done"
    assert watch.seconds == 5.0 + 1000 * 2
    assert watch.seconds == 5.0 + 1000 * 2


def test_an_accuracy_measured_after_the_checkpoint_is_not_told_twice(tmp_path):
    written = [{"step": 3, "top1": 1.0}, {"step": 7, "loss": 2.0}, {"step": 7, "top1": 3.0}]
    text = "".join(f"{json.dumps(line)}\n" for line in [*written, {"step": 8, "loss": 1.0}])
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 9, "lo')
    metrics.Metrics(tmp_path, step=7, tensorboard=False)
    assert lines(tmp_path) == written[:2]
