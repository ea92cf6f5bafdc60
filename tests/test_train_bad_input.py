"""What goes wrong while training: told with place, values and remedy, and nothing saved is lost."""

from __future__ import annotations

import copy
import errno
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from quietvit.data import create_model
from quietvit.decay import worst_amplification
from quietvit.errors import QuietvitError
from quietvit.pairs import find_pairs
from quietvit.tasks import Classification, classification
from quietvit.train import checkpoint, loop, losses, step
from quietvit.train.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from quietvit.train.engine import check_groups, check_optimizer_state
from quietvit.train.setup import build
from quietvit.train.watch import Watch
from test_train_loop import EVERYTHING, MODEL, assert_same, config, interrupt, run


def test_a_diverged_run_names_step_pair_and_last_checkpoint(tmp_path, monkeypatch):
    forward = step.forward_backward

    def diverging(parts, batch, at):
        if at == 5:
            with torch.no_grad():
                parts.models.plain.blocks[1].mlp.fc1.weight.fill_(float("nan"))
        return forward(parts, batch, at)

    monkeypatch.setattr(loop, "forward_backward", diverging)
    with pytest.raises(QuietvitError) as caught:
        run(tmp_path / "run", decay={"watch_every": 2})
    told = str(caught.value)
    assert told.startswith("the loss became nan at step 6.")
    assert "The largest amplification is infinite for " in told
    logged = [
        json.loads(text) for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    last = [line for line in logged if "worst_pair" in line][-1]
    assert last["step"] == 4
    value, pair = last["worst_amplification"], last["worst_pair"]
    assert f"; at step 4 (that of the last checkpoint) it was {value:g}, of {pair}." in told
    path = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert path.name == "step-00000004"
    assert f"The last checkpoint is {path}." in told


@pytest.mark.parametrize("log_every", [3, 5, 100])
def test_the_step_told_is_the_one_that_diverged_not_the_one_that_looked(
    tmp_path, monkeypatch, log_every
):
    """Of 7 steps an epoch, one loss is no number; an evaluation comes after the first epoch."""
    forward = step.forward_backward

    def diverging(parts, batch, at):
        loss = forward(parts, batch, at)
        return loss * float("nan") if at == 3 else loss

    monkeypatch.setattr(loop, "forward_backward", diverging)
    changes = {"log_every": log_every, "evaluate_every": 1, "checkpoint": {"every": 0}}
    with pytest.raises(QuietvitError) as caught:
        run(tmp_path / "run", **changes)
    seen = min(7, -(-4 // log_every) * log_every)
    assert str(caught.value).startswith(
        f"the loss became nan at step 4 (seen at step {seen}). The largest amplification is "
    )


@pytest.mark.parametrize("last", [False, True])
def test_weights_that_are_no_numbers_are_told_before_an_evaluation(tmp_path, monkeypatch, last):
    forward = step.forward_backward

    def spoiling(parts, batch, at):
        loss = forward(parts, batch, at)
        if at == (13 if last else 6):
            with torch.no_grad():
                parts.models.plain.head.bias[0] = float("nan")
        return loss

    monkeypatch.setattr(loop, "forward_backward", spoiling)
    where = f"weights became NaN or infinite at step {14 if last else 7}"
    with pytest.raises(QuietvitError, match=where + r".*largest amplification is"):
        run(tmp_path / "run", evaluate_every=1, checkpoint={"every": 0})


def test_a_loss_that_is_nan_is_told_where_a_regularizer_finds_it_first(tmp_path, monkeypatch):
    forward = step.forward_backward

    def diverging(parts, batch, at):
        if at == 3:
            with torch.no_grad():
                parts.models.plain.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
        return forward(parts, batch, at)

    monkeypatch.setattr(loop, "forward_backward", diverging)
    told = (
        r"^the loss became nan at step 4\. The largest amplification is infinite for .*"
        r"; at step 2 \(that of the last checkpoint\) it was [\d.]+, of \w+: blocks.*"
        r"last checkpoint is .*step-00000002\. Lower optimizer.lr \(now .*\(--resume\)"
    )
    with pytest.raises(QuietvitError, match=told):
        run(tmp_path / "run", decay={"cd": {"strength": 1.0}, "watch_every": 2})


WATCHED_LATE = [
    {"decay": {"cd": {"strength": 1.0}}},
    {"decay": {"cd": {"strength": 1.0}}, "log_every": 50},
    {},
    {"log_every": 50},
    {"decay": {"watch_every": 0}},
]


def spoil(monkeypatch, layer, at):
    """Enlarge a weight before step ``at`` + 1, and make the images of step 4 NaN."""
    forward = step.forward_backward

    def spoiled(parts, batch, now):
        if now == at:
            with torch.no_grad():
                parts.models.plain.get_submodule(layer).weight.mul_(20)
        images, labels = batch
        return forward(parts, (images * float("nan") if now == 3 else images, labels), now)

    monkeypatch.setattr(loop, "forward_backward", spoiled)


@pytest.mark.parametrize("changes", WATCHED_LATE)
def test_nan_before_the_first_look_names_the_worst_pair_of_the_checkpoint(
    tmp_path, monkeypatch, changes
):
    spoil(monkeypatch, "blocks.1.mlp.fc2", 1)
    with pytest.raises(QuietvitError) as caught:
        run(tmp_path / "run", **changes)
    path = tmp_path / "run" / "checkpoints" / "step-00000002"
    model = create_model("vit_tiny_patch16_224", 10, **MODEL["kwargs"])
    model.load_state_dict(load_checkpoint(path.parent)["model"])
    pair, value = worst_amplification(model, find_pairs(model, torch.zeros(1, 3, 16, 16)))
    assert "blocks.1.mlp.fc2" in pair
    pairs = len(find_pairs(model, torch.zeros(1, 3, 16, 16)))
    assert str(caught.value).startswith(
        "the loss became nan at step 4. The largest amplification is infinite for "
        f"{pairs} of {pairs} pairs; at step 2 (that of the last checkpoint) it was {value:g}, of "
        f"{pair}. The last checkpoint is {path}. Lower optimizer.lr (now "
    )


@pytest.mark.parametrize("changes", WATCHED_LATE)
def test_nan_before_the_first_checkpoint_names_the_worst_pair_of_the_start(
    tmp_path, monkeypatch, changes
):
    make, made = classification.create_model, []

    def enlarged(*args, **kwargs):
        model = make(*args, **kwargs)
        with torch.no_grad():
            model.blocks[1].attn.proj.weight.mul_(20)
        made.append(copy.deepcopy(model))
        return model

    monkeypatch.setattr(classification, "create_model", enlarged)
    spoil(monkeypatch, "", None)
    with pytest.raises(QuietvitError) as caught:
        run(tmp_path / "run", **changes, checkpoint={"every": 0})
    pair, value = worst_amplification(made[0], find_pairs(made[0], torch.zeros(1, 3, 16, 16)))
    assert "blocks.1.attn.proj" in pair
    told = str(caught.value)
    assert told.startswith("the loss became nan at step 4")
    assert f"; before step 1 it was {value:g}, of {pair}. There is no checkpoint: a resumed" in told
    assert "Lower optimizer.lr (now " in told


def test_a_resumed_run_that_diverges_names_the_worst_pair_of_its_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        spoil(patch, "blocks.1.mlp.fc2", 1)
        interrupt(tmp_path / "run", patch, 3)
    spoil(monkeypatch, "", None)
    told = r"at step 4\. .*; at step 2 \(that of .*\) it was [\d.]+, of [^;.]*: blocks\.1\.mlp\.fc"
    with pytest.raises(QuietvitError, match=told):
        run(tmp_path / "run", resume=True)


@pytest.mark.parametrize("weights", [{}, {"head.weight": torch.zeros(1)}])
def test_a_checkpoint_without_the_weights_leaves_the_look_before(tmp_path, monkeypatch, weights):
    spoil(monkeypatch, "", None)
    monkeypatch.setattr(losses, "weights_of", lambda path: weights)
    told = r"; before step 1 it was [\d.]+, of .*The last checkpoint is .*step-00000002\."
    with pytest.raises(QuietvitError, match=told):
        run(tmp_path / "run")


def test_an_overflow_without_a_checkpoint_does_not_send_to_one(tmp_path, monkeypatch):
    forward = step.forward_backward

    def overflowing(parts, batch, at):
        if at == 3:
            weight = parts.models.plain.blocks[1].mlp.fc1.weight

            def enlarge(*_):
                weight.data.mul_(1e30)

            parts.optim.inner.register_step_pre_hook(enlarge)
        return forward(parts, batch, at)

    monkeypatch.setattr(loop, "forward_backward", overflowing)
    told = (
        r"^at step 4: .*update overflows .*resume from an earlier checkpoint or start anew\. "
        r"The largest amplification is .*; before step 1 it was [\d.]+, of \w+: blocks.*"
        r"\. There is no checkpoint: a resumed run starts from its beginning\.$"
    )
    with pytest.raises(QuietvitError, match=told):
        run(tmp_path / "run", decay={"cd": {"strength": 1.0}}, checkpoint={"every": 0})


def test_a_diverged_run_names_the_pair_where_nothing_is_logged_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Classification, "tensors", lambda _, outputs: (outputs * float("nan"),))
    with pytest.raises(QuietvitError, match=r"became nan at step 1\. The largest amplification is"):
        run(tmp_path / "run", decay={"watch_every": 0})


@pytest.mark.parametrize("missing", ["pairs", "blocks", "trace"])
def test_what_cannot_be_watched_does_not_keep_the_rest_from_it(monkeypatch, caplog, missing):
    def refused(*args, **kwargs):
        raise QuietvitError("there is none")

    places = {
        "pairs": "quietvit.pairs.find_pairs",
        "blocks": "quietvit.decay.activations.ActivationWatch",
        "trace": "quietvit.tracing.trace",
    }
    monkeypatch.setattr(places[missing], refused)
    example = torch.randn(1, 3, 16, 16)
    watch = Watch(create_model("vit_tiny_patch16_224", 10, **MODEL["kwargs"]), example)
    assert "the logs will lack some values: there is none" in caplog.text
    assert bool(watch.blocks) == (watch.activation(example) is not None) == (missing == "pairs")
    assert (watch.amplification(0) is None) == (missing != "blocks")


def test_weights_that_are_no_numbers_are_not_saved(tmp_path, monkeypatch):
    forward = step.forward_backward

    def spoiling(parts, batch, at):
        loss = forward(parts, batch, at)
        if at == 3:
            with torch.no_grad():
                parts.models.plain.head.bias[0] = float("inf")
        return loss

    monkeypatch.setattr(loop, "forward_backward", spoiling)
    with pytest.raises(QuietvitError, match="weights became NaN or infinite at step 4"):
        run(tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "checkpoints")["step"] == 2


def test_a_full_disk_is_told_with_the_space_needed_and_free(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"step": 1}, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage_of(2**20))
        with pytest.raises(QuietvitError) as caught:
            save_checkpoint(tmp_path, 2, {"x": torch.zeros(2**20)}, keep=1)
    told = str(caught.value)
    assert os.strerror(errno.ENOSPC) in told
    assert "It needs 4.0 MiB and 1.0 MiB are free." in told
    assert load_checkpoint(tmp_path) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def usage_of(free):
    class Usage:
        pass

    Usage.free = free
    return Usage


def test_metrics_on_a_full_disk_are_told(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text("")
    metrics = loop.Metrics(tmp_path, 0, False)
    metrics.path = tmp_path / "gone" / "metrics.jsonl"
    with pytest.raises(QuietvitError, match=r"could not be written at step 3 .*free some space"):
        metrics.write(3, loss=1.0)


class FullWriter:
    """A TensorBoard writer on a full disk: ``fails`` from its ``after``-th point on, if ever."""

    fails: ClassVar[set[str]] = set()
    after = 0

    def __init__(self, *args, **kwargs):
        self.points = 0
        self._fail("__init__")

    def add_scalar(self, *args):
        self.points += 1
        if self.points > self.after:
            self._fail("add_scalar")

    def close(self):
        self._fail("close")

    def _fail(self, name):
        if name in self.fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def full_writer(monkeypatch):
    def make(*fails, after=0):
        writer = type("Writer", (FullWriter,), {"fails": set(fails), "after": after})
        monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", writer)

    return make


@pytest.mark.parametrize("fails", ["__init__", "add_scalar"])
def test_curves_on_a_full_disk_are_told(tmp_path, full_writer, fails):
    full_writer(fails)
    with pytest.raises(QuietvitError, match=r"tensorboard could not be written at step 3 \(No sp"):
        loop.Metrics(tmp_path, 3, True).write(3, loss=1.0)


def test_curves_that_cannot_be_finished_hide_no_other_error(
    tmp_path, monkeypatch, full_writer, caplog
):
    caplog.set_level(logging.WARNING, "quietvit")
    full_writer("close")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage_of(0))
        with pytest.raises(QuietvitError, match=r"step-00000002 could not be written .*It needs"):
            run(tmp_path / "run", tensorboard=True)
    assert "tensorboard could not be finished ([Errno 28] No space left" in caplog.text
    full_writer("close", "add_scalar", after=9)
    with pytest.raises(QuietvitError, match=r"tensorboard could not be written at step \d+ "):
        run(tmp_path / "run", tensorboard=True, resume=True)
    full_writer("close")
    assert run(tmp_path / "run", tensorboard=True, resume=True).steps == 14


def test_a_run_goes_on_without_the_weights_it_began_with(tmp_path, monkeypatch, caplog):
    started = run(tmp_path / "start", epochs=1, data={**EVERYTHING["data"], "num_classes": 12})
    weights = started.weights.rename(tmp_path / "start.safetensors")
    changes = {
        **EVERYTHING,
        "model": {**MODEL, "weights": str(weights), "freeze_blocks": 1,
                  "kwargs": {**MODEL["kwargs"], "img_size": 24}},
        "decay": {**EVERYTHING["decay"], "s2d": {"threshold": 0.5, "images": 8, "refresh": 3}},
        "optimizer": {**EVERYTHING["optimizer"], "layer_decay": 0.8},
    }  # fmt: skip
    caplog.set_level(logging.WARNING, "quietvit")
    expected = run(tmp_path / "whole", **changes)
    assert "'head' has 12 classes, but 10 are requested" in caplog.text
    assert "adapted by timm to this model (pos_embed is" in caplog.text
    interrupt(tmp_path / "run", monkeypatch, 5, **changes)
    interrupt(tmp_path / "early", monkeypatch, 1, **changes)
    weights.unlink()
    caplog.clear()
    assert_same(run(tmp_path / "run", resume=True, **changes), expected)
    assert "starts anew" not in caplog.text
    assert "adapted by timm" not in caplog.text
    with pytest.raises(QuietvitError, match=r"start\.safetensors do not exist"):
        run(tmp_path / "early", resume=True, **changes)


def test_other_threads_or_another_torch_are_told_on_resume(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "quietvit")
    folder = tmp_path / "run" / "checkpoints"

    def told(**changes):
        caplog.clear()
        interrupt(tmp_path / "run", monkeypatch, 4, resume=True, **changes)
        return [text for text in caplog.messages if "the checkpoint was written with" in text]

    interrupt(tmp_path / "run", monkeypatch, 3)
    assert told() == []
    (threads,) = told(threads=2)
    assert "with threads=1 and this run has threads=2: its weights may differ" in threads
    assert "Resume with --set threads=1 (or OMP_NUM_THREADS=1)" in threads
    state = load_checkpoint(folder)
    assert (state["threads"], state["torch"]) == (1, torch.__version__)
    save_checkpoint(folder, state["step"], {**state, "torch": "1.2.3"}, keep=1)
    (version,) = told()
    assert f"1.2.3 and this run has torch {torch.__version__}: its weights may differ" in version
    assert "Resume with torch 1.2.3" in version
    earlier = {key: value for key, value in state.items() if key not in ("threads", "torch")}
    save_checkpoint(folder, state["step"], earlier, keep=1)
    assert told(threads=2) == []


def test_a_damaged_checkpoint_is_set_aside_and_a_good_one_is_not_pruned_for_it(
    tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.WARNING, "quietvit")
    folder = tmp_path / "run" / "checkpoints"
    interrupt(tmp_path / "run", monkeypatch, 5)
    (folder / "step-00000004" / "state.json").write_text("{")
    interrupt(tmp_path / "run", monkeypatch, 3, resume=True, checkpoint={"every": 3, "keep": 1})
    assert "step-00000004 is damaged" in caplog.text
    assert "is set aside as step-00000004.damaged" in caplog.text
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000003"]
    assert run(tmp_path / "run", resume=True).steps == 14


def began_to_write(output):
    """What a run killed while it wrote its configuration for the first time leaves."""
    output.mkdir(exist_ok=True)
    left = Path(tempfile.mkdtemp(prefix=".config.json.", dir=output))
    (left / "config.json").write_text('{"rec')
    return left


def test_a_run_killed_while_it_wrote_its_configuration_is_begun_again(tmp_path, monkeypatch):
    output = tmp_path / "run"
    began_to_write(output)
    tempfile.mkdtemp(prefix=".config.json.", dir=output)
    interrupt(output, monkeypatch, 3, resume=True)
    assert sorted(path.name for path in output.iterdir()) == [
        "checkpoints", "classes.json", "config.json", "metrics.jsonl",
    ]  # fmt: skip
    left = began_to_write(output)  # killed again, while it was written anew
    (output / ".config.json.swp").write_text("mine")
    assert run(output, resume=True).steps == 14
    assert not left.exists()
    assert (output / ".config.json.swp").read_text() == "mine"
    began_to_write(tmp_path / "anew")
    assert run(tmp_path / "anew", epochs=1).steps == 7


def test_a_folder_with_other_things_and_no_configuration_takes_force(tmp_path, monkeypatch):
    output = tmp_path / "run"
    interrupt(output, monkeypatch, 3, seed=5)
    (output / "config.json").unlink()
    last = list_checkpoints(output / "checkpoints")[-1]
    last.rename(last.with_name("step-00000099"))
    left = began_to_write(output)
    (output / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(QuietvitError, match=r"cannot be resumed: there is no config\.json"):
            run(output, resume=resume)
    assert left.is_dir()
    anew = run(output, resume=True, force=True, discard=True)
    assert_same(anew, run(tmp_path / "other"))
    assert not (output / "checkpoints" / "step-00000099").exists()
    assert not left.exists()
    assert (output / "notes.txt").read_text() == "mine"


def test_force_takes_no_part_where_the_run_was_begun(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "quietvit")
    interrupt(tmp_path / "run", monkeypatch, 3)
    with pytest.raises(QuietvitError, match="another configuration"):
        run(tmp_path / "run", resume=True, force=True, seed=5)
    run(tmp_path / "run", resume=True, force=True)
    assert "resuming at step 2" in caplog.text


def test_resuming_a_run_of_another_recipe_version_is_refused(tmp_path, monkeypatch):
    interrupt(tmp_path / "run", monkeypatch, 3)
    path = tmp_path / "run" / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "recipe": 7}))
    with pytest.raises(QuietvitError, match=r"version 7, but this quietvit reads version 1"):
        run(tmp_path / "run", resume=True)
    # a run begun before a key existed has its default
    del content["parallel"], content["decay"]["watch_every"]
    path.write_text(json.dumps(content))
    assert run(tmp_path / "run", resume=True).steps == 14


