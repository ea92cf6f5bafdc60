"""Tables of any size and number of files: the same images, read by row group or record batch."""

from __future__ import annotations

import io
import logging
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from quietvit.data import load_dataset, table
from quietvit.data.images import Transformed
from quietvit.errors import QuietvitError


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def content(shades):
    return pa.table(
        {
            "other": pa.array(["x" * 1000] * len(shades), pa.string()),
            "image": pa.array([picture(shade) for shade in shades], pa.binary()),
            "label": pa.array([shade % 3 for shade in shades], pa.int32()),
        }
    )


def write(path, shades, rows=4):
    """Write by the ending: parquet, feather (compressed), arrow file, or .stream.arrow."""
    data = content(shades)
    if path.suffix == ".parquet":
        pq.write_table(data, path, row_group_size=rows)
    elif path.suffix == ".feather":
        pyarrow.feather.write_feather(data, str(path), compression="lz4", chunksize=rows)
    else:
        new = pa.ipc.new_stream if ".stream" in path.name else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as sink, new(sink, data.schema) as writer:
            writer.write_table(data, max_chunksize=rows)
    return path


def shade_of(dataset, index):
    return dataset[index][0].getpixel((0, 0))[0]


def first_pixel(image):
    return image.getpixel((0, 0))[0]


ENDINGS = [".parquet", ".feather", ".arrow", ".stream.arrow"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_many_files_are_one_table_in_order_of_their_names(tmp_path, ending):
    for number, count in enumerate((10, 0, 7)):
        write(tmp_path / f"t-{number}{ending}", [20 * number + i for i in range(count)])
    expected = [*range(10), *range(40, 47)]
    for part in (f"t-*{ending}", f"t-{{0..2}}{ending}", ""):
        dataset = load_dataset(f"table:{tmp_path}/{part}")
        assert [shade_of(dataset, i) for i in range(17)] == expected
        assert dataset.labels.tolist() == [shade % 3 for shade in expected]
    back = [shade_of(dataset, i) for i in reversed(range(17))]
    assert back == expected[::-1]
    assert dataset.where(12).startswith("row 2 of ")
    assert dataset.where(12).endswith(f"t-2{ending}")
    groups = dataset.groups
    assert [int((groups == group).sum()) for group in np.unique(groups)] == [4, 4, 2, 4, 3]


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_test_part_has_the_classes_of_all_training_files(tmp_path, ending):
    write(tmp_path / f"train-0{ending}", [0, 1])
    write(tmp_path / f"train-1{ending}", [2])
    write(tmp_path / f"test{ending}", [0, 1])
    test = load_dataset(f"table:{tmp_path}/train-*{ending},{tmp_path}/test{ending}", "test")
    assert (len(test), test.num_classes) == (2, 3)


def test_no_more_than_the_limit_is_held_in_memory(tmp_path, monkeypatch):
    rows, size = 60, 100_000
    noise = np.random.default_rng(0).integers(0, 256, (rows, size), dtype=np.uint8)
    data = pa.table({"image": [row.tobytes() for row in noise], "label": [0] * rows})
    for path in (tmp_path / "a.parquet", tmp_path / "b.feather"):
        if path.suffix == ".parquet":
            pq.write_table(data, path, row_group_size=5)
        else:
            pyarrow.feather.write_feather(data, str(path), compression="lz4", chunksize=5)
    del data
    monkeypatch.setattr(table, "KEPT_BYTES", 11 * size)
    for path in (tmp_path / "a.parquet", tmp_path / "b.feather"):
        before = pa.total_allocated_bytes()
        dataset = load_dataset(f"table:{path}")
        assert pa.total_allocated_bytes() - before < size, "labels are read alone"
        for index in np.random.default_rng(1).permutation(rows):
            assert dataset._read(int(index)) == noise[index].tobytes()
            assert pa.total_allocated_bytes() - before < 20 * size
        del dataset


def reads(dataset, order, monkeypatch):
    """Return how many row groups were decoded on the way."""
    decoded = []
    chunk = table._Parquet.chunk
    with monkeypatch.context() as patch:
        patch.setattr(table._Parquet, "chunk", lambda *a: decoded.append(a[1]) or chunk(*a))
        for index in order:
            dataset._read(int(index))
    return len(decoded)


def test_a_small_table_is_decoded_once_in_any_order(tmp_path, monkeypatch):
    dataset = load_dataset(f"table:{write(tmp_path / 'a.parquet', range(40), rows=8)}")
    order = [*np.random.default_rng(0).permutation(40), *range(40)]
    assert reads(dataset, order, monkeypatch) == 5


def test_reading_against_the_grain_is_said_once_with_the_remedy(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "quietvit")
    path = write(tmp_path / "a.parquet", [i % 256 for i in range(400)], rows=10)
    monkeypatch.setattr(table, "KEPT_BYTES", 1)
    dataset = load_dataset(f"table:{path}")
    assert reads(dataset, range(400), monkeypatch) == 40
    assert not caplog.text, "in order it is read well"
    dataset = load_dataset(f"table:{path}")
    order = np.random.default_rng(0).permutation(400)
    assert reads(dataset, order, monkeypatch) > 300
    assert caplog.text.count("shuffle_window") == 1


@pytest.mark.parametrize("ending", ENDINGS)
def test_workers_started_in_any_way_read_the_same(tmp_path, ending):
    dataset = load_dataset(f"table:{write(tmp_path / f'a{ending}', range(12))}")
    assert shade_of(dataset, 5) == 5
    copy = pickle.loads(pickle.dumps(dataset))
    assert [shade_of(copy, i) for i in range(12)] == list(range(12))
    loader = DataLoader(Transformed(dataset, first_pixel), batch_size=3, num_workers=2)
    assert [int(shade) for batch, _ in loader for shade in batch] == list(range(12))


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_damaged_file_among_many_is_named(tmp_path, ending):
    write(tmp_path / f"a{ending}", range(4))
    path = write(tmp_path / f"b{ending}", range(40))
    path.write_bytes(path.read_bytes()[:300])
    kind = "a parquet" if ending == ".parquet" else "an arrow"
    with pytest.raises(QuietvitError, match=rf"b\{ending} could not be read as {kind} table"):
        load_dataset(f"table:{tmp_path}")


def test_a_row_without_image_or_label_is_named_with_its_file(tmp_path):
    write(tmp_path / "a.parquet", range(6))
    bad = pa.table({"image": [picture(0), None], "label": [0, 1]})
    pq.write_table(bad, tmp_path / "b.parquet", row_group_size=1)
    dataset = load_dataset(f"table:{tmp_path}")
    with pytest.raises(QuietvitError, match=r"row 1 of the table .*b\.parquet has no image"):
        dataset[7]
    bad = pa.table({"image": [picture(0)] * 2, "label": [0, None]})
    pq.write_table(bad, tmp_path / "b.parquet")
    with pytest.raises(QuietvitError, match=r"row 1 of .*b\.parquet has no label"):
        load_dataset(f"table:{tmp_path}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(QuietvitError, match=r"holds no table ending in \.parquet, \.arrow"):
        load_dataset(f"table:{tmp_path / 'empty'}")
