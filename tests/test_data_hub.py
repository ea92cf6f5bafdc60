"""Data sets of the package datasets, from folders; the hub itself is not asked."""

from __future__ import annotations

import io
import pickle
import sys

import pytest
from PIL import Image

from quietvit import console
from quietvit.data import load_dataset
from quietvit.errors import QuietvitError

datasets = pytest.importorskip("datasets")


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def made(shades, image="image", label="label", kind=None, **more):
    columns = {
        image: [{"bytes": picture(shade), "path": None} for shade in shades],
        label: [shade % 3 for shade in shades],
    }
    kinds = {
        image: datasets.Image(),
        label: kind or datasets.ClassLabel(names=["ant", "bee", "cat", "dog"]),
    }
    for name, found in more.items():
        columns[name], kinds[name] = [0] * len(shades), found
    return datasets.Dataset.from_dict(columns, datasets.Features(kinds))


def saved(root, **splits):
    datasets.DatasetDict(splits).save_to_disk(str(root / "d"))
    return f"hf:{root / 'd'}"


def shades_of(dataset):
    return [dataset[i][0].getpixel((0, 0))[0] for i in range(len(dataset))]


def test_splits_images_labels_and_names_of_classes_come_back(tmp_path):
    spec = saved(tmp_path, train=made(range(7)), test=made([50, 51]))
    train, test = load_dataset(spec, "train"), load_dataset(spec, "test")
    assert (shades_of(train), shades_of(test)) == (list(range(7)), [50, 51])
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert train.class_names == test.class_names == ("ant", "bee", "cat", "dog")
    assert train.num_classes == test.num_classes == 4
    assert len(console.open_data(spec, "test")) == 2


def test_validation_images_go_before_the_hidden_test_images(tmp_path):
    hidden = made([1], kind=datasets.Value("int64"))
    spec = saved(tmp_path, train=made([1]), validation=made([9]), test=hidden)
    assert shades_of(load_dataset(spec, "test")) == [9]


def test_one_data_set_without_splits_is_for_training_alone(tmp_path):
    made(range(3)).save_to_disk(str(tmp_path / "d"))
    spec = f"hf:{tmp_path / 'd'}"
    assert shades_of(load_dataset(spec)) == shades_of(load_dataset(spec, "train")) == [0, 1, 2]
    assert len(console.open_data(spec, "test")) == 3
    with pytest.raises(QuietvitError, match=r"without splits.*DatasetDict"):
        load_dataset(spec, "test")


def test_columns_are_known_by_their_type(tmp_path):
    label = datasets.ClassLabel(names=["x"])
    fine = made([1, 2], "img", "fine_label", coarse_label=label, id=datasets.Value("int64"))
    spec = saved(tmp_path, train=fine)
    assert load_dataset(spec, "train").labels.tolist() == [1, 2]
    plain = made([1, 2], "photo", "label", kind=datasets.Value("int8"))
    spec = saved(tmp_path / "b", train=plain, test=made([0], kind=datasets.Value("int8")))
    assert load_dataset(spec, "train").class_names is None
    assert load_dataset(spec, "test").num_classes == 3
    spec = saved(tmp_path / "c", train=made([1], "image", "a", b=label))
    with pytest.raises(QuietvitError, match=r"2 columns of labels .*'a' \(ClassLabel\)"):
        load_dataset(spec, "train")
    spec = saved(tmp_path / "d", train=datasets.Dataset.from_dict({"label": [1]}))
    with pytest.raises(QuietvitError, match=r"no columns of images .*'label' \(Value\)"):
        load_dataset(spec, "train")


def test_rows_chosen_and_shuffled_by_datasets_stay_so(tmp_path):
    picked = made(range(9)).shuffle(seed=3).select([1, 4, 6])
    expected = [row.getpixel((0, 0))[0] for row in picked["image"]]
    dataset = load_dataset(saved(tmp_path, train=picked), "train")
    assert shades_of(dataset) == expected
    assert dataset.labels.tolist() == [shade % 3 for shade in expected]


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    spec = saved(tmp_path, train=made([1]), extra=made([2]))
    with pytest.raises(
        QuietvitError, match=r"splits 'train', 'extra'; none is called 'validation'"
    ):
        load_dataset(spec, "test")
    with pytest.raises(QuietvitError, match="ask for 'train' or 'test'"):
        load_dataset(spec)
    with pytest.raises(QuietvitError, match=r"could not be opened .*save_to_disk"):
        load_dataset(f"hf:{tmp_path / 'none'}", "train")
    empty = datasets.Dataset.from_dict(
        {"image": [None, {"bytes": None, "path": "/no.png"}], "label": [0, 0]},
        datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(1)}),
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(train=empty))
    dataset = load_dataset("hf:name", "train")
    for row, reason in enumerate(("neither bytes nor path", r"/no\.png could not be read")):
        with pytest.raises(QuietvitError, match=rf"row {row} of hf:.* has no image: .*{reason}"):
            dataset[row]


def test_a_name_on_the_hub_is_loaded_with_its_configuration(tmp_path, monkeypatch):
    asked = []

    def load(*arguments):
        asked.append(arguments)
        if "none" in arguments[0]:
            raise ConnectionError("no route\nto host")
        return datasets.DatasetDict(train=made([5]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert shades_of(load_dataset("hf:owner/name", "train")) == [5]
    assert shades_of(load_dataset("hf:owner/name:small", "train")) == [5]
    assert asked == [("owner/name", None), ("owner/name", "small")]
    with pytest.raises(QuietvitError, match=r"\(no route\); check the name and the connection"):
        load_dataset("hf:none", "train")


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(QuietvitError, match=r"pip install 'quietvit\[datasets\]'"):
        load_dataset("hf:owner/name", "train")


def test_it_travels_to_other_processes(tmp_path):
    dataset = load_dataset(saved(tmp_path, train=made(range(4))), "train")
    assert shades_of(pickle.loads(pickle.dumps(dataset))) == list(range(4))
