"""The output folder of a run: begun anew, or recognised as the same run to resume.

What the files in it hold is decided in ``loop``, ``checkpoint``, ``metrics`` and ``result``.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quietvit.classes import KEY
from quietvit.data import ImageDataset
from quietvit.errors import QuietvitError
from quietvit.files import (
    LOCK,
    json_text,
    leftovers,
    refuse_nonempty,
    refuse_other_bytes,
    write_atomic,
)
from quietvit.train.config import TrainConfig
from quietvit.train.earlier import earlier_run
from quietvit.train.metrics import METRICS, TENSORBOARD
from quietvit.train.recipe import parse_config
from quietvit.train.result import CHECKPOINTS, CLASSES, CONFIG, RESULT, WEIGHTS

logger = logging.getLogger("quietvit")

# What changes no weight, or only their last bits.
_MAY_CHANGE = {
    "output", "num_workers", "threads", "checkpoint", "tensorboard", "log_every", "evaluate_every",
    "data.max_bad_images", "decay.watch_every", "device",
}  # fmt: skip
# What may change too, and is told: the remedies of a run that diverged, where the data lie, and how
# a step is shared out. That images and steps stay the same is seen to in ``resume``.
_TOLD = {
    "optimizer.lr", "optimizer.clip_grad", "schedule.min_lr", "precision", "data.dataset",
    "batch_size", "accumulation", "parallel",
}  # fmt: skip


def own_files(output: Path) -> list[Path]:
    """Return the files that a run writes into ``output``, folders aside.

    The configuration is written first and removed first: without it nothing there is a run.
    """
    return [output / name for name in (CONFIG, CLASSES, METRICS, WEIGHTS, RESULT)]


def fresh(output: Path) -> None:
    """Remove an earlier run's own files from ``output``, and nothing else; a warning names them."""
    earlier = earlier_run(output)
    if earlier.parts:
        logger.warning("starting anew in %s deletes %s: %s.", output, earlier, earlier.deleted())
    for path in own_files(output):
        path.unlink(missing_ok=True)
    for name in (CHECKPOINTS, TENSORBOARD):
        shutil.rmtree(output / name, ignore_errors=True)


def refuse_used(output: Path, force: bool, discard: bool) -> None:
    """Refuse a folder that holds more than a run killed at its start leaves, unless ``force``.

    An unfinished run with checkpoints takes ``discard`` too.
    """
    refuse_other_bytes(output)
    refusal = earlier_run(output).refusal(force, discard)
    if refusal is not None:
        raise refusal
    refuse_nonempty(output, force, ignored=[output / LOCK, *leftovers(*own_files(output))])


def begun_with(config: TrainConfig, force: bool, discard: bool) -> dict[str, Any] | None:
    """Return what the run in its output folder was begun with; refuse to resume another one.

    None where there is no ``config.json``, so no run was begun; the folder is then refused as
    ``refuse_used`` does.

    Raises:
        QuietvitError: a folder in use, another configuration or recipe version (what differs is
            named), a damaged ``config.json``.
    """
    refuse_other_bytes(config.output)
    path = config.output / CONFIG
    if not path.exists():
        refuse_used(config.output, force, discard)
        return None
    try:
        before = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise QuietvitError(
            f"{path} is damaged ({error}); start anew in another output folder."
        ) from error
    version = before.get("recipe") if isinstance(before, dict) else None
    if version != config.recipe:
        raise QuietvitError(
            f"{config.output} was begun with a recipe of version {version!r}, this quietvit reads "
            f"version {config.recipe}; finish it with the quietvit that began it, or start anew in "
            "another output folder."
        )
    before = as_now(before, str(path))
    differing = [
        f"{key} was {old!r} and is {new!r}"
        for key, old, new in _differences(before, flat(config))
        if key not in _TOLD
    ]
    if differing:
        raise QuietvitError(
            f"{config.output} was begun with another configuration: {'; '.join(differing[:3])}. "
            "Resume with the same one, or choose another output folder."
        )
    return before


def as_now(content: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a configuration of ``where``, perhaps of an earlier version, ``flat`` as of now.

    Keys that came after it was written have the values they stood for then.
    """
    return flat(parse_config(content, where))


def flat(config: TrainConfig) -> dict[str, Any]:
    """Return a configuration as JSON has it."""
    content: dict[str, Any] = json.loads(json_text(config.model_dump(mode="json")))
    return content


def changes(before: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """Say what differs of ``before``, a ``flat`` configuration, but for what changes no weight."""
    found = _differences(dict(before), flat(config))
    return [f"{key} was {old!r} and is {new!r}" for key, old, new in found]


def write_config(config: TrainConfig) -> None:
    """Write ``config.json``, by which the folder is known as that of this run."""
    write_atomic(config.output / CONFIG, json_text(flat(config), indent=2) + "\n")


def write_classes(config: TrainConfig, train: ImageDataset) -> None:
    """Write ``classes.json``: the names of the classes, in the order of the logits."""
    names = train.class_names
    content = {"num_classes": train.num_classes, KEY: None if names is None else list(names)}
    write_atomic(config.output / CLASSES, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def written(output: Path) -> tuple[bool, list[str]]:
    """What a run has written so far: whether its result, and the names of its checkpoints."""
    held = output / CHECKPOINTS
    names = sorted(path.name for path in held.iterdir()) if held.is_dir() else []
    return (output / RESULT).exists(), [name for name in names if not name.startswith(".")]


def _differences(before: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if not (isinstance(before, dict) and isinstance(now, dict)):
        if before != now:
            yield prefix, before, now
        return
    for key in sorted(before.keys() | now.keys()):
        dotted = f"{prefix}.{key}" if prefix else key
        if dotted not in _MAY_CHANGE:
            yield from _differences(before.get(key), now.get(key), dotted)
