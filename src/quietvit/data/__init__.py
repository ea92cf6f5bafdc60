"""Data sets, transforms, models with weights, and top-1 evaluation.

Training and quantization live elsewhere.
"""

from quietvit.classes import name_classes, names_of
from quietvit.data.evaluate import calibration_images, evaluate, evaluation_loader
from quietvit.data.sources import ImageDataset, Transformed, load_dataset, subset
from quietvit.data.transforms import data_config, evaluation_transform, training_transform
from quietvit.data.weights import create_model, load_weights

__all__ = [
    "ImageDataset",
    "Transformed",
    "calibration_images",
    "create_model",
    "data_config",
    "evaluate",
    "evaluation_loader",
    "evaluation_transform",
    "load_dataset",
    "load_weights",
    "name_classes",
    "names_of",
    "subset",
    "training_transform",
]
