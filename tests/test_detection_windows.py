"""Laws: a window attends to itself and the prefix tokens; one window for all changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import quietvit
from method_cases import configured
from quietvit.data import create_model
from quietvit.detection import faster_rcnn, fcos
from quietvit.detection.pyramid import pyramid
from quietvit.detection.windows import use_windows
from quietvit.errors import QuietvitError

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": (64, 96)}
GRID = (4, 6)
PLAIN = {
    "vit": ("vit_tiny_patch16_224", {"reg_tokens": 2}),
    "no_prefix": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "deit": ("deit_tiny_distilled_patch16_224", {}),
    "dinov2": ("vit_small_patch14_dinov2", {"img_size": (56, 84)}),
    "beit": ("beit_base_patch16_224", {}),
    "beit_shared": ("beit_base_patch16_224", {"use_rel_pos_bias": False,
                                              "use_shared_rel_pos_bias": True}),
    "eva02": ("eva02_tiny_patch14_224", {"patch_size": 16}),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", {}),
}  # fmt: skip


def body(kind: str, **more):
    torch.manual_seed(0)
    name, kwargs = PLAIN[kind]
    model = create_model(name, 0, **(TINY | kwargs | more)).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():  # position tables and biases start at 0
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    return model


def attended(model, images):
    """Input, keyword arguments and output of the first block's attention."""
    seen = []
    hook = model.blocks[0].attn.register_forward_hook(
        lambda _, args, kwargs, output: seen.append((args[0], kwargs, output)), with_kwargs=True
    )
    with torch.no_grad():
        model.forward_intermediates(images, intermediates_only=True)
    hook.remove()
    return seen[0]


def images(model, count=2):
    size = model.patch_embed.img_size
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(2))


def masked(attention, tokens, kwargs, allowed: Tensor) -> Tensor:
    """Global attention whose queries see only the keys that ``allowed`` (N, N) names."""
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))[None]
    kwargs = dict(kwargs)
    if "shared_rel_pos_bias" in kwargs:
        shared = kwargs["shared_rel_pos_bias"]
        kwargs["shared_rel_pos_bias"] = mask if shared is None else shared + mask
    else:
        kwargs["attn_mask"] = mask
    with torch.no_grad():
        return attention(tokens, **kwargs)


@pytest.mark.parametrize("kind", PLAIN)
def test_a_window_sees_its_own_tokens_and_the_prefix_and_no_others(kind):
    whole, side = body(kind), 2
    model = copy.deepcopy(whole)
    use_windows(model, GRID, side, (1,))
    tokens, kwargs, _ = attended(whole, images(whole))
    with torch.no_grad():
        found = model.blocks[0].attn(tokens, **kwargs)
    prefix = whole.num_prefix_tokens
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    window = (rows // side * 3 + columns // side).flatten()
    of = torch.cat([torch.full((prefix,), -1), window])
    same = (of[:, None] == of) | (of[None] < 0)
    expected = masked(whole.blocks[0].attn, tokens, kwargs, same)
    torch.testing.assert_close(found[:, prefix:], expected[:, prefix:], atol=1e-5, rtol=1e-4)
    each = [
        masked(whole.blocks[0].attn, tokens, kwargs, ((of == w) | (of < 0)).expand(len(of), -1))
        for w in range(6)
    ]
    mean = torch.stack(each).mean(0)[:, :prefix]
    torch.testing.assert_close(found[:, :prefix], mean, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, attended(whole, images(whole))[2], atol=1e-3)
    global_block = model.blocks[1].attn
    assert not global_block._forward_pre_hooks
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in whole.state_dict().items()
    }


