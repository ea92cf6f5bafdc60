"""What a run asks its task: data, model, batches, loss, and the figure that it is judged by.

A task trains nothing and writes no file; ``train`` does both, for every task alike.
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
"""What the model is called with, and the targets. For a classifier: (B, 3, H, W) and (B,)."""


@dataclass(frozen=True)
class Metric:
    """The figure a task is judged by. More is better.

    ``key`` names it in files (``top1``), ``name`` in sentences (``top-1``), ``unit`` follows the
    number.
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
        """For a title: ``top-1 in percent``."""
        return self.axis.replace("%", "percent")

    def text(self, value: float) -> str:
        """Return for example ``top-1 81.20 %``."""
        return f"{self.name} {value:.2f} {self.unit}".rstrip()


class NoSettings(Section):
    """A task without keys of its own in ``task_settings``."""


class Task(ABC):
    """One kind of training: classification, detection, ...

    A run makes one task from its ``quietvit.TrainConfig``. Calls come in this order: ``open_data``,
    ``create_model``, ``refuse_unfit``, then batches and losses. A dry run leaves out ``open_data``
    where the data is missing.

    A batch is a pair (inputs, targets): ``model(inputs)`` runs the model. A data set has a length,
    ``name``, ``groups`` (as ``quietvit.data.ImageDataset``), ``where(index)`` for errors, and
    ``dataset[index] -> (PIL image, target)``.
    """

    name: ClassVar[str]
    metric: ClassVar[Metric]
    settings: ClassVar[type[Section]] = NoSettings
    """The keys that ``task_settings`` may hold in a recipe."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.own: Any = self.settings.model_validate(config.task_settings)

    # Data

    @abstractmethod
    def open_data(self) -> tuple[Any, Any]:
        """Open all training images, and the test images that the run is judged by."""

    @abstractmethod
    def facts(self, train: Any) -> dict[str, Any]:
        """Return what tells one training set from another, as JSON, for a checkpoint.

        ``images`` is their number. A resumed run must find the same facts.
        """

    @abstractmethod
    def training_transform(self, model: nn.Module) -> Callable[[Any, Any], tuple[Any, Any]]:
        """Return what makes one sample of a batch from an image and its target, at random.

        It can be pickled, and draws from Python's, numpy's and torch's global generators alone.
        """

    def subset(self, dataset: Any, count: int | None) -> Any:
        """Return ``count`` images of a data set, always the same ones; all of them for None."""
        return subset(dataset, count)

    def collate(self) -> Callable[[list[Any]], Batch] | None:
        """Return what makes a batch of samples; None takes torch's default."""
        return None

    @abstractmethod
    def evaluation_loader(
        self, model: nn.Module, dataset: Any, batch_size: int, num_workers: int
    ) -> Any:
        """Return a ``DataLoader`` of batches in the order of the data set, without randomness."""

    @abstractmethod
    def calibration(self, model: nn.Module, dataset: Any, count: int, seed: int) -> Any:
        """Return ``count`` images drawn by ``seed``, as the model takes them."""

    # Model

    @abstractmethod
    def create_model(self, train: Any | None, *, untrained: bool) -> nn.Module:
        """Build the model that the configuration names, with a head for the training data.

        Args:
            train: the training data; None in a dry run without data.
            untrained: random weights, since a checkpoint is loaded next.
        """

    @abstractmethod
    def rebuild(self, result: Any, weights: Any) -> nn.Module:
        """Build the model of a finished run (``quietvit.TrainResult``) and load its weights.

        ``weights`` is their path, or None for random ones.
        """

    @abstractmethod
    def refuse_unfit(self, model: nn.Module, output: Any) -> None:
        """Refuse a model that cannot be trained for this task.

        ``output`` is what it returns in eval mode for one image. ``model.kwargs`` can make a model
        that returns something else than the loss takes. Raises QuietvitError; see ``built``.
        """

    @abstractmethod
    def stand_in(self, model: nn.Module, count: int) -> Batch:
        """Return a batch of ``count`` images of noise, the same each time, on the CPU.

        The model is traced with its inputs, and a dry run is measured on it.
        """

    def call(self, forward: Callable[..., Any], batch: Batch) -> Any:
        """Call the model on a batch, as ``loss`` does: ``forward(inputs)``.

        A model that computes its losses itself takes the targets too.
        """
        return forward(batch[0])

    @abstractmethod
    def tensors(self, output: Any) -> tuple[Tensor, ...]:
        """Return the tensors of what ``call`` returns, that the loss can reach."""

    @property
    def built(self) -> str:
        """The model's name and arguments, for errors."""
        chosen = self.config.model
        given = ", ".join(f"{key}={value!r}" for key, value in chosen.kwargs.items())
        return f"{chosen.name} with {given or 'its defaults'}"

    # Training and evaluation

    @abstractmethod
    def loss(self, forward: Callable[..., Any], batch: Batch) -> Tensor:
        """Return the loss of one batch, a scalar. ``forward`` is the model to call."""

    @abstractmethod
    def judge(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        device: str | torch.device = "cpu",
        progress: bool = False,
    ) -> Any:
        """Run the model on batches; return what ``score`` needs of them.

        Each process judges its share. What is returned can be pickled.
        """

    @abstractmethod
    def score(self, judged: Sequence[Any]) -> float:
        """Return the metric from what every process has judged."""
