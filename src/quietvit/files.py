"""Write files and folders atomically, and refuse folders that are not empty or in use.

The callers decide content and format. No content is read here.
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

# The random suffix that tempfile.mkdtemp appends to a prefix.
_RANDOM = re.compile("[a-z0-9_]{8}")
_PROBE = ".probe."


def write_atomic(path: str | Path, content: bytes | str) -> Path:
    """Write ``content`` to ``path`` atomically and return the path.

    The content goes to a temporary file beside it, is flushed to disk, and the file is renamed. So
    readers see either the old file or the complete new one. Missing parent folders are created.
    Text is written as valid UTF-8; bytes of a path that are not UTF-8 become U+FFFD.

    Raises:
        QuietvitError: the disk is full or not writable. An old file is unchanged.
    """
    path = Path(path)
    with beside(path) as folder:
        new = folder / path.name
        new.write_bytes(content.encode(errors=WRITTEN) if isinstance(content, str) else content)
        flush(new)
        new.replace(path)
    return path


def json_text(content: Any, indent: int | None = None) -> str:
    """Return ``content`` as JSON that strict readers accept. nan and infinity become null.

    Bytes of a path that are not UTF-8 become U+FFFD. ``json.dumps`` alone writes a lone surrogate
    for each of them, which strict readers refuse.
    """
    text = json.dumps(finite(content), indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode(errors=WRITTEN).decode()


def finite(content: Any) -> Any:
    """Return plain dicts, lists and values, with None for nan and infinity."""
    if isinstance(content, dict):
        return {key: finite(entry) for key, entry in content.items()}
    if isinstance(content, list | tuple):
        return [finite(entry) for entry in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def not_utf8(path: str | Path) -> str:
    """Return an error text for a file name that is not UTF-8, with the remedy."""
    with suppress(UnicodeError):
        name = os.fsencode(path).decode("utf-8")
        return (
            f"the name {name} cannot be used with the character set of this system's locale; set "
            "LC_ALL=C.UTF-8 or PYTHONUTF8=1, and run the command again."
        )
    return (
        f"the name {printable(str(path))} has bytes that are not UTF-8; rename it, or create a "
        "symbolic link to it with a plain name and use the link."
    )


def refuse_other_bytes(path: str | Path) -> None:
    """Raise QuietvitError for a path that is not UTF-8.

    safetensors, pyarrow, tensorboard, onnxruntime and openvino cannot open such a path.
    """
    if not is_utf8(str(path)):
        raise QuietvitError(not_utf8(path))


def refuse_unwritable(path: str | Path) -> None:
    """Raise QuietvitError if a file cannot be written at ``path``. Call this before long work.

    Missing parent folders are created.
    """
    path = Path(path)
    if path.is_dir():
        raise QuietvitError(f"{path} is a folder; name a file in it, such as {path / 'out.json'}.")
    with beside(path):
        pass


@contextmanager
def beside(path: Path, *failures: type[Exception]) -> Iterator[Path]:
    """Yield an empty hidden folder beside ``path``. Missing parent folders are created.

    The folder is removed at the end with everything in it. ``put_in_place`` moves files out first.

    Raises:
        QuietvitError: the block raised an OSError or one of ``failures``, for example because the
            disk is full or not writable.
    """
    told: tuple[type[Exception], ...] = (OSError, *failures)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder, lock = _hidden(path)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            _unlock(lock)
    except told as error:
        raise QuietvitError(
            f"could not write {path}: {getattr(error, 'strerror', None) or error}. What was there "
            "before is untouched; free some space or choose another place."
        ) from error


def _hidden(path: Path) -> tuple[Path, int | None]:
    """Make a hidden folder beside ``path`` and lock it. Returns the folder and the lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        lock = _lock_folder(folder, wait=True)
        if lock is None or folder.exists():
            return folder, lock
        _unlock(lock)  # another process swept the folder before it was locked


def _lock_folder(folder: Path, wait: bool) -> int | None:
    """Lock a folder against ``sweep`` until ``_unlock`` or the end of the process.

    None if it is locked already and ``wait`` is False, or if the system has no such locks.
    """
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    return handle


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def leftovers(*paths: Path, parts: Collection[str] = ()) -> list[Path]:
    """Return the hidden folders that a killed write of ``paths`` left behind, or writes now.

    They have a name from ``beside`` and hold nothing, or a file with the path's name. Other folders
    with the same prefix, and unreadable ones, belong to somebody else. ``parts``: names of more
    files that may be in such a folder, or in a folder with the path's name.
    """
    return [
        folder
        for path in paths
        for folder in sorted(path.parent.glob(f".{glob.escape(path.name)}.*"))
        if _RANDOM.fullmatch(folder.name.removeprefix(f".{path.name}."))
        and _holds_at_most(folder, path.name, parts)
    ]


