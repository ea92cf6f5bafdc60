"""The shipped fine-tuning recipes train on what they are for: folders of images, parquet tables."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from quietvit.data import create_model
from quietvit.train import load_recipe, train

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def jpeg(label: int, number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 60, (40, 40, 3), dtype=np.uint8)
    pixels[..., label] += 150
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def folder(root):
    for split, count in (("train", 8), ("val", 4)):
        for label, name in enumerate(("red", "green", "blue")):
            place = root / "images" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                (place / f"{number}.jpg").write_bytes(jpeg(label, number))
    return f"imagefolder:{root / 'images'}"


def photographs_at_hand():
    """The tables of CIFAR-10 for training and testing; none where they are not at hand."""
    real = Path(os.environ.get("QUIETVIT_TEST_DATA") or "/nowhere")
    found = [real / f"cifar10_{split}.parquet" for split in ("train", "test")]
    return found if all(path.is_file() for path in found) else []


def photographs(root):
    """Folders of photographs: as they are encoded for training, PNG files for testing."""
    found = photographs_at_hand()
    if not found:
        pytest.skip("QUIETVIT_TEST_DATA names no folder with CIFAR-10")
    for source, split, kind in zip(found, ("train", "val"), ("jpg", "png"), strict=True):
        for number, (image, label) in enumerate(rows_of(source, 24 if split == "train" else 12)):
            place = root / "images" / split / ("airplane", "automobile", "bird")[label]
            place.mkdir(parents=True, exist_ok=True)
            picture = Image.open(io.BytesIO(image))
            assert picture.format == "JPEG"
            if kind == "jpg":
                (place / f"{number}.jpg").write_bytes(image)
            else:
                picture.save(place / f"{number}.png")
    return f"imagefolder:{root / 'images'}"


def tables(root):
    """Real photographs where they are at hand, else coloured noise."""
    found = photographs_at_hand()
    if found:
        return tables_of(root, found)
    paths = []
    for split, count in (("train", 24), ("test", 12)):
        labels = [number % 3 for number in range(count)]
        images = [jpeg(label, number) for number, label in enumerate(labels)]
        paths.append(root / f"{split}.parquet")
        pq.write_table(pa.table({"image": images, "label": labels}), paths[-1])
    return "table:" + ",".join(map(str, paths))


def rows_of(source, count):
    """The first images of three classes in turn, encoded, with their labels."""
    rows = pq.ParquetFile(source).iter_batches(batch_size=400).__next__().to_pylist()
    label = next(key for key in rows[0] if "label" in key)
    image = next(key for key in rows[0] if key != label)
    by_class = [[row for row in rows if row[label] == chosen] for chosen in range(3)]
    kept = [by_class[number % 3][number // 3] for number in range(count)]
    return [(row[image], row[label]) for row in kept]


def tables_of(root, found):
    """The first images of three classes, as many as of the coloured ones."""
    paths = []
    for source, split, count in zip(found, ("train", "test"), (24, 12), strict=True):
        images, labels = zip(*rows_of(source, count), strict=True)
        paths.append(root / f"{split}.parquet")
        pq.write_table(pa.table({"image": images, "label": labels}), paths[-1])
    return "table:" + ",".join(map(str, paths))


@pytest.mark.parametrize(
    ("recipe", "source"),
    [
        ("finetune_imagefolder", folder),
        ("finetune_imagefolder", photographs),
        ("finetune_cifar10", tables),
    ],
)
def test_recipe_fine_tunes_from_weights(tmp_path, recipe, source):
    start = create_model("deit_tiny_patch16_224", 5, **SMALL)
    weights = tmp_path / "start.safetensors"
    save_file(start.state_dict(), weights)
    kwargs = "{" + ", ".join(f"{key} = {value}" for key, value in SMALL.items()) + "}"
    config = load_recipe(
        recipe,
        [
            f"data.dataset={source(tmp_path)}",
            f"model.weights={weights}",
            f"model.kwargs={kwargs}",
            "data.train_images=none",
            "data.test_images=none",
            "epochs=2",
            "batch_size=4",
            "schedule.warmup_epochs=0.5",
            "checkpoint.every=5",
            "num_workers=0",
            "log_every=2",
            "threads=1",
            f"output={tmp_path / 'run'}",
        ],
    )
    assert config.decay.cd is not None
    result = train(config, progress=False)
    trained = load_file(result.weights)
    assert result.steps == 12
    assert trained["head.weight"].shape == (3, 32)
    assert not torch.equal(
        trained["blocks.0.mlp.fc1.weight"], start.state_dict()["blocks.0.mlp.fc1.weight"]
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert any("penalty_cd" in row for row in rows)
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert 0 <= result.top1 <= 100
