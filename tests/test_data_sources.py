from __future__ import annotations

import io
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from quietvit.data import evaluation_loader, load_dataset, subset
from quietvit.data.evaluate import evaluate, worker_errors
from quietvit.errors import QuietvitError


def jpeg(shade: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (shade, shade, shade)).save(buffer, "JPEG")
    return buffer.getvalue()


def table(path, images, labels, **names):
    columns = {"image": images, "label": labels}
    pq.write_table(pa.table({names.get(k, k): v for k, v in columns.items()}), path)
    return path


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def test_digits_are_split_once_and_for_all_with_every_class_in_both_parts():
    train, test, whole = (load_dataset("embedded:digits", part) for part in ("train", "test", None))
    assert (len(train), len(test), len(whole)) == (1198, 599, 1797)
    shares = [np.bincount(part.labels, minlength=10) / len(part) for part in (train, test)]
    assert np.abs(shares[0] - shares[1]).max() < 0.005
    again = load_dataset("embedded:digits", "test")
    assert np.array_equal(again.labels, test.labels)
    assert all(again[i][0].tobytes() == test[i][0].tobytes() for i in range(0, 599, 50))
    assert train[0][0].mode == "RGB"
    assert train[0][0].size == (8, 8)
    assert train[0][0].getextrema()[1] == (0, 239)


@pytest.mark.parametrize("struct", [False, True])
def test_table_images_and_labels_come_back_in_order(tmp_path, struct):
    shades, labels = [0, 120, 240], [2, 0, 1]
    images = [jpeg(s) for s in shades]
    cells = [{"bytes": b, "path": None} for b in images] if struct else images
    dataset = load_dataset(f"table:{table(tmp_path / 'a.parquet', cells, labels)}", "train")
    assert dataset.num_classes == 3
    read = [dataset[i] for i in range(3)]
    assert [label for _, label in read] == labels
    assert [image.getpixel((0, 0))[0] for image, _ in read] == pytest.approx(shades, abs=2)


def test_the_test_table_has_the_classes_of_the_training_table(tmp_path):
    train = table(tmp_path / "a.parquet", [jpeg(0)] * 3, [0, 1, 4])
    test = table(tmp_path / "b.parquet", [jpeg(0)] * 2, [0, 1])
    assert load_dataset(f"table:{train},{test}", "test").num_classes == 5
    bad = table(tmp_path / "c.parquet", [jpeg(0)] * 2, [0, 5])
    with pytest.raises(QuietvitError, match=r"label of row 1 is 5, outside 0\.\.4"):
        load_dataset(f"table:{train},{bad}", "test")
    with pytest.raises(QuietvitError, match="names no test table"):
        load_dataset(f"table:{train}", "test")


def test_a_missing_or_truncated_image_names_its_row(tmp_path):
    images = [jpeg(5, 64), jpeg(5, 64)[:300], b"no image", None]
    path = table(tmp_path / "a.parquet", images, [0] * 4)
    dataset = load_dataset(f"table:{path}")
    assert dataset[0][0].size == (64, 64)
    for row, reason in ((1, "(?i:truncated)"), (2, "cannot identify")):
        with pytest.raises(QuietvitError, match=rf"row {row} of table .*a\.parquet.*{reason}"):
            dataset[row]
    with pytest.raises(QuietvitError, match=r"row 3 of the table .* has no image"):
        dataset[3]


def test_a_bad_image_in_a_worker_process_reads_like_one_in_this_process(tmp_path):
    path = table(tmp_path / "a.parquet", [jpeg(5), b"no image"], [0, 0])
    loader = evaluation_loader(load_dataset(f"table:{path}"), to_tensor, num_workers=1)
    with pytest.raises(QuietvitError) as caught:
        evaluate(torch.nn.Flatten(), loader)
    assert str(caught.value).startswith("the image at row 1 of table ")
    assert "\n" not in str(caught.value)
    with pytest.raises(QuietvitError, match=r"^plain$"), worker_errors():
        raise QuietvitError("plain")


