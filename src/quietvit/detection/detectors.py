"""Build torchvision's Faster R-CNN, Mask R-CNN, RetinaNet and FCOS on timm backbones.

``pyramid`` builds the feature pyramid, and ``canvas`` fits the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from quietvit.classes import name_classes
from quietvit.data.transforms import data_config
from quietvit.detection.canvas import Canvas, check_multiples
from quietvit.detection.pyramid import Pyramid, pyramid
from quietvit.errors import QuietvitError, nearest

_RATIOS = (0.5, 1.0, 2.0)
_OURS = ("backbone", "num_classes", "kwargs", "min_size", "max_size", "image_mean", "image_std")
"""Arguments of torchvision's detectors that this module sets."""

PREDICTORS = (
    *("cls_logits", "bbox_pred", "bbox_reg", "bbox_ctrness", "cls_score"),  # torchvision
    "mask_fcn_logits",
    *("class_labels_classifier", "bbox_predictor", "class_embed", "bbox_embed"),  # transformers
    *("enc_score_head", "enc_bbox_head", "enc_out_class_embed", "enc_out_bbox_embed"),
)
_ANCHOR = 8
"""Side of an anchor as a multiple of its map's stride: 32 pixels at stride 4 (arXiv 1612.03144)."""


def faster_rcnn(
    backbone: nn.Module,
    num_classes: int,
    *,
    size: tuple[int, int] | None = None,
    channels: int = 256,
    scales: Sequence[float] | None = None,
    windows: int | None = None,
    global_blocks: Sequence[int] | None = None,
    box_channels: int = 1024,
    class_names: Sequence[str] | None = None,
    **options: Any,
) -> nn.Module:
    """Build a Faster R-CNN (arXiv 1506.01497) on a timm backbone, with a feature pyramid.

    The model is torchvision's ``FasterRCNN``, but it fits every image to one canvas
    (``quietvit.detection.canvas.Canvas``).

    In eval mode it takes a list of images (3, h, w) in 0..1 of any size, or one tensor
    (N, 3, h, w). It normalizes them itself. For each image it returns a dict: ``boxes`` (K, 4),
    corners x1, y1, x2, y2 in pixels of the given image; ``labels`` (K,), 1 to ``num_classes``;
    ``scores`` (K,) in 0..1, in descending order.

    In training mode it takes ``(images, targets)`` and returns a dict of losses. Each target is a
    dict with ``boxes`` (N, 4) and ``labels`` (N,). N may be 0.

    Args:
        backbone: a timm model, such as ``quietvit.data.create_model(name, 0, weights,
            img_size=size)``. Its classifier is removed; see ``quietvit.detection.pyramid``.
        num_classes: number of classes without the background.
        size: height and width of the canvas, multiples of every stride. None: the backbone's size.
        channels: channels of the pyramid's maps (256 in arXiv 1612.03144 and 2203.16527).
        scales: see ``quietvit.detection.pyramid``.
        windows: side in tokens of the windows of a plain backbone (14 in ViTDet, arXiv
            2203.16527). None: every block attends to the whole image. See
            ``quietvit.detection.windows.Windows``.
        global_blocks: numbers of the blocks without windows, counted from 0. None: the last block
            of each quarter, as in ViTDet (2, 5, 8 and 11 of 12).
        box_channels: width of the box head's two hidden layers.
        class_names: names of label 1, 2, ...
        options: passed to ``torchvision.models.detection.FasterRCNN``, such as
            ``rpn_post_nms_top_n_test``, ``box_score_thresh`` or ``box_detections_per_img``.

    Raises:
        QuietvitError: the backbone has no feature maps, the size does not fit the strides, the
            backbone cannot have windows, or torchvision refuses an option.
    """
    body, canvas = _parts(backbone, size, channels, scales, windows, global_blocks)
    kwargs = _two_stages(body, box_channels, num_classes) | options
    return _finished(_built(FasterRCNN, body, None, kwargs), canvas, num_classes, class_names)


