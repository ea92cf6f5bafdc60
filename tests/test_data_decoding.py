"""One decoder for every source: upright, scaled to 8 bits, laid on white, or refused by name."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from quietvit.data import calibration_images, create_model, evaluation_transform, load_dataset
from quietvit.data.decoding import decode
from quietvit.deployment.predicting import read_image
from quietvit.errors import QuietvitError

GREY = np.add.outer(np.arange(6) * 10, np.arange(8) * 20).astype(np.uint8)  # 0..190, no symmetry
COLOURS = np.stack([GREY, 255 - GREY, np.full_like(GREY, 80)], axis=-1)
HALF = np.where(np.arange(8) < 4, 0, 255).astype(np.uint8) * np.ones((6, 1), np.uint8)  # alpha


def grey(values=GREY):
    return np.repeat(values[..., None], 3, axis=-1)


def on_white(colours, alpha=HALF):
    return np.where(alpha[..., None] == 0, 255, colours)


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def frames(form, **options):
    first, second = Image.fromarray(COLOURS), Image.fromarray(255 - COLOURS)
    return encoded(first, form, save_all=True, append_images=[second], **options)


def oriented(form, orientation, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(COLOURS), form, exif=exif.tobytes(), **options)


def turned(orientation):
    """What a viewer shows: the definitions of EXIF 2.3, section 4.6.4, in terms of arrays."""
    x = COLOURS.transpose(1, 0, 2) if orientation > 4 else COLOURS
    if orientation in (3, 4, 7, 8):
        x = x[::-1]
    if orientation in (2, 3, 6, 7):
        x = x[:, ::-1]
    return x


def palette(transparency):
    image = Image.frombytes("P", (8, 6), (HALF // 255).tobytes())
    image.putpalette([200, 100, 50, 10, 20, 30] + [0] * 762)
    options = {} if transparency is None else {"transparency": transparency}
    return encoded(image, "PNG", **options)


def pillow(mode):
    return Image.fromarray(COLOURS).convert(mode)


SIXTEEN = GREY.astype(np.uint16) * 257
RGBA = Image.fromarray(np.dstack([COLOURS, HALF]))
LA = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(HALF)])
IMAGES = {
    "grey 8": (encoded(Image.fromarray(GREY), "PNG"), grey()),
    "bilevel": (encoded(Image.fromarray(HALF > 0), "PNG"), grey(HALF)),
    "grey 16 PNG": (encoded(Image.fromarray(SIXTEEN), "PNG"), grey()),
    "grey 16 TIFF": (encoded(Image.fromarray(SIXTEEN), "TIFF"), grey()),
    "grey 16 TIFF big endian": (
        encoded(Image.frombytes("I;16B", (8, 6), SIXTEEN.astype(">u2").tobytes()), "TIFF"),
        grey(),
    ),
    "grey 16 PGM": (b"P5 8 6 65535\n" + SIXTEEN.astype(">u2").tobytes(), grey()),
    "int TIFF of 8 bits": (encoded(Image.fromarray(GREY.astype(np.int32)), "TIFF"), grey()),
    "int TIFF of 16 bits": (encoded(Image.fromarray(SIXTEEN.astype(np.int32)), "TIFF"), grey()),
    "float TIFF 0..1": (encoded(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"), grey()),
    "float TIFF 0..255": (encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"), grey()),
    "RGBA PNG": (encoded(RGBA, "PNG"), on_white(COLOURS)),
    "RGBA WebP": (encoded(RGBA, "WEBP", lossless=True), on_white(COLOURS)),
    "LA": (encoded(LA, "PNG"), on_white(grey())),
    "palette": (
        palette(None),
        np.where(HALF[..., None] == 0, [200, 100, 50], [10, 20, 30]),
    ),
    "palette, transparent": (
        palette(0),
        np.where(HALF[..., None] == 0, [255, 255, 255], [10, 20, 30]),
    ),
    "transparent grey": (
        encoded(Image.fromarray(GREY), "PNG", transparency=0),
        on_white(grey(), GREY),
    ),
    "CMYK TIFF": (encoded(pillow("CMYK"), "TIFF"), COLOURS),
    "GIF": (encoded(Image.fromarray(GREY), "GIF"), grey()),
    "GIF of frames": (frames("GIF"), COLOURS),
    "TIFF of frames": (frames("TIFF"), COLOURS),
    "APNG": (frames("PNG"), COLOURS),
    **{
        f"{form} turned {number}": (oriented(form, number, **options), turned(number))
        for form, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}))
        for number in range(1, 9)
    },
    "JPEG turned 6": (oriented("JPEG", 6, quality=100, subsampling=0), turned(6)),
    "CMYK JPEG, inverted by Adobe": (encoded(pillow("CMYK"), "JPEG", quality=100), COLOURS),
    "YCbCr JPEG": (encoded(pillow("YCbCr"), "JPEG", quality=100, subsampling=0), COLOURS),
}
LOSSY = ("JPEG", "GIF of")


def sources(folder: Path, contents: list[bytes]):
    """The same encoded images in every source that takes files; numbered, in order."""
    names = [f"{i:03d}.png" for i in range(len(contents))]  # Pillow looks at the content alone
    (folder / "images" / "one").mkdir(parents=True)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, content in zip(names, contents, strict=True):
            (folder / "images" / "one" / name).write_bytes(content)
            for member, data in ((name, content), (name.replace("png", "cls"), b"0")):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    labels = [0] * len(contents)
    pq.write_table(pa.table({"image": contents, "label": labels}), folder / "a.parquet")
    yield "folder", load_dataset(f"imagefolder:{folder}/images")
    yield "unlabelled folder", load_dataset(f"imagefolder:{folder}/images/one", labels=False)
    yield "shards", load_dataset(f"shards:{folder}/a.tar")
    yield "table", load_dataset(f"table:{folder}/a.parquet")
    yield "unlabelled table", load_dataset(f"table:{folder}/a.parquet", labels=False)
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": content, "path": None} for content in contents]
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["x"])}
    rows = {"image": cells, "label": labels}
    made = datasets.Dataset.from_dict(rows, datasets.Features(kinds))
    made.save_to_disk(str(folder / "hub"))
    yield "hub", load_dataset(f"hf:{folder}/hub")


def test_every_mode_and_orientation_is_the_same_from_every_source(tmp_path):
    contents = [content for content, _ in IMAGES.values()]
    for source, dataset in sources(tmp_path, contents):
        for index, (name, (_, expected)) in enumerate(IMAGES.items()):
            image = dataset[index][0]
            assert image.mode == "RGB", (source, name)
            found = np.asarray(image).astype(int)
            assert found.shape == expected.shape, (source, name)
            room = 12 if any(kind in name for kind in LOSSY) else 1
            assert np.abs(found - expected).max() <= room, (source, name)
    for index, (name, _) in enumerate(IMAGES.items()):
        path = tmp_path / "images" / "one" / f"{index:03d}.png"
        opened = Image.open(path)
        before = opened.mode, opened.size
        by_name, given = read_image(path), read_image(opened)
        assert by_name.tobytes() == given.tobytes() == dataset[index][0].tobytes(), name
        assert read_image(by_name).tobytes() == by_name.tobytes(), f"{name}, decoded twice"
        assert name.startswith("TIFF turned") or (opened.mode, opened.size) == before


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "LAB", "RGBX", "RGBa", "P", "PA", "La"])
def test_pillow_images_of_any_mode_keep_their_colours(mode):
    if mode == "LAB":
        from PIL import ImageCms

        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(Image.fromarray(COLOURS), srgb, lab, outputMode="LAB")
    elif mode == "PA":
        image = LA.convert("PA")
        image.putalpha(LA.getchannel("A"))
    elif mode in ("RGBa", "La"):
        image = {"RGBa": RGBA, "La": LA}[mode].convert(mode)
    else:
        image = pillow(mode)
    expected = {"RGBa": on_white(COLOURS), "La": on_white(grey()), "PA": on_white(grey())}
    found = np.asarray(decode(image, lambda: "it")).astype(int)
    room = {"LAB": 30, "HSV": 6, "YCbCr": 3, "P": 60}.get(mode, 1)
    assert np.abs(found - expected.get(mode, COLOURS)).max() <= room


def test_arrays_follow_the_same_rules_and_other_shapes_are_refused():
    for array in (COLOURS, COLOURS / 255, COLOURS.astype(np.uint16) * 257, COLOURS.astype(int)):
        assert np.array_equal(np.asarray(decode(array, lambda: "it")), COLOURS)
    assert np.array_equal(np.asarray(decode(GREY[..., None], lambda: "it")), grey())
    assert np.array_equal(np.asarray(decode(HALF > 0, lambda: "it")), grey(HALF))
    for shape in ((3, 6, 8), (1, 6, 8, 3), (6,), (0, 8, 3)):
        with pytest.raises(QuietvitError, match=r"is an array of shape .*\(height, width, 3\)"):
            decode(np.zeros(shape, np.uint8), lambda: "it")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (np.float32([[-1, 1]]), "from -1 to 1"),
        (np.float32([[0, 1000]]), "from 0 to 1000"),
        (np.float32([[0, 1.5]]), "from 0 to 1.5"),
        (np.float32([[0, np.nan]]), "nan"),
        (np.int32([[-3, 5]]), "from -3 to 5"),
        (np.int32([[0, 70000]]), "from 0 to 70000"),
    ],
)
def test_values_of_no_known_range_are_refused_with_their_numbers(values, told):
    for content in (encoded(Image.fromarray(values), "TIFF"), Image.fromarray(values), values):
        with pytest.raises(QuietvitError, match=rf"image at row 3 holds values.*{told}.*Scale"):
            decode(content, lambda: "row 3")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", r"it is empty \(0 bytes\)"),
        (
            b"<html>nothing</html>",
            r"cannot identify its format \(20 bytes, beginning with b'<html>",
        ),
        (b"\0\0\0\x18ftypheic" + bytes(20), "pip install pillow-heif|decoded"),
        (b"\xff\x0a" + bytes(20), "pip install pillow-jxl-plugin|decoded"),
        (encoded(Image.fromarray(COLOURS), "PNG")[:60], "bytes"),
    ],
)
def test_what_cannot_be_decoded_is_named_with_the_reason(content, told):
    with pytest.raises(QuietvitError, match=told) as caught:
        decode(content, lambda: "a/b.jpg of the data set")
    assert "a/b.jpg of the data set" in str(caught.value)
    assert "0x" not in str(caught.value).replace("\\x", "")


def test_a_damaged_exif_block_does_not_cost_the_image():
    content = encoded(Image.fromarray(COLOURS), "PNG", exif=b"Exif\0\0MM\0*\0\0\xff\xff")
    assert np.array_equal(np.asarray(decode(content, lambda: "it")), COLOURS)


@pytest.mark.slow
def test_photographs_keep_their_class_turned_or_in_16_bits(test_data, tmp_path):
    """Top-1 of DeiT-Tiny, of which clipping left nothing and a quarter turn a third."""
    model = create_model(
        "deit_tiny_patch16_224", weights=test_data / "deit_tiny_patch16_224.safetensors"
    ).eval()
    given = load_dataset(f"table:{test_data / 'imagenet_dev_1000.parquet'}")
    exif = Image.Exif()
    exif[0x0112] = 6
    for index in range(0, 160, 20):
        upright = given[index][0]
        wide = np.asarray(upright.convert("L")).astype(np.uint16) * 257
        turned = upright.transpose(Image.Transpose.ROTATE_90)
        for kind, content in (
            ("plain/a", encoded(upright, "PNG")),
            ("plain/b", encoded(upright.convert("L"), "PNG")),
            ("other/a", encoded(turned, "PNG", exif=exif.tobytes())),
            ("other/b", encoded(Image.fromarray(wide), "PNG")),
        ):
            (tmp_path / kind).mkdir(parents=True, exist_ok=True)
            (tmp_path / kind / f"{index:03d}.png").write_bytes(content)
    transform = evaluation_transform(model)
    folders = [
        load_dataset(f"imagefolder:{tmp_path / name}", labels=False) for name in ("plain", "other")
    ]
    plain, other = (calibration_images(folder, 16, transform) for folder in folders)
    with torch.no_grad():
        assert torch.equal(model(plain).argmax(-1), model(other).argmax(-1))
