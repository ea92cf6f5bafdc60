"""Index a tar of samples: the offset, size and label of each image.

Headers and labels are read once, and the index is stored in a small file. ``shards`` reads images.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from quietvit.data.formats import IMAGE_SUFFIXES
from quietvit.data.label_names import name_in_json
from quietvit.errors import QuietvitError
from quietvit.files import write_atomic

logger = logging.getLogger("quietvit")

PREFERRED = ("jpg", "jpeg", "png", "webp")
"""Image formats that are preferred to others in the same sample."""
MISSING = np.iinfo(np.int64).min
"""The label of a sample without a label."""
_VERSION = 4
_META = re.compile(r"__[^/]*__($|/)")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class TarIndex:
    """The index of a tar.

    For each sample: the image's offset and size (bytes), its label (``MISSING`` for none) and the
    image's suffix, each (N,). ``passed``: names of members that are neither image nor label.
    ``names``: (label, class name) pairs from the samples' JSON.
    """

    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    suffixes: np.ndarray
    passed: np.ndarray
    names: tuple[tuple[int, str], ...] = ()

    def chosen(self, which: np.ndarray) -> TarIndex:
        """Return the index with only the samples in the mask ``which`` (N,)."""
        return TarIndex(
            self.offsets[which],
            self.sizes[which],
            self.labels[which],
            self.suffixes[which],
            self.passed,
            self.names,
        )


@dataclass
class _Sample:
    key: str
    image: tuple[int, int] | None = None
    suffix: str = ""
    label: int | None = None
    labelled_by: str = ""
    name: str | None = None
    extensions: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return ", ".join(f".{name}" for name in self.extensions)


def read_index(path: Path) -> TarIndex:
    """Return the stored index of a tar; build and store it if it is missing, damaged or outdated.

    The file is ``NAME.quietvit-index`` beside the tar. If that is not writable, it is below
    ``$XDG_CACHE_HOME`` or ``~/.cache``. It is outdated if the tar's size or time of change differs.
    Errors: see ``build_index``.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise QuietvitError(f"the shard {path} could not be read: {error.strerror}.") from error
    stamp = np.array([_VERSION, status.st_size, status.st_mtime_ns])
    places = [path.with_name(f"{path.name}.quietvit-index"), _place_in_cache(path)]
    for place in places:
        kept = _load(place, stamp)
        if kept is not None:
            return kept
    index = build_index(path)
    content = io.BytesIO()
    names = np.frombuffer(json.dumps(index.names).encode(), np.uint8)
    np.savez(content, stamp=stamp, **(vars(index) | {"names": names}))
    failed: QuietvitError | None = None
    for place in places:
        try:
            write_atomic(place, content.getvalue())
            return index
        except QuietvitError as error:
            failed = error
    logger.warning(
        "the index of %s could not be stored, so the next run builds it again: %s", path, failed
    )
    return index


def build_index(path: Path, labels: bool = False) -> TarIndex:
    """Read the headers and labels of a tar.

    As in WebDataset, a sample is a run of members whose names are equal up to the first dot of the
    file name. It holds one image, and ``.cls`` (an integer as text) or ``.json`` (``label``, and
    the class name as ``label_name``, ``class_name`` or ``label_text``). Example: ``a/1.jpg`` and
    ``a/1.cls``. Of several images, the one ``PREFERRED`` image is used. Other members are skipped,
    and so are files or folders named ``__...__`` (WebDataset's metadata of a shard).

    Args:
        path: the tar.
        labels: whether a sample without a label is an error. Otherwise its label is ``MISSING``.

    Raises:
        QuietvitError: the tar is compressed, truncated or not a tar, or a sample has a label but no
            image, or two images, or lacks a label. The message names shard and sample.
    """
    samples: list[tuple[int, int, int]] = []
    suffixes: list[str] = []
    passed: list[str] = []
    names: set[tuple[int, str]] = set()
    current: _Sample | None = None

    def close(sample: _Sample | None) -> None:
        if sample is None:
            return
        if sample.image is None and sample.label is None and "cls" not in sample.extensions:
            passed.extend(f"{sample.key}.{name}" for name in sample.extensions)
            return
        _check_sample(sample, path, labels)
        assert sample.image is not None
        samples.append((*sample.image, MISSING if sample.label is None else sample.label))
        suffixes.append(f".{sample.suffix}")
        if sample.label is not None and sample.name is not None:
            names.add((sample.label, sample.name))

    with _opened(path) as tar:
        assert tar.fileobj is not None
        try:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]
                key, extension = _split_name(member.name)
                if not member.isfile() or not key:
                    continue
                if current is None or current.key != key:
                    close(current)
                    current = _Sample(key)
                _add(current, extension, member, tar, path, labels)
        except (tarfile.TarError, EOFError) as error:
            raise _truncated(path, str(error)) from error
        _check_end(path, tar)
        close(current)
    offsets, sizes, numbers = np.array(samples, np.int64).reshape(-1, 3).T.copy()
    return TarIndex(
        offsets,
        sizes,
        numbers,
        np.array(suffixes, np.str_),
        np.array(passed, np.str_),
        tuple(sorted(names)),
    )