def mask_rcnn(
    backbone: nn.Module,
    num_classes: int,
    *,
    size: tuple[int, int] | None = None,
    channels: int = 256,
    scales: Sequence[float] | None = None,
    windows: int | None = None,
    global_blocks: Sequence[int] | None = None,
    box_channels: int = 1024,
    mask_channels: int = 256,
    class_names: Sequence[str] | None = None,
    **options: Any,
) -> nn.Module:
    """Build a Mask R-CNN (arXiv 1703.06870) on a timm backbone: ``faster_rcnn`` with masks.

    In eval mode the dict of an image also has ``masks`` (K, 1, h, w) in pixels of the given image:
    the probability in 0..1 that a pixel is on the object. In training mode each target also needs
    ``masks`` (N, h, w), uint8, 1 on the object. The losses then hold ``loss_mask``.

    Args:
        mask_channels: channels of the mask head's four convolutions and its transposed one.

    The other arguments and the errors are those of ``faster_rcnn``. ``options`` are passed to
    ``torchvision.models.detection.MaskRCNN``.
    """
    body, canvas = _parts(backbone, size, channels, scales, windows, global_blocks)
    kwargs = _two_stages(body, box_channels, num_classes) | {
        "mask_roi_pool": _pool(body, 14),
        "mask_head": MaskRCNNHeads(channels, (mask_channels,) * 4, 1),
        "mask_predictor": MaskRCNNPredictor(mask_channels, mask_channels, num_classes + 1),
    }
    built = _built(MaskRCNN, body, None, kwargs | options)
    return _finished(built, canvas, num_classes, class_names)


def retinanet(
    backbone: nn.Module,
    num_classes: int,
    *,
    size: tuple[int, int] | None = None,
    channels: int = 256,
    scales: Sequence[float] | None = None,
    windows: int | None = None,
    global_blocks: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    **options: Any,
) -> nn.Module:
    """Build a RetinaNet (arXiv 1708.02002) on a timm backbone. See ``faster_rcnn``."""
    body, canvas = _parts(backbone, size, channels, scales, windows, global_blocks)
    kwargs = {"anchor_generator": _anchors(body, octave=True), **options}
    built = _built(RetinaNet, body, num_classes + 1, kwargs)
    return _finished(built, canvas, num_classes, class_names)


def fcos(
    backbone: nn.Module,
    num_classes: int,
    *,
    size: tuple[int, int] | None = None,
    channels: int = 256,
    scales: Sequence[float] | None = None,
    windows: int | None = None,
    global_blocks: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    **options: Any,
) -> nn.Module:
    """Build an FCOS (arXiv 1904.01355) on a timm backbone. See ``faster_rcnn``."""
    body, canvas = _parts(backbone, size, channels, scales, windows, global_blocks)
    sizes = tuple((stride,) for stride in _all_strides(body))
    kwargs = {"anchor_generator": AnchorGenerator(sizes, ((1.0,),) * len(sizes)), **options}
    return _finished(_built(FCOS, body, num_classes + 1, kwargs), canvas, num_classes, class_names)


DETECTORS: Mapping[str, Callable[..., nn.Module]] = {
    "faster_rcnn": faster_rcnn,
    "mask_rcnn": mask_rcnn,
    "retinanet": retinanet,
    "fcos": fcos,
}


def is_detector(model: nn.Module) -> bool:
    """Whether quietvit built ``model`` as a detector, which takes images of any size in 0..1."""
    return isinstance(getattr(model, "transform", None), Canvas)


def predicts_masks(model: nn.Module) -> bool:
    """Whether ``model`` is a detector of torchvision with a mask head."""
    heads = getattr(model, "roi_heads", None)
    return heads is not None and bool(heads.has_mask())


def predictors(model: nn.Module) -> tuple[str, ...]:
    """Return name patterns of a detector's last sites: they predict classes, objectness and boxes.

    In torchvision's detectors, DETR and YOLOS, they have the role ``head``, so ``head_bits`` (8)
    covers them. Most of transformers' detectors feed predicted boxes into later decoder layers, so
    some of their predictors have other roles. Keep those at 8 bits with ``overrides={site: 8 for
    site in predictors(model)}``.
    """
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in PREDICTORS]
    return tuple(f"{name}*" for name in names)


