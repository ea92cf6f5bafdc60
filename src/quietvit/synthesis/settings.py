"""The settings of each way to generate images, and how they are written on the command line.

``psaq``, ``dgh`` and ``priors`` do the work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field, ValidationError

from quietvit.errors import QuietvitError, nearest
from quietvit.section import Section

Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]
PREFIX = "synthetic"


class Generator(Section):
    """A way to generate images. Raises QuietvitError for an unknown field or a bad value."""

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
    """Noise whose amplitude falls with spatial frequency as in natural images, clipped likewise.

    The amplitude spectrum of natural images is about 1/f (Field 1987, J. Opt. Soc. Am. A 4, 2379).
    Each channel of an image has the mean and deviation of natural images.
    """

    name = "pink"
    exponent: Annotated[float, Field(ge=0, le=4)] = 1.0
    """The amplitude is f to the power of minus this number. 0 gives white noise."""


class PSAQ(Generator):
    """Images in which the patches differ, as the model's attention sees them; after PSAQ-ViT.

    Source: arXiv 2203.02250 and its code. For each attention, the output of attention times values
    is averaged over heads. The cosine similarities of all pairs of patches give a kernel density.
    Its differential entropy is maximized, summed over all blocks. Total variation, stretching and
    classes are further terms. Each batch has its own Adam. Images are rolled and flipped at random.

    Differences from the published code: the density has its grid points for each image, not for
    each batch, so the images of a batch are independent. The default has no class loss, because
    encoders and detectors have no classes; it stretches the outputs instead. The images are in
    ImageNet's normalization during the optimization, whatever the model's is.
    """

    name = "psaq"
    iterations: Count = 1000
    """Steps of each batch; published 2 x 500."""
    batch_size: Count = 8
    """Images in one pass; published 32. It bounds the memory; all batches advance together."""
    entropy: Weight = 1.0
    """Weight of the entropy of patch similarity."""
    stretching: Weight = 0.3
    """Weight of (largest - smallest output) of each image; published 0."""
    classes: Weight = 0.0
    """Weight of the cross-entropy to a random class for each image; published 1."""
    variation: Weight = 0.05
    """Weight of the distance of the total variation from a random target."""
    variation_range: tuple[Weight, Weight] = (2500.0, 3000.0)
    """The target is drawn from here. It holds for 32 images of 224 x 224 and is scaled for others.
    """
    bandwidth: Annotated[float, Field(gt=0)] = 0.01
    """Standard deviation of the Gaussian kernel."""
    points: Annotated[int, Field(ge=2)] = 10
    """Points between the least and the largest similarity at which the density is computed."""
    patches: Annotated[int, Field(ge=2)] = 196
    """Most patches of an image that are compared; more are sampled at each step."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate in units of ImageNet's normalization. None: 0.25 for attention in windows, else
    0.2, as published."""


class DGH(Generator):
    """Images that have the statistics that the BatchNorms stored in training (arXiv 2410.22110).

    The mean and deviation of each BatchNorm's input over the whole image set are matched to the
    running statistics. An image is flipped, smoothed, cropped and clipped at random before each
    pass. The outputs are stretched. Each batch has its own RAdam and plateau schedule.

    Differences from the published code: the patience of the schedule is never below 20, because
    iterations / 50 cuts the rate far too early in short runs. All BatchNorms with stored statistics
    count, also one-dimensional and frozen ones. The default batch is smaller. The images are in
    ImageNet's normalization during the optimization, whatever the model's is.
    """

    name = "dgh"
    iterations: Count = 1000
    """Steps of each batch."""
    batch_size: Count = 16
    """Images in one pass; published 128. The statistics are always those of all images."""
    lr: Annotated[float, Field(gt=0)] = 16.0
    """Learning rate of RAdam in units of ImageNet's normalization."""
    deviation: Weight = 10.0
    """Weight of the deviations against that of the means."""
    stretching: Weight | None = None
    """Weight of the outputs. None: 3e-7 for ResNet-18, 1e-7 for ResNet-50, 3e-5 for MobileNetV2, as
    published, and 3e-5 for other models."""
    sigma: Annotated[float, Field(gt=0)] = 1.25
    """Standard deviation of the 3 x 3 smoothing in pixels."""
    margin: Annotated[float, Field(ge=0, le=1)] = 32 / 224
    """Room for random crops as a share of the side: 256 for 224 pixels."""
    patience: Count | None = None
    """Steps without progress before the rate is halved. None: iterations / 50, at least 20."""


GENERATORS: dict[str, type[Generator]] = {kind.name: kind for kind in (DGH, PSAQ, Pink, Noise)}


def generator_of(method: Generator | str) -> Generator:
    """Return the settings of a generator given as such, or by name with its defaults."""
    if isinstance(method, Generator):
        return method
    if isinstance(method, str) and method in GENERATORS:
        return GENERATORS[method]()
    shown = repr(method)
    raise QuietvitError(
        f"there is no way to generate images called {shown}{nearest(str(method), GENERATORS)}; "
        f"choose one of {', '.join(GENERATORS)}."
    )


@dataclass(frozen=True)
class Request:
    """What ``synthetic:COUNT:METHOD:FIELD=VALUE,...`` asks for; None where it says nothing."""

    count: int | None
    method: Generator | None


def is_synthetic(text: str) -> bool:
    """Whether a data specification asks for generated images."""
    return text.partition(":")[0] == PREFIX


def parse_request(text: str) -> Request:
    """Read ``synthetic``, ``synthetic:32``, ``synthetic:32:pink`` or with fields of the method.

    Example: ``synthetic:32:psaq:iterations=120,patches=64``.

    Raises:
        QuietvitError: a bad number, an unknown method or field, or a value out of range.
    """
    _, *parts = text.split(":", 3)
    count = method = None
    if parts:
        if not parts[0].isdecimal() or int(parts[0]) < 1:
            raise QuietvitError(
                f"{text!r} asks for {parts[0]!r} images; write a number, such as {PREFIX}:32."
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
                f"{part!r} in {text!r} sets no field; write FIELD=VALUE, such as iterations=100."
            )
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
