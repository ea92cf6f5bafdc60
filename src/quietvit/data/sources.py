"""Data sets by name: embedded digits, image folders, parquet tables. Samples: (PIL RGB, label).

Images are decoded one by one when asked for. How they become tensors is decided in ``transforms``.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from quietvit.errors import QuietvitError, nearest

Split = Literal["train", "test"] | None
Sample = tuple[Image.Image, int]
T = TypeVar("T")

EMBEDDED = ("digits",)
_SPLITS = {"train", "val", "test"}
_FORMS = (
    "'embedded:digits', 'imagefolder:/path' (with train/ and val/ or test/ inside) or "
    "'table:/train.parquet[,/test.parquet]'"
)


class ImageDataset(Dataset[Sample]):
    """Labelled images, decoded on access: ``dataset[i] -> (PIL image in RGB, label)``.

    Args:
        labels: one integer in 0..num_classes-1 per image.
        read: index -> the encoded bytes, or a PIL image.
        where: index -> a few words naming the image in error messages.
        num_classes: number of classes; None takes the largest label plus one.
        name: names the data set in error messages.

    Raises:
        QuietvitError: no images at all, or a label outside 0..num_classes-1.
    """

    def __init__(
        self,
        labels: Sequence[int] | np.ndarray,
        read: Callable[[int], bytes | Image.Image],
        where: Callable[[int], str],
        *,
        num_classes: int | None = None,
        name: str = "the data set",
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)
        self.name = name
        self.class_names = class_names
        self._read, self._where = read, where
        if len(self.labels) == 0:
            raise QuietvitError(f"{name} holds no images at all; check the path and its contents.")
        self.num_classes = int(self.labels.max()) + 1 if num_classes is None else num_classes
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= self.num_classes))
        if len(outside):
            first = int(outside[0])
            raise QuietvitError(
                f"{name}: the label of {where(first)} is {int(self.labels[first])}, outside "
                f"0..{self.num_classes - 1} ({len(outside)} such labels); labels count from 0, so "
                "correct them or state the right number of classes."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        content = self._read(index)
        if isinstance(content, Image.Image):
            return content.convert("RGB"), int(self.labels[index])
        return _decode(content, f"{self._where(index)} of {self.name}"), int(self.labels[index])


class Transformed(Dataset[tuple[Tensor, int]]):
    """``dataset`` with its images transformed: samples are (tensor (3, H, W), label)."""

    def __init__(self, dataset: Dataset[Sample], transform: Callable[[Image.Image], Tensor]):
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[index]
        return self.transform(image), label


def load_dataset(spec: str, split: Split = None, *, num_classes: int | None = None) -> ImageDataset:
    """Open the data set that ``spec`` names.

    Args:
        spec: ``embedded:digits`` (1797 handwritten digits of 8 x 8 pixels shipped with
            scikit-learn: 1198 for training, 599 for testing, stratified, always the same ones),
            ``imagefolder:/path`` with ``train/`` and ``val/`` or ``test/`` inside, one folder a
            class (the classes are those of ``train/`` where there is one), or
            ``table:/train.parquet,/test.parquet`` with columns ``image`` (encoded bytes, or a
            struct with ``bytes``) and ``label`` (integer).
        split: ``train``, ``test``, or None for everything: all digits, the folder itself as one
            folder a class (refused where its folders are splits), the only table.
        num_classes: refuse labels at or above it; None takes it from the training split.

    Raises:
        QuietvitError: unknown form, missing path or column, zero images, label out of range. A
            missing or truncated image raises when it is read, naming file or row.
    """
    form, _, rest = spec.partition(":")
    if split not in ("train", "test", None):
        raise QuietvitError(f"split is 'train', 'test' or None, not {split!r}.")
    if form == "embedded":
        return _embedded(rest, split, num_classes)
    if form == "imagefolder" and rest:
        return _image_folder(Path(rest).expanduser(), split, num_classes)
    if form == "table" and rest:
        paths = [Path(part.strip()).expanduser() for part in rest.split(",") if part.strip()]
        return _table(paths, split, num_classes)
    raise QuietvitError(
        f"no data set is named {spec!r}{nearest(form, ['embedded', 'imagefolder', 'table'])}; "
        f"write {_FORMS}."
    )


def subset(dataset: ImageDataset, count: int | None, seed: int = 0) -> ImageDataset:
    """Return ``count`` images drawn without replacement (all for None), the same for every call.

    Raises:
        QuietvitError: ``count`` is below 1 or more than there are.
    """
    if count is None:
        return dataset
    if not 1 <= count <= len(dataset):
        raise QuietvitError(
            f"{count} images of {dataset.name} were asked for, which holds {len(dataset)}; ask "
            f"for 1 to {len(dataset)}."
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:count])
    return ImageDataset(
        dataset.labels[chosen],
        partial(_chosen, dataset._read, chosen),
        partial(_chosen, dataset._where, chosen),
        num_classes=dataset.num_classes,
        name=dataset.name,
        class_names=dataset.class_names,
    )


def _embedded(name: str, split: Split, num_classes: int | None) -> ImageDataset:
    if name not in EMBEDDED:
        raise QuietvitError(
            f"no embedded data set is named {name!r}{nearest(name, EMBEDDED)}; there is: "
            f"{', '.join(EMBEDDED)}."
        )
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    chosen = np.arange(len(digits.target))
    if split is not None:
        parts = train_test_split(chosen, test_size=1 / 3, random_state=0, stratify=digits.target)
        chosen = np.sort(parts[0 if split == "train" else 1])
    pixels = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return ImageDataset(
        digits.target[chosen],
        partial(_picture, pixels),
        "image {}".format,
        num_classes=10 if num_classes is None else num_classes,
        name="embedded:digits",
        class_names=tuple(str(digit) for digit in range(10)),
    )


def _image_folder(root: Path, split: Split, num_classes: int | None) -> ImageDataset:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not root.is_dir():
        raise QuietvitError(f"the folder {root} of the data set does not exist; check the path.")
    if split is None and holds_splits(root):
        held = sorted(entry.name for entry in root.iterdir() if entry.name in _SPLITS)
        raise QuietvitError(
            f"{root} holds {' and '.join(map(repr, held))}, which are splits and no classes; ask "
            f"for the split 'train' or 'test', or open one of them: 'imagefolder:{root / held[0]}'."
        )
    folder = root if split is None else _split_folder(root, split)
    reference = root / "train" if split == "test" and (root / "train").is_dir() else folder
    classes = sorted(entry.name for entry in reference.iterdir() if entry.is_dir())
    present = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    unknown = [name for name in present if name not in classes]
    if unknown:
        raise QuietvitError(
            f"{folder} has a class {unknown[0]!r} that {reference} does not have"
            f"{nearest(unknown[0], classes)}; both need the same class folders."
        )
    files: list[Path] = []
    labels: list[int] = []
    for name in present:
        found = sorted(
            path
            for path in (folder / name).rglob("*")
            if path.suffix.lower() in IMG_EXTENSIONS and path.is_file()
        )
        files += found
        labels += [classes.index(name)] * len(found)
    if not files:
        raise QuietvitError(
            f"{folder} holds no images; one folder a class is expected inside, with files "
            f"ending in {', '.join(IMG_EXTENSIONS)}."
        )
    return ImageDataset(
        labels,
        partial(_read_file, files),
        partial(_path_of, files),
        num_classes=len(classes) if num_classes is None else num_classes,
        name=f"imagefolder:{root}",
        class_names=tuple(classes),
    )


def holds_splits(root: Path) -> bool:
    """Tell splits from classes: train/ beside val/ or test/, or no folder but these."""
    if not root.is_dir():
        return False
    held = {entry.name for entry in root.iterdir() if entry.is_dir()}
    return ("train" in held and len(held & _SPLITS) > 1) or (bool(held) and held <= _SPLITS)


def _split_folder(root: Path, split: str) -> Path:
    wanted = ["train"] if split == "train" else ["val", "test"]
    for name in wanted:
        if (root / name).is_dir():
            return root / name
    held = sorted(entry.name for entry in root.iterdir())
    shown = ", ".join(held[:5]) + (", ..." if len(held) > 5 else "") if held else "nothing"
    raise QuietvitError(
        f"{root} has no folder {' or '.join(repr(name) for name in wanted)} (it holds {shown}); "
        "arrange the images as train/<class>/*.jpg and val/<class>/*.jpg."
    )


def _table(paths: list[Path], split: Split, num_classes: int | None) -> ImageDataset:
    if len(paths) > 2 or not paths:
        raise QuietvitError(
            f"a table data set names one or two files, not {len(paths)}: "
            "'table:/train.parquet,/test.parquet'."
        )
    if split == "test" and len(paths) == 1:
        raise QuietvitError(
            f"the data set names no test table beside {paths[0]}; write "
            f"'table:{paths[0]},/path/to/test.parquet'."
        )
    path = paths[1] if split == "test" else paths[0]
    images, labels = _read_table(path)
    if num_classes is None and split == "test":
        num_classes = int(_read_labels(paths[0]).max()) + 1
    return ImageDataset(
        labels,
        partial(_read_row, images, path),
        "row {}".format,
        num_classes=num_classes,
        name=f"table {path}",
    )


def _read_table(path: Path) -> tuple[Any, np.ndarray]:
    import pyarrow as pa

    table = _open_table(path, ["image", "label"])
    kind = table.schema.field("image").type
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    is_struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    if not (is_bytes or is_struct):
        raise QuietvitError(
            f"the column 'image' of {path} is of type {kind}; it needs the encoded bytes of the "
            "image (binary, or a struct with a field 'bytes')."
        )
    return table.column("image"), _labels_of(table, path)


def _read_labels(path: Path) -> np.ndarray:
    return _labels_of(_open_table(path, ["label"]), path)


def _open_table(path: Path, columns: list[str]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise QuietvitError(f"the table {path} does not exist; check the path.")
    try:
        known = pq.read_schema(path).names
        for column in columns:
            if column not in known:
                raise QuietvitError(
                    f"{path} has no column {column!r}; it has {', '.join(map(repr, known))}"
                    f"{nearest(column, known)}. Rename the columns to 'image' and 'label'."
                )
        return pq.read_table(path, columns=columns, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise QuietvitError(
            f"{path} could not be read as a parquet table ({str(error).splitlines()[0]}); copy it "
            "again or write it with pyarrow."
        ) from error


def _labels_of(table: Any, path: Path) -> np.ndarray:
    import pyarrow as pa

    column = table.column("label")
    if not pa.types.is_integer(column.type):
        raise QuietvitError(
            f"the column 'label' of {path} is of type {column.type}; it needs integers from 0."
        )
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise QuietvitError(f"row {row} of {path} has no label; fill it in or drop the row.")
    labels: np.ndarray = column.to_numpy().astype(np.int64)
    if len(labels) == 0:
        raise QuietvitError(f"the table {path} holds no rows, so no images; check the file.")
    return labels


def _read_row(images: Any, path: Path, index: int) -> bytes:
    value = images[index].as_py()
    if isinstance(value, dict):
        value = value["bytes"]
    if not value:
        raise QuietvitError(
            f"row {index} of the table {path} has no image; write the encoded bytes into the "
            "column 'image' or drop the row."
        )
    return bytes(value)


def _read_file(files: list[Path], index: int) -> bytes:
    path = files[index]
    try:
        return path.read_bytes()
    except OSError as error:
        raise QuietvitError(
            f"the image {path} could not be read: {error.strerror or error}; restore the file or "
            "open the data set again without it."
        ) from error


def _picture(pixels: np.ndarray, index: int) -> Image.Image:
    return Image.fromarray(pixels[index])


def _path_of(files: list[Path], index: int) -> str:
    return str(files[index])


def _chosen(inner: Callable[[int], T], chosen: np.ndarray, index: int) -> T:
    return inner(int(chosen[index]))


def _decode(content: bytes, where: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(content)).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise QuietvitError(
            f"the image at {where} could not be decoded: {error} ({len(content)} bytes); replace "
            "it or remove it from the data set."
        ) from error
