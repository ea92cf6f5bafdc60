"""The settings of each method to generate images, and their form on the command line.

``psaq``, ``dgh`` and ``priors`` implement the methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationError

from quietvit.errors import QuietvitError, nearest
from quietvit.section import Section

Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]
Precision = Literal["auto", "bfloat16", "float32"]
PREFIX = "synthetic"


def _ends(written: Any) -> Any:
    """Return the two ends of a range such as ``2500..3000``. Other values pass unchanged."""
    if not isinstance(written, str):
        return written
    low, dots, high = written.partition("..")
    if not dots:
        raise ValueError("write both ends, such as 2500..3000")
    return low, high


class Generator(Section):
    """A method to generate images. Raises QuietvitError for an unknown field or a bad value."""

    name: ClassVar[str]

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise QuietvitError(_explained(type(self), error)) from error


class Noise(Generator):
    """Gaussian noise with the mean and deviation of natural images, clipped to valid pixels."""

    name = "noise"


class Pink(Generator):
    """Noise with the spectrum of natural images, clipped to valid pixels.

    The amplitude spectrum of natural images is about 1/f (Field 1987, J. Opt. Soc. Am. A 4, 2379).
    Each channel of an image has the mean and deviation of natural images.
    """

    name = "pink"
    exponent: Annotated[float, Field(ge=0, le=4)] = 1.0
    """The amplitude is 1 / f^exponent. 0 gives white noise."""


class PSAQ(Generator):
    """Optimize images so that the model's attention gives diverse patches, after PSAQ-ViT.

    For each attention, the product of attention map and values is averaged over heads. The cosine
    similarities of all pairs of patches give a kernel density. The loss maximizes its differential
    entropy, summed over all blocks. Other terms are total variation, stretching and classes. Each
    batch has its own Adam. Images are rolled and flipped at random.

    Source: arXiv 2203.02250 and its code, with three differences. The density has its own grid
    points for each image, so the images of a batch are independent. The default stretches the
    outputs and has no class loss, because encoders and detectors have no classes. The optimization
    always uses ImageNet's normalization.
    """

    name = "psaq"
    iterations: Count = 1000
    """Steps of each batch; published 2 x 500."""
    batch_size: Count = 8
    """Images in one pass, which bounds the memory; published 32. All batches advance together."""
    entropy: Weight = 1.0
    """Weight of the entropy of patch similarity."""
    stretching: Weight = 0.3
    """Weight of the range (largest - smallest) of each image's outputs; published 0."""
    classes: Weight = 0.0
    """Weight of the cross-entropy to one random class per image; published 1."""
    variation: Weight = 0.05
    """Weight of the distance between the total variation and a random target."""
    variation_range: Annotated[tuple[Weight, Weight], BeforeValidator(_ends)] = (2500.0, 3000.0)
    """Range of the random target, for 32 images of 224 x 224; other sizes are scaled to it. The
    command line takes ``2500..3000``."""
    bandwidth: Annotated[float, Field(ge=1e-6)] = 0.01
    """Standard deviation of the Gaussian kernel."""
    points: Annotated[int, Field(ge=2)] = 10
    """Grid points of the density between the smallest and the largest similarity."""
    patches: Annotated[int, Field(ge=2)] = 196
    """Most patches per image to compare. Each step samples them if there are more."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate in units of ImageNet's normalization. None: 0.25 for window attention, else
    0.2, as published."""
    precision: Precision = "auto"
    """Of the model's matrix products. ``auto``: bfloat16 where it is faster than float32."""