def _parts(
    backbone: nn.Module,
    size: tuple[int, int] | None,
    channels: int,
    scales: Sequence[float] | None,
    windows: int | None,
    global_blocks: Sequence[int] | None,
) -> tuple[Pyramid, Canvas]:
    config = data_config(backbone)
    body = pyramid(backbone, channels, scales)
    height, width = config["input_size"][1:] if size is None else size
    strides = f"strides {', '.join(map(str, body.strides))} of the feature pyramid"
    check_multiples((height, width), math.lcm(*body.strides), strides)
    if windows is not None:
        body.use_windows((height, width), windows, global_blocks)
    elif global_blocks is not None:
        raise QuietvitError("global_blocks needs windows, such as windows = 14.")
    return body, Canvas((height, width), config["mean"], config["std"])


def _two_stages(body: Pyramid, box_channels: int, num_classes: int) -> dict[str, Any]:
    """Return the proposals and the box head, as arguments of torchvision's ``FasterRCNN``."""
    return {
        "rpn_anchor_generator": _anchors(body),
        "box_roi_pool": _pool(body, 7),
        "box_head": TwoMLPHead(body.out_channels * 7 * 7, box_channels),
        "box_predictor": FastRCNNPredictor(box_channels, num_classes + 1),
    }


def _built(kind: Any, body: Pyramid, classes: int | None, options: Mapping[str, Any]) -> nn.Module:
    known = [name for name in signature(kind).parameters if name not in _OURS]
    for name in options:
        if name not in known:  # torchvision silently ignores unknown options
            raise QuietvitError(
                f"torchvision's {kind.__name__} has no option {name!r}{nearest(name, known)}. Its "
                f"options are {', '.join(known)}."
            )
    try:
        model: nn.Module = kind(body, num_classes=classes, **options)
    except (TypeError, ValueError) as error:
        raise QuietvitError(
            f"torchvision could not build a {kind.__name__}: {error}. Change or remove this option."
        ) from error
    return model


def _finished(
    model: Any, canvas: Canvas, num_classes: int, class_names: Sequence[str] | None
) -> nn.Module:
    model.transform = canvas
    model.num_classes = num_classes
    model.pretrained_cfg = canvas.data_config
    kept: Any = getattr(getattr(model.backbone, "body", None), "no_weight_decay", set)
    model.no_weight_decay = _Names(f"backbone.body.{name}" for name in kept())
    name_classes(model, class_names)
    built: nn.Module = model
    return built


class _Names(frozenset[str]):
    """Parameter names that a call returns, like timm's ``no_weight_decay()``."""

    def __call__(self) -> set[str]:
        return set(self)


def _all_strides(body: Pyramid) -> tuple[int, ...]:
    return (*body.strides, 2 * body.strides[-1])


def _anchors(body: Pyramid, octave: bool = False) -> AnchorGenerator:
    """Return anchors of three shapes per map. ``octave`` adds three sizes (RetinaNet)."""
    parts = [2 ** (step / 3) for step in range(3)] if octave else [1.0]
    side = _ANCHOR // 2 if octave else _ANCHOR
    sizes = tuple(tuple(int(side * stride * p) for p in parts) for stride in _all_strides(body))
    return AnchorGenerator(sizes, (_RATIOS,) * len(sizes))


def _pool(body: Pyramid, side: int) -> MultiScaleRoIAlign:
    """Return a pooling of ``side`` x ``side`` cells that knows the strides of the maps.

    torchvision infers them from the first batch: powers of two of the image sizes before padding.
    That is wrong for patches of 14 pixels, and for images that fill a small part of the canvas.
    """
    strides = body.strides
    names = [str(index) for index in range(len(strides))]
    pool = MultiScaleRoIAlign(names, output_size=side, sampling_ratio=2)
    pool.scales = [1 / stride for stride in strides]
    first = int(math.log2(strides[0]))
    pool.map_levels = initLevelMapper(
        first,
        first + len(strides) - 1,
        canonical_scale=pool.canonical_scale,
        canonical_level=pool.canonical_level,
    )
    return pool
