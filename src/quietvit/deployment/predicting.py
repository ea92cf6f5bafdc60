"""``predict``: an exported file on an image, with the preprocessing that travels in the file."""

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
    """A class by its index and name, and its probability, the softmax of the logits."""

    index: int
    label: str
    probability: float


Source = str | Path | Image.Image | np.ndarray


def predict(
    model: str | Path | Runtime, image: Source | list[Source] | tuple[Source, ...], top: int = 5
) -> Any:
    """Return the ``top`` most probable classes of an image, the most probable first.

    That is a list of ``Prediction``. A file that gives no scores of classes, but an embedding or a
    feature map, returns an ``Embedding``. A list of images gives a list of results. The image is
    decoded as in every data set (``quietvit.data.decoding.decode``), then resized, cropped and
    normalized as the model was evaluated.

    Args:
        model: what ``export`` wrote, or a runtime that is open already (``open_runtime``).
        image: a file, a PIL image of any size, or an array (height, width, 3) or (height, width)
            before any transform; or a list of these, which gives a list of results.
        top: how many classes.

    Raises:
        QuietvitError: a file that cannot be read, something else than an image, an artifact of ours
            without preprocessing, or a foreign one.
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
    """The image as the model takes it, (1, C, H, W) float32."""
    transform = transform_of(facts.preprocessing, path)
    return np.asarray(transform(read_image(image)).unsqueeze(0).numpy())


def read_image(image: Source) -> Image.Image:
    """Decode an image to RGB. Raises QuietvitError naming the file, or what is no image."""
    if isinstance(image, Image.Image | np.ndarray):
        return decode(image, lambda: "the argument 'image'")
    if not isinstance(image, str | Path):
        more = ""
        if isinstance(image, Tensor):
            more = (
                "; a tensor that is transformed already goes into the model itself: "
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