def test_a_checkpoint_of_several_processes_is_refused_in_one(tmp_path, monkeypatch):
    interrupt(tmp_path / "run", monkeypatch, 3)
    state = load_checkpoint(tmp_path / "run" / "checkpoints")
    save_checkpoint(tmp_path / "run" / "checkpoints", 2, {**state, "processes": 4}, keep=1)
    told = r"with processes 4, .* has processes 1, .*or batch_size 8 and accumulation 4 here"
    with pytest.raises(QuietvitError, match=told):
        run(tmp_path / "run", resume=True)


def test_a_training_state_of_two_optimizers_or_of_other_groups_is_refused():
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    optimizer = torch.optim.AdamW(weights)
    with pytest.raises(QuietvitError, match="holds 2 optimizers and this run has one"):
        check_optimizer_state(optimizer, [optimizer.state_dict()] * 2)
    with pytest.raises(QuietvitError, match="holds no optimizer state"):
        check_optimizer_state(optimizer, {"step": 3})
    fewer = torch.optim.AdamW([{"params": weights[:1]}, {"params": weights[1:2]}])
    with pytest.raises(QuietvitError, match=r"with 2 parameters in groups of \[1, 1\] and now has"):
        check_optimizer_state(optimizer, fewer.state_dict())


def test_a_parameter_without_a_group_is_named(tmp_path):
    parts = build(config(tmp_path)).training
    check_groups(parts.models.plain, parts.optim.inner)
    parts.optim.inner.param_groups[0]["params"].pop()
    with pytest.raises(QuietvitError, match="is in 0 groups of the optimizer"):
        check_groups(parts.models.plain, parts.optim.inner)
    parts.models.plain.requires_grad_(False)
    check_groups(parts.models.plain, parts.optim.inner)


def test_an_average_of_sharded_weights_is_refused(tmp_path):
    with pytest.raises(QuietvitError, match=r"ema needs unsharded weights.*ema to none"):
        config(tmp_path, parallel="fsdp2", ema={"decay": 0.9})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"features_only": True}, "could not build vit_tiny_patch16_224"),
        ({"global_pool": ""}, "not logits of shape|could not build"),
        ({"num_heads": 0}, "could not build vit_tiny_patch16_224"),
    ],
)
def test_a_model_that_is_no_classifier_is_refused_before_the_folder_is_used(
    tmp_path, kwargs, message
):
    model = {**MODEL, "kwargs": {**MODEL["kwargs"], **kwargs}}
    with pytest.raises(QuietvitError, match=message):
        run(tmp_path / "run", model=model)
    assert not (tmp_path / "run" / "config.json").exists()


def test_an_output_that_is_not_utf_8_is_refused_before_it_is_made(tmp_path):
    output = tmp_path / os.fsdecode(b"run\xff")
    changed = config(tmp_path / "run").model_copy(update={"output": output})
    with pytest.raises(QuietvitError, match=r"output: the name .* has bytes that are not UTF-8"):
        loop.train(changed, progress=False)
    assert not list(tmp_path.iterdir())
