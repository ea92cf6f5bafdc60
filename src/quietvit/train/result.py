"""The result of a finished run: weights, score, times and provenance, written and read back.

Nothing is trained or evaluated here.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

import quietvit
from quietvit.classes import KEY
from quietvit.errors import QuietvitError
from quietvit.files import json_text, write_atomic
from quietvit.quantization import load
from quietvit.tasks import Metric, Task, task_named
from quietvit.train.config import TrainConfig
from quietvit.train.recipe import load_recipe

T = TypeVar("T")

WEIGHTS, RESULT, CONFIG = "model.safetensors", "result.json", "config.json"
QUANTIZED = "model.qvit"
CHECKPOINTS, CLASSES = "checkpoints", "classes.json"


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    ``score`` is the task's ``metric`` of the saved weights: for a classifier top-1 in percent, also
    available as ``top1``. The saved weights are the moving average if the config has one; then
    ``score_without_ema`` is the score of the last weights. ``train_seconds`` is the time of the
    training steps with data loading, without evaluation and checkpoints. ``decay_seconds`` is the
    part spent in regularizers: optimizer hooks, TWEO's loss (not its backward pass) and their logs.
    ``figures`` holds all figures of the task by name, such as AP50 and mask AP of a detector.
    ``class_names`` has ``num_classes`` names, or is None if the data has no names.
    """

    output: Path
    config: TrainConfig
    num_classes: int
    score: float
    score_without_ema: float | None
    steps: int
    train_seconds: float
    decay_seconds: float
    class_names: tuple[str, ...] | None = None
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        """The task of the run."""
        return task_named(self.config.task)(self.config)

    @property
    def metric(self) -> Metric:
        """The name and unit of ``score``."""
        return task_named(self.config.task).metric

    @property
    def top1(self) -> float:
        """Top-1 of a classifier in percent. Raises AttributeError for other tasks."""
        return self._as("top1", self.score)

    @property
    def top1_without_ema(self) -> float | None:
        """Top-1 of the last weights if ``top1`` is that of their moving average, else None."""
        return self._as("top1", self.score_without_ema)

    @property
    def weights(self) -> Path:
        """``model.safetensors``, or ``model.qvit`` of a run with ``qat``."""
        return self.output / weights_of(self.config).name

    @property
    def decay_overhead(self) -> float:
        """Time of the regularizers in percent of the other training time."""
        rest = self.train_seconds - self.decay_seconds
        return 100.0 * self.decay_seconds / rest if rest > 0 else 0.0

    def load_model(self) -> nn.Module:
        """Build the model and load the trained weights, on the CPU, in eval mode.

        A run with ``qat`` gives a ``QuantizedModel``.
        """
        if self.config.qat is not None:
            bare = self.task.rebuild(self, None)
            return load(self.weights, bare)
        return self.task.rebuild(self, self.weights).eval()

    def write(self) -> None:
        """Write ``result.json``."""
        content = {
            "task": self.config.task,
            self.metric.key: self.score,
            f"{self.metric.key}_without_ema": self.score_without_ema,
            "figures": dict(self.figures),
            "num_classes": self.num_classes,
            KEY: None if self.class_names is None else list(self.class_names),
            "steps": self.steps,
            "train_seconds": self.train_seconds,
            "decay_seconds": self.decay_seconds,
            "decay_overhead_percent": self.decay_overhead,
            "seed": self.config.seed,
            **provenance(),
        }
        write_atomic(self.output / RESULT, json_text(content, indent=2) + "\n")

    def _as(self, key: str, value: T) -> T:
        if self.metric.key != key:
            raise AttributeError(
                f"a run of the task {self.config.task!r} is judged by {self.metric.name}; use "
                "score instead of top1"
            )
        return value

    @classmethod
    def read(cls, output: str | Path) -> TrainResult:
        """Read a finished run. Raises QuietvitError if the folder holds none."""
        output = Path(output)
        try:
            content = json.loads((output / RESULT).read_text(encoding="utf-8"))
            config = load_recipe(output / CONFIG)
            key = task_named(config.task).metric.key
            return cls(
                output=output,
                config=config,
                score=content[key],
                score_without_ema=content[f"{key}_without_ema"],
                class_names=None if content.get(KEY) is None else tuple(content[KEY]),
                figures=content.get("figures", {}),  # earlier versions have none
                **{key: content[key] for key in _KEPT},
            )
        except (OSError, ValueError, KeyError) as error:
            raise QuietvitError(
                f"{output} holds no finished training run ({error}); train first, or resume it."
            ) from error


def weights_of(config: TrainConfig) -> Path:
    """Return where a run writes its final weights."""
    return config.output / (WEIGHTS if config.qat is None else QUANTIZED)


_KEPT = ("num_classes", "steps", "train_seconds", "decay_seconds")


def provenance() -> dict[str, Any]:
    """Return versions, machine and command line for a result file."""
    names = ("torchvision", "timm", "accelerate", "numpy")
    accelerators = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "versions": {
            "quietvit": quietvit.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: version(name) for name in names},
        },
        "machine": {
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "accelerators": accelerators,
        },
        "command": shlex.join(sys.argv),
    }
