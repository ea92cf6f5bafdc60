"""COCO's box AP of predictions, counted by faster-coco-eval.

The models that predict are in ``detectors``; AP over several processes is put together by the task.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.classes import class_count
from quietvit.data.evaluate import progress_bar, worker_errors
from quietvit.errors import QuietvitError
from quietvit.tracing import evaluating

Judged = list[tuple[dict[str, Any], dict[str, Any]]]
"""Of each image: what there is (as in ``dataset.Target``), and what was predicted; as lists."""

MAX_DETECTIONS = 100


@dataclass(frozen=True)
class BoxAP:
    """COCO's average precision of boxes, in percent; -1 where there is no box of that size.

    ``ap`` is the mean over the IoU thresholds 0.50, 0.55, ..., 0.95 and over all classes, ``ap50``
    and ``ap75`` are at one threshold. ``small`` is of boxes below 32 x 32 pixels, ``medium`` below
    96 x 96, ``large`` of all others. At most 100 boxes of an image count (Lin et al. 2014, arXiv
    1405.0312, and cocodataset.org/#detection-eval).
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


def box_ap(judged: Judged) -> BoxAP:
    """Return the AP of predictions; images are told apart by ``image_id``.

    Raises:
        QuietvitError: no images, no boxes in them, or faster-coco-eval is missing.
    """
    truth, results = coco_files(judged)
    if not truth["annotations"]:
        raise QuietvitError(
            f"the {len(judged)} test images hold no boxes at all, so there is no AP; check the "
            "data set."
        )
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise QuietvitError(
            "AP needs the package faster-coco-eval: pip install 'quietvit[detection]'."
        ) from error
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(truth)
        found = COCO({**truth, "annotations": _as_annotations(results)})
        counted = COCOeval_faster(reference, found, iouType="bbox")
        counted.evaluate()
        counted.accumulate()
        counted.summarize()
    return BoxAP(*(_percent(value) for value in counted.stats[: len(fields(BoxAP))]))


def coco_files(
    judged: Judged, category_ids: Sequence[int] | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return ground truth and predictions as COCO's two JSON files hold them.

    Boxes are (x, y, width, height) in pixels of the upright image. ``category_ids`` are the numbers
    of label 1, 2, ... (``DetectionDataset.category_ids``); None takes the labels.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    categories: set[int] = set()

    def objects(id_: int, found: Mapping[str, Any], **keys: str) -> Iterator[dict[str, Any]]:
        columns = [found[key] for key in ("boxes", "labels", *keys.values())]
        for box, label, *rest in zip(*columns, strict=True):
            category = label if category_ids is None else category_ids[label - 1]
            categories.add(category)
            sides = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            yield {"image_id": id_, "category_id": category, "bbox": sides} | dict(
                zip(keys, rest, strict=True)
            )

    for there, predicted in judged:
        (height, width), id_ = there["size"], there["image_id"]
        images.append({"id": id_, "height": height, "width": width})
        annotations += objects(id_, there, area="area", iscrowd="iscrowd")
        results += objects(id_, predicted, score="scores")
    for place, annotation in enumerate(annotations, start=1):
        annotation["id"] = place
    named = [{"id": category, "name": str(category)} for category in sorted(categories)]
    return {"images": images, "annotations": annotations, "categories": named}, results


@torch.no_grad()
def predict_all(
    model: nn.Module,
    loader: Iterable[tuple[list[Tensor], list[dict[str, Any]]]],
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Judged:
    """Run a detector on batches of a ``loading.detection_loader``; its mode is restored.

    Args:
        model: a list of images (3, H, W) -> for each a dict with ``boxes`` (N, 4), ``labels`` and
            ``scores`` (N,), boxes in pixels of the image given.

    Raises:
        QuietvitError: a model that is no detector, boxes or scores that are no numbers.
    """
    judged: Judged = []
    with evaluating(model), worker_errors(), progress_bar(loader, progress) as batches:
        for images, targets in batches:
            found = model([image.to(device) for image in images])
            for target, boxes in zip(targets, _as_lists(found), strict=True):
                kept = {key: _listed(target[key]) for key in _KEPT}
                judged.append((kept, boxes))
    return judged


def evaluate_detector(
    model: nn.Module,
    loader: Any,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> BoxAP:
    """Return COCO's box AP of a detector on a ``loading.detection_loader``.

    Raises:
        QuietvitError: the model tells another number of classes apart than the data set; as
            ``predict_all`` and ``box_ap``.
    """
    data, classes = loader.dataset.dataset, class_count(model)
    if classes is not None and classes != data.num_classes:
        raise QuietvitError(
            f"the model tells {classes} classes apart, and {data.name} has {data.num_classes}; "
            "evaluate it on its own data."
        )
    return box_ap(predict_all(model, loader, device, progress))


_KEPT = ("image_id", "size", "boxes", "labels", "area", "iscrowd")


def _as_lists(found: Any) -> list[dict[str, Any]]:
    if not isinstance(found, Sequence) or not all(isinstance(one, Mapping) for one in found):
        raise QuietvitError(
            f"the model returned {type(found).__name__}, not a list with the boxes of each image; "
            "AP needs a detector (quietvit.detection)."
        )
    predicted = []
    for one in found:
        boxes, labels, scores = (one[key].detach().cpu() for key in ("boxes", "labels", "scores"))
        if not (bool(boxes.isfinite().all()) and bool(scores.isfinite().all())):
            raise QuietvitError(
                "the model's boxes or scores are no numbers; find the first site with NaN by "
                "quietvit.diagnose(model, images)."
            )
        predicted.append(
            {"boxes": boxes.tolist(), "labels": labels.tolist(), "scores": scores.tolist()}
        )
    return predicted


def _as_annotations(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Predictions as pycocotools' ``loadRes`` numbers them; it refuses an empty list."""
    return [
        {
            **result,
            "id": place,
            "area": result["bbox"][2] * result["bbox"][3],
            "iscrowd": 0,
        }
        for place, result in enumerate(results, start=1)
    ]


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _percent(value: float) -> float:
    return 100.0 * float(value) if value >= 0 else -1.0
