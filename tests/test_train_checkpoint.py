from __future__ import annotations

import hashlib
import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quietvit.errors import QuietvitError
from quietvit.train import checkpoint
from quietvit.train.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    set_aside_after,
)
from quietvit.train.order import (
    EpochBatches,
    SeededImages,
    generator_states,
    seeded,
    set_generator_states,
)

CPU = torch.device("cpu")


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


def test_what_is_saved_comes_back_with_its_types(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    state = {
        "numbers": [1, 2.5, float("nan"), float("inf"), True, None, "ü"],
        "tuple": (1, (2, [3])),
        "keys": {0: "int", "0": "str", (1, 2): "tuple", "tensor": 1, "dict": {}},
        "views": [whole, whole[1], whole.T, torch.tensor(3), torch.zeros(0)],
        "dtypes": [torch.ones(2, dtype=d) for d in (torch.bfloat16, torch.int64, torch.uint8)],
        "generators": generator_states(CPU),
    }
    save_checkpoint(tmp_path, 3, state, keep=1)
    assert same(state, load_checkpoint(tmp_path))


def test_tensors_by_name_are_read_as_weights_by_others(tmp_path):
    linear = torch.nn.Linear(3, 2)
    tied = {"a": linear.weight.detach(), "b": linear.weight.detach(), "c": linear.weight[0]}
    mixed = {"weight": linear.weight.detach(), "step": 1}
    state = {"model": linear.state_dict(), "tied": tied, "mixed": mixed, "../x": tied, "empty": {}}
    path = save_checkpoint(tmp_path, 3, state, keep=1)
    back = load_checkpoint(tmp_path)
    assert list(back) == list(state)
    for key, value in state.items():
        assert same(dict(sorted(value.items())), dict(sorted(back[key].items()))), key
    assert same(back["model"], load_file(path / "model.safetensors"))
    assert [file.name for file in sorted(path.iterdir())] == [
        "manifest.json", "model.safetensors", "state.json", "tensors.safetensors",
        "tied.safetensors",
    ]  # fmt: skip


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path):
    """These held every tensor in one file, and no entry in a file of its own."""
    weights = {"weight": torch.arange(3.0)}
    path = save_checkpoint(tmp_path, 3, {"model": weights, "step": 3}, keep=1)
    (path / "model.safetensors").unlink()
    save_file({"0": weights["weight"]}, path / "tensors.safetensors")
    entries = [["model", {"dict": [["weight", {"tensor": "0"}]]}], ["step", 3]]
    (path / "state.json").write_text(json.dumps({"dict": entries}))
    names = ("tensors.safetensors", "state.json")
    sums = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}
    (path / "manifest.json").write_text(json.dumps({"step": 3, "sha256": sums}))
    assert same({"model": weights, "step": 3}, load_checkpoint(tmp_path))


def test_generators_go_on_as_if_nothing_had_happened(tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    save_checkpoint(tmp_path, 1, generator_states(CPU), keep=1)
    expected = [draw() for _ in range(3)]
    set_generator_states(load_checkpoint(tmp_path), CPU)
    assert [draw() for _ in range(3)] == expected


def test_only_the_last_few_are_kept(tmp_path):
    assert load_checkpoint(tmp_path) is None
    for step in (5, 10, 100):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000100"]
    assert load_checkpoint(tmp_path) == {"step": 100}


def spoil(folder, step):
    (folder / f"step-{step:08d}" / "state.json").write_text("{")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("keep", [1, 2])
def test_the_checkpoint_just_written_stays_whatever_lies_after_it(tmp_path, keep):
    for step in (0, 1, 3):
        save_checkpoint(tmp_path, step, {"step": step}, keep=3)
    spoil(tmp_path, 3)
    save_checkpoint(tmp_path, 2, {"step": 2}, keep)
    assert load_checkpoint(tmp_path) == {"step": 2}
    kept = [1, 2, 3] if keep == 2 else [2, 3]
    assert names(tmp_path) == [f"step-{step:08d}" for step in kept]


@pytest.mark.parametrize("damaged", [3, 1])
def test_checkpoints_that_could_not_be_read_are_set_aside_and_do_not_count(
    tmp_path, caplog, damaged
):
    caplog.set_level(logging.WARNING, "quietvit")
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, {"step": step}, keep=4)
    for step in range(5 - damaged, 5):
        spoil(tmp_path, step)
    whole = 4 - damaged
    assert load_checkpoint(tmp_path) == {"step": whole}
    assert len(list_checkpoints(tmp_path)) == 4, "reading changes nothing"
    set_aside_after(tmp_path, whole, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        f"step-{step:08d}" for step in range(1, whole + 1)
    ]
    for step in range(whole + 1, 5):
        assert f"step-{step:08d} is set aside as step-{step:08d}.damaged" in caplog.text
        assert (tmp_path / f"step-{step:08d}.damaged" / "state.json").read_text() == "{"
    save_checkpoint(tmp_path, 9, {"step": 9}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        f"step-{whole:08d}", "step-00000009",
    ]  # fmt: skip
    assert load_checkpoint(tmp_path) == {"step": 9}


