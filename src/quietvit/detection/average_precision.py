"""Compute COCO's box AP and mask AP of a detector with faster-coco-eval.

``detectors`` builds the models. ``tasks.detection`` combines the results of several processes.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quietvit.classes import class_count
from quietvit.data.evaluate import progress_bar, worker_errors
from quietvit.detection.masks import ON, encoded, mask_functions
from quietvit.errors import QuietvitError
from quietvit.tracing import evaluating

Figures = tuple[float, float, float, float, float, float]
Judged = list[tuple[dict[str, Any], dict[str, Any]]]
"""For each image: its ground truth (keys of ``dataset.Target``) and its predictions, as lists.

``masks`` are a list of ``masks.RLE``. They are missing if the model predicts no masks.
"""


@dataclass(frozen=True)
class MaskAP:
    """COCO's average precision of masks, in percent. A size without objects has -1.

    ``ap`` is the mean over all classes and the IoU thresholds 0.50, 0.55, ..., 0.95. ``ap50`` and
    ``ap75`` use one threshold. ``small`` covers objects below 32 x 32 pixels, ``medium`` those
    below 96 x 96, and ``large`` the rest. The area of an object is that of its annotation. The
    area of a prediction is that of its mask. At most 100 objects per image count.

    Source: Lin et al. 2014, arXiv 1405.0312, and cocodataset.org/#detection-eval.
    """

    ap: float
    ap50: float
    ap75: float
    small: float
    medium: float
    large: float

    def __str__(self) -> str:
        return (
            f"AP {self.ap:.2f} %, AP50 {self.ap50:.2f}, AP75 {self.ap75:.2f}, small "
            f"{self.small:.2f}, medium {self.medium:.2f}, large {self.large:.2f}"
        )


@dataclass(frozen=True)
class BoxAP(MaskAP):
    """COCO's average precision of boxes, in percent. The fields are those of ``MaskAP``.

    The area of a prediction is that of its box. ``mask`` is the AP of the masks, and None if the
    model predicts no masks.
    """

    mask: MaskAP | None = None

    def __str__(self) -> str:
        boxes = super().__str__()
        return boxes if self.mask is None else f"{boxes}; mask {self.mask}"

    def figures(self) -> dict[str, float]:
        """Return all figures by name: ``ap``, ``ap50``, ..., and with masks ``mask_ap``, ..."""
        names = [field.name for field in fields(MaskAP)]
        found = {name: getattr(self, name) for name in names}
        if self.mask is not None:
            found |= {f"mask_{name}": getattr(self.mask, name) for name in names}
        return found


def box_ap(judged: Judged) -> BoxAP:
    """Return the AP of predictions, with mask AP if they have masks.

    ``image_id`` identifies each image.

    Raises:
        QuietvitError: there are no images or no boxes, or faster-coco-eval is not installed.
    """
    if not any(there["boxes"] for there, _ in judged):
        raise QuietvitError(
            f"the {len(judged)} test images hold no boxes at all, so AP is undefined. Check the "
            "data set."
        )
    mask = MaskAP(*_counted(judged, "segm")) if "masks" in judged[0][1] else None
    return BoxAP(*_counted(judged, "bbox"), mask=mask)


def _counted(judged: Judged, by: Literal["bbox", "segm"]) -> Figures:
    """Return the fields of ``MaskAP``, for boxes or masks."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise QuietvitError(
            "AP needs the package faster-coco-eval. Run: pip install 'quietvit[detection]'."
        ) from error
    truth, results = coco_files(judged, by=by)
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(truth)
        detected = COCO({**truth, "annotations": _as_annotations(results)})
        counted = COCOeval_faster(reference, detected, iouType=by)
        counted.evaluate()
        counted.accumulate()
        counted.summarize()
    ap, ap50, ap75, small, medium, large = map(_percent, counted.stats[:6])
    return ap, ap50, ap75, small, medium, large