def sweep(*paths: Path, parts: Collection[str] = ()) -> None:
    """Remove the ``leftovers`` of ``paths``, except those that another write uses now.

    Without locks of folders (Windows, some network disks) nothing is removed.
    """
    for folder in leftovers(*paths, parts=parts):
        lock = _lock_folder(folder, wait=False)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            _unlock(lock)


def _holds_at_most(folder: Path, name: str, parts: Collection[str]) -> bool:
    """Whether ``folder`` is a real folder (no link) that holds at most what ``leftovers`` tells."""
    try:
        held = list(folder.iterdir())
        if parts and [path.name for path in held] == [name] and held[0].is_dir():
            folder, held = held[0], list(held[0].iterdir())
    except OSError:
        return False
    known = {name, *parts}
    return not folder.is_symlink() and all(p.name in known and p.is_file() for p in held)


def put_in_place(folder: Path, *paths: Path) -> None:
    """Move the files that ``folder`` (from ``beside``) holds under the names of ``paths`` there.

    The files are flushed to disk first. Old files are deleted only when all new ones are in place.
    If a rename fails, the old files are restored and no new file stays. What killed writes of the
    same paths left is swept at the end.

    Raises:
        QuietvitError: a rename failed, and the old files could not be restored. The message names
            the hidden folder that keeps them.
    """
    parts = set[str]()
    for path in paths:
        new = folder / path.name
        if new.is_dir():
            parts |= {inner.name for inner in new.iterdir()}
        for inner in new.rglob("*") if new.is_dir() else [new]:
            if not inner.is_dir():
                flush(inner)
    earlier, lock = _hidden(folder.parent / paths[0].name)
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
            with suppress(OSError):  # no later write sweeps a folder of another name
                earlier = earlier.rename(f"{earlier}.kept")
            raise QuietvitError(
                f"could not write {paths[0]}: {getattr(error, 'strerror', None) or error}. The "
                f"earlier file could not be restored and is in {earlier}; move it from there."
            ) from error
        earlier.rmdir()
        raise
    else:
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        _unlock(lock)
    sweep(*paths, parts=[*(path.name for path in paths), *parts])


def refuse_nonempty(
    directory: str | Path, force: bool = False, ignored: Collection[Path] = ()
) -> Path:
    """Return ``directory``, created if missing. Nothing is ever deleted.

    The entries ``ignored`` do not count. Several processes may call it at the same time.

    Raises:
        QuietvitError: the folder is not empty and ``force`` is False, the path is a file, or the
            folder cannot be written.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise QuietvitError(f"{directory} is a file, not a folder; choose another output folder.")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        Path(tempfile.mkdtemp(prefix=_PROBE, dir=directory)).rmdir()  # raises if not writable
        names = sorted(
            entry.name
            for entry in directory.iterdir()
            if entry not in ignored and not _is_probe(entry.name)
        )
    except OSError as error:
        raise QuietvitError(
            f"could not use {directory} as the output folder: {error.strerror or error}; choose "
            "another place."
        ) from error
    if names and not force:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise QuietvitError(
            f"the output folder {directory} is not empty (it holds {shown}); choose another one, "
            "or pass force (--force) to write into it."
        )
    return directory


def _is_probe(name: str) -> bool:
    """Whether another process made the entry ``name`` to see if it may write into the folder.

    All processes of a distributed run look at the same folder at the same time.
    """
    return name.startswith(_PROBE) and _RANDOM.fullmatch(name.removeprefix(_PROBE)) is not None


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock ``folder`` for this process until the block or the process ends.

    The lock is a POSIX lock on the file ``LOCK`` in it. The existence of the file means nothing.
    Child processes do not inherit the lock, so a worker that outlives a killed run does not hold
    it. Without such locks (Windows, some file systems) nothing is locked.

    Raises:
        QuietvitError: another process holds it, on this machine or on one that shares the disk.
    """
    path = folder / LOCK
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise QuietvitError(
                f"could not write {path}: {error.strerror or error}; free some space, choose "
                "another output folder, or remove that file if no run uses the folder."
            ) from error
        try:
            _lock(handle, folder)
            # The previous owner may have removed the file after this process opened it.
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
                "output folder. If both belong to one run, start its processes with torchrun or "
                "accelerate launch."
            ) from error


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with the permissions of the umask.

    safetensors itself makes files that only their owner can read. The tensors must be contiguous
    and share no memory. Nothing is flushed, and errors are not translated.
    """
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, dict(metadata) if metadata else None)
    path.chmod(mode)


def flush(path: Path) -> None:
    """Wait until a file, or the directory entries of a folder, are on disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
