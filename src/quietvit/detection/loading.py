"""Turn images with boxes into batches: augmentation, loaders and calibration images.

Images keep their own size here. The detector fits them to its canvas (``canvas``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from quietvit.data.images import drawn
from quietvit.detection.dataset import Target
from quietvit.section import Section, low_to_high

Sample = tuple[Tensor, Target]
Factor = Annotated[float, Field(gt=0, le=4)]


class BoxAugmentation(Section):
    """Random changes of training images and their boxes.

    ``crop`` is the probability of DETR's crop (arXiv 2005.12872, appendix A.4), which comes first:
    the shorter side becomes 400, 500 or 600 pixels, and a random part with sides of 384 to 600
    pixels remains.

    ``scale`` is the range of large-scale jitter (Ghiasi et al., arXiv 2012.07177). Jitter scales
    the image to a random factor of the model's canvas, then crops or pads it to the canvas. (1, 1)
    turns it off. ``flip`` is the probability of a horizontal flip. ``color_jitter`` is the largest
    relative change of brightness, contrast and saturation.
    """

    crop: float = Field(default=0.0, ge=0, le=1)
    flip: float = Field(default=0.5, ge=0, le=1)
    scale: tuple[Factor, Factor] = (1.0, 1.0)
    color_jitter: float = Field(default=0.0, ge=0, le=1)

    _low_to_high = field_validator("scale")(low_to_high)


class TrainingTransform:
    """Augment one training sample: (image (3, H, W) in 0..1, ``Target``).

    Crowd boxes are removed. Boxes with a side below one pixel after cropping are removed, too.
    Masks change with the boxes. After a crop, a box fits the visible part of its mask, and an
    object without a visible part is removed. Randomness comes from torch's global generator.

    Args:
        canvas: height and width of the detector's input.
        mean: color of the padding, one value in 0..1 for each channel.
    """

    def __init__(
        self, canvas: tuple[int, int], mean: tuple[float, ...], augmentation: BoxAugmentation
    ) -> None:
        steps: list[Any] = []
        if augmentation.crop > 0:
            sides: Any = [400, 500, 600]
            cropped = [v2.RandomShortestSize(sides), RandomPart(384, 600)]
            steps.append(v2.RandomApply(cropped, augmentation.crop))
        if augmentation.scale != (1.0, 1.0):
            fill = {Image.Image: [round(255 * value) for value in mean], "others": 0}
            steps += [
                v2.ScaleJitter(canvas, augmentation.scale, antialias=True),
                v2.RandomCrop(canvas, pad_if_needed=True, fill=fill),
                _fit_boxes_to_masks,
            ]
        if augmentation.flip > 0:
            steps.append(v2.RandomHorizontalFlip(augmentation.flip))
        if augmentation.color_jitter > 0:
            steps.append(v2.ColorJitter(*[augmentation.color_jitter] * 3))
        steps += [
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(min_size=1, labels_getter=_per_box),
        ]
        self._steps = v2.Compose(steps)

    def __call__(self, image: Image.Image, target: Target) -> Sample:
        kept = target["iscrowd"] == 0
        chosen = {key: target[key][kept] for key in _PER_BOX}
        for key in _located(target):
            chosen[key] = tv_tensors.wrap(target[key][kept], like=target[key])
        pixels, changed = evaluation_sample(*self._steps(image, {**target, **chosen}))
        return pixels, changed | {"size": tuple(pixels.shape[-2:])}


class RandomPart(v2.Transform):
    """Crop a random rectangle whose sides are between ``least`` and ``most`` pixels.

    A side of the image that is shorter than ``least`` stays whole.
    """

    def __init__(self, least: int, most: int) -> None:
        super().__init__()
        self.least, self.most = least, most

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        whole = v2.functional.get_size(flat_inputs[0])
        sides = [_drawn(min(self.least, side), min(self.most, side)) for side in whole]
        top, left = (_drawn(0, side - kept) for side, kept in zip(whole, sides, strict=True))
        return {"top": top, "left": left, "height": sides[0], "width": sides[1]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(v2.functional.crop, inpt, **params)


def _drawn(low: int, high: int) -> int:
    """Draw an integer from ``low`` to ``high``, both included."""
    return int(torch.randint(low, high + 1, ()))


def evaluation_sample(image: Image.Image, target: Target) -> Sample:
    """Return the image (3, H, W) in 0..1 at its own size, and its target as plain tensors."""
    pixels = v2.functional.to_dtype(v2.functional.to_image(image), torch.float32, scale=True)
    return _plain(pixels), target | {key: _plain(target[key]) for key in _located(target)}


class DetectionSamples(Dataset[Sample]):
    """The samples of ``dataset`` with images as tensors, without augmentation."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return evaluation_sample(*self.dataset[index])


def collate(samples: list[Sample]) -> tuple[list[Tensor], list[Target]]:
    """Return a list of images, which may differ in size, and a list of their targets."""
    return [image for image, _ in samples], [target for _, target in samples]


def detection_loader(dataset: Any, batch_size: int = 8, num_workers: int = 0) -> DataLoader[Sample]:
    """Return a loader over the whole data set, in order. A batch is two lists (images, targets).

    Images are (3, H, W) in 0..1 at their own size. Targets are ``dataset.Target``.
    """
    return DataLoader(
        DetectionSamples(dataset),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        generator=torch.Generator(),
    )


def detection_calibration(
    dataset: Any, count: int, fit: Callable[[Tensor], Tensor], seed: int = 0
) -> Tensor:
    """Draw ``count`` images without replacement as one tensor (count, 3, H, W) in 0..1.

    ``fit`` fits an image (3, h, w) to the detector's canvas: use ``model.transform.fit``.

    Raises:
        QuietvitError: ``count`` is below 1 or above the number of images.
    """
    order = drawn(dataset, count, seed, "calibration images")
    samples = (evaluation_sample(*dataset[int(index)]) for index in order)
    return torch.stack([fit(image) for image, _ in samples])


_PER_BOX = ("labels", "category_ids", "area", "iscrowd")


def _per_box(sample: Any) -> tuple[Tensor, ...]:
    return tuple(sample[1][key] for key in _PER_BOX)


def _located(target: Target) -> list[str]:
    return [key for key in ("boxes", "masks") if key in target]


def _fit_boxes_to_masks(image: Any, target: Target) -> tuple[Any, Target]:
    """Let each box enclose its mask. The box of an empty mask becomes empty."""
    if "masks" not in target:
        return image, target
    masks, boxes = _plain(target["masks"]).bool(), target["boxes"]
    fitted = torch.zeros_like(_plain(boxes))
    seen = masks.flatten(1).any(1)
    fitted[seen] = masks_to_boxes(masks[seen]).to(fitted)
    fitted[seen, 2:] += 1  # masks_to_boxes gives the last pixel, and boxes end behind it
    return image, target | {"boxes": tv_tensors.wrap(fitted, like=boxes)}


def _plain(value: Tensor) -> Tensor:
    return value.as_subclass(Tensor)
