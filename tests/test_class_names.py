"""Names of classes: data sets tell them, files carry them, and labels follow them."""

from __future__ import annotations

import io
import json
import logging
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from timm.data.imagenet_info import ImageNetInfo

import quietvit
from deployment_cases import quantized as quantized_case
from quietvit.classes import are_presumed
from quietvit.data import (
    ImageDataset,
    create_model,
    evaluate,
    evaluation_loader,
    load_dataset,
    load_weights,
    name_classes,
    names_of,
)
from quietvit.data.matching import in_words, matched
from quietvit.errors import QuietvitError
from quietvit.tasks import Classification
from quietvit.train import TrainResult, train
from quietvit.train.checkpoint import list_checkpoints
from test_cli import refused, run
from test_train_loop import config, interrupt

IMAGENET = ImageNetInfo("imagenet-1k")
WORDS = tuple(IMAGENET.label_descriptions())
CRANES = [place for place, words in enumerate(WORDS) if words == "crane"]
COLOURS = {"blue": (0, 0, 250), "green": (0, 250, 0), "red": (250, 0, 0)}


def png(colour) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(out, "PNG")
    return out.getvalue()


def folder(root, colours=COLOURS, count=8):
    """Images of one colour a class, no two alike."""
    for name, (red, green, blue) in colours.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            content = png((red + number % 5, green + number // 5, blue))
            (root / name / f"{number}.png").write_bytes(content)
    return root


def dataset(names, labels, total=None):
    return ImageDataset(
        labels,
        lambda index: Image.new("RGB", (8, 8)),
        str,
        num_classes=total if names is None else len(names),
        name="pictures",
        class_names=names,
    )


@pytest.mark.parametrize(
    ("own", "names", "expected"),
    [
        (("cat", "dog"), ("ant", "cat", "cow", "dog"), [1, 3]),
        (("Tabby-cat", "sea_lion"), ("sea lion", "tabby cat"), [1, 0]),
        (("Cat", "dog"), ("Cat", "cat", "dog"), [0, 2]),
        (("n01440764", "n02123045"), WORDS, [0, 281]),
        (("tench", "tabby"), WORDS, [0, 281]),
        ((WORDS[1], WORDS[0]), tuple(IMAGENET.label_names()), [1, 0]),
        (tuple(IMAGENET.label_names()[place] for place in CRANES), WORDS, CRANES),
    ],
)
def test_a_class_is_found_by_its_name(own, names, expected, caplog):
    caplog.set_level(logging.WARNING, "quietvit")
    found = matched(dataset(own, [0, 1, 1]), names, len(names))
    assert found.labels.tolist() == [expected[0], expected[1], expected[1]]
    assert (found.num_classes, found.class_names) == (len(names), names)
    assert ("matched by name" in caplog.text) == (expected != [0, 1])


def test_wordnet_ids_are_shown_in_words():
    assert in_words(("n01440764", "n00000000", "cat")) == (WORDS[0], "n00000000", "cat")


def test_classes_that_the_model_does_not_know_are_named():
    with pytest.raises(QuietvitError) as caught:
        matched(dataset(("cat", "horse", "tabby"), [0, 1]), ("cat", "horses"), 2)
    assert "1 classes that the model does not know" in str(caught.value)
    assert "'horse'; did you mean 'horses'" in str(caught.value)
    assert "tabby" not in str(caught.value), "of it there is no image"
    with pytest.raises(QuietvitError, match="'crane'"):
        matched(dataset(("crane", "tench"), [0, 1]), WORDS, 1000)
    with pytest.raises(QuietvitError, match=r"several classes that all match 'cat'"):
        matched(dataset(("CAT", "Cat"), [0, 1]), ("cat", "dog"), 2)


def test_without_names_unequal_numbers_are_told_and_impossible_ones_refused(caplog):
    caplog.set_level(logging.WARNING, "quietvit")
    given = dataset(("cat", "dog"), [0, 1])
    assert matched(given, None, 10) is given
    assert "pictures has 2 classes, but the model has 10" in caplog.text
    caplog.clear()
    assert matched(given, None, 2) is given
    assert matched(dataset(None, [0, 1], 2), ("cat", "dog"), 2).labels.tolist() == [0, 1]
    assert not caplog.text
    with pytest.raises(QuietvitError, match="label 4, but the model has only 3 classes"):
        matched(dataset(None, [0, 4]), ("a", "b", "c"), 3)


class Always(torch.nn.Module):
    """Says the class called ``answer``."""

    def __init__(self, names, answer):
        super().__init__()
        self.number, self.count = names.index(answer), len(names)
        name_classes(self, names)

    def forward(self, images):
        one = torch.tensor([self.number] * len(images))
        return torch.nn.functional.one_hot(one, self.count).float()


def test_evaluation_counts_by_name_also_of_parts_and_of_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import ToTensor

    folder(tmp_path, {"cat": (1, 2, 3), "dog": (4, 5, 6)})
    (tmp_path / "dog" / "0.png").unlink()
    model = Always(("ant", "bee", "cat", "dog"), "dog")
    own = evaluation_loader(load_dataset(f"imagefolder:{tmp_path}"), ToTensor())
    other = torch.utils.data.DataLoader(ImageFolder(tmp_path, ToTensor()), batch_size=4)
    for loader in (own, other):
        assert evaluate(model, loader) == pytest.approx(100 * 7 / 15)
    assert evaluate(torch.nn.Sequential(model), own) == 0.0, "nobody knows the names of this one"
    dogs = torch.utils.data.Subset(own.dataset, range(8, 15))
    assert evaluate(model, torch.utils.data.DataLoader(dogs, batch_size=4)) == 100.0
    with pytest.raises(QuietvitError, match="'cat'"):
        evaluate(Always(("ant", "dog"), "dog"), other)


def written(path, labels, metadata=None, **columns):
    table = pa.table({"image": [png((i, i, i)) for i in range(len(labels))], "label": labels})
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    features = {"label": {"names": metadata, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    noted = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(noted if metadata else None), path)
    return f"table:{path}"


def test_tables_tell_names_in_three_ways(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "quietvit")
    coded = pa.DictionaryArray.from_arrays(pa.array([1, 0, 1]), pa.array(["dog", "cat", "cow"]))
    found = load_dataset(written(tmp_path / "dictionary.parquet", coded))
    assert (found.class_names, found.labels.tolist()) == (("dog", "cat", "cow"), [1, 0, 1])
    other = pa.DictionaryArray.from_arrays(pa.array([0, 1]), pa.array(["cat", "emu"]))
    written(tmp_path / "dictionary2.parquet", other)
    both = load_dataset(f"table:{tmp_path}/dictionary*.parquet")
    assert both.class_names == ("dog", "cat", "cow", "emu")
    assert both.labels.tolist() == [1, 0, 1, 1, 3]
    found = load_dataset(written(tmp_path / "hub.parquet", [1, 0], ["ant", "bee", "cow"]))
    assert (found.class_names, found.num_classes) == (("ant", "bee", "cow"), 3)
    spec = written(tmp_path / "column.parquet", [2, 0, 2], class_name=["c", "a", "c"])
    assert load_dataset(spec).class_names == ("a", "class 1", "c")
    assert load_dataset(spec, num_classes=4).class_names == ("a", "class 1", "c", "class 3")
    assert not caplog.text
    spec = written(tmp_path / "two.parquet", [0, 0], label_name=["cat", "dog"])
    assert load_dataset(spec).class_names is None
    assert "two names for the class of label 0, 'cat' and 'dog'" in caplog.text
    assert load_dataset(written(tmp_path / "none.parquet", [0, 1])).class_names is None


def test_shards_tell_names_in_the_json_of_samples(tmp_path):
    path = tmp_path / "a.tar"
    samples = [("a", 1, "cat"), ("b", 0, "ant"), ("c", 1, "cat")]
    with tarfile.open(path, "w") as tar:
        for key, label, name in samples:
            told = json.dumps({"label": label, "class_name": name}).encode()
            for member, content in ((f"{key}.png", png((1, 2, 3))), (f"{key}.json", told)):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    for _ in range(2):  # the second time from the kept index
        assert load_dataset(f"shards:{path}").class_names == ("ant", "cat")


def test_only_what_may_be_a_head_of_imagenet_has_its_names(tmp_path):
    plain = timm.create_model("test_vit")
    assert names_of(plain) == WORDS
    assert are_presumed(plain)
    assert names_of(timm.create_model("test_vit", num_classes=7)) is None
    assert names_of(quantized_case("hf-vit").model) is None, "LABEL_0 is no name"
    assert names_of(create_model("test_vit")) is None, "a random head"
    save_file(plain.state_dict(), tmp_path / "w.safetensors")
    assert names_of(create_model("test_vit", weights=tmp_path / "w.safetensors")) == WORDS
    assert names_of(create_model("test_vit", 7, tmp_path / "w.safetensors")) is None
    built = create_model("test_vit")
    load_weights(built, tmp_path / "w.safetensors")
    assert names_of(built) == WORDS
    name_classes(built, None)
    quantized = quietvit.quantize(built, quietvit.RTN(), torch.randn(1, 3, 160, 160))
    assert names_of(quantized) is None
    assert names_of(quietvit.load(quantized.save(tmp_path / "x.qvit"))) is None
    with pytest.raises(QuietvitError, match="3 names were given for the 1000 classes"):
        name_classes(quantized, ("a", "b", "c"))
    with pytest.raises(QuietvitError, match="2 names were given for the 1000 classes"):
        quietvit.export(quantized, tmp_path / "x.onnx", labels=["a", "b"])


def test_names_go_from_a_folder_through_every_file_to_a_prediction(tmp_path):
    """As a user types it; the evaluation of two of three classes counts what predict says."""
    for split in ("train", "val"):
        folder(tmp_path / "images" / split)
    output = tmp_path / "run"
    arguments = ("-s", f'data.dataset="imagefolder:{tmp_path / "images"}"', "-s", "epochs=3",
                 "-s", "batch_size=8", "-s", "num_workers=0", "-s", "checkpoint.every=9",
                 "-s", "model.kwargs.depth=1",
                 "-s", "data.augmentation.crop=none", "-s", "decay.cd=none")  # fmt: skip
    done = run("train", "--recipe", "digits", *arguments, "-o", output)
    assert done.exit_code == 0, done.output
    names = ["blue", "green", "red"]
    for file in ("result.json", "classes.json"):
        assert json.loads((output / file).read_text())["class_names"] == names
    assert TrainResult.read(output).class_names == tuple(names)
    last = list_checkpoints(output / "checkpoints")[-1]
    for path in (output, last):
        with safe_open(path / "model.safetensors", "pt") as file:
            assert json.loads(file.metadata()["quietvit"]) == {"class_names": names}

    qvit, images = tmp_path / "m.qvit", f"imagefolder:{tmp_path / 'images'}"
    done = run("quantize", output, "--calibration", images, "--count", 8, "-o", qvit)
    assert done.exit_code == 0, done.output
    assert json.loads((qvit / "quantization.json").read_text())["class_names"] == names
    done = run("export", qvit)
    assert done.exit_code == 0, done.output
    assert "give its names" not in done.output
    onnx = qvit.with_suffix(".onnx")
    two = folder(tmp_path / "two", {name: COLOURS[name] for name in ("green", "red")}, count=1)
    said = {}
    for name in ("green", "red"):
        done = run("predict", onnx, two / name / "0.png", "--top", 1)
        said[name] = done.output.split()[-1]
    assert set(said.values()) <= set(names)
    right = 50.0 * sum(name == found for name, found in said.items())
    done = run("evaluate", qvit, "--images", two)
    assert done.exit_code == 0, done.output
    assert f"top-1 {right:.2f} %" in done.output
    assert run("evaluate", output, "--images", two).exit_code == 0
    (two / "red").rename(two / "read")
    for command in (("evaluate", output), ("check", onnx, "--against", qvit, "--seconds", 0)):
        assert "'read'; did you mean 'red'" in refused(run(*command, "--images", two))


def table_config(tmp_path, train_names, test_names):
    labels = np.arange(30) % 3
    data = written(tmp_path / "train.parquet", labels, train_names)
    written(tmp_path / "test.parquet", labels, test_names)
    return {"dataset": f"{data},{tmp_path / 'test.parquet'}"}


def test_test_images_follow_the_names_of_the_training_set(tmp_path):
    from quietvit.train.setup import task_of

    data = table_config(tmp_path, ["a", "b", "c"], ["b", "c", "a"])
    own, test = task_of(config(tmp_path / "run", data=data)).open_data()
    assert own.class_names == test.class_names == ("a", "b", "c")
    assert test.labels[:3].tolist() == [1, 2, 0]
    data = table_config(tmp_path, ["a", "b", "c"], ["a", "b", "d"])
    with pytest.raises(QuietvitError, match=r"the training set does not know .*'d'"):
        task_of(config(tmp_path / "run", data=data)).open_data()


def swapped_contents(images):
    (images / "red").rename(images / "aside")
    (images / "blue").rename(images / "red")
    (images / "aside").rename(images / "blue")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (swapped_contents, "first image of class 'red' .* is now in class 'blue'"),
        (lambda images: (images / "blue").rename(images / "violet"),
         "class 0 was 'blue' and is 'green'; 1 was 'green' and is 'red'; 2 was 'red' and is 'vio"),
    ],
)  # fmt: skip
def test_a_run_does_not_go_on_with_exchanged_classes(tmp_path, monkeypatch, change, told):
    for split in ("train", "val"):
        folder(tmp_path / "images" / split)
    data = {"dataset": f"imagefolder:{tmp_path / 'images'}"}
    interrupt(tmp_path / "run", monkeypatch, 3, data=data, batch_size=4, accumulation=1)
    for split in ("train", "val"):
        change(tmp_path / "images" / split)
    with pytest.raises(QuietvitError, match=told):
        train(config(tmp_path / "run", data=data, batch_size=4, accumulation=1), resume=True)


def test_a_run_of_an_earlier_version_goes_on_and_is_told_once(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "quietvit")
    facts = Classification.facts

    def earlier(self, own):
        found = facts(self, own)
        return {key: found[key] for key in ("images", "classes", "labels")}

    with monkeypatch.context() as patch:
        patch.setattr(Classification, "facts", earlier)
        interrupt(tmp_path / "run", monkeypatch, 5)
    interrupt(tmp_path / "run", monkeypatch, 9, resume=True)
    assert caplog.text.count("kept no class names") == 1
    found = train(config(tmp_path / "run"), resume=True, progress=False)
    assert caplog.text.count("kept no class names") == 1
    assert found.class_names == tuple("0123456789")
