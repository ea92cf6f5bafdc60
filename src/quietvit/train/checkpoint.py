"""Write, verify, read and rotate checkpoints. Tensors go to safetensors, the rest to JSON.

Nothing is pickled. ``loop`` and ``resume`` decide what a checkpoint contains.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from quietvit.errors import QuietvitError
from quietvit.files import flush, save_tensors

logger = logging.getLogger("quietvit")

_MANIFEST, _TENSORS, _STATE = "manifest.json", "tensors.safetensors", "state.json"
_FILED = "in files of their own"


def save_checkpoint(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    keep: int,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write ``state`` to ``folder/step-<step>`` and keep it and the ``keep`` - 1 before it.

    Older checkpoints are removed. Checkpoints of later steps stay and do not count: the run could
    not read them, otherwise it would not be at an earlier step.

    Everything is written and flushed in a temporary folder, which is then renamed. A process that
    is killed at any moment leaves the earlier checkpoints intact.

    Args:
        state: nested dicts, lists and tuples of numbers, strings, None, tensors and numpy arrays.
            An entry that maps names to tensors only, such as a ``state_dict``, gets its own file
            ``<entry>.safetensors``. Other programs can load it as weights.
        metadata: written into the header of every safetensors file.

    Raises:
        QuietvitError: the disk is full or not writable. Earlier checkpoints are unchanged.
    """
    final, temporary = folder / f"step-{step:08d}", folder / f".step-{step:08d}.partial"
    files, plain = _filed(state)
    needed = sum(tensor.nbytes for part in files.values() for tensor in part.values()) + len(plain)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step-*.partial"):
            shutil.rmtree(leftover)
        if shutil.disk_usage(folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        temporary.mkdir()
        for name, tensors in files.items():
            save_tensors(tensors, temporary / name, metadata)
        (temporary / _STATE).write_text(plain, encoding="utf-8")
        sums = {name: _checksum(temporary / name) for name in (*files, _STATE)}
        manifest = {"step": step, "sha256": sums}
        (temporary / _MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        for name in (*sums, _MANIFEST, ""):
            flush(temporary / name)
        if final.exists():
            _set_aside(folder, [final], keep)
        temporary.rename(final)
        flush(folder)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise QuietvitError(
            f"the checkpoint {final} could not be written ({error}); earlier ones are untouched. "
            f"It needs {needed / 2**20:.1f} MiB and {_free(folder)} are free. Free some space and "
            "resume."
        ) from error
    earlier = [path for path in list_checkpoints(folder) if step_of(path) < step]
    for old in earlier[: max(0, len(earlier) + 1 - keep)]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Read the newest intact checkpoint. Return None if the folder has no checkpoint.

    Damaged checkpoints are skipped with a warning. Nothing on disk changes.

    Raises:
        QuietvitError: every checkpoint is damaged.
    """
    checkpoints = list_checkpoints(folder)
    for path in reversed(checkpoints):
        damage = _damage(path)
        if damage is None:
            return _read(path)
        logger.warning("the checkpoint %s is damaged (%s); trying the one before.", path, damage)
    if checkpoints:
        raise QuietvitError(
            f"all {len(checkpoints)} checkpoints in {folder} are damaged; start a new run in "
            "another output folder, or pass force and discard (--force --discard)."
        )
    return None


def set_aside_after(folder: Path, step: int, keep: int) -> None:
    """Rename the checkpoints after ``step`` to ``step-<step>.damaged`` and warn.

    ``step`` is the checkpoint that ``load_checkpoint`` could read. Renamed checkpoints are never
    read again, and at most ``keep`` of them are kept. Call this in one process only.

    Raises:
        QuietvitError: a checkpoint could not be renamed.
    """
    try:
        _set_aside(
            folder, [path for path in list_checkpoints(folder) if step_of(path) > step], keep
        )
    except OSError as error:
        raise QuietvitError(
            f"a damaged checkpoint in {folder} could not be renamed ({error}); remove the "
            f"checkpoints after step {step} and resume."
        ) from error


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder``, oldest first, including damaged ones."""
    return sorted((path for path in folder.glob("step-*") if path.name[5:].isdigit()), key=step_of)


def newest_whole(folder: Path) -> Path | None:
    """Return the newest checkpoint that is not damaged, or None."""
    return next((path for path in reversed(list_checkpoints(folder)) if not _damage(path)), None)


def step_of(path: Path) -> int:
    """Return the step of the checkpoint at ``path``."""
    return int(path.name[5:])


def weights_of(path: Path) -> dict[str, Tensor]:
    """Read only the model's weights from a checkpoint: name -> tensor on the CPU.

    The result is empty for checkpoints of earlier versions, which have no separate weights file.
    """
    file = path / "model.safetensors"
    return load_file(file) if file.exists() else {}


def _read(path: Path) -> dict[str, Any]:
    state = _unpacked(
        json.loads((path / _STATE).read_text(encoding="utf-8")), load_file(path / _TENSORS)
    )
    for name in state.pop(_FILED, ()):  # checkpoints of earlier versions have none
        state[name] = load_file(path / f"{name}.safetensors")
    return state


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB"
    except OSError:
        return "unknown MiB"


def _set_aside(folder: Path, paths: Sequence[Path], keep: int) -> None:
    earlier = sorted(folder.glob("step-*.damaged*"))
    for path in paths:
        aside = path.rename(_unused(folder / f"{path.name}.damaged"))
        logger.warning("the checkpoint %s is set aside as %s.", path, aside.name)
    for old in earlier[: max(0, len(earlier) + len(paths) - keep)]:
        shutil.rmtree(old, ignore_errors=True)


def _damage(path: Path) -> str | None:
    try:
        sums = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))["sha256"]
        for name in {_TENSORS, _STATE, *sums}:
            if _checksum(path / name) != sums[name]:
                return f"the checksum of {name} differs"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unused(path: Path) -> Path:
    number = 0
    while path.exists():
        number += 1
        path = path.with_suffix(f".damaged{number}")
    return path


