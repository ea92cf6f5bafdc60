"""Data sets of boxes by name: ``coco:`` and ``voc:``, with parts for training and test.

How each form is read is the matter of ``coco`` and ``voc``.
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
) -> DetectionDataset:
    """Open the images with boxes that ``spec`` names. Images are decoded when asked for.

    Args:
        spec: ``coco:/train.json,/test.json`` with annotations in COCO's JSON; a folder of images
            behind ``@``, as in ``coco:/train.json@/images``, where it is not found beside them.
            ``voc:/folder`` with ``Annotations``, ``JPEGImages`` and the lists in
            ``ImageSets/Main``, or ``voc:/train,/test`` with one folder for each.
            ``objects:/folder`` with a Hugging Face data set that has a column ``objects``.
        split: ``train``, ``test``, or None for the first part (all of a VOC folder).
        class_names: number the classes as these. The test images take the training images' names.
        max_bad_boxes: leave out so many wrong annotations; with more the data set is refused.

    Raises:
        QuietvitError: unknown form, a missing file or folder, too many wrong annotations. A missing
            or truncated image raises when it is read, and so does one of another size than its
            annotations state.
    """
    form, _, rest = spec.partition(":")
    parts = split_parts(rest)
    if form not in FORMS or not parts:
        raise QuietvitError(
            f"no data set with boxes is named {spec!r}{nearest(form, FORMS)}; write {_WRITTEN}."
        )
    if form == "objects":
        return open_objects(rest.strip(), split, class_names, max_bad_boxes)
    if form == "voc" and len(parts) == 1:
        return open_voc(parts[0], split, class_names, max_bad_boxes)
    example = "'coco:/train.json,/test.json'" if form == "coco" else "'voc:/train,/test'"
    part = part_for(parts, split, "annotations", example)
    if form == "voc":
        return open_voc(part, None, class_names, max_bad_boxes)
    annotations, _, images = part.partition("@")
    return open_coco(annotations, images or None, class_names, max_bad_boxes)


def is_detection_spec(text: str) -> bool:
    """Whether ``text`` names a data set with boxes."""
    return text.partition(":")[0] in FORMS


def has_splits(spec: str) -> bool:
    """Whether a data set with boxes tells training from test images."""
    from pathlib import Path

    form, _, rest = spec.partition(":")
    if form == "objects":
        return hub.has_splits(rest)
    parts = split_parts(rest)
    lists = Path(parts[0]).expanduser() / "ImageSets" / "Main" if parts else None
    return len(parts) > 1 or (form == "voc" and lists is not None and lists.is_dir())
