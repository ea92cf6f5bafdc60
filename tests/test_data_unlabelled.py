"""Images without labels from every source, and files that are passed over and counted."""

from __future__ import annotations

import io
import logging
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from quietvit.console import open_data
from quietvit.data import calibration_images, evaluate, evaluation_loader, load_dataset, subset
from quietvit.data import formats as known
from quietvit.data.images import NoLabelsError
from quietvit.errors import QuietvitError
from test_data_sources import to_tensor


def png(shade: int, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(buffer, form)
    return buffer.getvalue()


def shades_of(dataset):
    return [dataset[i][0].getpixel((0, 0))[0] for i in range(len(dataset))]


def put(root, **files):
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        place = root / name.replace("__", "/").replace("_", ".")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    return root


def shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def flat(tmp_path):
    return put(tmp_path / "flat", a_png=png(0), b_gif=png(10, "GIF"), c_TIFF=png(20, "TIFF"))


def labelless(tmp_path, flat):
    """(what a user types, its shades) of every source, none of which has a label."""
    nested = put(tmp_path / "nested", a__b__c_png=png(0), a__d_png=png(1), e_png=png(2))
    split = put(tmp_path / "split", train__a_png=png(7), val__b_png=png(8))
    pq.write_table(pa.table({"image": [png(3), png(4)]}), tmp_path / "a.parquet")
    texts = pa.table({"image": [png(3)], "label": ["cat"]})
    pq.write_table(texts, tmp_path / "texts.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file:
        table = pa.table({"image": [png(5)]})
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    bare = shard(tmp_path / "a.tar", [("1.png", png(6)), ("2.jpg", png(200, "JPEG"))])
    named = shard(tmp_path / "named.tar", [("1.png", png(6)), ("1.cls", b"cat")])
    yield str(flat), [0, 10, 20]
    yield f"{flat}/*.png", [0]
    yield str(flat / "b.gif"), [10]
    yield str(nested), [0, 1, 2]
    yield str(split), [7]
    yield str(tmp_path / "a.parquet"), [3, 4]
    yield str(tmp_path / "texts.parquet"), [3]
    yield str(tmp_path / "a.arrow"), [5]
    yield str(bare), [6, 200]
    yield str(named), [6]
    datasets = pytest.importorskip("datasets")
    rows = {"picture": [{"bytes": png(9), "path": None}]}
    made = datasets.Dataset.from_dict(rows, datasets.Features({"picture": datasets.Image()}))
    made.save_to_disk(str(tmp_path / "hub"))
    yield f"hf:{tmp_path / 'hub'}", [9]


def test_calibration_takes_images_without_labels_from_every_source(tmp_path, flat):
    for text, shades in labelless(tmp_path, flat):
        dataset = open_data(text, "train", labels=False)
        assert shades_of(dataset) == shades, text
        assert not dataset.labelled
        assert shades_of(subset(dataset, 1))[0] in shades
        assert calibration_images(dataset, 1, to_tensor).shape == (1, 3, 4, 4)
        assert dataset[0][1] == -1
        with pytest.raises(NoLabelsError, match="opened without labels"):
            _ = dataset.labels
        with pytest.raises(QuietvitError, match="without labels; top-1 needs the class"):
            evaluate(torch.nn.Flatten(), evaluation_loader(dataset, to_tensor))


def test_evaluation_needs_labels_and_says_what_lacks(tmp_path, flat):
    for text, _ in labelless(tmp_path, flat):
        if text.endswith(("split", "nested")):
            continue  # there are class folders, or folders that may be meant so
        with pytest.raises(QuietvitError, match=r"label") as caught:
            open_data(text, "test")
        needed = isinstance(caught.value, NoLabelsError)
        assert needed == ("texts" not in text), text
        assert not needed or "alibration" in str(caught.value), text


def test_labels_that_are_there_are_not_read_for_calibration(tmp_path):
    root = put(tmp_path / "c", ant__a_png=png(0), bee__b_png=png(1), top_png=png(2))
    spec = f"imagefolder:{root}"
    labelled, free = load_dataset(spec), load_dataset(spec, labels=False)
    assert (shades_of(labelled), labelled.labels.tolist()) == ([0, 1], [0, 1])
    assert shades_of(free) == [0, 1, 2]


def test_images_outside_class_folders_are_told(tmp_path, caplog):
    root = put(tmp_path / "c", ant__a_png=png(0), b_png=png(1), c_png=png(1))
    load_dataset(f"imagefolder:{root}")
    assert "2 images are not in a class folder" in caplog.text


def test_files_that_cannot_be_read_are_counted_by_suffix_once(tmp_path, monkeypatch, caplog):
    without = frozenset(known.readable_suffixes() - {".heic"})
    monkeypatch.setattr(known, "readable_suffixes", lambda: without)
    files = {"1_png": png(0), "2_HEIC": b"x", "3_heic": b"x", "4_nef": b"x", "5": b"x"}
    side = {"Thumbs_db": b"", "notes_txt": b"", "more_txt": b"", "_DS_Store": b""}
    root = put(tmp_path / "c", **{f"ant__{name}": x for name, x in {**files, **side}.items()})
    for spec, labels in ((f"imagefolder:{root}", True), (f"imagefolder:{root}/ant", False)):
        caplog.clear()
        with caplog.at_level(logging.INFO, "quietvit"):
            assert len(load_dataset(spec, labels=labels)) == 1
        warned, calm = caplog.records
        assert (warned.levelname, calm.levelname) == ("WARNING", "INFO")
        assert "4 of 5 files are skipped" in warned.message
        assert "2 .heic (pip install pillow-heif), 1 .nef, 1 without a suffix" in warned.message
        assert "3 files beside" in calm.message
        assert "2 .txt, 1 thumbs.db" in calm.message
    members = [("1.png", png(0)), ("1.cls", b"0"), ("1.txt", b"caption"), ("2.heic", b"x")]
    members += [("2.cls", b"1"), ("3.nef", b"x"), ("about.txt", b"x")]
    path = shard(tmp_path / "a.tar", members)
    for _ in range(2):  # the second time from the kept index
        caplog.clear()
        assert len(load_dataset(f"shards:{path}")) == 1
        assert "files are skipped" in caplog.text
        assert "1 .heic (pip install pillow-heif)" in caplog.text
        assert "1 .nef" in caplog.text
        assert ".txt" not in caplog.text
    only = put(tmp_path / "only", ant__a_heic=b"x")
    with pytest.raises(QuietvitError, match=r"no images .*1 \.heic \(pip install pillow-heif\)"):
        load_dataset(f"imagefolder:{only}")


def test_a_sample_with_several_images_gives_its_usual_one(tmp_path):
    members = [("1.tif", png(9, "TIFF")), ("1.png", png(5)), ("1.gif", b"x"), ("1.cls", b"0")]
    assert shades_of(load_dataset(f"shards:{shard(tmp_path / 'a.tar', members)}")) == [5]
    with pytest.raises(QuietvitError, match="two images"):
        load_dataset(f"shards:{shard(tmp_path / 'b.tar', [('1.tif', b'x'), ('1.gif', b'x')])}")


def test_what_pillow_only_recognizes_is_no_image():
    found = known.readable_suffixes()
    assert {".jpg", ".png", ".gif", ".tif", ".bmp", ".webp"} <= found
    assert not found & {".h5", ".eps", ".wmf", ".mpg", ".pdf", ".txt", ".json"}
