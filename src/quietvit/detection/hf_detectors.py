"""Open transformers' detectors (DETR, RT-DETR, RF-DETR and others) from a folder.

They get the interface of torchvision's detectors, so they share data, AP and training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from quietvit.classes import name_classes
from quietvit.data.huggingface import create_hf_detector
from quietvit.detection.canvas import Canvas, check_multiples, is_padding
from quietvit.errors import QuietvitError

MOST = 300
"""Most boxes per image. COCO's AP uses the 100 best."""


class Detections(Sequence[dict[str, Tensor]]):
    """The queries of a batch. Reading an item decodes the boxes of one image.

    An item is a dict: ``boxes`` (K, 4), corners in pixels of the given image; ``labels`` (K,), from
    1; ``scores`` (K,) in 0..1, in descending order. With classes + 1 logits, scores are a softmax,
    and the last logit means "no object" (DETR, YOLOS). Otherwise scores are sigmoids.

    Args:
        logits: (B, queries, classes) or (B, queries, classes + 1).
        boxes: (B, queries, 4), center x and y, width and height, as shares of ``sizes``.
        sizes: (height, width) in pixels of each given image, without padding.
        num_classes: number of classes without "no object".
    """

    def __init__(
        self, logits: Tensor, boxes: Tensor, sizes: Sequence[tuple[float, float]], num_classes: int
    ) -> None:
        self.logits, self.boxes = logits, boxes
        self.sizes, self.num_classes = sizes, num_classes

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return ``queries`` (B, queries, logits + 4): logits, then boxes. Export writes this."""
        return {"queries": torch.cat([self.logits, self.boxes], dim=-1)}

    @classmethod
    def of_queries(
        cls, queries: Tensor, sizes: Sequence[tuple[float, float]], num_classes: int
    ) -> Detections:
        """Build from ``tensors["queries"]``."""
        return cls(queries[..., :-4], queries[..., -4:], sizes, num_classes)

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        logits, boxes = self.logits[index].float(), self.boxes[index].float()
        if logits.shape[-1] > self.num_classes:
            best, labels = logits.softmax(-1)[:, : self.num_classes].max(-1)
            scores, places = best.topk(min(len(best), MOST))
            labels = labels[places]
        else:
            scores, flat = logits.sigmoid().flatten().topk(min(len(logits), MOST))
            labels, places = flat % self.num_classes, flat // self.num_classes
        height, width = self.sizes[index]
        corners = box_convert(boxes[places], "cxcywh", "xyxy").clamp(0, 1)
        scale = corners.new_tensor([width, height, width, height])
        return {"boxes": corners * scale, "labels": labels + 1, "scores": scores}


class HFDetector(nn.Module):
    """A transformers detector with the interface of torchvision's detectors.

    In eval mode it returns ``Detections``. It takes a list of images (3, h, w) in 0..1, or one
    tensor (N, 3, H, W) with the size of the canvas, as ``transform.fit`` makes them. A model with a
    padding mask then masks the pixels that have the value ``canvas.PADDING``. In training mode it
    takes ``(images, targets)`` and returns a dict with the model's own weighted ``loss``.
    """

    def __init__(self, model: nn.Module, canvas: Canvas) -> None:
        super().__init__()
        self.model = model
        self.transform = canvas
        self.num_classes = int(model.config.num_labels)  # type: ignore[union-attr, arg-type]

    @property
    def decoding(self) -> dict[str, Any]:
        """Return what an exported file needs to decode boxes from its queries."""
        mean = [float(value) for value in self.transform.image_mean]
        return {
            "classes": self.num_classes,
            "stretch": self.transform.stretch,
            "mean": mean,
            "marked": self.transform.marked,
        }

    def forward(
        self,
        images: Sequence[Tensor] | Tensor,
        targets: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> Any:
        if not self.training and self._fitted(images):
            return self._whole(images if isinstance(images, Tensor) else torch.stack([*images]))
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        listed = None if targets is None else [dict(target) for target in targets]
        fitted, boxed = self.transform(list(images), listed)
        inputs: dict[str, Any] = {"pixel_values": fitted.tensors}
        if self.transform.marked:
            inputs["pixel_mask"] = _mask(fitted.tensors, fitted.image_sizes)
        if not self.training:
            output = self.model(**inputs)
            return Detections(output.logits, output.pred_boxes, sizes, self.num_classes)
        if boxed is None:
            raise QuietvitError(
                "training needs targets. Give a dict with boxes and labels for each image."
            )
        inputs["labels"] = [
            _relative(target, size) for target, size in zip(boxed, fitted.image_sizes, strict=True)
        ]
        return {"loss": self.model(**inputs).loss}

    def _fitted(self, images: Sequence[Tensor] | Tensor) -> bool:
        """Whether all images have the size of the canvas."""
        given = [images] if isinstance(images, Tensor) else images
        return bool(given) and all(x.shape[-2:] == self.transform.size for x in given)

    def _whole(self, images: Tensor) -> Detections:
        """Run images that ``transform.fit`` made. Mask their padding if the model has a mask.

        No Python code depends on the batch size, for export.
        """
        mean = images.new_tensor(self.transform.image_mean)[:, None, None]
        std = images.new_tensor(self.transform.image_std)[:, None, None]
        normalized = (images - mean) / std
        if not self.transform.marked:
            output = self.model(pixel_values=normalized)
            sizes: Sequence[tuple[float, float]] = _Always(self.transform.size)
        else:
            padding = is_padding(images)
            pixels = normalized.masked_fill(padding[:, None], 0.0)
            output = self.model(pixel_values=pixels, pixel_mask=(~padding).long())
            sizes = _Unpadded(padding)
        return Detections(output.logits, output.pred_boxes, sizes, self.num_classes)


class _Always(Sequence[tuple[float, float]]):
    """One size for every image of a batch."""

    def __init__(self, size: tuple[float, float]) -> None:
        self.size = size

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> Any:
        return self.size


class _Unpadded(Sequence[tuple[float, float]]):
    """The size of each image without its padding (N, H, W). Nothing is computed while exporting."""

    def __init__(self, padding: Tensor) -> None:
        self.padding = padding

    def __len__(self) -> int:
        return len(self.padding)

    def __getitem__(self, index: Any) -> Any:
        seen = ~self.padding[index]
        return int(seen.any(dim=1).sum()), int(seen.any(dim=0).sum())


def hf_detector(
    folder: str,
    num_classes: int | None = None,
    *,
    size: tuple[int, int] | None = None,
    class_names: Sequence[str] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    untrained: bool = False,
) -> HFDetector:
    """Open a transformers detector from a folder that ``save_pretrained`` wrote.

    Images are fitted to one canvas. They keep their aspect ratio if the model takes a padding mask
    and its image processor does not stretch (DETR). Otherwise they are stretched (RT-DETR).

    Args:
        folder: a local folder with ``config.json`` and safetensors. Pickle and code are not loaded.
        num_classes: None keeps the config's number. Another number reinitializes the class heads.
        size: height and width of the canvas. None takes those of ``preprocessor_config.json``. If
            that file has a shortest and a longest edge, the size is (shortest, longest).
        class_names: names of label 1, 2, ... None takes the config's, if it has any.
        kwargs: changes to the config, such as ``num_queries``.
        weights: name -> tensor, loaded strictly instead of the folder's weights.
        untrained: use random weights.

    Raises:
        QuietvitError: no size is known, the size does not divide into the strides or windows of
            the model, a RF-DETR gets a size that is not square; or see
            ``quietvit.data.create_hf_model``.
    """
    model, settings = create_hf_detector(folder, num_classes, kwargs, weights, untrained=untrained)
    config: Any = model.config
    size = size or _size(settings, config, folder)
    _check_size(size, config)
    masked = "pixel_mask" in signature(model.forward).parameters and _pads(settings)
    canvas = Canvas(
        size,
        *_scale(settings),
        stretch=not masked,
        marked=masked,
    )
    detector = HFDetector(model, canvas)
    detector.pretrained_cfg = canvas.data_config  # type: ignore[assignment]
    name_classes(detector, class_names or _names(config, num_classes))
    return detector


def is_detector_folder(folder: str) -> bool:
    """Whether a local folder holds the config of an object detector."""
    path = Path(folder).expanduser() / "config.json"
    try:
        named = json.loads(path.read_text("utf-8")).get("architectures") or []
    except (OSError, ValueError, AttributeError):
        return False
    return any(str(name).endswith("ForObjectDetection") for name in named)


def _mask(images: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Return 1 for pixels of the image and 0 for padding: (N, H, W)."""
    mask = torch.zeros(len(images), *images.shape[-2:], dtype=torch.long, device=images.device)
    for place, (height, width) in zip(mask, sizes, strict=True):
        place[:height, :width] = 1
    return mask