def test_what_is_set_aside_does_not_pile_up(tmp_path):
    save_checkpoint(tmp_path, 1, {"step": 1}, keep=9)
    for round_ in range(5):
        for step in (2, 3):
            save_checkpoint(tmp_path, step, {"step": step, "round": round_}, keep=9)
            spoil(tmp_path, step)
            (tmp_path / f"step-{step:08d}" / "round").write_text(str(round_))
        assert load_checkpoint(tmp_path) == {"step": 1}
        set_aside_after(tmp_path, 1, keep=2)
        aside = [path for path in tmp_path.iterdir() if "damaged" in path.name]
        assert [(path / "round").read_text() for path in aside] == [str(round_)] * 2
    for _ in range(5):
        save_checkpoint(tmp_path, 2, {"step": 2}, keep=2)
        assert len([name for name in names(tmp_path) if "damaged" in name]) <= 2
    assert load_checkpoint(tmp_path) == {"step": 2}


@pytest.mark.parametrize(
    "name", ["tensors.safetensors", "model.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_recognised_and_the_one_before_used(tmp_path, caplog, name, damage):
    caplog.set_level(logging.WARNING, "quietvit")
    for step in (1, 2):
        state = {"step": step, "x": torch.ones(50), "model": {"w": torch.ones(50)}}
        save_checkpoint(tmp_path, step, state, keep=2)
    path = tmp_path / "step-00000002" / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[-10] ^= 1
        path.write_bytes(content)
    assert load_checkpoint(tmp_path)["step"] == 1
    assert "step-00000002 is damaged" in caplog.text
    save_checkpoint(tmp_path, 2, {"step": 2, "again": True}, keep=2)
    assert load_checkpoint(tmp_path) == {"step": 2, "again": True}
    assert (tmp_path / "step-00000002.damaged").is_dir()


def test_when_all_are_damaged_that_is_an_error(tmp_path):
    save_checkpoint(tmp_path, 1, {}, keep=2)
    (tmp_path / "step-00000001" / "state.json").write_text("{")
    with pytest.raises(QuietvitError, match=r"all 1 checkpoints .* are damaged"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("call", ["save_tensors", "_checksum", "flush"])
def test_a_failed_save_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, call):
    save_checkpoint(tmp_path, 1, {"step": 1}, keep=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, call, full)
        with pytest.raises(QuietvitError, match=r"No space left.*earlier ones are untouched"):
            save_checkpoint(tmp_path, 2, {"step": 2}, keep=1)
    assert load_checkpoint(tmp_path) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_half_a_checkpoint_of_a_killed_process_is_not_seen_and_swept_away(tmp_path):
    save_checkpoint(tmp_path, 1, {"step": 1}, keep=2)
    partial = tmp_path / ".step-00000002.partial"
    partial.mkdir()
    (partial / "state.json").write_text("{")
    assert load_checkpoint(tmp_path) == {"step": 1}
    save_checkpoint(tmp_path, 2, {"step": 2}, keep=2)
    assert not partial.exists()


def test_an_object_of_unknown_kind_is_refused_not_pickled(tmp_path):
    with pytest.raises(TypeError, match="cannot hold a PosixPath"):
        save_checkpoint(tmp_path, 1, {"path": Path("x")}, keep=1)


def test_each_epoch_is_a_permutation_of_its_own_and_can_be_entered_anywhere():
    batches = EpochBatches(images=10, batch_size=3, batches=3, seed=4)
    first = list(batches)
    indices = [index for batch in first for _, index in batch]
    assert len(indices) == len(set(indices)) == 9
    batches.seek(0, 2)
    assert list(batches) == first[2:]
    assert len(batches) == 1
    batches.seek(1, 0)
    second = list(batches)
    assert {epoch for batch in second for epoch, _ in batch} == {1}
    assert [i for b in second for _, i in b] != indices
    assert list(EpochBatches(10, 3, 3, seed=5)) != first


def test_an_images_randomness_depends_on_seed_epoch_and_index_alone():
    class Pictures(list):
        pass

    pictures = Pictures([("a", 0), ("b", 1)])

    def transform(_, label):
        return (random.random(), float(np.random.rand()), torch.rand(1).item()), label

    images = SeededImages(pictures, transform, seed=1)
    drawn = images[0, 1]
    torch.rand(3), random.random()
    assert images[0, 1] == drawn
    others = [images[0, 0], images[1, 1], SeededImages(pictures, transform, seed=2)[0, 1]]
    assert all(other[0] != drawn[0] for other in others)


def test_seeding_inside_leaves_the_generators_outside_alone():
    before = generator_states(CPU)
    with seeded(1, 2, 3):
        random.random(), np.random.rand(), torch.rand(1)
    assert same(before, generator_states(CPU))
