"""The detection task: images with boxes, a detector, and COCO's AP in percent.

``quietvit.detection`` holds the data sets, models and AP. This file connects them to a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from quietvit.classes import KEY
from quietvit.data import create_model, data_config, load_weights, subset
from quietvit.data.transforms import Augmentation
from quietvit.detection.average_precision import Judged, box_ap, predict_all
from quietvit.detection.checks import MAX_BAD_BOXES
from quietvit.detection.dataset import DetectionDataset
from quietvit.detection.detectors import DETECTORS, predicts_masks
from quietvit.detection.hf_detectors import hf_detector
from quietvit.detection.loading import (
    BoxAugmentation,
    TrainingTransform,
    collate,
    detection_calibration,
    detection_loader,
)
from quietvit.detection.sources import load_detection_dataset
from quietvit.errors import QuietvitError
from quietvit.section import Section
from quietvit.tasks.task import Batch, Metric, Task

_OF_TORCHVISION = ("detector", "channels", "scales", "windows", "global_blocks", "options")
"""Settings for detectors on a timm backbone only."""
_TITLES = {
    "faster_rcnn": "Faster R-CNN",
    "mask_rcnn": "Mask R-CNN",
    "retinanet": "RetinaNet",
    "fcos": "FCOS",
}


class DetectionSettings(Section):
    """The detector and its data.

    ``size`` is the height and width of the canvas; None takes the backbone's own. ``channels`` and
    ``scales`` belong to the feature pyramid, ``windows`` and ``global_blocks`` to a plain backbone,
    and ``options`` are passed to the detector (see ``quietvit.detection.faster_rcnn``).
    ``max_bad_boxes`` wrong annotations are tolerated in the training images, and as many in the
    test images. ``mask_rcnn`` needs data with masks.
    """

    detector: Literal["faster_rcnn", "mask_rcnn", "retinanet", "fcos"] = "faster_rcnn"
    size: tuple[int, int] | None = None
    channels: int = Field(default=256, ge=1)
    scales: tuple[float, ...] | None = None
    windows: int | None = Field(default=None, ge=1)
    global_blocks: tuple[int, ...] | None = None
    options: dict[str, Any] = Field(default={})
    augmentation: BoxAugmentation = BoxAugmentation()
    max_bad_boxes: int = Field(default=MAX_BAD_BOXES, ge=0)


class Detection(Task):
    """Object detection. ``model.name`` is a timm backbone, or ``hf:/folder`` with a detector."""

    name = "detection"
    metric = Metric("ap", "box AP", "%")
    settings = DetectionSettings

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for key, used in (
            ("data.augmentation", config.data.augmentation != Augmentation()),
            ("mix", config.mix.active),
            ("label_smoothing", config.label_smoothing > 0),
        ):
            if used:
                raise QuietvitError(
                    f"{key} belongs to classification, but the task is detection. Remove it. "
                    "task_settings.augmentation augments images with boxes."
                )

    @property
    def model_name(self) -> str:
        """The detector and its backbone: ``Faster R-CNN on vit_tiny_patch16_224``."""
        name = str(self.config.model.name)
        return name if name.startswith("hf:") else f"{_TITLES[self.own.detector]} on {name}"

    def open_data(self) -> tuple[DetectionDataset, DetectionDataset]:
        """Open both data sets, with masks for a mask detector. Test classes are matched by name.

        Raises:
            QuietvitError: ``data.num_classes`` differs from the number of classes; or see
                ``load_detection_dataset``.
        """
        data, most = self.config.data, self.own.max_bad_boxes
        masks = self.own.detector == "mask_rcnn"
        train = load_detection_dataset(data.dataset, "train", max_bad_boxes=most, masks=masks)
        if data.num_classes not in (None, train.num_classes):
            raise QuietvitError(
                f"data.num_classes is {data.num_classes}, but {train.name} has "
                f"{train.num_classes} classes. Remove data.num_classes."
            )
        test = load_detection_dataset(
            data.dataset,
            "test",
            class_names=train.class_names,
            max_bad_boxes=most,
            masks=masks,
        )
        return train, subset(test, data.test_images)

    def facts(self, train: DetectionDataset) -> dict[str, Any]:
        return {
            "images": len(train),
            "classes": train.num_classes,
            KEY: list(train.class_names),
            "boxes": train.checksum(),
        }

    def training_transform(self, model: nn.Module) -> Callable[[Any, Any], tuple[Any, Any]]:
        canvas: Any = model.transform
        return TrainingTransform(canvas.size, tuple(canvas.image_mean), self.own.augmentation)

    def collate(self) -> Callable[[list[Any]], Batch]:
        return collate

    def evaluation_loader(
        self, model: nn.Module, dataset: Any, batch_size: int, num_workers: int
    ) -> Any:
        # Callers choose the batch size for classifiers. A detector's images are much larger.
        return detection_loader(dataset, min(batch_size, 2 * self.config.batch_size), num_workers)

    def calibration(self, model: nn.Module, dataset: Any, count: int, seed: int) -> Tensor:
        """Return images (count, 3, H, W) in 0..1 on the detector's canvas."""
        return detection_calibration(dataset, count, _fit(model), seed)

    def create_model(self, train: DetectionDataset | None, *, untrained: bool) -> nn.Module:
        chosen = self.config.model
        classes = self.config.data.num_classes or 1 if train is None else train.num_classes
        names = None if train is None else train.class_names
        return self._built(classes, names, None if untrained else chosen.weights, untrained)

    def rebuild(self, result: Any, weights: Any) -> nn.Module:
        model = self._built(result.num_classes, result.class_names, None, untrained=True)
        if weights is not None:
            load_weights(model, weights)
        return model

    def refuse_unfit(self, model: nn.Module, output: Any) -> None:
        if not (isinstance(output, Sequence) and output and "boxes" in output[0]):
            raise QuietvitError(
                f"{self.built} returns {type(output).__name__} for one image, not its boxes, so it "
                "cannot be trained as a detector. Change model.kwargs or task_settings."
            )

    def stand_in(self, model: nn.Module, count: int) -> Batch:
        size = data_config(model)["input_size"]
        images = torch.rand(count, *size, generator=torch.Generator().manual_seed(0))
        height, width = size[1:]
        boxes = torch.tensor([[width / 4, height / 4, width / 2, height / 2]])
        target = {"boxes": boxes, "labels": torch.tensor([1])}
        if predicts_masks(model):
            mask = torch.zeros(1, height, width, dtype=torch.uint8)
            mask[:, height // 4 : height // 2, width // 4 : width // 2] = 1
            target["masks"] = mask
        return images, [dict(target) for _ in range(count)]

    def call(self, forward: Callable[..., Any], batch: Batch) -> Any:
        """Return the losses by name in training mode, the boxes of each image in eval mode."""
        images, targets = batch
        # torchvision reads only these keys, and writes scaled boxes into a copy of the target.
        read = ("boxes", "labels", "masks")
        return forward(images, [{key: t[key] for key in read if key in t} for t in targets])

    def tensors(self, output: Any) -> tuple[Tensor, ...]:
        if isinstance(output, dict):
            return tuple(output.values())
        return tuple(boxes[key] for boxes in output for key in ("boxes", "scores"))

    def loss(self, forward: Callable[..., Any], batch: Batch) -> Tensor:
        """Return the sum of the detector's own losses."""
        return torch.stack(self.tensors(self.call(forward, batch))).sum()

    def judge(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        device: str | torch.device = "cpu",
        progress: bool = False,
    ) -> Judged:
        """Return ground truth and predictions of each image."""
        return predict_all(model, batches, device, progress)

    def score(self, judged: Sequence[Judged]) -> float:
        """Return the AP over all images. This differs from the mean of the processes' APs."""
        return self.figures(judged)["ap"]

    def figures(self, judged: Sequence[Judged]) -> dict[str, float]:
        """Return ``BoxAP.figures`` over all images."""
        return box_ap([image for part in judged for image in part]).figures()

    def _whole(self, classes: int, names: Sequence[str] | None, untrained: bool) -> nn.Module:
        """Open a transformers detector. Refuse settings for detectors on a timm backbone."""
        chosen, own, default = self.config.model, self.own, DetectionSettings()
        ours = {f"task_settings.{key}": getattr(own, key) for key in _OF_TORCHVISION}
        usual = {f"task_settings.{key}": getattr(default, key) for key in _OF_TORCHVISION}
        ours |= {"model.weights": chosen.weights, "model.preprocessing": chosen.preprocessing}
        usual |= {"model.weights": None, "model.preprocessing": {}}
        changed = [key for key, value in ours.items() if value != usual[key]]
        if changed:
            raise QuietvitError(
                f"{chosen.name} is a whole detector with its own weights and preprocessing, so "
                f"leave {', '.join(changed)} out."
            )
        return hf_detector(
            chosen.name[3:],
            classes,
            size=own.size,
            class_names=names,
            kwargs=chosen.kwargs,
            untrained=untrained,
        )

    def _built(
        self, classes: int, names: Sequence[str] | None, weights: Any, untrained: bool
    ) -> nn.Module:
        import timm

        chosen, own = self.config.model, self.own
        kwargs = dict(chosen.kwargs)
        if chosen.name.startswith("hf:"):
            return self._whole(classes, names, untrained)
        known = timm.get_pretrained_cfg(chosen.name) if timm.is_model(chosen.name) else None
        if own.size is not None and getattr(known, "fixed_input_size", False):
            kwargs.setdefault("img_size", own.size)
        body = create_model(chosen.name, 0, weights, preprocessing=chosen.preprocessing, **kwargs)
        return DETECTORS[own.detector](
            body,
            classes,
            size=own.size,
            channels=own.channels,
            scales=own.scales,
            windows=own.windows,
            global_blocks=own.global_blocks,
            class_names=names,
            **own.options,
        )


def _fit(model: nn.Module) -> Callable[[Tensor], Tensor]:
    canvas: Any = model.transform
    fit: Callable[[Tensor], Tensor] = canvas.fit
    return fit