def _relative(target: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
    """Return labels from 0, and boxes as center and sides, as shares of the image size."""
    height, width = size
    scale = target["boxes"].new_tensor([width, height, width, height])
    boxes = box_convert(target["boxes"], "xyxy", "cxcywh") / scale
    return {"class_labels": target["labels"] - 1, "boxes": boxes}


def _pads(settings: Mapping[str, Any]) -> bool:
    """Whether the image processor keeps the aspect ratio, as DETR's does. True without one."""
    size = settings.get("size")
    return not (isinstance(size, Mapping) and {"height", "width"} <= {k for k in size if size[k]})


def _size(settings: Mapping[str, Any], config: Any, folder: str) -> tuple[int, int]:
    size = settings.get("size") or {}
    if size.get("height") and size.get("width"):
        return int(size["height"]), int(size["width"])
    if size.get("shortest_edge"):
        shortest = int(size["shortest_edge"])
        return shortest, int(size.get("longest_edge") or shortest)
    own = getattr(config, "image_size", None)
    if own is None:
        raise QuietvitError(
            f"the configs in {folder} do not state the image size of the detector. Give "
            "size=(height, width) (in a recipe: task_settings.size)."
        )
    return (own, own) if isinstance(own, int) else (int(own[0]), int(own[1]))


def _check_size(size: tuple[int, int], config: Any) -> None:
    """Raise QuietvitError if the model cannot take images of this size, by its config."""
    check_multiples(
        size, max(getattr(config, "feat_strides", None) or (1,)), "strides of the model"
    )
    backbone: Any = getattr(config, "backbone_config", None)
    windows = int(getattr(backbone, "num_windows", 1))
    side = int(getattr(backbone, "num_windows_side", windows))  # LW-DETR counts all, RF-DETR a side
    if side > 1:
        patch = backbone.patch_size
        check_multiples(size, side * int(patch), f"windows of the backbone ({side} x {side})")
    if windows > 1 and windows == side and size[0] != size[1]:
        raise QuietvitError(
            f"transformers' windows of {config.model_type} mix up the rows of images that are not "
            f"square, such as {size[0]} x {size[1]}. Give a square size."
        )


def _scale(settings: Mapping[str, Any]) -> tuple[Sequence[float], Sequence[float]]:
    """Return mean and std for images in 0..1. The default is ImageNet's."""
    if not settings.get("do_normalize", True):
        return (0.0,) * 3, (1.0,) * 3
    mean, std = settings.get("image_mean"), settings.get("image_std")
    return mean or (0.485, 0.456, 0.406), std or (0.229, 0.224, 0.225)


def _names(config: Any, num_classes: int | None) -> list[str] | None:
    """Return the config's class names, or None if it has only numbers or their count changed."""
    names = [config.id2label[index] for index in sorted(config.id2label)]
    kept = num_classes in (None, len(names)) and names != [f"LABEL_{i}" for i in range(len(names))]
    return names if kept else None
