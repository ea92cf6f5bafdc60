"""Open detection data sets by name: ``coco:``, ``voc:`` and ``objects:``.

``coco``, ``voc`` and ``objects`` read the files.
"""

from __future__ import annotations

from collections.abc import Sequence

from quietvit.data import hub
from quietvit.data.paths import part_for, split_parts
from quietvit.data.sources import Split
from quietvit.detection.checks import MAX_BAD_BOXES
from quietvit.detection.coco import open_coco
from quietvit.detection.dataset import DetectionDataset
from quietvit.detection.objects import open_objects
from quietvit.detection.voc import open_voc
from quietvit.errors import QuietvitError, nearest

FORMS = ("coco", "voc", "objects")
_WRITTEN = (
    "'coco:/train.json[@/images][,/test.json[@/images]]' or 'voc:/folder' (with ImageSets/Main), "
    "'voc:/train,/test', or 'objects:/folder' (as datasets' save_to_disk writes it)"
)


def load_detection_dataset(
    spec: str,
    split: Split = None,
    *,
    class_names: Sequence[str] | None = None,
    max_bad_boxes: int = MAX_BAD_BOXES,
    masks: bool = False,
) -> DetectionDataset:
    """Open the detection data set that ``spec`` names. Images are decoded on access.

    Args:
        spec: ``coco:/train.json,/test.json`` for COCO's JSON. Add an image folder after ``@`` if it
            is not beside the file: ``coco:/train.json@/images``.
            ``voc:/folder`` with ``Annotations``, ``JPEGImages`` and the lists in
            ``ImageSets/Main``, or ``voc:/train,/test`` with one folder for each.
            ``objects:/folder`` with a Hugging Face data set that has a column ``objects``.
        split: ``train``, ``test``, or None for the first part (all of a VOC folder).
        class_names: classes of label 1, 2, ... Give test images the names of the training images.
        max_bad_boxes: tolerate this many wrong annotations.
        masks: also read the masks of the objects, for a mask detector. Only ``coco:`` has them.

    Raises:
        QuietvitError: the form is unknown, a file or folder is missing, there are too many wrong
            annotations, or masks are wanted that the data does not have. Later, reading a missing,
            truncated or differently sized image raises.
    """
    form, _, rest = spec.partition(":")
    parts = split_parts(rest)
    if form not in FORMS or not parts:
        raise QuietvitError(
            f"no data set with boxes is named {spec!r}{nearest(form, FORMS)}. Write {_WRITTEN}."
        )
    if masks and form != "coco":
        raise QuietvitError(
            f"{spec} holds boxes and no masks, and a mask detector needs masks. Give annotations "
            "in COCO's JSON with segmentations (coco:/train.json), or use a detector of boxes "
            "(task_settings.detector: faster_rcnn)."
        )
    if form == "objects":
        return open_objects(rest.strip(), split, class_names, max_bad_boxes)
    if form == "voc" and len(parts) == 1:
        return open_voc(parts[0], split, class_names, max_bad_boxes)
    example = "'coco:/train.json,/test.json'" if form == "coco" else "'voc:/train,/test'"
    place = part_for(parts, split, "annotations", example)
    if form == "voc":
        return open_voc(place, None, class_names, max_bad_boxes)
    annotations, _, images = place.partition("@")
    return open_coco(annotations, images or None, class_names, max_bad_boxes, masks)


def is_detection_spec(text: str) -> bool:
    """Whether ``text`` names a detection data set."""
    return text.partition(":")[0] in FORMS


def has_splits(spec: str) -> bool:
    """Whether a detection data set has separate training and test images."""
    from pathlib import Path

    form, _, rest = spec.partition(":")
    if form == "objects":
        return hub.has_splits(rest)
    parts = split_parts(rest)
    lists = Path(parts[0]).expanduser() / "ImageSets" / "Main" if parts else None
    return len(parts) > 1 or (form == "voc" and lists is not None and lists.is_dir())
