"""Writing so that nothing is lost: files and folders whole or not at all, none that is in use.

What is written, and in which format, is decided by the callers; no content is read here.
"""

from __future__ import annotations

import errno
import glob
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quietvit.errors import QuietvitError
from quietvit.text import WRITTEN, is_utf8, printable

if TYPE_CHECKING:
    from torch import Tensor

LOCK = ".lock"

# What tempfile.mkdtemp puts behind a prefix.
_RANDOM = re.compile("[a-z0-9_]{8}")


def write_atomic(path: str | Path, content: bytes | str) -> Path:
    """Write ``content`` (str as UTF-8) to ``path``; readers see the old file or the new, whole.

    Text is always valid UTF-8: the bytes of a path that are not stand as U+FFFD. The bytes go to a
    temporary file beside it, are flushed to disk, and the file is renamed.
    Missing parent folders are made. Returns the path.

    Raises:
        QuietvitError: the disk is full or the place cannot be written; the old file, if there was
            one, is untouched.
    """
    path = Path(path)
    with beside(path) as folder:
        new = folder / path.name
        new.write_bytes(content.encode(errors=WRITTEN) if isinstance(content, str) else content)
        flush(new)
        new.replace(path)
    return path


def json_text(content: Any, indent: int | None = None) -> str:
    """Return ``content`` as JSON that every reader takes, also where it names paths of any bytes.

    Bytes that are not UTF-8 stand as U+FFFD; ``json.dumps`` alone writes half a surrogate pair
    for each, which strict readers refuse. nan and infinity stand as null.
    """
    text = json.dumps(finite(content), indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode(errors=WRITTEN).decode()


def finite(content: Any) -> Any:
    """Return plain dicts, lists and values, with None in place of nan and infinity."""
    if isinstance(content, dict):
        return {key: finite(entry) for key, entry in content.items()}
    if isinstance(content, list | tuple):
        return [finite(entry) for entry in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def not_utf8(path: str | Path) -> str:
    """Say that the name of a file or folder is not UTF-8, and what can be done."""
    with suppress(UnicodeError):
        name = os.fsencode(path).decode("utf-8")
        return (
            f"the name {name} cannot be used with the character set of this system's locale; set "
            "LC_ALL=C.UTF-8 or PYTHONUTF8=1, and run the command again."
        )
    return (
        f"the name {printable(str(path))} has bytes that are not UTF-8; rename it, or make a "
        "symbolic link with a plain name to it and give the link."
    )


def refuse_other_bytes(path: str | Path) -> None:
    """Raise QuietvitError for a path that is not UTF-8, for libraries that cannot open such.

    They are safetensors, pyarrow, tensorboard, onnxruntime and openvino.
    """
    if not is_utf8(str(path)):
        raise QuietvitError(not_utf8(path))


def refuse_unwritable(path: str | Path) -> None:
    """Raise QuietvitError now where a file could not be written at ``path`` later.

    Missing parent folders are made. To be called before long work.
    """
    path = Path(path)
    if path.is_dir():
        raise QuietvitError(f"{path} is a folder; name a file in it, such as {path / 'out.json'}.")
    with beside(path):
        pass


@contextmanager
def beside(path: Path, *failures: type[Exception]) -> Iterator[Path]:
    """Give an empty hidden folder in the folder of ``path``, which is made if missing.

    At the end it is removed with all that is still in it: what shall stay is renamed before, by
    ``put_in_place``.

    Raises:
        QuietvitError: an OSError, or one of ``failures``, came out of the block: the disk is full
            or the place cannot be written.
    """
    told: tuple[type[Exception], ...] = (OSError, *failures)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except told as error:
        raise QuietvitError(
            f"could not write {path}: {getattr(error, 'strerror', None) or error}. What was there "
            "before is untouched; free some space or choose another place."
        ) from error


def leftovers(*paths: Path) -> list[Path]:
    """Return the hidden folders that ``write_atomic``, killed while it wrote ``paths``, left.

    They have the names that ``beside`` gives and hold nothing, or a file with the path's name.
    What else begins with the same letters is somebody else's, and so is what cannot be looked at.
    """
    return [
        folder
        for path in paths
        for folder in sorted(path.parent.glob(f".{glob.escape(path.name)}.*"))
        if _RANDOM.fullmatch(folder.name.removeprefix(f".{path.name}."))
        and _holds_at_most(folder, path.name)
    ]


def sweep(*paths: Path) -> None:
    """Remove the ``leftovers`` of ``paths``, which nobody may be writing now."""
    for folder in leftovers(*paths):
        shutil.rmtree(folder, ignore_errors=True)


def _holds_at_most(folder: Path, name: str) -> bool:
    """Whether it is a folder, no link to one, that holds nothing or the file ``name`` alone."""
    try:
        parts = list(folder.iterdir())
    except OSError:
        return False
    return not folder.is_symlink() and all(p.name == name and p.is_file() for p in parts)


def put_in_place(folder: Path, *paths: Path) -> None:
    """Rename what ``folder``, one of ``beside``, holds under the names of ``paths`` to ``paths``.

    The files are flushed to disk first. What was there goes only when all of the new stands; where
    a rename fails it comes back, and nothing new stays.

    Raises:
        QuietvitError: a rename failed and so did bringing back what was there: the message names
            the hidden folder beside that keeps it.
    """
    for path in paths:
        new = folder / path.name
        for part in new.rglob("*") if new.is_dir() else [new]:
            if not part.is_dir():
                flush(part)
    earlier = Path(tempfile.mkdtemp(prefix=f".{paths[0].name}.", dir=folder.parent))
    try:
        for path in paths:
            if os.path.lexists(path):
                path.rename(earlier / path.name)
        for path in paths:
            (folder / path.name).rename(path)
    except BaseException as error:
        for path in paths:
            with suppress(OSError):
                if not (folder / path.name).exists():
                    path.replace(folder / path.name)
                if os.path.lexists(earlier / path.name):
                    (earlier / path.name).replace(path)
        if any(earlier.iterdir()):
            raise QuietvitError(
                f"could not write {paths[0]}: {getattr(error, 'strerror', None) or error}. What "
                f"was there before could not be put back either and is in {earlier}; move it from "
                "there."
            ) from error
        earlier.rmdir()
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def refuse_nonempty(
    directory: str | Path, force: bool = False, ignored: Collection[Path] = ()
) -> Path:
    """Return ``directory``, made if missing; with ``force`` one that holds files is accepted too.

    What is in it and ``ignored`` counts as nothing. Nothing is ever deleted.

    Raises:
        QuietvitError: the folder holds something and ``force`` is False, or the path is a file.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise QuietvitError(f"{directory} is a file, not a folder; choose another output folder.")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        Path(tempfile.mkdtemp(prefix=".probe.", dir=directory)).rmdir()  # it can be written
        held = sorted(entry.name for entry in directory.iterdir() if entry not in ignored)
    except OSError as error:
        raise QuietvitError(
            f"could not use {directory} as the output folder: {error.strerror or error}; choose "
            "another place."
        ) from error
    if held and not force:
        shown = ", ".join(held[:3]) + (", ..." if len(held) > 3 else "")
        raise QuietvitError(
            f"the output folder {directory} is not empty (it holds {shown}); choose another one, "
            "or pass force (--force) to write into it."
        )
    return directory


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process alone, until it is done or ends in whatever way.

    The lock is on the file ``LOCK`` in it, by process and not inherited: neither a loader's worker
    that outlives a killed run holds it, nor does the file itself. Where a file system or a system
    has no such locks, nothing is held.

    Raises:
        QuietvitError: another process holds it, on this machine or on one that shares the disk.
    """
    path = folder / LOCK
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise QuietvitError(
                f"could not write {path}: {error.strerror or error}; free some space, remove it if "
                "it is somebody else's and no run goes on there, or choose another output folder."
            ) from error
        try:
            _lock(handle, folder)
            # Who held it before may have removed the file since it was opened here.
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        finally:
            os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise QuietvitError(
                f"another process is writing into {folder}; wait for it to end, or choose another "
                "output folder. If both belong to one run, start its processes by torchrun or "
                "accelerate launch, so that they know of each other."
            ) from error


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file that whoever may read a new file here may read.

    The writer of safetensors alone lets only the owner read, whatever the umask says. The tensors
    are contiguous and share no memory; nothing is flushed, and errors come as they are.
    """
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, dict(metadata) if metadata else None)
    path.chmod(mode)


def flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
