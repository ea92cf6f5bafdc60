"""WebDataset shards: what is in them comes back, in any order, and what is wrong is named."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import tarfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from decay_cases import process_group
from processes import run_in_processes
from quietvit.data import load_dataset, shards, subset, tars
from quietvit.errors import QuietvitError


def picture(shade: int, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(buffer, form)
    return buffer.getvalue()


def write(path, members, form=tarfile.PAX_FORMAT, mode="w"):
    with tarfile.open(path, mode, format=form) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def samples(shades, folder=""):
    for shade in shades:
        yield f"{folder}{shade:04d}.png", picture(shade)
        yield f"{folder}{shade:04d}.cls", str(shade % 3).encode()


def shades_of(dataset):
    return [dataset[i][0].getpixel((0, 0))[0] for i in range(len(dataset))]


@pytest.fixture
def three(tmp_path):
    for number in range(3):
        write(tmp_path / f"train-{number:02d}.tar", samples(range(10 * number, 10 * number + 4)))
    write(tmp_path / "val-00.tar", samples([60, 61]))
    return tmp_path


SHADES = [10 * shard + i for shard in range(3) for i in range(4)]


@pytest.mark.parametrize("part", ["train-{00..02}.tar", "train-*.tar", "train-{00,01,02}.tar"])
def test_images_come_in_order_of_shards_with_their_labels(three, part):
    train = load_dataset(f"shards:{three}/{part},{three}/val-00.tar", "train")
    test = load_dataset(f"shards:{three}/{part},{three}/val-00.tar", "test")
    assert shades_of(train) == SHADES
    assert train.labels.tolist() == [shade % 3 for shade in SHADES]
    assert train.groups.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert shades_of(test) == [60, 61]
    assert (test.labels.tolist(), test.num_classes) == ([0, 1], 3)


def test_a_folder_of_tars_is_all_its_tars(three):
    assert shades_of(load_dataset(f"shards:{three}")) == [*SHADES, 60, 61]
    assert len(load_dataset(f"shards:{three}")) == 14, "the kept indexes are no shards"


def test_a_glob_that_the_kept_indexes_match_too_is_the_shards_alone(three):
    for _ in range(2):
        assert shades_of(load_dataset(f"shards:{three}/train-*")) == SHADES
    (three / ".train-03.tar").write_bytes(b"")
    assert len(load_dataset(f"shards:{three}")) == 14, "nor is a hidden file"


def test_a_shard_is_not_searched_for_the_names_of_good_images(three, monkeypatch):
    dataset = load_dataset(f"shards:{three}")

    def searched(path, offset):
        raise AssertionError(path)

    monkeypatch.setattr("quietvit.data.shards.name_at", searched)
    assert shades_of(dataset) == [*SHADES, 60, 61]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar_is_read_long_names_and_folders_included(tmp_path, form):
    names = ["a/1", "b" * 90 + "/" + "c" * 80, "a/2"]
    members = []
    for shade, name in enumerate(names):
        members += [
            (f"{name}.JPG", picture(90 * shade, "JPEG")),
            (f"{name}.mask.png", b"of no interest"),
            (f"{name}.json", json.dumps({"label": shade, "x": "y"}).encode()),
        ]
    path = write(tmp_path / "a.tar", [("__meta__", b""), ("README", b"x"), *members], form)
    dataset = load_dataset(f"shards:{path}")
    assert shades_of(dataset) == [0, 90, 180]
    assert dataset.labels.tolist() == [0, 1, 2]
    assert dataset.where(1) == f"{names[1]}.JPG in {path}"


UNDERSCORED = ["__a", "__b__", "c/__d__", "__e__f"]


def underscored(path):
    """A shard of samples, and of members that are facts about it."""
    members = [
        (f"{name}.{extension}", content)
        for shade, name in enumerate(UNDERSCORED)
        for extension, content in (("png", picture(60 * shade)), ("cls", b"0"))
    ]
    meta = [("__x__", b""), ("__y__/1.png", b"x"), ("__y.z__", b"x")]
    return write(path, [*meta, *members])


def test_names_between_double_underscores_alone_are_passed_over(tmp_path):
    path = underscored(tmp_path / "a.tar")
    assert shades_of(load_dataset(f"shards:{path}")) == [0, 60, 120, 180]


def test_the_webdataset_package_passes_over_the_same_names(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    path = underscored(tmp_path / "a.tar")
    theirs = webdataset.WebDataset(str(path), shardshuffle=False)
    assert [sample["__key__"] for sample in theirs] == UNDERSCORED


def test_shards_of_the_webdataset_package_are_read(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as sink:
        for shade in range(5):
            sink.write(
                {"__key__": f"n/{shade}", "png": Image.new("RGB", (4, 4), (shade,) * 3), "cls": 7}
            )
    dataset = load_dataset(f"shards:{tmp_path / 'a.tar'}")
    assert shades_of(dataset) == [0, 1, 2, 3, 4]
    assert dataset.labels.tolist() == [7] * 5
    theirs = webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    assert [sample["png"] for sample in theirs] == [dataset._read(i) for i in range(5)]


def test_cls_goes_before_json_wherever_it_stands(tmp_path):
    for order in (1, -1):
        labels = [("a.cls", b"2\n"), ("a.json", b'{"label": 0}')][::order]
        path = write(tmp_path / f"{order}.tar", [("a.png", picture(0)), *labels])
        assert load_dataset(f"shards:{path}").labels.tolist() == [2]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("k.png", b"x")], r"sample 'k' of .*a\.tar has no label \(it holds \.png\)"),
        ([("k.cls", b"1")], r"sample 'k' of .* has no image \(it holds \.cls\)"),
        ([("k.png", b"x"), ("l.png", b"x"), ("k.cls", b"1")], "'k' .*has no image.*be consecutive"),
        ([("k.png", b"x"), ("k.cls", b"cat")], r"k\.cls of .* holds b'cat'.*integer"),
        ([("k.png", b"x"), ("k.json", b'{"label": "cat"}')], r"no label \(it holds \.png, \.json"),
        ([("k.png", b"x"), ("k.json", b"{")], "no label"),
        ([("k.png", b"x"), ("k.json", b'{"label": true}')], "no label"),
        ([("k.png", b"x"), ("k.jpg", b"x"), ("k.cls", b"1")], "'k' .*two images"),
        ([("k.png", b"x"), ("k.cls", b"-1")], r"label of k\.png in .*a\.tar is -1"),
        ([("README", b"x")], "holds no images"),
    ],
)
def test_a_bad_sample_is_named(tmp_path, members, message):
    path = write(tmp_path / "a.tar", members)
    with pytest.raises(QuietvitError, match=message):
        load_dataset(f"shards:{path}")


def test_an_image_that_cannot_be_decoded_is_named_by_sample_and_shard(tmp_path):
    path = write(tmp_path / "a.tar", [*samples([1]), ("bad.png", b"no image"), ("bad.cls", b"0")])
    dataset = load_dataset(f"shards:{path}")
    with pytest.raises(QuietvitError, match=r"image at bad\.png in .*a\.tar.*could not be decoded"):
        dataset[1]


def test_whatever_a_decoder_raises_is_a_bad_image(three, monkeypatch):
    dataset = load_dataset(f"shards:{three}")

    def opened(_):
        raise RuntimeError("Failed to decode frame 0")  # as Pillow's decoder of AVIF

    monkeypatch.setattr(Image, "open", opened)
    with pytest.raises(QuietvitError, match=r"train-00\.tar.*could not be decoded: Failed to"):
        dataset[0]


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_shards_are_refused_with_the_remedy(tmp_path, mode):
    for name in ("a.tar", "b.tar.gz"):
        path = write(tmp_path / name, samples([1]), mode=mode)
        with pytest.raises(QuietvitError, match=r"compressed .*uncompress it"):
            load_dataset(f"shards:{path}")
    (tmp_path / "a.tar").unlink()
    with pytest.raises(QuietvitError, match="compressed"):
        load_dataset(f"shards:{tmp_path}")


def test_a_shard_cut_anywhere_is_refused_and_named(tmp_path):
    whole = write(tmp_path / "whole.tar", samples(range(3)), tarfile.USTAR_FORMAT).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        tar.getmembers()
        end = tar.offset
    cuts = [0, 1, *range(100, end + 1, 97), *range(0, end + 1, 512), end + 100]
    for cut in cuts:
        path = tmp_path / f"cut-{cut}.tar"
        path.write_bytes(whole[:cut])
        with pytest.raises(QuietvitError, match=rf"cut-{cut}\.tar (could not|is truncated)"):
            load_dataset(f"shards:{path}")
    (tmp_path / "kept.tar").write_bytes(whole[: end + 512])
    assert len(load_dataset(f"shards:{tmp_path / 'kept.tar'}")) == 3


def test_what_is_no_tar_and_tars_joined_by_cat_are_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"nonsense " * 500)
    with pytest.raises(QuietvitError, match=r"a\.tar could not be read as a tar"):
        load_dataset(f"shards:{tmp_path / 'a.tar'}")
    one = write(tmp_path / "b.tar", samples([1])).read_bytes()
    (tmp_path / "b.tar").write_bytes(one + one)
    with pytest.raises(QuietvitError, match="after its end mark"):
        load_dataset(f"shards:{tmp_path / 'b.tar'}")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("train-{00..03}.tar", r"train-03\.tar does not exist.*range in"),
        ("train-{02..00}.tar", "name nothing"),
        ("other-*.tar", r"no shard ending in .* matches .*other-"),
        ("train-0{0,0}.tar", "more than once"),
        ("none", "does not exist"),
    ],
)
def test_missing_shards_are_named(three, part, message):
    with pytest.raises(QuietvitError, match=message):
        load_dataset(f"shards:{three}/{part}")


def test_test_shards_must_be_named_and_local(three):
    with pytest.raises(QuietvitError, match="names no test shards"):
        load_dataset(f"shards:{three}/train-00.tar", "test")
    for part in ("pipe:curl x", "https://host/a-{0..9}.tar"):
        with pytest.raises(QuietvitError, match=r"local files.*copy them here"):
            load_dataset(f"shards:{part}")


def counted(monkeypatch):
    built = []
    build = tars.build_index
    monkeypatch.setattr(tars, "build_index", lambda path: built.append(path) or build(path))
    return built


def test_a_shard_is_looked_through_once_and_again_when_it_changed(three, monkeypatch):
    built = counted(monkeypatch)
    path = three / "train-00.tar"
    first = load_dataset(f"shards:{path}")
    again = load_dataset(f"shards:{path}")
    assert built == [path]
    assert shades_of(again) == shades_of(first)
    write(path, samples([7, 8, 9]))
    assert shades_of(load_dataset(f"shards:{path}")) == [7, 8, 9]
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    load_dataset(f"shards:{path}")
    assert built == [path] * 3


def test_a_damaged_index_is_said_and_built_again(three, monkeypatch, caplog):
    built = counted(monkeypatch)
    path = three / "train-00.tar"
    load_dataset(f"shards:{path}")
    kept = three / "train-00.tar.quietvit-index"
    whole = kept.read_bytes()
    for at in range(5, len(whole), max(1, len(whole) // 25)):
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        for content in (bytes(damaged), whole[:at]):
            kept.write_bytes(content)
            assert shades_of(load_dataset(f"shards:{path}")) == SHADES[:4]
    assert len(built) > 25
    assert "is damaged" in caplog.text
    assert kept.read_bytes() == whole


def test_where_nothing_can_be_written_the_index_goes_to_the_cache(three, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "quietvit")
    built = counted(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(three / "cache"))
    write_atomic = tars.write_atomic

    def refuse(path, content):
        if "cache" not in str(path):
            raise QuietvitError("read-only")
        return write_atomic(path, content)

    monkeypatch.setattr(tars, "write_atomic", refuse)
    for _ in range(2):
        load_dataset(f"shards:{three / 'train-00.tar'}")
    assert len(built) == 1
    assert not (three / "train-00.tar.quietvit-index").exists()
    assert not caplog.text
    monkeypatch.setenv("XDG_CACHE_HOME", str(three / "elsewhere"))
    load_dataset(f"shards:{three / 'train-00.tar'}")
    assert "could not be stored" in caplog.text


def test_processes_index_their_own_shards_first_and_then_all(monkeypatch):
    import torch.distributed as dist

    paths = [Path(f"{number}.tar") for number in range(11)]
    assert shards._own_first(paths) == paths, "alone: in order"
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    orders = []
    for rank in range(3):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        orders.append(shards._own_first(paths))
        assert sorted(orders[-1]) == sorted(paths)
    shares = [order[: len(paths[rank::3])] for rank, order in enumerate(orders)]
    assert sorted(path for share in shares for path in share) == sorted(paths)


def _open_in_one_of_two(rank: int, folder: str) -> None:
    """Both build their first index at the same time, and go on together after their halves."""
    built: list[str] = []
    build_index, write_atomic = tars.build_index, tars.write_atomic

    def meet(place: str) -> None:
        (Path(folder) / f"{place}-{rank}").touch()
        for _ in range(1000):
            if (Path(folder) / f"{place}-{1 - rank}").exists():
                return
            time.sleep(0.01)

    def build(path: Path) -> tars.TarIndex:
        built.append(path.name)
        if len(built) == 1:
            meet("begun")
        return build_index(path)

    def keep(path: Path, content: bytes) -> Path:
        done = write_atomic(path, content)
        if len(built) == 3:
            meet("half")
        return done

    tars.build_index, tars.write_atomic = build, keep
    with process_group(Path(folder), rank, 2):
        shades = shades_of(load_dataset(f"shards:{folder}/*.tar"))
    (Path(folder) / f"found-{rank}.json").write_text(json.dumps([built, shades]))


def test_two_processes_that_open_the_same_shards_index_each_once(tmp_path):
    for number in range(6):
        write(tmp_path / f"{number}.tar", samples([number]))
    run_in_processes(_open_in_one_of_two, str(tmp_path))
    found = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1)]
    assert sorted(found[0][0] + found[1][0]) == [f"{number}.tar" for number in range(6)]
    assert found[0][1] == found[1][1] == list(range(6))


def open_files():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_few_shards_are_open_at_once(three, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_SHARDS", 2)
    dataset = load_dataset(f"shards:{three}/train-*.tar")
    before = open_files()
    for index in (0, 4, 8, 1, 5, 9):
        dataset[index]
        assert open_files() - before <= 2
    assert dataset[9][0].getpixel((0, 0))[0] == 21


def test_a_shard_that_shrank_while_in_use_is_named(three):
    path = three / "train-00.tar"
    dataset = load_dataset(f"shards:{path}")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(QuietvitError, match=r"train-00\.tar is shorter than when it was opened"):
        dataset[3]


def test_shards_travel_to_other_processes_without_their_open_files(three):
    dataset = subset(load_dataset(f"shards:{three}/train-*.tar"), 5)
    dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert shades_of(copy) == shades_of(dataset)
    assert copy.groups.tolist() == dataset.groups.tolist()


def test_thousands_of_samples_are_a_few_arrays(tmp_path):
    """The index of one large shard holds numbers alone, and little memory is used to build it."""
    image, count = picture(0), 5_000
    header = tarfile.TarInfo()
    with (tmp_path / "a.tar").open("wb") as file:
        for number in range(count):
            for extension, content in (("png", image), ("cls", b"%d" % (number % 1000))):
                header.name, header.size = f"{number}.{extension}", len(content)
                file.write(header.tobuf(tarfile.USTAR_FORMAT))
                file.write(content.ljust(-(-len(content) // 512) * 512, b"\0"))
        file.write(b"\0" * 1024)
    tracemalloc.start()
    index = tars.build_index(tmp_path / "a.tar")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(index.labels, np.arange(count) % 1000)
    kept = index.offsets.nbytes + index.sizes.nbytes + index.labels.nbytes
    assert kept == 24 * count
    assert peak < 400 * count
    assert load_dataset(f"shards:{tmp_path / 'a.tar'}").where(4_321).startswith("4321.png in ")