def name_at(path: Path, offset: int) -> str:
    """Return the name of the member whose content begins at ``offset`` (bytes)."""
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]
                if member.offset_data == offset:
                    return member.name
    except (tarfile.TarError, OSError, EOFError):
        pass
    return f"the member at byte {offset}"


def _split_name(name: str) -> tuple[str, str]:
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    if not stem or not dot or _META.match(name):
        return "", ""
    return folder + slash + stem, extension.lower()


def _add(
    sample: _Sample,
    extension: str,
    member: tarfile.TarInfo,
    tar: tarfile.TarFile,
    path: Path,
    labels: bool,
) -> None:
    sample.extensions.append(extension)
    if f".{extension}" in IMAGE_SUFFIXES:
        ranks = [name in PREFERRED for name in (extension, sample.suffix)]
        if sample.image is not None and ranks[0] == ranks[1]:
            raise QuietvitError(
                f"the sample {sample.key!r} of {path} has two images (it holds {sample}). Keep one "
                "image in each sample, and give each sample its own name."
            )
        if sample.image is not None and ranks[1]:
            return
        if member.sparse is not None:
            raise QuietvitError(
                f"{member.name} of {path} is stored as a sparse file; write the tar without "
                "--sparse."
            )
        sample.image, sample.suffix = (member.offset_data, member.size), extension
    elif extension in ("cls", "json"):
        file = tar.extractfile(member)
        content = b"" if file is None else file.read()
        if len(content) < member.size:
            raise _truncated(path, f"{member.name} is cut off")
        label, name = _label_in(content, extension)
        sample.name = name or sample.name
        if label is None and extension == "cls" and labels:
            raise QuietvitError(
                f"{member.name} of {path} holds {content[:20]!r}, which is not a label; it needs "
                "an integer from 0 as text."
            )
        if label is not None and (extension == "cls" or sample.labelled_by != "cls"):
            sample.label, sample.labelled_by = label, extension


def _label_in(content: bytes, extension: str) -> tuple[int | None, str | None]:
    """Return the label and the class name, each None if missing."""
    try:
        if extension == "cls":
            return int(content), None
        entry = json.loads(content)
    except ValueError:
        return None, None
    if not isinstance(entry, dict):
        return None, None
    label = entry.get("label")
    is_label = isinstance(label, int) and not isinstance(label, bool)
    return (label if is_label else None), name_in_json(entry)


def _check_sample(sample: _Sample, path: Path, labels: bool) -> None:
    lacks, needs = "", ""
    if sample.label is None and labels:
        lacks, needs = "label", ".cls with an integer, or .json with an integer 'label'"
    if sample.image is None:
        lacks, needs = "image", "an image, such as .jpg or .png"
    if lacks:
        raise QuietvitError(
            f"the sample {sample.key!r} of {path} has no {lacks} (it holds {sample}). It needs "
            f"{needs}, and the members of a sample must be consecutive: write the shard again, or "
            "remove the sample."
        )


def _opened(path: Path) -> tarfile.TarFile:
    try:
        with path.open("rb") as file:
            begin = file.read(6)
        for magic, kind in _COMPRESSED.items():
            if begin.startswith(magic):
                raise QuietvitError(
                    f"the shard {path} is compressed ({kind}), so random access to its images is "
                    "not possible; uncompress it (images hardly shrink) and name the .tar."
                )
        return tarfile.open(path, "r:")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise QuietvitError(
            f"the shard {path} could not be read as a tar ({error}); copy it again or write it "
            "again."
        ) from error


def _check_end(path: Path, tar: tarfile.TarFile) -> None:
    """Raise unless the tar ends with a block of zeros and nothing else behind it."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(end) < tarfile.BLOCKSIZE or any(end):
        raise _truncated(path, f"no end mark at byte {tar.offset} of {path.stat().st_size}")
    while rest := tar.fileobj.read(2**20):
        if any(rest):
            raise QuietvitError(
                f"the shard {path} continues after its end mark at byte {tar.offset}, like tars "
                "that were joined by cat; keep them as separate shards."
            )


def _truncated(path: Path, reason: str) -> QuietvitError:
    return QuietvitError(
        f"the shard {path} is truncated or damaged ({reason}); copy it again or write it again."
    )


def _place_in_cache(path: Path) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return Path(root) / "quietvit" / "shards" / f"{name}.npz"


def _load(place: Path, stamp: np.ndarray) -> TarIndex | None:
    try:
        with np.load(place, allow_pickle=False) as kept:
            if not np.array_equal(kept["stamp"], stamp):
                return None
            arrays = {name: kept[name] for name in TarIndex.__dataclass_fields__}
            names = json.loads(arrays["names"].tobytes())
            arrays["names"] = tuple((int(label), str(name)) for label, name in names)
            index = TarIndex(**arrays)
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged zip raises any exception
        logger.warning("the index %s is damaged (%s); it is built again.", place, error)
        return None
    parts = (index.offsets, index.sizes, index.labels, index.suffixes)
    return index if len({len(part) for part in parts}) == 1 else None
