"""Object detection: images with boxes, torchvision's and transformers' detectors, COCO's AP.

``quietvit.tasks.detection`` trains detectors. ``quietvit.quantization`` quantizes them.
"""

from quietvit.data.images import subset
from quietvit.detection.average_precision import (
    BoxAP,
    MaskAP,
    box_ap,
    evaluate_detector,
    predict_all,
)
from quietvit.detection.by_part import PartLosses, ap_by_part
from quietvit.detection.canvas import Canvas
from quietvit.detection.coco import open_coco
from quietvit.detection.dataset import DetectionDataset, Record
from quietvit.detection.detectors import (
    DETECTORS,
    faster_rcnn,
    fcos,
    is_detector,
    mask_rcnn,
    predictors,
    predicts_masks,
    retinanet,
)
from quietvit.detection.hf_detectors import HFDetector, hf_detector, is_detector_folder
from quietvit.detection.loading import (
    BoxAugmentation,
    TrainingTransform,
    collate,
    detection_calibration,
    detection_loader,
)
from quietvit.detection.parts import sites_by_part
from quietvit.detection.sources import is_detection_spec, load_detection_dataset
from quietvit.detection.voc import open_voc

__all__ = [
    "DETECTORS",
    "BoxAP",
    "BoxAugmentation",
    "Canvas",
    "DetectionDataset",
    "HFDetector",
    "MaskAP",
    "PartLosses",
    "Record",
    "TrainingTransform",
    "ap_by_part",
    "box_ap",
    "collate",
    "detection_calibration",
    "detection_loader",
    "evaluate_detector",
    "faster_rcnn",
    "fcos",
    "hf_detector",
    "is_detection_spec",
    "is_detector",
    "is_detector_folder",
    "load_detection_dataset",
    "mask_rcnn",
    "open_coco",
    "open_voc",
    "predict_all",
    "predictors",
    "predicts_masks",
    "retinanet",
    "sites_by_part",
    "subset",
]