def _filed(state: Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], str]:
    """Split ``state`` into {file: {name: tensor}} and the JSON text of everything else."""
    own = [key for key, value in state.items() if key.isidentifier() and _is_state_dict(value)]
    files: dict[str, dict[str, Tensor]] = {_TENSORS: {}}
    for key in own:
        storages: set[int] = set()
        files[f"{key}.safetensors"] = {n: _plain(t, storages) for n, t in state[key].items()}
    rest = {key: None if key in own else value for key, value in state.items()}
    packed = _packed({**rest, _FILED: own} if own else rest, files[_TENSORS], set())
    return files, json.dumps(packed)


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _plain(tensor: Tensor, storages: set[int]) -> Tensor:
    """Return ``tensor`` on the CPU, contiguous, in its own storage, as safetensors requires."""
    plain = tensor.detach().to("cpu").contiguous()
    storage = plain.untyped_storage()
    if storage.data_ptr() in storages or storage.nbytes() != plain.nbytes:
        plain = plain.clone()
    storages.add(plain.untyped_storage().data_ptr())
    return plain


def _packed(value: Any, tensors: dict[str, Tensor], storages: set[int]) -> Any:
    """Return ``value`` in JSON types. Its tensors move into ``tensors``."""
    if isinstance(value, np.ndarray):
        array = value.astype(np.int64) if value.dtype == np.uint32 else value
        inner = _packed(torch.from_numpy(array.copy()), tensors, storages)
        return {"numpy": inner, "dtype": str(value.dtype)}
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = _plain(value, storages)
        return {"tensor": key}
    if isinstance(value, Mapping):
        entries = [[_packed(k, tensors, storages), _packed(v, tensors, storages)]
                   for k, v in value.items()]  # fmt: skip
        return {"dict": entries}
    if isinstance(value, tuple):
        return {"tuple": [_packed(item, tensors, storages) for item in value]}
    if isinstance(value, list):
        return [_packed(item, tensors, storages) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "numpy" in value:
        return _unpacked(value["numpy"], tensors).numpy().astype(value["dtype"])
    if "tuple" in value:
        return tuple(_unpacked(item, tensors) for item in value["tuple"])
    return {_unpacked(k, tensors): _unpacked(v, tensors) for k, v in value["dict"]}
