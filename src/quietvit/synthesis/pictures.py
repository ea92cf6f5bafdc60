"""Save generated images: one PNG file per image, and a contact sheet.

``generate`` makes the images.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from quietvit.files import beside, refuse_nonempty
from quietvit.synthesis.scale import pixel_scale

SHEET = "contact-sheet.png"


def save_images(images: Tensor, model: nn.Module, folder: str | Path, force: bool = False) -> Path:
    """Write ``contact-sheet.png`` and one PNG file per image in the subfolder ``images``.

    They are to look at. ``--calibration`` accepts the subfolder, but treats its files as photos: it
    resizes and crops them, and the result does not say that they were generated.

    Args:
        images: (N, C, H, W) in the preprocessing of ``model``, as from ``quietvit.synthesize``.
        folder: created if missing.
        force: write into a folder that is not empty, and replace files of the same name.

    Returns:
        The path of the contact sheet.

    Raises:
        QuietvitError: the folder is not empty or is read-only, or the normalization is unknown.
    """
    from torchvision.utils import save_image

    folder = Path(folder)
    height, width = images.shape[-2:]
    pixels = pixel_scale(model, (height, width)).to_pixels(images.detach().cpu().float())
    refuse_nonempty(folder, force)
    digits = len(str(len(pixels) - 1))
    for number, image in enumerate(pixels):
        path = folder / "images" / f"{number:0{digits}d}.png"
        with beside(path) as hidden:
            save_image(image, hidden / path.name)
            (hidden / path.name).replace(path)
    with beside(folder / SHEET) as hidden:
        save_image(pixels, hidden / SHEET, nrow=max(1, round(len(pixels) ** 0.5)))
        (hidden / SHEET).replace(folder / SHEET)
    return folder / SHEET
