"""The output folder of a run: start a new run in it, or check that it holds the run to resume.

``loop``, ``checkpoint``, ``metrics`` and ``result`` decide what the files contain.
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
from quietvit.quantization.storage import FORMAT
from quietvit.train.config import TrainConfig
from quietvit.train.earlier import earlier_run
from quietvit.train.metrics import METRICS, TENSORBOARD
from quietvit.train.recipe import parse_config
from quietvit.train.result import CHECKPOINTS, CLASSES, CONFIG, QUANTIZED, RESULT, WEIGHTS

logger = logging.getLogger("quietvit")

# These keys change no weight, or only the last bits of weights.
_MAY_CHANGE = {
    "output", "num_workers", "threads", "checkpoint", "tensorboard", "log_every", "evaluate_every",
    "data.max_bad_images", "decay.watch_every", "device",
}  # fmt: skip
# These may change too, with a warning: remedies for a run that diverged, the location of the data,
# and how processes share a step. ``resume`` checks that images and steps stay the same.
_TOLD = {
    "optimizer.lr", "optimizer.clip_grad", "schedule.min_lr", "precision", "data.dataset",
    "batch_size", "accumulation", "parallel",
}  # fmt: skip


def own_files(output: Path) -> list[Path]:
    """Return the files that a run writes into ``output``, without folders.

    The configuration is written first and removed first: a folder without it holds no run.
    """
    return [output / name for name in (CONFIG, CLASSES, METRICS, WEIGHTS, RESULT)]


def fresh(output: Path) -> None:
    """Remove the files of an earlier run from ``output``, nothing else, and warn."""
    earlier = earlier_run(output)
    if earlier.parts:
        logger.warning("a new run in %s deletes %s: %s.", output, earlier, earlier.deleted())
    for path in own_files(output):
        path.unlink(missing_ok=True)
    for name in (CHECKPOINTS, TENSORBOARD, QUANTIZED):
        shutil.rmtree(output / name, ignore_errors=True)


def refuse_used(output: Path, force: bool, discard: bool) -> None:
    """Refuse a folder that is not empty, unless ``force``.

    An unfinished run with checkpoints needs ``discard`` too. The lock and the temporary files of a
    run that was killed at its start do not count.
    """
    refuse_other_bytes(output)
    refusal = earlier_run(output).refusal(force, discard)
    if refusal is not None:
        raise refusal
    killed = [
        *leftovers(*own_files(output)),
        *leftovers(output / QUANTIZED, parts=FORMAT.files),
    ]
    refuse_nonempty(output, force, ignored=[output / LOCK, *killed])


def begun_with(config: TrainConfig, force: bool, discard: bool) -> dict[str, Any] | None:
    """Return the configuration (as ``flat``) that the run in its output folder began with.

    Without a ``config.json`` no run has begun: ``refuse_used`` checks the folder, the result is
    None.

    Raises:
        QuietvitError: the folder is in use, ``config.json`` is damaged, or it has another recipe
            version or configuration (the differences are named).
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
            f"{path} is damaged ({error}); start a new run in another output folder."
        ) from error
    version = before.get("recipe") if isinstance(before, dict) else None
    if version != config.recipe:
        raise QuietvitError(
            f"{config.output} was begun with a recipe of version {version!r}, but this quietvit "
            f"reads version {config.recipe}; finish the run with the quietvit that began it, or "
            "start a new run in another output folder."
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
            "Resume with the same configuration, or choose another output folder."
        )
    return before


def as_now(content: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a saved configuration as ``flat`` returns it now. ``where`` names it in errors.

    A configuration of an earlier version lacks newer keys. They get their defaults.
    """
    return flat(parse_config(content, where))


def flat(config: TrainConfig) -> dict[str, Any]:
    """Return a configuration as nested JSON types."""
    content: dict[str, Any] = json.loads(json_text(config.model_dump(mode="json")))
    return content


def changes(before: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """Describe the differences from ``before`` (``flat``), without keys that change no weight."""
    differing = _differences(dict(before), flat(config))
    return [f"{key} was {old!r} and is {new!r}" for key, old, new in differing]


def write_config(config: TrainConfig) -> None:
    """Write ``config.json``, which identifies the run in this folder."""
    write_atomic(config.output / CONFIG, json_text(flat(config), indent=2) + "\n")


def write_classes(config: TrainConfig, train: ImageDataset) -> None:
    """Write ``classes.json``: the class names in the order of the logits."""
    names = train.class_names
    content = {"num_classes": train.num_classes, KEY: None if names is None else list(names)}
    write_atomic(config.output / CLASSES, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def written(output: Path) -> tuple[bool, list[str]]:
    """Return what a run has written: (has a result, names of its checkpoints)."""
    checkpoints = output / CHECKPOINTS
    names = sorted(path.name for path in checkpoints.iterdir()) if checkpoints.is_dir() else []
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
