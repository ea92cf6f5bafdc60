"""``predict``: an exported file on an image, with the preprocessing that travels in the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from quietvit.data.images import decode
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


def predict(model: str | Path | Runtime, image: str | Path | Image.Image, top: int = 5) -> Any:
    """Return the ``top`` most probable classes of an image, the most probable first.

    That is a list of ``Prediction``. A file that gives no scores of classes, but an embedding or a
    feature map, returns an ``Embedding``.

    ``model``: an exported .onnx, .xml or torchao folder, or one already open (``open_runtime``).
    ``image``: a file or a PIL image of any size. It is resized, cropped and normalized as the model
    was evaluated.

    Raises QuietvitError for a file that cannot be read, an artifact of ours without preprocessing,
    or a foreign one.
    """
    runtime = model if isinstance(model, Runtime) else open_runtime(model)
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
    labels = facts.labels
    return [
        Prediction(
            int(index),
            labels[index] if labels is not None and index < len(labels) else f"class {index}",
            float(probabilities[index]),
        )
        for index in order
    ]


def preprocess(facts: Facts, image: str | Path | Image.Image, path: Path) -> np.ndarray:
    """The image as the model takes it, (1, C, H, W) float32."""
    transform = transform_of(facts.preprocessing, path)
    return np.asarray(transform(_opened(image)).unsqueeze(0).numpy())


def _opened(image: str | Path | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    path = Path(image)
    if not path.is_file():
        raise QuietvitError(f"the image {path} does not exist; check the path.")
    return decode(path.read_bytes(), lambda: str(path))