class DGH(Generator):
    """Optimize images to match the running statistics of BatchNorms (DGH, arXiv 2410.22110).

    The loss compares the mean and deviation of each BatchNorm's input, over the whole image set,
    with the running statistics. It also stretches the outputs. Before each pass, images are flipped
    and cropped at random, smoothed and clipped. Each batch has its own RAdam and plateau schedule.

    The published code differs. Here the default patience is at least 20, because iterations / 50
    cuts the rate too early in short runs. All BatchNorms with stored statistics count, also frozen
    and 1-D ones. The default batch is smaller. Optimization uses ImageNet's normalization. If a
    model has several heads, each is stretched, and not their mean.
    """

    name = "dgh"
    iterations: Count = 1000
    """Steps of each batch."""
    batch_size: Count = 16
    """Images in one pass; published 128. The statistics always cover all images."""
    lr: Annotated[float, Field(gt=0)] = 16.0
    """Learning rate of RAdam in units of ImageNet's normalization."""
    deviation: Weight = 10.0
    """Weight of the deviations relative to the means."""
    stretching: Weight | None = None
    """Weight of the output terms. None takes the published 3e-7 for ResNet-18, 1e-7 for ResNet-50
    and 3e-5 for MobileNetV2, and 3e-5 for other models."""
    sigma: Annotated[float, Field(gt=0)] = 1.25
    """Standard deviation of the 3 x 3 smoothing kernel, in pixels."""
    margin: Annotated[float, Field(ge=0, le=1)] = 32 / 224
    """Extra side for random crops as a share of the side: 224 + 32 pixels by default."""
    patience: Count | None = None
    """Steps without progress before the rate is halved. None takes iterations / 50, at least 20."""
    precision: Precision = "auto"
    """Of the model's matrix products. ``auto``: bfloat16 where it is faster than float32."""


GENERATORS: dict[str, type[Generator]] = {kind.name: kind for kind in (DGH, PSAQ, Pink, Noise)}


def generator_of(method: Generator | str) -> Generator:
    """Return the given settings, or the default settings for a name."""
    if isinstance(method, Generator):
        return method
    if isinstance(method, str) and method in GENERATORS:
        return GENERATORS[method]()
    if isinstance(method, type) and issubclass(method, Generator):
        raise QuietvitError(
            f"the method is the class {method.__name__}. Give settings, such as "
            f"{method.__name__}(), or the name {getattr(method, 'name', 'pink')!r}."
        )
    shown = repr(method)
    raise QuietvitError(
        f"there is no method {shown} to generate images{nearest(str(method), GENERATORS)}. "
        f"Choose from {', '.join(GENERATORS)}."
    )


@dataclass(frozen=True)
class Request:
    """A parsed ``synthetic:COUNT:METHOD:FIELD=VALUE,...``. Parts that are left out are None."""

    count: int | None
    method: Generator | None


def is_synthetic(text: str) -> bool:
    """Whether a data specification requests generated images."""
    return text.partition(":")[0] == PREFIX


def parse_request(text: str) -> Request:
    """Parse ``synthetic``, ``synthetic:32``, ``synthetic:32:pink`` or a method with fields.

    Example with fields: ``synthetic:32:psaq:iterations=120,patches=64``.

    Raises:
        QuietvitError: the number, method, a field or a value is invalid.
    """
    _, *parts = text.split(":", 3)
    count = method = None
    if parts:
        if not parts[0].isdecimal() or int(parts[0]) < 1:
            method_alone = parts[0] in GENERATORS
            shown = ":".join([PREFIX, "32", *(parts if method_alone else [])])
            raise QuietvitError(
                f"{text!r} requests {parts[0]!r} images. Write a number, such as {shown}."
            )
        count = int(parts[0])
    if len(parts) > 1:
        kind = type(generator_of(parts[1]))
        method = kind(**_fields(parts[2], text) if len(parts) > 2 else {})
    return Request(count, method)


def _fields(written: str, text: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for part in written.split(","):
        key, equals, value = part.partition("=")
        if not equals:
            raise QuietvitError(
                f"{part!r} in {text!r} sets no field. Write FIELD=VALUE, such as iterations=100."
            )
        if key.strip() in fields:
            raise QuietvitError(f"{text!r} sets {key.strip()} twice. Leave one of them out.")
        fields[key.strip()] = None if value.strip().lower() == "none" else value.strip()
    return fields


def _explained(kind: type[Generator], error: ValidationError) -> str:
    told = []
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            fields = kind.model_fields
            has = ", ".join(fields) or "no fields"
            told.append(f"there is no field {key!r}{nearest(key, fields)} (it has {has})")
        else:
            told.append(f"{key}={problem['input']!r}: {problem['msg'].lower()}")
    return f"the generator {kind.name}: {'; '.join(told)}."
