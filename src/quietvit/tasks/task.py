"""The interface of a task: its data, model, batches, loss and metric.

``train`` trains and writes files, in the same way for every task.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quietvit.data.images import subset
from quietvit.section import Section

Batch = tuple[Any, Any]
"""The model's inputs and the targets. For a classifier: (B, 3, H, W) and (B,)."""


@dataclass(frozen=True)
class Metric:
    """The metric of a task. Higher is better.

    ``key`` is its name in files (``top1``), and ``name`` its name in sentences (``top-1``).
    ``unit`` follows the number.
    """

    key: str
    name: str
    unit: str

    @property
    def title(self) -> str:
        """The name at the beginning of a sentence: ``Top-1``."""
        return self.name[:1].upper() + self.name[1:]

    @property
    def axis(self) -> str:
        """The label of an axis: ``top-1 in %``."""
        return f"{self.name} in {self.unit}" if self.unit else self.name

    @property
    def in_words(self) -> str:
        """The metric with its unit in words: ``top-1 in percent``."""
        return self.axis.replace("%", "percent")

    def text(self, value: float) -> str:
        """Return the metric with a value, such as ``top-1 81.20 %``."""
        return f"{self.name} {value:.2f} {self.unit}".rstrip()


class NoSettings(Section):
    """The settings of a task that takes no ``task_settings``."""


class Task(ABC):
    """What a run trains for: classification, detection, ...

    A run makes one task from its ``quietvit.TrainConfig``. It calls ``open_data`` (not in a dry run
    without data), ``create_model`` and ``refuse_unfit``, then makes batches and losses.

    A batch is a pair (inputs, targets), and ``model(inputs)`` runs the model. A data set has
    ``len``, ``name``, ``groups`` (see ``quietvit.data.ImageDataset``), ``where(index)`` for errors,
    and ``dataset[index] -> (PIL image, target)``.
    """

    name: ClassVar[str]
    metric: ClassVar[Metric]
    settings: ClassVar[type[Section]] = NoSettings
    """The schema of ``task_settings`` in a recipe."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.own: Any = self.settings.model_validate(config.task_settings)

    # Data

    @abstractmethod
    def open_data(self) -> tuple[Any, Any]:
        """Return the data sets of training images and test images."""

    @abstractmethod
    def facts(self, train: Any) -> dict[str, Any]:
        """Return JSON data that identifies the training set, to store in a checkpoint.

        ``images`` is the number of images. A resumed run must find the same facts.
        """

    @abstractmethod
    def training_transform(self, model: nn.Module) -> Callable[[Any, Any], tuple[Any, Any]]:
        """Return the random augmentation: (image, target) -> one sample of a batch.

        It must be picklable, and use only the global generators of Python, numpy and torch.
        """

    def subset(self, dataset: Any, count: int | None) -> Any:
        """Return ``count`` images of a data set, always the same ones. None returns all."""
        return subset(dataset, count)

    def collate(self) -> Callable[[list[Any]], Batch] | None:
        """Return the function that makes a batch from samples; None means torch's default."""
        return None

    @abstractmethod
    def evaluation_loader(
        self, model: nn.Module, dataset: Any, batch_size: int, num_workers: int
    ) -> Any:
        """Return a ``DataLoader`` over the data set in order, without augmentation."""

    @abstractmethod
    def calibration(self, model: nn.Module, dataset: Any, count: int, seed: int) -> Any:
        """Return ``count`` images drawn with ``seed``, as input of the model."""

    # Model

    @abstractmethod
    def create_model(self, train: Any | None, *, untrained: bool) -> nn.Module:
        """Build the configured model with a head for the training data.

        Args:
            train: the training data; None in a dry run without data.
            untrained: use random weights, because a checkpoint is loaded next.
        """

    @abstractmethod
    def rebuild(self, result: Any, weights: Any) -> nn.Module:
        """Build the model of a finished run (``quietvit.TrainResult``) and load its weights.

        ``weights`` is their path, or None for random ones.
        """

    @abstractmethod
    def refuse_unfit(self, model: nn.Module, output: Any) -> None:
        """Raise QuietvitError if the model cannot be trained for this task (see ``built``).

        ``output`` is the model's output for one image in eval mode. With unsuitable
        ``model.kwargs``, a model returns output that the loss cannot take.
        """

    @abstractmethod
    def stand_in(self, model: nn.Module, count: int) -> Batch:
        """Return a batch of ``count`` noise images on the CPU, the same in each call.

        The run traces the model with it, and a dry run measures time and memory with it.
        """

    def call(self, forward: Callable[..., Any], batch: Batch) -> Any:
        """Call the model on a batch as ``loss`` does: ``forward(inputs)``.

        Override it for a model that takes the targets and computes its own losses.
        """
        return forward(batch[0])

    @abstractmethod
    def tensors(self, output: Any) -> tuple[Tensor, ...]:
        """Return the tensors in the output of ``call`` that a loss can use."""

    @property
    def model_name(self) -> str:
        """The model's name in reports."""
        return str(self.config.model.name)

    @property
    def built(self) -> str:
        """The model's name and arguments, for errors."""
        chosen = self.config.model
        arguments = ", ".join(f"{key}={value!r}" for key, value in chosen.kwargs.items())
        return f"{chosen.name} with {arguments or 'its defaults'}"

    # Training and evaluation

    @abstractmethod
    def loss(self, forward: Callable[..., Any], batch: Batch) -> Tensor:
        """Return the scalar loss of one batch. ``forward`` calls the model."""

    @abstractmethod
    def judge(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        device: str | torch.device = "cpu",
        progress: bool = False,
    ) -> Any:
        """Run the model on batches and return what ``score`` needs.

        Each process judges its own share. The result must be picklable.
        """

    @abstractmethod
    def score(self, judged: Sequence[Any]) -> float:
        """Return the metric from the results of all processes."""

    def figures(self, judged: Sequence[Any]) -> dict[str, float]:
        """Return all figures for result files by name: the metric, and any others.

        Override it if there are others. The metric stays under its ``key``.
        """
        return {self.metric.key: self.score(judged)}
