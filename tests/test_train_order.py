"""Windows of shards, repeated augmentation, bad images: laws of the order, and exact resume."""

from __future__ import annotations

import io
import logging
import multiprocessing
import random
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from quietvit.data import ImageDataset
from quietvit.errors import QuietvitError
from quietvit.train.order import EpochBatches, SeededImages, epoch_order
from test_train_loop import EVERYTHING, assert_same, interrupt, run

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def grouped(sizes):
    return np.repeat(np.arange(len(sizes)) * 3, sizes)


@given(sizes=SIZES, window=st.integers(1, 14), seed=st.integers(0, 50), epoch=st.integers(0, 9))
def test_each_image_comes_once_an_epoch_and_windows_come_one_after_the_other(
    sizes, window, seed, epoch
):
    groups = grouped(sizes)
    order = epoch_order(len(groups), seed, epoch, groups, window)
    assert sorted(order) == list(range(len(groups)))
    assert np.array_equal(order, epoch_order(len(groups), seed, epoch, groups, window))
    visited = list(dict.fromkeys(groups[order]))
    at = 0
    while at < len(order):
        present = set(visited[:window])
        visited = visited[window:]
        size = int(np.isin(groups, list(present)).sum())
        assert set(groups[order[at : at + size]]) == present
        at += size


def test_windows_are_of_other_shards_and_mixed_anew_each_epoch():
    groups = grouped([20] * 8)
    first, second = (epoch_order(160, 0, epoch, groups, 2) for epoch in (0, 1))
    pairs = [[set(groups[o[i : i + 40]]) for i in range(0, 160, 40)] for o in (first, second)]
    assert pairs[0] != pairs[1]
    changes = np.count_nonzero(np.diff(groups[first[:40]]))
    assert changes > 10, "the two shards of a window are mixed"
    assert np.count_nonzero(np.diff(first) == 1) < 10, "and so are the images of each"
    alone = epoch_order(160, 0, 0, groups, 1)
    assert np.count_nonzero(np.diff(groups[alone])) == 7


def test_without_a_window_the_order_is_the_plain_permutation():
    plain = np.random.default_rng((4, 2)).permutation(30)
    assert np.array_equal(epoch_order(30, 4, 2), plain)
    assert np.array_equal(epoch_order(30, 4, 2, grouped([15, 15])), plain)


def test_a_window_for_images_in_no_shards_is_refused():
    with pytest.raises(QuietvitError, match=r"shuffle_window is 3.*Leave data\.shuffle_window out"):
        EpochBatches(10, 2, 5, 0, window=3)