def test_wrong_tables_are_refused_with_what_they_hold(tmp_path):
    path = table(tmp_path / "a.parquet", [jpeg(0)], [0], image="img", label="labels")
    with pytest.raises(QuietvitError, match=r"no column 'image'; it has 'img', 'labels'"):
        load_dataset(f"table:{path}")
    path = table(tmp_path / "b.parquet", [jpeg(0)], [0], label="labels")
    with pytest.raises(QuietvitError, match=r"no column 'label'.*did you mean 'labels'"):
        load_dataset(f"table:{path}")
    for labels, message in (
        ([0.5], "needs integers"),
        ([None], "row 0 .* has no label|needs integers"),
        ([-1], "label of row 0 is -1"),
    ):
        with pytest.raises(QuietvitError, match=message):
            load_dataset(f"table:{table(tmp_path / 'c.parquet', [jpeg(0)], labels)}")
    with pytest.raises(QuietvitError, match="of type string; it needs the encoded bytes"):
        load_dataset(f"table:{table(tmp_path / 'd.parquet', ['x'], [0])}")
    empty = table(tmp_path / "e.parquet", pa.array([], pa.binary()), pa.array([], pa.int64()))
    with pytest.raises(QuietvitError, match="no images"):
        load_dataset(f"table:{empty}")
    (tmp_path / "f.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(QuietvitError, match="could not be read as a parquet table"):
        load_dataset(f"table:{tmp_path / 'f.parquet'}")
    with pytest.raises(QuietvitError, match="does not exist"):
        load_dataset(f"table:{tmp_path / 'g.parquet'}")


def folder(root, split, names, count=2):
    for shade, name in enumerate(names):
        (root / split / name).mkdir(parents=True)
        for i in range(count):
            (root / split / name / f"{i}.jpg").write_bytes(jpeg(shade * 50))


def test_a_test_folder_lacking_a_class_keeps_the_labels_of_training(tmp_path):
    folder(tmp_path, "train", ["ant", "bee", "cat"])
    folder(tmp_path, "val", ["ant", "cat"])
    train = load_dataset(f"imagefolder:{tmp_path}", "train")
    test = load_dataset(f"imagefolder:{tmp_path}", "test")
    assert train.class_names == test.class_names == ("ant", "bee", "cat")
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert test.labels.tolist() == [0, 0, 2, 2]
    assert test.num_classes == 3
    assert test[2][0].getpixel((0, 0))[0] == pytest.approx(50, abs=2)


def test_wrong_folders_are_refused_with_what_they_hold(tmp_path):
    with pytest.raises(QuietvitError, match="does not exist"):
        load_dataset(f"imagefolder:{tmp_path / 'none'}", "train")
    folder(tmp_path, "train", ["ant", "bee"])
    with pytest.raises(QuietvitError, match=r"no folder 'val' or 'test' \(it holds train\)"):
        load_dataset(f"imagefolder:{tmp_path}", "test")
    folder(tmp_path, "test", ["ants"])
    with pytest.raises(QuietvitError, match=r"class 'ants' .*did you mean 'ant'"):
        load_dataset(f"imagefolder:{tmp_path}", "test")
    (tmp_path / "train" / "bee" / "1.jpg").write_bytes(jpeg(9, 64)[:200])
    with pytest.raises(QuietvitError, match=r"bee/1\.jpg.*could not be decoded"):
        load_dataset(f"imagefolder:{tmp_path}", "train")[3]
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(QuietvitError, match="holds no images"):
        load_dataset(f"imagefolder:{tmp_path / 'empty'}", "train")


def test_what_is_hidden_is_neither_a_class_nor_an_image(tmp_path):
    folder(tmp_path, "train", [".ipynb_checkpoints", "ant", "bee"])
    folder(tmp_path, "val", ["ant", "bee"])
    (tmp_path / "train" / "ant" / "._0.jpg").write_bytes(b"of another system")
    (tmp_path / ".cache").mkdir()
    train = load_dataset(f"imagefolder:{tmp_path}", "train")
    assert (train.class_names, train.labels.tolist()) == (("ant", "bee"), [0, 0, 1, 1])
    assert load_dataset(f"imagefolder:{tmp_path}", "test").labels.tolist() == [0, 0, 1, 1]


def test_links_are_followed_and_circles_are_not(tmp_path):
    folder(tmp_path, "train", ["ant", "bee"], count=1)
    folder(tmp_path, "elsewhere", ["more", "wasp"])
    ant = tmp_path / "train" / "ant"
    (ant / "more").symlink_to(tmp_path / "elsewhere" / "more")
    (ant / "one.jpg").symlink_to(ant / "0.jpg")
    (ant / "gone.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "train" / "wasp").symlink_to(tmp_path / "elsewhere" / "wasp")
    for name, target in (("up", ant), ("train", tmp_path / "train"), ("root", tmp_path)):
        (ant / "more" / name).symlink_to(target)
        (ant / name).symlink_to(target)
    (ant / "itself").symlink_to(ant / "itself")
    train = load_dataset(f"imagefolder:{tmp_path}", "train")
    names = [train.where(i).removeprefix(f"{tmp_path}/train/") for i in range(len(train))]
    assert names == [
        *(f"ant/{name}.jpg" for name in ("0", "gone", "more/0", "more/1", "one")),
        *("bee/0.jpg", "wasp/0.jpg", "wasp/1.jpg"),
    ]
    assert train.labels.tolist() == [0] * 5 + [1] + [2] * 2
    with pytest.raises(QuietvitError, match=r"ant/gone\.jpg could not be read"):
        train[1]


def test_a_training_class_without_images_is_refused_by_name(tmp_path):
    for split in ("train", "val"):
        folder(tmp_path, split, ["ant", "bee"])
        (tmp_path / split / "cat").mkdir()
        (tmp_path / split / "cat" / "notes.txt").write_text("to do")
    with pytest.raises(QuietvitError, match=r"class 'cat' of .*/train holds no images.*remove"):
        load_dataset(f"imagefolder:{tmp_path}", "train")
    assert load_dataset(f"imagefolder:{tmp_path}", "test").num_classes == 3


def test_splits_are_never_read_as_classes(tmp_path):
    folder(tmp_path, "val", ["ant", "bee"])
    with pytest.raises(QuietvitError, match="splits, not classes"):
        load_dataset(f"imagefolder:{tmp_path}")
    folder(tmp_path, "train", ["ant", "bee"])
    (tmp_path / "notes").mkdir()
    with pytest.raises(QuietvitError, match=r"'train' and 'val', which.*imagefolder:.*/train'"):
        load_dataset(f"imagefolder:{tmp_path}")
    assert load_dataset(f"imagefolder:{tmp_path / 'train'}").class_names == ("ant", "bee")


def test_a_class_may_be_called_train(tmp_path):
    folder(tmp_path, ".", ["car", "ship", "train"])
    assert load_dataset(f"imagefolder:{tmp_path}").class_names == ("car", "ship", "train")


def test_a_folder_of_test_images_alone_brings_its_own_classes(tmp_path):
    folder(tmp_path, "val", ["ant", "bee"])
    test = load_dataset(f"imagefolder:{tmp_path}", "test")
    assert (test.class_names, test.labels.tolist()) == (("ant", "bee"), [0, 0, 1, 1])
    with pytest.raises(QuietvitError, match=r"no folder 'train' \(it holds val\)"):
        load_dataset(f"imagefolder:{tmp_path}", "train")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("embeded:digits", "did you mean 'embedded'"),
        ("embedded:digit", "did you mean 'digits'"),
        ("digits", "write 'embedded:digits'"),
        ("table:", "no data set is named"),
        ("hub:owner/name", r"'hf:owner/name\[:configuration\]' \(from the hub over the network"),
        ("table:a,b,c", "one or two names, not 3"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_known(spec, message):
    with pytest.raises(QuietvitError, match=message):
        load_dataset(spec)


def test_a_subset_is_the_same_each_time_and_keeps_pictures_with_labels():
    whole = load_dataset("embedded:digits", "test")
    part = subset(whole, 50)
    assert part.labels.tolist() == subset(whole, 50).labels.tolist()
    assert part.num_classes == 10
    assert subset(whole, None) is whole
    known = {(whole[i][0].tobytes(), whole[i][1]) for i in range(len(whole))}
    drawn = [(part[i][0].tobytes(), part[i][1]) for i in range(50)]
    assert set(drawn) <= known
    with pytest.raises(QuietvitError, match="holds 599"):
        subset(whole, 600)


def test_data_sets_travel_to_worker_processes_by_any_start_method(tmp_path):
    path = table(tmp_path / "a.parquet", [jpeg(9)] * 2, [0, 1])
    folder(tmp_path, "train", ["ant"])
    for spec in (f"table:{path}", f"imagefolder:{tmp_path}", "embedded:digits"):
        dataset = subset(load_dataset(spec, "train"), 1)
        copy = pickle.loads(pickle.dumps(dataset))
        assert copy[0][0].tobytes() == dataset[0][0].tobytes()
