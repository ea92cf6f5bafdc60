"""Images as checked batches on a model's device, with a warning if they are not normalized.

The accepted forms of images are in ``quietvit.inputs``; callers decide what to measure.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.inputs import ImageBatch, Images, image_batches
from quietvit.normalization import warn_unless_normalized
from quietvit.tracing import plain_model


def batches(images: Images, model: nn.Module, batch_size: int) -> Iterator[ImageBatch]:
    """Yield batches of at most ``batch_size``, on the model's device and in its dtype.

    The model gets a mapping by keyword. If its forward does not take these keys, it gets the images
    alone. If the first batch is not normalized like the model's preprocessing, a warning says so.

    Args:
        images: in any form that ``inputs.image_batches`` takes.

    Raises:
        QuietvitError: no images, an unknown form or shape, integers, NaN or inf.
    """
    if batch_size < 1:
        raise QuietvitError(f"batch_size is {batch_size}; give at least 1.")
    parameter = next(model.parameters(), None)
    empty = True
    for batch in image_batches(images, batch_size):
        if empty:
            warn_unless_normalized(batch.inputs, model, "given")
        empty = False
        inputs = batch.inputs
        if isinstance(inputs, dict) and _takes(model, inputs):
            yield ImageBatch({key: _like(value, parameter) for key, value in inputs.items()})
        else:
            yield ImageBatch(_like(batch.images, parameter))
    if empty:
        raise QuietvitError("there are no images to measure; give at least one image.")


def _takes(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether the model's forward has arguments of these names."""
    parameters = inspect.signature(plain_model(model).forward).parameters
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return any_name or set(names) <= set(parameters)


def _like(x: Tensor, parameter: Tensor | None) -> Tensor:
    if parameter is None:
        return x
    dtype = parameter.dtype if x.is_floating_point() and parameter.is_floating_point() else x.dtype
    return x.to(parameter.device, dtype)
