"""Cut torchvision's detectors into networks of fixed shapes, and assemble a detector from them.

Anchors, proposals, pooling and NMS are torchvision's own code. ``deployment`` exports the networks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from quietvit.detection.canvas import Canvas
from quietvit.errors import QuietvitError

DENSE, BOXES, MASKS = "dense", "boxes", "masks"
HEADS = {BOXES: "box_head", MASKS: "mask_head"}
"""The parts of a two-stage detector that run on pooled boxes, and their modules in roi_heads."""

Run = Callable[[Tensor], Tensor]

_ONE_STAGE = {"retinanet": RetinaNet, "fcos": FCOS}
_DENSE_SETTINGS = ("score_thresh", "nms_thresh", "detections_per_img", "topk_candidates")


class DensePart(nn.Module):
    """Everything that runs once for each image: backbone, neck, and RPN head or dense heads.

    It takes images (N, 3, H, W) in 0..1 that fill the canvas. A Faster R-CNN gives (N, values):
    all maps, then the RPN's logits and box deltas, each (C, h, w) and flattened. A RetinaNet or
    FCOS gives (N, anchors, columns): its heads' outputs side by side. The modules keep the names
    that they have in the detector.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        canvas: Canvas = model.transform
        for name, values in (("mean", canvas.image_mean), ("std", canvas.image_std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.backbone = model.backbone
        if hasattr(model, "rpn"):
            self.rpn = nn.ModuleDict({"head": model.rpn.head})
        else:
            self.head = model.head

    def forward(self, images: Tensor) -> Tensor:
        maps = list(_named(self.backbone((images - self.mean) / self.std)).values())
        if hasattr(self, "rpn"):
            logits, deltas = self.rpn["head"](maps)
            return torch.cat([x.flatten(1) for x in (*maps, *logits, *deltas)], dim=1)
        return torch.cat(list(self.head(maps).values()), dim=-1)


class BoxPart(nn.Module):
    """The box head of a Faster R-CNN: pooled proposals (K, C, h, w) -> class logits and box deltas.

    The result is (K, columns): the logits of all classes and the background, then the deltas.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        heads = {name: getattr(model.roi_heads, name) for name in ("box_head", "box_predictor")}
        self.roi_heads = nn.ModuleDict(heads)

    def forward(self, pooled: Tensor) -> Tensor:
        heads = self.roi_heads
        return torch.cat(heads["box_predictor"](heads["box_head"](pooled)), dim=1)


class MaskPart(nn.Module):
    """The mask head of a Mask R-CNN: pooled boxes (K, C, h, w) -> mask logits of each class.

    The result is (K, classes + 1, 2h, 2w). Class 0 is the background.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        names = ("mask_head", "mask_predictor")
        self.roi_heads = nn.ModuleDict({name: getattr(model.roi_heads, name) for name in names})

    def forward(self, pooled: Tensor) -> Tensor:
        logits: Tensor = self.roi_heads["mask_predictor"](self.roi_heads["mask_head"](pooled))
        return logits


def has_static_parts(model: nn.Module) -> bool:
    """Whether ``model`` is a detector of torchvision, which is exported in parts."""
    return isinstance(model, RetinaNet | FCOS) or all(
        hasattr(model, name) for name in ("backbone", "rpn", "roi_heads")
    )


def static_parts(model: Any) -> dict[str, nn.Module]:
    """Return the parts of a detector by name.

    They are ``dense``, ``boxes`` of a Faster or Mask R-CNN, and ``masks`` of a Mask R-CNN. They
    share their modules with ``model``.

    Raises:
        QuietvitError: its images have no fixed size, or it predicts keypoints.
    """
    name = type(model).__name__
    if not isinstance(model.transform, Canvas):
        raise QuietvitError(
            f"{name} gives each batch another image size, so it has no parts of fixed shapes. "
            "Build it with a function of quietvit.detection, such as faster_rcnn, or set its "
            "transform to quietvit.detection.Canvas(size, mean, std)."
        )
    if not hasattr(model, "roi_heads"):
        return {DENSE: DensePart(model)}
    if model.roi_heads.has_keypoint():
        raise QuietvitError(
            f"{name} predicts keypoints, and only boxes and masks are exported. Set "
            "roi_heads.keypoint_predictor to None, and quantize it again."
        )
    found: dict[str, nn.Module] = {DENSE: DensePart(model), BOXES: BoxPart(model)}
    return found | ({MASKS: MaskPart(model)} if model.roi_heads.has_mask() else {})


def most_rows(model: Any, part: str) -> int:
    """Return the most rows of one image that a head sees: proposals, or boxes found."""
    if part == MASKS:
        return int(model.roi_heads.detections_per_img)
    return int(model.rpn._post_nms_top_n["testing"])


def pooled_shape(model: Any, part: str) -> tuple[int, int, int]:
    """Return (C, h, w) of one pooled box that a head sees."""
    height, width = _pool(model, part).output_size
    return int(model.backbone.out_channels), int(height), int(width)


def decoding_of(model: Any) -> dict[str, Any]:
    """Return everything but weights that ``assembled`` needs, as plain data for JSON."""
    canvas: Canvas = model.transform
    device = next(model.parameters()).device
    with torch.no_grad():
        maps = _named(model.backbone(torch.zeros(1, 3, *canvas.size, device=device)))
    two_stage = hasattr(model, "rpn")
    anchors = (model.rpn if two_stage else model).anchor_generator
    found: dict[str, Any] = {
        "classes": int(model.num_classes),
        "stretch": canvas.stretch,
        "mean": [float(value) for value in canvas.image_mean],
        "anchors": [
            [list(sides) for sides in each] for each in (anchors.sizes, anchors.aspect_ratios)
        ],
        "maps": {name: list(x.shape[1:]) for name, x in maps.items()},
    }
    if not two_stage:
        kind = next(name for name, known in _ONE_STAGE.items() if isinstance(model, known))
        settings = {name: getattr(model, name) for name in _DENSE_SETTINGS}
        return found | {"kind": kind, "settings": settings}
    rpn, heads = model.rpn, model.roi_heads
    settings = {
        "rpn_pre_nms_top_n_test": rpn._pre_nms_top_n["testing"],
        "rpn_post_nms_top_n_test": rpn._post_nms_top_n["testing"],
        "rpn_nms_thresh": rpn.nms_thresh,
        "rpn_score_thresh": rpn.score_thresh,
        "box_score_thresh": heads.score_thresh,
        "box_nms_thresh": heads.nms_thresh,
        "box_detections_per_img": heads.detections_per_img,
        "bbox_reg_weights": list(heads.box_coder.weights),
    }

    def shape(part: str, module: nn.Module) -> list[int]:
        with torch.no_grad():
            rows = module(torch.zeros(1, *pooled_shape(model, part), device=device))
        return list(rows.shape[1:])

    found |= {
        "kind": "faster_rcnn",
        "settings": settings,
        "columns": shape(BOXES, BoxPart(model))[0],
        "smallest": rpn.min_size,
        **_pooling(_pool(model, BOXES)),
    }
    if heads.has_mask():
        masks = {"shape": shape(MASKS, MaskPart(model)), **_pooling(_pool(model, MASKS))}
        found |= {"kind": "mask_rcnn", MASKS: masks}
    return found


def _pool(model: Any, part: str) -> MultiScaleRoIAlign:
    heads = model.roi_heads
    pool: MultiScaleRoIAlign = heads.mask_roi_pool if part == MASKS else heads.box_roi_pool
    return pool


def _pooling(pool: Any) -> dict[str, Any]:
    """Return what ``_pool_of`` needs."""
    levels = pool.map_levels
    fixed = isinstance(levels, LevelMapper)
    return {
        "pool": {
            "featmap_names": list(pool.featmap_names),
            "output_size": list(pool.output_size),
            "sampling_ratio": pool.sampling_ratio,
            "canonical_scale": pool.canonical_scale,
            "canonical_level": pool.canonical_level,
        },
        "scales": list(pool.scales) if fixed else None,
        "levels": [levels.k_min, levels.k_max] if fixed else None,
    }


def _pool_of(told: Mapping[str, Any]) -> MultiScaleRoIAlign:
    pool = MultiScaleRoIAlign(**told["pool"])
    if told["scales"] is not None:
        pool.scales = told["scales"]
        pool.map_levels = LevelMapper(*told["levels"], pool.canonical_scale, pool.canonical_level)
    return pool


def assembled(
    decoding: Mapping[str, Any], dense: Run, heads: Mapping[str, Run], canvas: Canvas
) -> nn.Module:
    """Return a torchvision detector in eval mode whose networks are ``dense`` and ``heads``.

    ``dense`` maps tensors like ``DensePart``, ``heads["boxes"]`` like ``BoxPart`` and
    ``heads["masks"]`` like ``MaskPart``. ``canvas`` must give the images that ``dense`` takes.
    """
    sizes, ratios = (tuple(map(tuple, each)) for each in decoding["anchors"])
    anchors = AnchorGenerator(sizes, ratios)
    shapes = {name: tuple(shape) for name, shape in decoding["maps"].items()}
    classes, settings = decoding["classes"] + 1, dict(decoding["settings"])
    if decoding["kind"] in _ONE_STAGE:
        body: Any = _OneStage(dense, shapes, classes)
        kind: Any = _ONE_STAGE[decoding["kind"]]
        model = kind(body, classes, anchor_generator=anchors, head=_Kept(body), **settings)
    else:
        body = _TwoStage(dense, shapes, anchors.num_anchors_per_location())
        masks, given = decoding.get(MASKS), dict[str, nn.Module]()
        if masks is not None:
            given["mask_roi_pool"] = _pool_of(masks)
            given["mask_head"] = _Running(heads[MASKS], masks["shape"])
            given["mask_predictor"] = nn.Identity()
        kind = FasterRCNN if masks is None else MaskRCNN
        model = kind(
            body,
            rpn_anchor_generator=anchors,
            rpn_head=_Kept(body),
            box_roi_pool=_pool_of(decoding),
            box_head=_Running(heads[BOXES], [decoding["columns"]]),
            box_predictor=_Columns(classes),
            **given,
            **settings,
        )
        model.rpn.min_size = decoding["smallest"]
    model.transform = canvas
    result: nn.Module = model.eval()
    return result


class _Body(nn.Module):
    """Runs ``dense``, returns the maps, and keeps the predictions for ``_Kept``."""

    def __init__(self, run: Run, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.run, self.shapes = run, shapes
        self.out_channels = next(iter(shapes.values()))[0]
        self.kept: Any = None


class _TwoStage(_Body):
    def __init__(self, run: Run, shapes: Mapping[str, tuple[int, ...]], anchors: list[int]) -> None:
        super().__init__(run, shapes)
        places = [shape[1:] for shape in shapes.values()]
        self._cut = [
            *shapes.values(),
            *((n, *place) for n, place in zip(anchors, places, strict=True)),
            *((4 * n, *place) for n, place in zip(anchors, places, strict=True)),
        ]

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        flat = self.run(images).split([c * h * w for c, h, w in self._cut], dim=1)
        each = [x.unflatten(1, shape) for x, shape in zip(flat, self._cut, strict=True)]
        count = len(self.shapes)
        self.kept = each[count : 2 * count], each[2 * count :]
        return OrderedDict(zip(self.shapes, each, strict=False))


class _OneStage(_Body):
    def __init__(self, run: Run, shapes: Mapping[str, tuple[int, ...]], classes: int) -> None:
        super().__init__(run, shapes)
        self._classes = classes

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        columns = self.run(images)
        logits, boxes, rest = columns.tensor_split((self._classes, self._classes + 4), dim=-1)
        self.kept = {"cls_logits": logits, "bbox_regression": boxes}
        if rest.shape[-1]:
            self.kept["bbox_ctrness"] = rest
        # torchvision reads only the shapes of these maps, to place the anchors.
        empty = columns.new_zeros(()).expand
        return OrderedDict((k, empty(len(images), *shape)) for k, shape in self.shapes.items())


class _Kept(nn.Module):
    """Stands for the RPN's head or the dense heads: returns what the body has kept."""

    def __init__(self, body: _Body) -> None:
        super().__init__()
        self._body = [body]  # a list, so that it is not a second child

    def forward(self, maps: Any) -> Any:
        return self._body[0].kept


class _Running(nn.Module):
    """Runs a head on pooled boxes (K, C, h, w). It does not run if no image has any.

    ``shape`` is that of one row of its result.
    """

    def __init__(self, run: Run, shape: Sequence[int]) -> None:
        super().__init__()
        self.run, self._shape = run, shape

    def forward(self, pooled: Tensor) -> Tensor:
        return self.run(pooled) if len(pooled) else pooled.new_zeros(0, *self._shape)


class _Columns(nn.Module):
    """Cuts the columns of ``BoxPart`` into logits and deltas."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self._classes = classes

    def forward(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        return columns[:, : self._classes], columns[:, self._classes :]


def _named(maps: Any) -> Mapping[str, Tensor]:
    return {"0": maps} if isinstance(maps, Tensor) else maps