def coco_files(
    judged: Judged,
    category_ids: Sequence[int] | None = None,
    by: Literal["bbox", "segm"] = "bbox",
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the contents of COCO's two JSON files: ground truth and predictions.

    Boxes are (x, y, width, height) in pixels of the upright image. ``category_ids[i]`` is the
    category of label i + 1 (``DetectionDataset.category_ids``). None writes the labels themselves.
    ``by`` is ``bbox``, or ``segm`` for masks. Predictions then have no boxes, because pycocotools
    would take the areas of the boxes for those of the masks.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    categories: set[int] = set()

    def objects(id_: int, boxes: Mapping[str, Any], **keys: str) -> Iterator[dict[str, Any]]:
        columns = [boxes[key] for key in ("boxes", "labels", *keys.values())]
        for box, label, *rest in zip(*columns, strict=True):
            category = label if category_ids is None else category_ids[label - 1]
            categories.add(category)
            sides = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            yield {"image_id": id_, "category_id": category, "bbox": sides} | dict(
                zip(keys, rest, strict=True)
            )

    masks = {"segmentation": "masks"} if by == "segm" else {}
    for there, predicted in judged:
        (height, width), id_ = there["size"], there["image_id"]
        images.append({"id": id_, "height": height, "width": width})
        annotations += objects(id_, there, area="area", iscrowd="iscrowd", **masks)
        results += objects(id_, predicted, score="scores", **masks)
    for place, annotation in enumerate(annotations, start=1):
        annotation["id"] = place
    if masks:
        for result in results:
            del result["bbox"]
    named = [{"id": category, "name": str(category)} for category in sorted(categories)]
    return {"images": images, "annotations": annotations, "categories": named}, results


@torch.no_grad()
def predict_all(
    model: nn.Module,
    loader: Iterable[tuple[list[Tensor], list[dict[str, Any]]]],
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Judged:
    """Run a detector in eval mode on a ``loading.detection_loader``, then restore its mode.

    Args:
        model: takes a list of images (3, H, W). It returns for each image a dict with ``boxes``
            (N, 4) in pixels of that image, ``labels`` (N,) and ``scores`` (N,). A mask detector
            also returns ``masks`` (N, 1, H, W) in 0..1. From 0.5 on, a pixel is on the object.

    Raises:
        QuietvitError: the model is not a detector, a box or score is NaN or infinite, or the model
            predicts masks and the data set has none.
    """
    judged: Judged = []
    with evaluating(model), worker_errors(), progress_bar(loader, progress) as batches:
        for images, targets in batches:
            output = model([image.to(device) for image in images])
            for target, found in zip(targets, _as_lists(output), strict=True):
                kept = {key: _listed(target[key]) for key in _KEPT}
                if "masks" in found:
                    kept["masks"] = _true_masks(target)
                judged.append((kept, found))
    return judged


def evaluate_detector(
    model: nn.Module,
    loader: Any,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> BoxAP:
    """Return COCO's box AP of a detector on a ``loading.detection_loader``.

    A mask detector's result has mask AP, too. Its data set must have masks.

    Raises:
        QuietvitError: the model and the data set have different numbers of classes; or see
            ``predict_all`` and ``box_ap``.
    """
    data, classes = loader.dataset.dataset, class_count(model)
    if classes is not None and classes != data.num_classes:
        raise QuietvitError(
            f"the model distinguishes {classes} classes, but {data.name} has {data.num_classes}. "
            "Evaluate the model on data with its own classes."
        )
    return box_ap(predict_all(model, loader, device, progress))


_KEPT = ("image_id", "size", "boxes", "labels", "area", "iscrowd")


def _as_lists(output: Any) -> list[dict[str, Any]]:
    if not isinstance(output, Sequence) or not all(isinstance(item, Mapping) for item in output):
        raise QuietvitError(
            f"the model returned {type(output).__name__}, not a list with the boxes of each image. "
            "AP needs a detector (see quietvit.detection)."
        )
    predicted = []
    for item in output:
        boxes, labels, scores = (item[key].detach().cpu() for key in ("boxes", "labels", "scores"))
        if not (bool(boxes.isfinite().all()) and bool(scores.isfinite().all())):
            raise QuietvitError(
                "the model's boxes or scores are NaN or infinite. Find the first site with NaN: "
                "quietvit.diagnose(model, images)."
            )
        listed = {"boxes": boxes.tolist(), "labels": labels.tolist(), "scores": scores.tolist()}
        if "masks" in item:
            listed["masks"] = encoded(item["masks"].detach()[:, 0] >= ON)
        predicted.append(listed)
    return predicted


def _true_masks(target: Mapping[str, Any]) -> list[Any]:
    if "masks" not in target:
        raise QuietvitError(
            "the model predicts masks, but the data set has none. Open annotations in COCO's JSON "
            "with masks: load_detection_dataset('coco:...', masks=True)."
        )
    return encoded(target["masks"])


def _as_annotations(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Number predictions as pycocotools' ``loadRes`` does. ``loadRes`` refuses an empty list."""
    return [
        {**result, "id": place, "area": _area(result), "iscrowd": 0}
        for place, result in enumerate(results, start=1)
    ]


def _area(result: Mapping[str, Any]) -> float:
    if "segmentation" in result:
        return float(mask_functions().area(result["segmentation"]))
    return float(result["bbox"][2] * result["bbox"][3])


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _percent(value: float) -> float:
    return 100.0 * float(value) if value >= 0 else -1.0
