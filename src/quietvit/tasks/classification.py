"""The classification task: integer labels, logits (B, classes), cross-entropy, top-1 in percent.

``quietvit.data`` opens data sets and evaluates classifiers outside of a run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from quietvit.classes import KEY, class_count, name_classes
from quietvit.data import (
    ImageDataset,
    calibration_images,
    create_model,
    data_config,
    evaluation_loader,
    evaluation_transform,
    load_dataset,
    subset,
    training_transform,
)
from quietvit.data.evaluate import count_right
from quietvit.data.matching import matched
from quietvit.errors import QuietvitError
from quietvit.outputs import heads
from quietvit.tasks.task import Batch, Metric, Task

_MOST_CLASSES = 2000
"""``facts`` reads the first image of each class, unless there are more classes than this."""


class Classification(Task):
    """Image classification with mixup, cutmix and label smoothing."""

    name = "classification"
    metric = Metric("top1", "top-1", "%")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # Mixup applies label_smoothing itself.
        smoothing = 0.0 if config.mix.active else config.label_smoothing
        self._criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)
        self._mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        self._classes: int | None = config.data.num_classes

    def open_data(self) -> tuple[ImageDataset, ImageDataset]:
        """Open both data sets. Test classes are matched by name if both sets have class names.

        Raises:
            QuietvitError: a path or column is missing, there are too few images, a label is out of
                range, or the training images lack a test class.
        """
        data = self.config.data
        train = load_dataset(data.dataset, "train", num_classes=data.num_classes)
        test = load_dataset(data.dataset, "test", num_classes=train.num_classes)
        test = matched(test, train.class_names, train.num_classes, "the training set")
        return train, subset(test, data.test_images)

    def facts(self, train: ImageDataset) -> dict[str, Any]:
        """Return the number of images, the classes, and checksums of labels and first images.

        The first image of each class reveals swapped folders when there are no class names.
        """
        # With a shuffle window, the order of images depends on the groups.
        windowed = self.config.data.shuffle_window is not None
        told = {"labels": train.labels, "groups": train.groups if windowed else None}
        hashed = {
            key: hashlib.sha256(values.tobytes()).hexdigest()
            for key, values in told.items()
            if values is not None
        }
        names = train.class_names
        return {
            "images": len(train),
            "classes": train.num_classes,
            KEY: None if names is None else list(names),
            "first_images": _first_images(train),
            **hashed,
        }

    def training_transform(self, model: nn.Module) -> Callable[[Any, Any], tuple[Any, Any]]:
        return partial(_of_image, training_transform(model, self.config.data.augmentation))

    def evaluation_loader(
        self, model: nn.Module, dataset: Any, batch_size: int, num_workers: int
    ) -> Any:
        return evaluation_loader(dataset, evaluation_transform(model), batch_size, num_workers)

    def calibration(self, model: nn.Module, dataset: Any, count: int, seed: int) -> Tensor:
        """Return images (count, 3, H, W)."""
        return calibration_images(dataset, count, evaluation_transform(model), seed)

    def create_model(self, train: ImageDataset | None, *, untrained: bool) -> nn.Module:
        chosen = self.config.model
        if train is not None:
            self._classes = train.num_classes
        model = create_model(
            chosen.name,
            self._classes,
            None if untrained else chosen.weights,
            preprocessing=chosen.preprocessing,
            untrained=untrained,
            **chosen.kwargs,
        )
        if train is not None:
            name_classes(model, train.class_names)
        return model

    def rebuild(self, result: Any, weights: Any) -> nn.Module:
        chosen = self.config.model
        model = create_model(
            chosen.name,
            result.num_classes,
            weights,
            preprocessing=chosen.preprocessing,
            **chosen.kwargs,
        )
        name_classes(model, result.class_names)
        return model

    def refuse_unfit(self, model: nn.Module, output: Any) -> None:
        for head in self.tensors(output):
            flat = isinstance(head, Tensor) and head.ndim == 2
            if not flat or (self._classes is not None and head.shape[1] != self._classes):
                shape = tuple(head.shape) if isinstance(head, Tensor) else type(head).__name__
                raise QuietvitError(
                    f"{self.built} gives {shape} for one image, not logits of shape (1, "
                    f"{self._classes or 'classes'}), so it cannot be trained as a classifier. "
                    "Change model.kwargs."
                )

    def stand_in(self, model: nn.Module, count: int) -> Batch:
        size = data_config(model)["input_size"]
        images = torch.randn(count, *size, generator=torch.Generator().manual_seed(0))
        return images, torch.arange(count) % (self._classes or class_count(model) or 1)

    def tensors(self, output: Any) -> tuple[Tensor, ...]:
        """Return the logits (B, classes) of each head. A distilled model has two."""
        return heads(output)

    def loss(self, forward: Callable[..., Any], batch: Batch) -> Tensor:
        images, targets = batch
        if self.config.mix.active and self._classes is not None:
            images, targets = self._mixed(images, targets)
        heads = self.tensors(forward(images))
        return torch.stack([self._criterion(head, targets) for head in heads]).mean()

    def judge(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        device: str | torch.device = "cpu",
        progress: bool = False,
    ) -> tuple[int, int]:
        """Return the number of correct images and the number of all images."""
        return count_right(model, batches, device, progress)

    def score(self, judged: Sequence[tuple[int, int]]) -> float:
        return 100.0 * sum(right for right, _ in judged) / sum(total for _, total in judged)

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self._mix is None:
            from timm.data.mixup import Mixup

            mix = self.config.mix
            self._mix = Mixup(
                mixup_alpha=mix.mixup,
                cutmix_alpha=mix.cutmix,
                prob=mix.probability,
                switch_prob=mix.switch_probability,
                label_smoothing=self.config.label_smoothing,
                num_classes=self._classes,
            )
        return self._mix(images, labels)


def _of_image(
    transform: Callable[[Image.Image], Tensor], image: Image.Image, label: int
) -> tuple[Tensor, int]:
    return transform(image), label


def _first_images(train: ImageDataset) -> list[str] | None:
    """Return a checksum of the first image of each class, or "" if none can be read.

    Grouped images give None: reading one reads many, and no folder can be swapped.
    """
    if train.groups is not None or train.num_classes > _MOST_CLASSES:
        return None
    places = dict(zip(*np.unique(train.labels, return_index=True), strict=True))
    return [
        train.checksum(int(places[label])) if label in places else ""
        for label in range(train.num_classes)
    ]
