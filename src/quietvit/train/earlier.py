"""Find an earlier run in an output folder and say what starting a new run would delete.

``folder`` says which files a run writes. Nothing is deleted here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quietvit.errors import QuietvitError
from quietvit.tasks import task_named
from quietvit.train.checkpoint import list_checkpoints, step_of
from quietvit.train.metrics import METRICS, TENSORBOARD
from quietvit.train.result import CHECKPOINTS, CLASSES, CONFIG, QUANTIZED, RESULT, WEIGHTS


@dataclass(frozen=True)
class Earlier:
    """What a new run in ``folder`` would delete.

    ``begun``: ``config.json`` belongs to a run. ``parts``: names of the files and folders.
    ``checkpoints``: names of the checkpoints, oldest first, including those set aside as damaged.
    ``last_step``: step of the last checkpoint that is not set aside.
    """

    folder: Path
    begun: bool
    parts: tuple[str, ...]
    checkpoints: tuple[str, ...]
    last_step: int | None

    @property
    def finished(self) -> bool:
        return self.begun and RESULT in self.parts

    @property
    def unfinished(self) -> bool:
        """Whether ``resume`` can continue this run."""
        return self.begun and not self.finished

    @property
    def precious(self) -> bool:
        """Whether ``force`` alone must not delete it: checkpoints or weights without a result."""
        trained = {WEIGHTS, f"{QUANTIZED}/"}.intersection(self.parts)
        return not self.finished and (bool(self.checkpoints) or bool(trained))

    def __str__(self) -> str:
        """Describe it, such as "an unfinished run (checkpoints: step-00000004)"."""
        if self.finished:
            return f"a finished run{_score(self.folder)}"
        kind = "an unfinished run" if self.begun else "files that a run would replace"
        if not self.checkpoints:
            return f"{kind} (without a checkpoint)" if self.begun else kind
        shown = ", ".join(self.checkpoints[-3:])
        if len(self.checkpoints) > 3:
            shown = f"{len(self.checkpoints)}, the last are {shown}"
        last = "" if self.last_step is None else f", the last after step {self.last_step}"
        return f"{kind} (checkpoints: {shown}{last})"

    def refusal(self, force: bool, discard: bool) -> QuietvitError | None:
        """Return the error that forbids a new run here, or None if a new run may start.

        The error names the remedies that keep the earlier run first.
        """
        if discard and force:
            return None
        wanted = "force and discard (--force --discard)" if self.precious else "force (--force)"
        if force and not self.precious:
            return None
        if not (self.begun or self.precious):
            return None
        keep = ""
        if self.unfinished:
            keep = f"To continue it, pass resume (--resume){' instead of force' * force}. "
        elif not self.finished:
            keep = f"It cannot be resumed: there is no {CONFIG} of a run. "
        return QuietvitError(
            f"the output folder {self.folder} holds {self}. {keep}To keep it and start another "
            f"run, choose another output folder. To start a new run in this one, pass {wanted}: "
            f"that deletes {self.deleted()}."
        )

    def deleted(self) -> str:
        """List what a new run deletes."""
        return ", ".join(self.parts) or "nothing"


def earlier_run(folder: Path) -> Earlier:
    """Return what ``folder`` holds of an earlier run. Nothing is changed."""
    place = folder / CHECKPOINTS
    whole = list_checkpoints(place)
    checkpoints = sorted(path.name for path in place.glob("step-*"))
    parts = [
        name for name in (CONFIG, CLASSES, METRICS, WEIGHTS, RESULT) if (folder / name).exists()
    ]
    parts += [f"{CHECKPOINTS}/{name}" for name in checkpoints]
    parts += [f"{name}/" for name in (QUANTIZED, TENSORBOARD) if (folder / name).is_dir()]
    begun = isinstance(_read(folder / CONFIG), dict) and "recipe" in _read(folder / CONFIG)
    return Earlier(
        folder,
        begun,
        tuple(parts),
        tuple(checkpoints),
        step_of(whole[-1]) if whole else None,
    )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return None


def _score(folder: Path) -> str:
    content = _read(folder / RESULT)
    try:
        metric = task_named(content.get("task", "classification")).metric
        return f" ({metric.text(content[metric.key])} after {content['steps']} steps)"
    except (AttributeError, KeyError, TypeError, ValueError, QuietvitError):
        return ""
