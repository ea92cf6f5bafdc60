"""Image folders: one folder for each class, or images in any folders. Files are not opened.

``formats`` decides which files are images. Names are one array of bytes: a million Python strings
would cost much memory.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from quietvit.data.formats import PassedOver, is_readable
from quietvit.data.images import ImageDataset, NoLabelsError
from quietvit.errors import QuietvitError, nearest

logger = logging.getLogger("quietvit")

_SPLITS = {"train", "val", "test"}


def open_folder(
    root: Path, split: str | None, num_classes: int | None, labels: bool = True
) -> ImageDataset:
    """Open ``split`` of an image folder; for None, ``root`` itself holds the class folders.

    Hidden files and folders are skipped, and links are followed. Files that cannot be read as
    images are skipped, too, and a log line counts them by suffix.

    Args:
        root: the folder; without ``labels`` also a single image, or a pattern such as ``*.jpg``.
        split: ``train``, ``test`` or None.
        num_classes: labels at or above it are an error; None uses the number of class folders.
        labels: False uses all images at any depth below the folder.

    Raises:
        NoLabelsError: labels are needed, but the images are not in class folders.
        QuietvitError: a folder is missing, holds no images, or has a class that training lacks; a
            class of ``train/`` has no images. Caused by FileNotFoundError if ``root`` is missing.
    """
    if not root.is_dir():
        return _open_files(root, labels)
    if split is None and holds_splits(root):
        splits = sorted(entry.name for entry in root.iterdir() if entry.name in _SPLITS)
        raise QuietvitError(
            f"{root} holds {' and '.join(map(repr, splits))}, which are splits, not classes; "
            f"request the split 'train' or 'test', or open one of them: "
            f"'imagefolder:{root / splits[0]}'."
        )
    folder = root if split is None else _split_folder(root, split)
    around = frozenset(map(_identity, folder.absolute().parents))
    passed = PassedOver()
    if not labels:
        images = _images_in(folder, _files_below(folder, around), passed)
        return _dataset(root, folder, images, passed)
    reference = root / "train" if split == "test" and (root / "train").is_dir() else folder
    classes, present = _folders_in(reference), _folders_in(folder)
    unknown = [name for name in present if name not in classes]
    if unknown:
        raise QuietvitError(
            f"{folder} has a class {unknown[0]!r} that {reference} does not have"
            f"{nearest(unknown[0], classes)}; both need the same class folders."
        )
    around |= {_identity(folder)}
    files: list[bytes] = []
    numbers: list[int] = []
    for name in present:
        of_class = PassedOver()
        inside = list(_files_below(folder / name, around))
        images = _images_in(folder, inside, of_class)
        if not images and split == "train":
            beside = f" It holds {of_class}." if str(of_class) else ""
            raise QuietvitError(
                f"the class {name!r} of {folder} holds no images that can be read here.{beside} "
                "Put images there (.jpg, .png, ...), or remove the folder."
            )
        passed.update(of_class)
        files += images
        numbers += [classes.index(name)] * len(images)
    if not files and (outside := _count_images(folder)):
        raise NoLabelsError(
            f"{folder} holds {outside} images but no class folders, so they have no labels. "
            "Training and evaluation need one folder for each class: move the images to "
            f"{folder}/<class>/. Calibration (quantize, diagnose) needs no labels."
        )
    if files and (outside := _count_images(folder)):
        logger.warning(
            "%s: %d images are not in a class folder, so they have no label and are not used.",
            folder, outside,
        )  # fmt: skip
    return _dataset(root, folder, files, passed, numbers, classes, num_classes)


def image_files(text: str) -> tuple[list[str], PassedOver]:
    """Return the images that ``text`` names, sorted: a file, a folder or a glob.

    Folders inside the folder are not searched. A single file is returned whatever its suffix.
    Hidden files are skipped silently; ``PassedOver`` counts others that are not readable images.

    Raises:
        QuietvitError: there is no such file, or no image in the folder or among the matches.
            Caused by FileNotFoundError if the path does not exist.
    """
    path = Path(text).expanduser()
    passed = PassedOver()
    if path.is_dir():
        names = [entry.path for entry in os.scandir(path) if not entry.is_dir()]
    elif path.exists():
        return [str(path)], passed
    elif glob.has_magic(text):
        names = [name for name in glob.glob(str(path)) if not Path(name).is_dir()]  # noqa: PTH207
    else:
        raise QuietvitError(
            f"the image or folder {path} does not exist; check the path."
        ) from FileNotFoundError(text)
    paths = []
    for name in sorted(names):
        if Path(name).name.startswith("."):
            continue
        if is_readable(name):
            paths.append(name)
        else:
            passed.add(name)
    if not paths:
        raise QuietvitError(_without_images(str(path), passed))
    return paths, passed


def _open_files(path: Path, labels: bool) -> ImageDataset:
    """Open a single image, or those that a pattern matches. They have no labels."""
    if not path.exists() and not glob.has_magic(str(path)):
        raise QuietvitError(
            f"the folder {path} of the data set does not exist; check the path."
        ) from FileNotFoundError(path)
    files, passed = image_files(str(path))
    if labels:
        raise NoLabelsError(
            f"{path} names images without class folders, so they have no labels. Training and "
            "evaluation need a folder with one folder for each class. Calibration (quantize, "
            "diagnose) needs no labels."
        )
    passed.tell(f"imagefolder:{path}", len(files))
    names = np.array([os.fsencode(name) for name in files])
    return ImageDataset(
        None,
        partial(_read_file, Path(), names),
        partial(_path_of, Path(), names),
        name=f"imagefolder:{path}",
        count=len(files),
    )


def _dataset(
    root: Path,
    folder: Path,
    files: list[bytes],
    passed: PassedOver,
    labels: list[int] | None = None,
    classes: list[str] | None = None,
    num_classes: int | None = None,
) -> ImageDataset:
    if not files:
        raise QuietvitError(_without_images(str(folder), passed))
    name = f"imagefolder:{root}"
    passed.tell(name, len(files))
    names = np.array(files)
    return ImageDataset(
        labels,
        partial(_read_file, folder, names),
        partial(_path_of, folder, names),
        num_classes=len(classes or ()) if num_classes is None else num_classes,
        name=name,
        class_names=None if classes is None else tuple(classes),
        count=len(files),
    )


def _without_images(place: str, passed: PassedOver) -> str:
    holds = f" It holds {passed}." if str(passed) else ""
    return (
        f"{place} holds no images that can be read here.{holds} Give a folder with files such as "
        ".jpg and .png; for training and evaluation, one folder for each class. For tables and "
        "shards write 'table:...' and 'shards:...'."
    )


def _images_in(folder: Path, paths: Iterable[str], passed: PassedOver) -> list[bytes]:
    """Return the images among ``paths``, sorted by name and relative to ``folder``."""
    names = []
    for path in paths:
        if is_readable(path):
            names.append(path)
        else:
            passed.add(path)
    names.sort(key=lambda path: Path(path).parts)
    return [os.fsencode(path.removeprefix(f"{folder}{os.sep}")) for path in names]


def _count_images(folder: Path) -> int:
    return sum(is_readable(entry.name) and not entry.is_dir() for entry in os.scandir(folder))


def holds_splits(root: Path) -> bool:
    """Whether a folder holds splits: train/ and val/ or test/, or no other folders than these."""
    if not root.is_dir():
        return False
    splits = set(_folders_in(root))
    return ("train" in splits and len(splits & _SPLITS) > 1) or (bool(splits) and splits <= _SPLITS)


def _folders_in(folder: Path) -> list[str]:
    return sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."
    )


def _split_folder(root: Path, split: str) -> Path:
    wanted = ["train"] if split == "train" else ["val", "test"]
    for name in wanted:
        if (root / name).is_dir():
            return root / name
    names = sorted(entry.name for entry in root.iterdir())
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"
    raise QuietvitError(
        f"{root} has no folder {' or '.join(repr(name) for name in wanted)} (it holds {shown}); "
        "arrange the images as train/<class>/*.jpg and val/<class>/*.jpg."
    )


def _files_below(folder: str | Path, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Yield all files below ``folder``, following links; ``above`` holds its parent folders.

    A link to a parent is skipped, because it would never end. A broken link counts as a file, and
    reading it raises.
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
    except OSError:  # a link that points to itself
        return False


def _read_file(folder: Path, names: np.ndarray, index: int) -> bytes:
    path = _path_of(folder, names, index)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise QuietvitError(
            f"the image {path} could not be read: {error.strerror or error}. Restore the file, or "
            "open the data set again without it."
        ) from error


def _path_of(folder: Path, names: np.ndarray, index: int) -> str:
    return str(folder / os.fsdecode(bytes(names[index])))
