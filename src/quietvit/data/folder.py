"""Image folders: ``root/train/<class>/*.jpg``, one folder a class. Files are found, not opened.

Names are kept as one array of bytes, so that a million of them take no Python objects.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from quietvit.data.images import ImageDataset
from quietvit.errors import QuietvitError, nearest

_SPLITS = {"train", "val", "test"}


def open_folder(root: Path, split: str | None, num_classes: int | None) -> ImageDataset:
    """Open ``split`` of an image folder; for None the folder itself is one folder a class.

    Hidden files and folders are passed over, links are followed.

    Raises:
        QuietvitError: a folder is missing, holds no images, or has a class that training lacks; a
            class of ``train/`` has no images. Caused by FileNotFoundError where ``root`` is none.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not root.is_dir():
        raise QuietvitError(
            f"the folder {root} of the data set does not exist; check the path."
        ) from FileNotFoundError(root)
    if split is None and holds_splits(root):
        held = sorted(entry.name for entry in root.iterdir() if entry.name in _SPLITS)
        raise QuietvitError(
            f"{root} holds {' and '.join(map(repr, held))}, which are splits and no classes; ask "
            f"for the split 'train' or 'test', or open one of them: 'imagefolder:{root / held[0]}'."
        )
    folder = root if split is None else _split_folder(root, split)
    reference = root / "train" if split == "test" and (root / "train").is_dir() else folder
    classes, present = _folders_in(reference), _folders_in(folder)
    unknown = [name for name in present if name not in classes]
    if unknown:
        raise QuietvitError(
            f"{folder} has a class {unknown[0]!r} that {reference} does not have"
            f"{nearest(unknown[0], classes)}; both need the same class folders."
        )
    around = frozenset(map(_identity, (folder, *folder.absolute().parents)))
    files: list[bytes] = []
    labels: list[int] = []
    for name in present:
        found = [
            path
            for path in _files_below(folder / name, around)
            if os.path.splitext(path)[1].lower() in IMG_EXTENSIONS  # noqa: PTH122
        ]
        if not found and split == "train":
            raise QuietvitError(
                f"the class {name!r} of {folder} holds no images (files ending in "
                f"{', '.join(IMG_EXTENSIONS)}); put images there, or remove the folder."
            )
        found.sort(key=lambda path: Path(path).parts)
        files += [os.fsencode(path.removeprefix(f"{folder}{os.sep}")) for path in found]
        labels += [classes.index(name)] * len(found)
    if not files:
        raise QuietvitError(
            f"{folder} holds no images; one folder a class is expected inside, with files "
            f"ending in {', '.join(IMG_EXTENSIONS)}."
        )
    names = np.array(files)
    return ImageDataset(
        labels,
        partial(_read_file, folder, names),
        partial(_path_of, folder, names),
        num_classes=len(classes) if num_classes is None else num_classes,
        name=f"imagefolder:{root}",
        class_names=tuple(classes),
    )


def holds_splits(root: Path) -> bool:
    """Tell splits from classes: train/ beside val/ or test/, or no folder but these."""
    if not root.is_dir():
        return False
    held = set(_folders_in(root))
    return ("train" in held and len(held & _SPLITS) > 1) or (bool(held) and held <= _SPLITS)


def _folders_in(folder: Path) -> list[str]:
    return sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."
    )


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


def _files_below(folder: str | Path, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Files in ``folder`` and in all its folders, links followed; ``above`` are those around it.

    A link to one of these is passed over. A link to nothing is a file, and missed when it is read.
    """
    own = _identity(folder)
    if own in above:
        return
    above |= {own}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                yield from _files_below(entry.path, above)
            elif entry.is_symlink() or entry.is_file():
                yield entry.path


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)  # noqa: PTH116
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _read_file(folder: Path, names: np.ndarray, index: int) -> bytes:
    path = _path_of(folder, names, index)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise QuietvitError(
            f"the image {path} could not be read: {error.strerror or error}; restore the file or "
            "open the data set again without it."
        ) from error


def _path_of(folder: Path, names: np.ndarray, index: int) -> str:
    return str(folder / os.fsdecode(bytes(names[index])))
