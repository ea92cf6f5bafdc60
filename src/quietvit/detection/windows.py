"""Windowed attention for plain timm backbones, as in ViTDet (arXiv 2203.16527, section 3).

``pyramid`` builds the maps behind the backbone. Hierarchical backbones have windows of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope  # type: ignore[attr-defined]
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import Attention  # type: ignore[attr-defined]
from torch import Tensor, nn

from quietvit.errors import QuietvitError

_KNOWN = (Attention, AttentionRope, EvaAttention, BeitAttention)


class Windows:
    """Splits the tokens of a grid into square windows, and joins the windows again.

    Two hooks around an attention module call it, so the module computes each window by itself.
    Modules and parameters keep their names.

    - A grid that does not divide into windows is padded with zeros below and at the right. The
      padding comes behind the norm, is not masked, and is cut off afterwards (as in ViTDet's code).
    - ViTDet has no prefix tokens (class, registers). Derived here: each window attends to all of
      them, and each prefix token becomes the mean of its outputs in all windows.
    - Every token keeps its position in the whole grid (rope). Padding is not rotated.

    Args:
        grid: rows and columns of image tokens.
        side: side of a window in tokens.
        prefix: number of tokens in front of the image tokens.
    """

    def __init__(self, grid: tuple[int, int], side: int, prefix: int) -> None:
        self.grid, self.side, self.prefix = grid, side, prefix
        self.rows, self.columns = (-(-length // side) for length in grid)

    def split(self, tokens: Tensor) -> Tensor:
        """Cut tokens (N, prefix + h w, C) into windows (N * windows, prefix + side², C)."""
        image = self._cut(tokens[:, self.prefix :])
        if not self.prefix:
            return image.flatten(0, 1)
        first = tokens[:, None, : self.prefix].expand(-1, image.shape[1], -1, -1)
        return torch.cat([first, image], dim=2).flatten(0, 1)

    def join(self, windows: Tensor) -> Tensor:
        """Put the windows of ``split`` together: (N, prefix + h w, C)."""
        (height, width), side = self.grid, self.side
        each = windows.unflatten(0, (-1, self.rows * self.columns))
        image = each[:, :, self.prefix :].unflatten(2, (side, side))
        image = image.unflatten(1, (self.rows, self.columns)).transpose(2, 3)
        image = image.flatten(3, 4).flatten(1, 2)[:, :height, :width].flatten(1, 2)
        if not self.prefix:
            return image
        return torch.cat([each[:, :, : self.prefix].mean(dim=1), image], dim=1)

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Give the attention module windows. This is a forward pre-hook."""
        tokens, *rest = args
        changed = dict(kwargs)
        if kwargs.get("rope") is not None:
            changed["rope"] = self._rope(kwargs["rope"], len(tokens))
        if kwargs.get("shared_rel_pos_bias") is not None:
            places = self.places()
            changed["shared_rel_pos_bias"] = kwargs["shared_rel_pos_bias"][:, places][..., places]
        return (self.split(tokens), *rest), changed

    def after(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Join the windows that the attention module returned. This is a forward hook."""
        return self.join(output)

    def places(self) -> list[int]:
        """Return the places of the first window's tokens among all tokens, the prefix included.

        All windows have the same relative positions. Rows and columns beyond the grid, where it is
        shorter than a window, take the place of the last one.
        """
        height, width = self.grid
        image = [
            self.prefix + min(row, height - 1) * width + min(column, width - 1)
            for row in range(self.side)
            for column in range(self.side)
        ]
        return [*range(self.prefix), *image]

    def _cut(self, image: Tensor, value: float = 0.0) -> Tensor:
        """Cut image tokens (..., h w, C) into windows (..., windows, side², C)."""
        (height, width), side = self.grid, self.side
        image = image.unflatten(-2, (height, width))
        below, right = self.rows * side - height, self.columns * side - width
        if below or right:
            image = F.pad(image, (0, 0, 0, right, 0, below), value=value)
        image = image.unflatten(-2, (self.columns, side)).unflatten(-4, (self.rows, side))
        return image.transpose(-4, -3).flatten(-3, -2).flatten(-4, -3)

    def _rope(self, rope: Tensor, batch: int) -> Tensor:
        """Cut (h w, D) or (heads, h w, D), sines beside cosines: (N * windows, heads, side², D)."""
        sine, cosine = rope.chunk(2, dim=-1)
        parts = (self._cut(sine), self._cut(cosine, value=1.0))  # an angle of 0 for the padding
        windows = torch.cat(parts, dim=-1).movedim(-3, 0)
        windows = windows[:, None] if windows.ndim == 3 else windows
        return windows.repeat(batch, 1, 1, 1)


def use_windows(
    body: nn.Module, grid: tuple[int, int], side: int, global_blocks: Sequence[int] | None = None
) -> None:
    """Make the attention of a plain timm backbone windowed in all but a few blocks, in place.

    Windows that hold the whole grid change nothing.

    Args:
        body: a ViT, DeiT, BEiT, EVA or DINOv2 of timm.
        grid: rows and columns of its image tokens.
        side: side of the square windows in tokens (14 in ViTDet).
        global_blocks: numbers of the blocks that keep global attention, counted from 0. None: the
            last block of each quarter, as in ViTDet (2, 5, 8 and 11 of 12).

    Raises:
        QuietvitError: the attention is of another kind, or has windows already; a number is not
            that of a block; or the table of relative positions is for another grid.
    """
    blocks: list[Any] = list(getattr(body, "blocks", ()))
    name = type(body).__name__
    if side < 1:
        raise QuietvitError(f"windows is {side}. Give the side of a window in tokens, such as 14.")
    if global_blocks is None:
        global_blocks = [-(-len(blocks) * quarter // 4) - 1 for quarter in range(1, 5)]
    for place in global_blocks:
        if not 0 <= place < len(blocks):
            raise QuietvitError(
                f"global_blocks names block {place}, but {name} has the blocks 0 to "
                f"{len(blocks) - 1}."
            )
    kinds = {type(getattr(block, "attn", None)).__name__: block for block in blocks}
    for kind, block in kinds.items():
        if not isinstance(getattr(block, "attn", None), _KNOWN):
            raise QuietvitError(
                f"{name} cannot have windows: the attention of its blocks is {kind}. Windows are "
                "for ViT, DeiT, BEiT, EVA and DINOv2 of timm. Leave windows out."
            )
    if side >= max(grid):
        return
    windows = Windows(grid, side, int(getattr(body, "num_prefix_tokens", 0)))
    for place, block in enumerate(blocks):
        if place not in global_blocks:
            _wrap(block.attn, windows, name)


def _wrap(attention: Any, windows: Windows, name: str) -> None:
    hooks = attention._forward_pre_hooks.values()
    if any(isinstance(getattr(hook, "__self__", None), Windows) for hook in hooks):
        raise QuietvitError(f"this {name} has windows already. Create the backbone anew.")
    if getattr(attention, "relative_position_bias_table", None) is not None:
        own = tuple(attention.window_size)
        if own != windows.grid:
            raise QuietvitError(
                f"the relative positions of {name} are for {own[0]} x {own[1]} tokens, but the "
                f"image has {windows.grid[0]} x {windows.grid[1]}. Create the backbone with "
                "img_size = size of the detector."
            )
        # The table stays whole, so weights fit with and without windows. The index chooses.
        places = windows.places()
        index = attention.relative_position_index[places][:, places]
        attention.register_buffer("relative_position_index", index, persistent=False)
        attention.window_size = (windows.side, windows.side)
    attention.register_forward_pre_hook(windows.before, with_kwargs=True)
    attention.register_forward_hook(windows.after)
