"""``quantize``: make a ``QuantizedModel`` from a float model, a method and images.

The method (``methods``) does the work in between; ``calibration`` checks the images.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from quietvit.errors import QuietvitError
from quietvit.normalization import warn_unless_normalized
from quietvit.origin import in_words, origin_of
from quietvit.quantization.calibration import IMAGES_ALONE, Calibration, ImageStream
from quietvit.quantization.method import Method, list_methods
from quietvit.quantization.outputs import with_quantized_outputs
from quietvit.quantization.quantized import QuantizedModel
from quietvit.quantization.settings import parse_method
from quietvit.tracing import Trace, plain_copy, trace_images
from quietvit.tracing import trace as trace_model


def quantize(
    model: nn.Module,
    method: Method | str,
    calibration: Any,
    *,
    bits: str | None = None,
    example: Any = None,
    trace: Trace | None = None,
    progress: bool = True,
) -> QuantizedModel:
    """Quantize a copy of ``model``; the given model never changes.

    Give the method as a config, ``quantize(model, RTN(weight_bits=4), images)``, or by name,
    ``quantize(model, "repq-vit", images, bits="W4A4")``.

    Args:
        model: any model that ``quietvit.trace`` can trace. The copy is in eval mode.
        method: the config of a method, or a name: ``rtn``, ``rtn-omse`` (with an activation range),
            ``repq-vit+qwt`` (one method on top of another). ``quietvit.list_methods()`` lists them.
        calibration: images (N, 3, H, W) after the model's own transform, or an iterable of batches:
            tensors, tuples or lists that begin with one, dicts with ``pixel_values`` or ``images``.
            The model gets the images alone: what follows them in a tuple counts as labels. Wrap a
            model with more arguments in a module whose ``forward(images)`` gives them.
            Batches are read one by one. A method that holds all images in memory says so in its
            docstring. Images from ``quietvit.synthesize`` are noted in the result.
        bits: such as ``W4A8``, for a method given by name; None takes the method's defaults, W8A8.
        example: input for tracing; None takes the first image.
        trace: an earlier ``quietvit.trace`` of this model.
        progress: show a progress bar if calibration takes more than 3 seconds.

    The result's notes name anything unusual, such as a model in train mode. A warning appears if
    the images are not normalized like the model's own preprocessing.

    Raises QuietvitError for no images, wrong shapes, NaN, a model that is quantized already, an
    unknown method, or ``bits`` together with a config.
    """
    if not isinstance(model, nn.Module):
        raise QuietvitError(f"the model is a {type(model).__name__}, not a torch.nn.Module.")
    if any(isinstance(module, QuantizedModel) for module in model.modules()):
        raise QuietvitError(
            f"this {type(model).__name__} is quantized already; quantize the float model it was "
            "made from."
        )
    method = _configured(method, bits)
    images = ImageStream(calibration, model)
    first = images.peek()
    warn_unless_normalized(first, model, "calibration")
    notes = []
    if model.training:
        notes.append("the model was in training mode; its quantized copy is in eval mode")
    own = plain_copy(model).eval()
    if trace is None:
        trace = (
            trace_images(own, first[:1], IMAGES_ALONE)
            if example is None
            else trace_model(own, example)
        )
    if not trace.matmuls:
        raise QuietvitError(
            f"{type(model).__name__} has no matrix products in its trace; nothing to quantize."
        )
    fixed = [site.name for site in trace.matmuls if site.role == "constant"]
    if fixed:
        shown = ", ".join(fixed[:3]) + (", ..." if len(fixed) > 3 else "")
        notes.append(
            f"{len(fixed)} products do not depend on the images ({shown}); they are quantized "
            "like all others. A deployed model may compute them once, in float: exclude them to "
            "measure that"
        )
    method.check_sites(trace)
    watched = Calibration(
        own, trace, images, progress, lambda slot: method.slot_bits(slot) is not None
    )
    calibrated = method.calibrate(watched)
    origin = origin_of(calibration)
    how = "" if origin is None else f", generated without data ({in_words(origin)})"
    notes.append(f"calibrated on {images.seen} images of shape {tuple(first.shape[1:])}{how}")
    notes += calibrated.notes
    quantized = QuantizedModel(
        own,
        trace,
        method,
        calibrated.quantizers,
        adjustments=calibrated.adjustments,
        compensations=calibrated.compensations,
        input_shape=tuple(first.shape[1:]),
        notes=tuple(notes),
        origin=origin,
    )
    if method.conv_output_bits is None:
        return quantized
    return with_quantized_outputs(quantized, watched, method.conv_output_bits)


def _configured(method: Any, bits: str | None) -> Method:
    """Return the method's config. Raises QuietvitError for other values and for unused ``bits``."""
    if isinstance(method, str):
        return parse_method(method, bits)
    if not isinstance(method, Method):
        text = f"the class {method.__name__}" if isinstance(method, type) else repr(method)
        raise QuietvitError(
            f"the method is {text}; give a config such as quietvit.RTN(weight_bits=8), or one of "
            f"the names {', '.join(list_methods())}."
        )
    if bits is not None:
        raise QuietvitError(
            f"bits={bits!r} goes with the name of a method, but the method is the config "
            f"{type(method).__name__}(...). Set weight_bits and activation_bits there instead."
        )
    return method