@given(images=st.integers(4, 60), size=st.integers(1, 4), repeats=st.integers(1, 5))
def test_each_image_of_an_epoch_comes_as_often_as_asked(images, size, repeats):
    """images // size batches, as without repeats, so the schedule of the run stays what it is."""
    batches = EpochBatches(images, size, images // size, seed=1, repeats=repeats)
    epoch = list(batches)
    assert [len(batch) for batch in epoch] == [size] * (images // size)
    places = [place for batch in epoch for place in batch]
    assert len(set(places)) == len(places)
    counts = np.bincount([place[1] for place in places], minlength=images)
    visits = len(places)
    assert (counts == repeats).sum() == visits // repeats
    assert (counts > 0).sum() == -(-visits // repeats)
    batches.seek(0, len(epoch) // 2)
    assert list(batches) == epoch[len(epoch) // 2 :]


def test_in_the_long_run_repeats_leave_no_image_out():
    batches = EpochBatches(30, 5, 6, seed=0, repeats=3)
    seen = set()
    for epoch in range(20):
        batches.seek(epoch, 0)
        seen |= {place[1] for batch in batches for place in batch}
    assert seen == set(range(30))


def draw(_, label):
    return random.random(), label


def test_each_copy_of_an_image_has_randomness_of_its_own():
    images = SeededImages([("a", 0)] * 3, draw, seed=1)
    drawn = [images[0, 2, copy][0] for copy in range(4)]
    assert len(set(drawn)) == 4
    assert drawn == [images[0, 2, copy][0] for copy in range(4)]
    assert drawn[0] == images[0, 2][0], "the first copy is what comes without repeats"


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, shade, 255 - shade)).save(buffer, "PNG")
    return buffer.getvalue()


BAD = (3, 11, 17)
SEED = 5  # of an order in which the last of them comes long after the others


def read(index):
    return b"no image" if index in BAD else png(index)


def shade(image, label):
    return image.getpixel((0, 0))[0], label


def with_bad_ones(max_bad, count=20):
    dataset = ImageDataset(np.arange(count), read, "picture {}".format, name="mine")
    return SeededImages(dataset, shade, seed=5, max_bad=max_bad)


def test_a_bad_image_is_replaced_by_the_same_one_always(caplog):
    caplog.set_level(logging.WARNING, "quietvit")
    first, second = with_bad_ones(3), with_bad_ones(3)
    expected = {epoch: first[epoch, 3] for epoch in range(30)}
    second[0, 11]
    assert {epoch: second[epoch, 3] for epoch in reversed(range(30))} == {**expected}
    assert all(shade == label for shade, label in expected.values()), "label and image agree"
    replacing = {label for _, label in expected.values()}
    assert len(replacing) > 10
    assert not replacing & set(BAD)
    assert first[0, 4] == (4, 4)
    for name in ("picture 3", "picture 11"):
        assert sum(name in line for line in caplog.messages) == 2, "once by each data set"


def test_the_same_image_is_counted_once_and_one_too_many_stops_the_run():
    images = with_bad_ones(2, count=200)
    for epoch in range(5):
        images[epoch, 3]
    images[0, 11]
    assert set(images.bad_images) == {3, 11}
    with pytest.raises(
        QuietvitError,
        match=r"3 images of mine could not be decoded, and data\.max_bad_images allows 2: "
        r"picture 3; picture 11; picture 17\..*Or raise data\.max_bad_images",
    ):
        images[0, 17]


def test_images_known_to_be_bad_count_and_are_not_told_again(caplog):
    caplog.set_level(logging.WARNING, "quietvit")
    earlier, images = with_bad_ones(2), with_bad_ones(2)
    earlier[0, 3], earlier[0, 11]
    caplog.clear()
    images.mark_bad([*earlier.bad_images, 999])
    assert images.bad_images == [3, 11]
    assert images[0, 3] == earlier[0, 3]
    assert not caplog.messages
    with pytest.raises(QuietvitError, match="picture 3; picture 11; picture 17"):
        images[0, 17]
    with_bad_ones(0).mark_bad(earlier.bad_images)


def test_without_leave_the_first_bad_image_stops_the_run():
    with pytest.raises(QuietvitError, match=r"^the image at picture 3 of mine could not be"):
        with_bad_ones(0)[0, 3]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_bad_images_are_counted_over_all_workers(workers):
    def through(max_bad):
        images = with_bad_ones(max_bad)
        loader = DataLoader(
            images, batch_sampler=EpochBatches(20, 2, 10, seed=2), num_workers=workers
        )
        return images, [(shades.tolist(), labels.tolist()) for shades, labels in loader]

    images, batches = through(3)
    assert images.bad_images == list(BAD)
    alone = with_bad_ones(3)
    expected = [[alone[place] for place in batch] for batch in EpochBatches(20, 2, 10, seed=2)]
    assert batches == [tuple(map(list, zip(*batch, strict=True))) for batch in expected]
    with pytest.raises(QuietvitError, match="3 images of mine could not be decoded"):
        through(2)


def test_a_data_set_that_is_gone_stops_the_run():
    dataset = ImageDataset([0] * 1000, lambda _: b"", "picture {}".format, name="mine")
    with pytest.raises(QuietvitError, match="in a row, drawn from mine, could not be read"):
        SeededImages(dataset, shade, seed=0, max_bad=999)[0, 0]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    for name, first, count in (
        ("train-0", 0, 17),
        ("train-1", 17, 20),
        ("train-2", 37, 23),
        ("val", 60, 8),
    ):
        with tarfile.open(root / f"{name}.tar", "w") as tar:
            for number in range(first, first + count):
                content = b"no image" if number in BAD else png(4 * number % 256)
                for ending, data in (("png", content), ("cls", b"%d" % (number % 4))):
                    member = tarfile.TarInfo(f"{number:03d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return f"shards:{root}/train-{{0..2}}.tar,{root}/val.tar"


def test_a_run_on_shards_resumes_bit_for_bit_whatever_the_workers(tmp_path, monkeypatch, shards):
    changes = {
        **EVERYTHING,
        "data": {
            "dataset": shards,
            "augmentation": EVERYTHING["data"]["augmentation"],
            "max_bad_images": 3,
            "repeats": 3,
            "shuffle_window": 2,
        },
    }
    expected = run(tmp_path / "whole", **changes)
    assert expected.config.data.repeats == 3
    output = tmp_path / "run"
    interrupt(output, monkeypatch, 5, **changes, num_workers=2)
    interrupt(output, monkeypatch, 9, resume=True, **changes)
    assert_same(run(output, resume=True, **changes, num_workers=1), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_images_stop_a_run_with_the_remedy(tmp_path, shards, workers):
    data = {"dataset": shards, "max_bad_images": 2}
    with pytest.raises(QuietvitError, match=r"^3 images of shards .*003\.png in .*train-0\.tar"):
        run(tmp_path / "run", data=data, num_workers=workers, batch_size=4)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_counted_over_a_resume_which_may_allow_more(
    tmp_path, monkeypatch, shards, workers
):
    def changes(max_bad):
        data = {"dataset": shards, "max_bad_images": max_bad}
        return {
            "data": data, "seed": SEED, "epochs": 1, "batch_size": 4, "checkpoint": {"every": 1},
            "num_workers": workers,
        }  # fmt: skip

    order = list(epoch_order(60, SEED, 0))
    _, second, third = sorted(order.index(bad) // 4 for bad in BAD)
    assert third - second > 2 + 2 * workers, "the third is not read ahead"
    interrupt(tmp_path / "run", monkeypatch, second + 1, **changes(2))
    with pytest.raises(QuietvitError, match=r"^3 images of shards .*max_bad_images allows 2: "):
        run(tmp_path / "run", resume=True, **changes(2))
    result = run(tmp_path / "run", resume=True, **changes(3))
    assert_same(result, run(tmp_path / "whole", **changes(3)))


def test_a_run_that_fails_leaves_no_worker_behind(tmp_path):
    """While the error is held, torch ends no worker; at the program's end it waits for them."""
    before = multiprocessing.active_children()
    with pytest.raises(QuietvitError) as held:
        run(tmp_path / "run", num_workers=2, optimizer={"lr": 1e20}, decay={"cd": {}})
    assert held.traceback
    assert multiprocessing.active_children() == before
