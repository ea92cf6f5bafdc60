"""``predict``: run an exported file on an image with the preprocessing stored in the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from quietvit.data.decoding import decode
from quietvit.data.matching import in_words
from quietvit.deployment.embedding import Embedding
from quietvit.deployment.facts import Facts
from quietvit.deployment.opening import open_runtime
from quietvit.deployment.preprocessing import transform_of
from quietvit.deployment.runtime import Runtime
from quietvit.errors import QuietvitError


@dataclass(frozen=True)
class Prediction:
    """A class with its index, name and probability (softmax of the logits)."""

    index: int
    label: str
    probability: float


Source = str | Path | Image.Image | np.ndarray


def predict(
    model: str | Path | Runtime, image: Source | list[Source] | tuple[Source, ...], top: int = 5
) -> Any:
    """Return the ``top`` most probable classes of an image, the most probable first.

    The result is a list of ``Prediction``. If the file gives an embedding or a feature map, it is
    an ``Embedding``. The image is decoded like in every data set (``quietvit.data.decoding``), then
    resized, cropped and normalized like in the model's evaluation.

    Args:
        model: a file that ``export`` wrote, or an open runtime (``open_runtime``).
        image: a file, a PIL image of any size, or an array (height, width, 3) or (height, width)
            before any transform. A list of these gives a list of results.
        top: how many classes.

    Raises QuietvitError for an unreadable image file, an argument that is not an image, and a model
    file that is foreign or has no preprocessing.
    """
    runtime = model if isinstance(model, Runtime) else open_runtime(model)
    if isinstance(image, list | tuple):
        return [predict(runtime, one, top) for one in image]
    facts = runtime.facts
    x = preprocess(facts, image, runtime.path)
    runtime.check_images(x.shape)
    found = runtime(x)[0]
    if not facts.output.of_classes:
        return Embedding(facts.output.name, found)
    logits = found.astype(np.float64)
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