@pytest.mark.parametrize("kind", ["vit", "no_prefix", "eva02", "beit"])
def test_padding_is_zeros_behind_the_norm_that_every_query_may_see(kind):
    """As detectron2's window_partition, written here with loops. Windows of 5 pad 4 x 6 tokens."""
    whole, side = body(kind), 5
    model = copy.deepcopy(whole)
    use_windows(model, GRID, side, ())
    tokens, kwargs, _ = attended(whole, images(whole))
    with torch.no_grad():
        found = model.blocks[0].attn(tokens, **kwargs)
    prefix, (height, width) = whole.num_prefix_tokens, GRID
    expected = torch.full_like(found, float("nan"))
    outputs = []
    attention = whole.blocks[0].attn
    for left in range(0, width, side):
        cells = [(row, left + column) for row in range(side) for column in range(side)]
        at = [prefix + r * width + c if r < height and c < width else None for r, c in cells]
        window = torch.stack([torch.zeros_like(tokens[:, 0]) if p is None else tokens[:, p]
                              for p in at], dim=1)  # fmt: skip
        given = dict(kwargs)
        if given.get("rope") is not None:
            still = torch.tensor([0.0, 1.0]).repeat_interleave(given["rope"].shape[-1] // 2)
            given["rope"] = torch.stack([still if p is None else given["rope"][p - prefix]
                                         for p in at])  # fmt: skip
        own = attention
        if kind == "beit":  # the bias of two cells depends on their distance only
            own = copy.deepcopy(attention)
            own.relative_position_bias_table = None
            given["shared_rel_pos_bias"] = bias_by_distance(attention, cells)
        with torch.no_grad():
            output = own(torch.cat([tokens[:, :prefix], window], dim=1), **given)
        outputs.append(output[:, :prefix])
        for place, p in enumerate(at):
            if p is not None:
                expected[:, p] = output[:, prefix + place]
    expected[:, :prefix] = torch.stack(outputs).mean(0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def bias_by_distance(attention, cells):
    """(1, heads, 1 + cells, 1 + cells). Rows beyond the grid count as its last row."""
    height, width = GRID
    count = (2 * height - 1) * (2 * width - 1)
    cells = [(min(r, height - 1), c - cells[0][1]) for r, c in cells]
    index = torch.empty(len(cells) + 1, len(cells) + 1, dtype=torch.long)
    index[0], index[:, 0], index[0, 0] = count, count + 1, count + 2
    for i, (r, c) in enumerate(cells):
        for j, (other_r, other_c) in enumerate(cells):
            index[i + 1, j + 1] = (r - other_r + height - 1) * (2 * width - 1) + (
                c - other_c + width - 1
            )
    return attention.relative_position_bias_table[index].permute(2, 0, 1)[None]


@pytest.mark.parametrize("kind", PLAIN)
def test_one_window_for_the_whole_grid_changes_nothing(kind):
    whole = body(kind)
    model = copy.deepcopy(whole)
    use_windows(model, GRID, 6, ())
    with torch.no_grad():
        for here, there in zip(*(m.forward_intermediates(images(whole), intermediates_only=True)
                                 for m in (model, whole)), strict=True):  # fmt: skip
            assert torch.equal(here, there)
    detectors = [faster_rcnn(copy.deepcopy(whole), 2, scales=(1,), channels=8, box_channels=8,
                             windows=w, global_blocks=g).eval()
                 for w, g in ((None, None), (6, ()))]  # fmt: skip
    detectors[1].load_state_dict(detectors[0].state_dict())
    with torch.no_grad():
        maps = [d.backbone(images(whole)) for d in detectors]
    assert all(torch.equal(maps[0][k], maps[1][k]) for k in maps[0])


def test_the_global_blocks_are_the_last_of_each_quarter():
    model = body("vit", depth=12)
    use_windows(model, GRID, 2)
    assert [i for i, b in enumerate(model.blocks) if not b.attn._forward_pre_hooks] == [2, 5, 8, 11]


@pytest.fixture(scope="module")
def windowed():
    """Windows of 3 on 4 x 6 tokens, with a class token; the second block is global."""
    return pyramid_of(3)


def pyramid_of(side):
    model = pyramid(body("vit"), 16, (1.0,))
    model.pretrained_cfg = {"input_size": (3, 64, 96)}
    if side:
        model.use_windows((64, 96), side, (1,))
    return model.eval()


def test_pairs_and_products_are_those_of_the_global_model(windowed):
    whole = pyramid_of(None)
    example = torch.rand(1, 3, 64, 96)
    assert quietvit.find_pairs(windowed, example) == quietvit.find_pairs(whole, example)
    traced = quietvit.trace(windowed, example)
    assert [s.name for s in traced.matmuls] == [
        s.name for s in quietvit.trace(whole, example).matmuls
    ]
    assert traced["body.blocks.0.attn.qkv"].macs == 4 * (3 + 9) * 32 * 96


# One of each mechanism. All 17 methods were run on this model once.
@pytest.mark.parametrize("name", ["rtn", "repq-vit", "gptq", "qdrop", "qwt"])
def test_methods_quantize_windows(windowed, name):
    draw = torch.Generator().manual_seed(3)
    given = torch.rand(4, 3, 64, 96, generator=draw)
    own = quietvit.quantize(windowed, configured(name), given, progress=False)
    assert {why for _, why in own.coverage.untouched} <= {"compensation of a block, float"}
    with torch.no_grad():
        assert all(x.isfinite().all() for x in own(given).values())


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: detector(windows=0), "windows is 0"),
        (lambda: detector(global_blocks=(1,)), "global_blocks needs windows"),
        (lambda: detector(windows=2, global_blocks=(2,)), "has the blocks 0 to 1"),
        (lambda: detector("resnet18", windows=2, size=(64, 64)), "ResNet is hierarchical"),
        (lambda: detector("vit_relpos_small_patch16_224", img_size=64, depth=2, windows=2),
         "attention of its blocks is RelPosAttention"),
        (lambda: use_windows(body("beit"), (5, 5), 2, ()), "are for 4 x 6 tokens, but the image"),
        (lambda: [use_windows(m, GRID, 2, ()) for m in [body("vit")] * 2], "has windows already"),
    ],
)  # fmt: skip
def test_windows_that_cannot_be_are_refused(make, told):
    with pytest.raises(QuietvitError, match=told):
        make()


def detector(name="vit_tiny_patch16_224", windows=None, global_blocks=None, size=None, **kwargs):
    kwargs = kwargs or (TINY if "vit" in name else {})
    made = create_model(name, 0, **kwargs)
    return fcos(made, 2, channels=32, windows=windows, global_blocks=global_blocks, size=size)
