"""``predict``: run an exported file on an image with the preprocessing stored in the file."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from quietvit.data.decoding import decode
from quietvit.data.matching import in_words
from quietvit.deployment.embedding import Embedding
from quietvit.deployment.evaluation import FileDetector
from quietvit.deployment.facts import Facts
from quietvit.deployment.opening import open_runtime
from quietvit.deployment.preprocessing import transform_of
from quietvit.deployment.runtime import Runtime
from quietvit.detection.masks import ON, encoded, mask_functions
from quietvit.errors import QuietvitError


@dataclass(frozen=True)
class Prediction:
    """A class with its index, name and probability (softmax of the logits)."""

    index: int
    label: str
    probability: float

    def __str__(self) -> str:
        return f"{100 * self.probability:6.2f} %  {self.label}"


@dataclass(frozen=True)
class Box:
    """An object: its class, score in 0..1, and corners x1, y1, x2, y2 in pixels of the image."""

    index: int
    label: str
    score: float
    corners: tuple[float, float, float, float]

    def __str__(self) -> str:
        corners = ", ".join(f"{value:.0f}" for value in self.corners)
        return f"{100 * self.score:6.2f} %  {self.label}  ({corners})"


@dataclass(frozen=True)
class MaskedBox(Box):
    """An object with its mask in COCO's run lengths: ``size`` (height, width) and ``counts``.

    ``faster_coco_eval.core.mask.decode`` or ``pycocotools.mask.decode`` gives the pixels.
    """

    mask: Mapping[str, Any]


Source = str | Path | Image.Image | np.ndarray


def predict(
    model: str | os.PathLike[str] | Runtime,
    image: Source | list[Source] | tuple[Source, ...],
    top: int = 5,
) -> Any:
    """Return the ``top`` most probable classes of an image, the most probable first.

    The result is a list of ``Prediction``. A file that gives an embedding or a feature map returns
    an ``Embedding``, that of a detector a list of its ``top`` best ``Box``, or ``MaskedBox`` of a
    mask detector. The image is decoded
    like in every data set (``quietvit.data.decoding``), then resized, cropped and normalized like
    in the model's evaluation.

    Args:
        model: a file that ``export`` wrote, its ``Artifact``, or an open runtime
            (``open_runtime``).
        image: a file, a PIL image of any size, or an array (height, width, 3) or (height, width)
            before any transform. A list of these gives a list of results.
        top: how many classes or boxes.

    Raises QuietvitError for an unreadable image file, an argument that is not an image, and a model
    file that is foreign or has no preprocessing.
    """
    runtime = model if isinstance(model, Runtime) else open_runtime(model)
    if isinstance(image, list | tuple):
        return [predict(runtime, source, top) for source in image]
    facts = runtime.facts
    if facts.detector is not None:
        return _boxes(runtime, read_image(image), top)
    x = preprocess(facts, image, runtime.path)
    runtime.check_images(x.shape)
    output = runtime(x)[0]
    if not facts.output.of_classes:
        return Embedding(facts.output.name, output)
    logits = output.astype(np.float64)
    odds = np.exp(logits - logits.max())
    probabilities = odds / odds.sum()
    order = np.argsort(-probabilities, kind="stable")[: max(top, 1)]
    labels = None if facts.labels is None else in_words(facts.labels)
    return [
        Prediction(
            int(index),
            labels[index] if labels is not None and index < len(labels) else f"class {index}",
            float(probabilities[index]),
        )
        for index in order
    ]


def _boxes(runtime: Runtime, image: Image.Image, top: int) -> list[Box]:
    pixels = functional.to_dtype(functional.to_image(image), torch.float32, scale=True)
    (result,) = FileDetector(runtime)([pixels.as_subclass(Tensor)])
    names = None if runtime.facts.labels is None else in_words(runtime.facts.labels)
    best = zip(result["labels"].tolist(), result["scores"].tolist(), result["boxes"], strict=True)
    found = [
        Box(
            label - 1,
            f"class {label - 1}" if names is None else names[label - 1],
            score,
            tuple(corners.tolist()),
        )
        for label, score, corners in itertools.islice(best, max(top, 1))
    ]
    if "masks" not in result:
        return found
    masks = encoded(result["masks"][: len(found), 0] >= ON)
    return [
        MaskedBox(**vars(box), mask={"size": rle["size"], "counts": rle["counts"].decode("ascii")})
        for box, rle in zip(found, masks, strict=True)
    ]


def drawn(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """Return the image with boxes, their classes and their masks drawn on it."""
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    if not boxes:
        return image.copy()
    picture = functional.pil_to_tensor(image)
    for box in boxes:
        if isinstance(box, MaskedBox):
            mask = torch.from_numpy(mask_functions().decode(dict(box.mask))).bool()
            picture = draw_segmentation_masks(picture, mask, alpha=0.4, colors="red")
    picture = draw_bounding_boxes(
        picture,
        torch.tensor([box.corners for box in boxes]),
        [f"{box.label} {100 * box.score:.0f} %" for box in boxes],
        colors="red",
        width=max(1, min(image.size) // 200),
    )
    result: Image.Image = functional.to_pil_image(picture)
    return result


def preprocess(facts: Facts, image: Source, path: Path) -> np.ndarray:
    """Return the image as model input, (1, C, H, W) float32."""
    transform = transform_of(facts.preprocessing, path)
    return np.asarray(transform(read_image(image)).unsqueeze(0).numpy())


def read_image(image: Source) -> Image.Image:
    """Decode an image to RGB. Raises QuietvitError with the file or type if that fails."""
    if isinstance(image, Image.Image | np.ndarray):
        return decode(image, lambda: "the argument 'image'")
    if not isinstance(image, str | Path):
        more = ""
        if isinstance(image, Tensor):
            more = (
                "; pass a transformed tensor to the model directly: "
                "quietvit.deployment.open_runtime(path)(images.numpy())"
            )
        raise QuietvitError(
            f"the image is a {type(image).__name__}; give a file, a PIL image, an array of shape "
            f"(height, width, 3), or a list of these{more}."
        )
    path = Path(image)
    if path.is_dir():
        raise QuietvitError(
            f"{path} is a folder; give its images: "
            "quietvit.predict(model, sorted(Path(folder).glob('*.jpg')))."
        )
    if not path.is_file():
        raise QuietvitError(f"the image {path} does not exist; check the path.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise QuietvitError(f"the image {path} could not be read: {error.strerror}.") from error
    return decode(content, lambda: str(path))
