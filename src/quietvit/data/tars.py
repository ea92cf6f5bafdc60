"""What is in a tar of samples: where each image begins, how long it is, its label.

Headers alone are read, once; the outcome is kept in a small file. Images are not touched here.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import tarfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from quietvit.data.label_names import name_in_json
from quietvit.errors import QuietvitError
from quietvit.files import write_atomic

logger = logging.getLogger("quietvit")

IMAGES = ("jpg", "jpeg", "png", "webp")
_VERSION = 3
_META = re.compile(r"__[^/]*__($|/)")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class TarIndex:
    """Per sample: where its image begins (bytes), its size (bytes) and its label, each (N,).

    ``names``: pairs of a label and a name of its class that occur in the samples' JSON.
    """

    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    names: tuple[tuple[int, str], ...] = ()


@dataclass
class _Sample:
    key: str
    image: tuple[int, int] | None = None
    label: int | None = None
    labelled_by: str = ""
    name: str | None = None
    held: list[str] = field(default_factory=list)


def read_index(path: Path) -> TarIndex:
    """Return the kept index of a tar, or build and keep it; a damaged or outdated one is rebuilt.

    It is kept beside the tar (``NAME.quietvit-index``), or, where that cannot be written, below
    ``$XDG_CACHE_HOME`` or ``~/.cache``. It is valid for the tar's size and time of change.

    Raises:
        QuietvitError: see ``build_index``.
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
    np.savez(
        content,
        stamp=stamp,
        offsets=index.offsets,
        sizes=index.sizes,
        labels=index.labels,
        names=np.frombuffer(json.dumps(index.names).encode(), np.uint8),
    )
    failed: QuietvitError | None = None
    for place in places:
        try:
            write_atomic(place, content.getvalue())
            return index
        except QuietvitError as error:
            failed = error
    logger.warning(
        "the index of %s could not be kept, so the next run reads it again: %s", path, failed
    )
    return index


def build_index(path: Path) -> TarIndex:
    """Read the headers of a tar, and its labels.

    A sample is a run of members whose names are equal up to the first dot of the file name, as
    WebDataset has it: one ``.jpg``, ``.jpeg``, ``.png`` or ``.webp``, and ``.cls`` (an integer as
    text) or ``.json`` (its ``label``, and ``label_name``, ``class_name`` or ``label_text`` as the
    name of the class). Other members are passed over, and so is what is named, or
    lies in a folder named, ``__...__`` (WebDataset's own, for facts about the shard).

    Raises:
        QuietvitError: the tar is compressed, truncated or no tar, or a sample lacks its image or
            its label; shard and sample are named.
    """
    images: list[tuple[int, int]] = []
    labels: list[int] = []
    names: set[tuple[int, str]] = set()
    current: _Sample | None = None

    def close(sample: _Sample | None) -> None:
        if sample is not None:
            found = _checked(sample, path)
            images.append(found[0])
            labels.append(found[1])
            if sample.name is not None:
                names.add((found[1], sample.name))

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
                _add(current, extension, member, tar, path)
        except (tarfile.TarError, EOFError) as error:
            raise _truncated(path, str(error)) from error
        _check_end(path, tar)
        close(current)
    where = np.array(images, np.int64).reshape(-1, 2)
    return TarIndex(
        where[:, 0].copy(), where[:, 1].copy(), np.array(labels, np.int64), tuple(sorted(names))
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
    sample: _Sample, extension: str, member: tarfile.TarInfo, tar: tarfile.TarFile, path: Path
) -> None:
    sample.held.append(extension)
    if extension in IMAGES:
        if sample.image is not None:
            raise QuietvitError(
                f"the sample {sample.key!r} of {path} has two images (it holds "
                f"{', '.join(f'.{name}' for name in sample.held)}); keep one image a sample, and "
                "give each sample a name of its own."
            )
        if member.sparse is not None:
            raise QuietvitError(
                f"{member.name} of {path} is stored as a sparse file; write the tar without "
                "--sparse."
            )
        sample.image = member.offset_data, member.size
    elif extension in ("cls", "json"):
        file = tar.extractfile(member)
        content = b"" if file is None else file.read()
        if len(content) < member.size:
            raise _truncated(path, f"{member.name} is cut off")
        label, name = _label_in(content, extension)
        sample.name = name or sample.name
        if label is None and extension == "cls":
            raise QuietvitError(
                f"{member.name} of {path} holds {content[:20]!r}, which is no label; it needs an "
                "integer from 0 as text."
            )
        if label is not None and (extension == "cls" or sample.labelled_by != "cls"):
            sample.label, sample.labelled_by = label, extension


def _label_in(content: bytes, extension: str) -> tuple[int | None, str | None]:
    """The label and the name of its class, each None where there is none."""
    try:
        if extension == "cls":
            return int(content), None
        found = json.loads(content)
    except ValueError:
        return None, None
    if not isinstance(found, dict):
        return None, None
    label = found.get("label")
    is_label = isinstance(label, int) and not isinstance(label, bool)
    return (label if is_label else None), name_in_json(found)


def _checked(sample: _Sample, path: Path) -> tuple[tuple[int, int], int]:
    lacks, needs = "", ""
    if sample.label is None:
        lacks, needs = "label", ".cls with an integer, or .json with an integer 'label'"
    if sample.image is None:
        lacks, needs = "image", ", ".join(f".{name}" for name in IMAGES)
    if sample.image is None or sample.label is None:
        raise QuietvitError(
            f"the sample {sample.key!r} of {path} has no {lacks} (it holds "
            f"{', '.join(f'.{name}' for name in sample.held)}); it needs {needs}, and the members "
            "of a sample must stand side by side: write the shard again, or take the sample out."
        )
    return sample.image, sample.label


def _opened(path: Path) -> tarfile.TarFile:
    try:
        with path.open("rb") as file:
            begin = file.read(6)
        for magic, kind in _COMPRESSED.items():
            if begin.startswith(magic):
                raise QuietvitError(
                    f"the shard {path} is compressed ({kind}), so its images cannot be reached one "
                    "by one; uncompress it (images gain next to nothing from it) and name the .tar."
                )
        return tarfile.open(path, "r:")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise QuietvitError(
            f"the shard {path} could not be read as a tar ({error}); copy it again or write it "
            "again."
        ) from error


def _check_end(path: Path, tar: tarfile.TarFile) -> None:
    """A whole tar ends with a block of zeros, and nothing comes after it."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(end) < tarfile.BLOCKSIZE or any(end):
        raise _truncated(path, f"no end mark at byte {tar.offset} of {path.stat().st_size}")
    while rest := tar.fileobj.read(2**20):
        if any(rest):
            raise QuietvitError(
                f"the shard {path} goes on after its end mark at byte {tar.offset}, as tars do "
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
            names = json.loads(kept["names"].tobytes())
            index = TarIndex(
                kept["offsets"],
                kept["sizes"],
                kept["labels"],
                tuple((int(label), str(name)) for label, name in names),
            )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("the index %s is damaged (%s); it is built again.", place, error)
        return None
    return index if len(index.offsets) == len(index.sizes) == len(index.labels) else None
