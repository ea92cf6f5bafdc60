from __future__ import annotations

import io
import json

import pytest
import timm
import torch
import torchvision
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import quietvit
from quietvit.errors import QuietvitError
from quietvit.measure import diagnose
from quietvit.measure.diagnose import operand_axes, output_axis
from quietvit.tracing import intercept


def tiny(name="vit_tiny_patch16_224", **options):
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 2}
    return timm.create_model(name, num_classes=4, **(sizes | options))


@pytest.fixture
def images():
    return torch.randn(7, 3, 16, 16)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny()


def test_every_matrix_product_is_measured(model, images):
    found = diagnose(model, images)
    trace = quietvit.trace(model, images)
    measured = {(s.site, s.operand) for s in found.sites}
    for site in trace.matmuls:
        names = ("input",) if len(site.operands) == 1 else ("left", "right")
        assert {(site.name, name) for name in names} <= measured
    for site in trace.sites:
        if site.kind in ("norm", "activation", "add"):
            assert (site.name, "output") in measured
    assert found.images == 7
    assert len(found.pairs) == 2 * (1 + 3)


@pytest.mark.parametrize("module", ["blocks.1.mlp.fc2", "patch_embed.proj", "head"])
def test_statistics_are_those_of_a_forward_hook(model, images, module):
    held = []
    hook = model.get_submodule(module).register_forward_pre_hook(lambda _, x: held.append(x[0]))
    with torch.no_grad():
        model.eval()(images)
    hook.remove()
    x = held[0]
    (site,) = [s for s in diagnose(model, images, batch_size=3).sites if s.site == module]
    assert site.max == pytest.approx(float(x.abs().max()), rel=1e-4)
    assert site.rms == pytest.approx(float(x.square().mean().sqrt()), rel=1e-4)
    axis = 1 if x.ndim == 4 else -1
    assert site.channels == x.shape[axis]
    others = [d for d in range(x.ndim) if d != axis % x.ndim]
    assert site.channel_max == pytest.approx(x.abs().amax(others).tolist(), rel=1e-3, abs=1e-5)
    assert site.worst_image == int(x.abs().flatten(1).amax(1).argmax())


def test_the_batch_size_changes_nothing(model, images):
    whole, split = diagnose(model, images), diagnose(model, images, batch_size=2)
    for a, b in zip(whole.sites, split.sites, strict=True):
        assert (a.name, a.count, a.worst_image) == (b.name, b.count, b.worst_image)
        assert a.rms == pytest.approx(b.rms, rel=1e-5)
        assert a.kurtosis == pytest.approx(b.kurtosis, rel=1e-4)
    for a, b in zip(whole.root_causes, split.root_causes, strict=True):
        assert (a.pair, a.channel, a.image) == (b.pair, b.channel, b.image)


def forms(images):
    labels = torch.arange(len(images))
    return {
        "batches": [images[:3], images[3:]],
        "singles": list(images),
        "with labels": [(images[:3], labels[:3]), [images[3:], labels[3:]]],
        "loader": DataLoader(TensorDataset(images, labels), batch_size=4),
        "dataset": TensorDataset(images, labels),
        "generator": (image for image in images),
        "mapping": [{"x": images[:4], "labels": labels[:4]}, {"x": images[4:]}],
    }


@pytest.mark.parametrize("form", list(forms(torch.zeros(7, 1))))
def test_images_come_in_any_form(model, images, form):
    plain, other = diagnose(model, images), diagnose(model, forms(images)[form])
    assert other.images == plain.images
    for a, b in zip(plain.sites, other.sites, strict=True):
        assert (a.count, a.worst_image) == (b.count, b.worst_image)
        assert a.rms == pytest.approx(b.rms, rel=1e-5)


def test_the_model_is_left_as_it_was(images):
    model = tiny()
    model.train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    diagnose(model, images)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(QuietvitError):
        diagnose(model, images * torch.nan)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"global_pool": "avg"}, "vit_tiny_patch16_224"),
        ({}, "deit_tiny_distilled_patch16_224"),
        ({"init_values": 1e-2}, "beit_base_patch16_224"),
        ({}, "eva02_tiny_patch14_224"),
    ],
)
def test_timm_families(options, name, images):
    found = diagnose(tiny(name, **options), images)
    assert found.root_causes
    assert found.skipped == ()
    assert all(s.max >= s.rms > 0 for s in found.sites)


@pytest.mark.parametrize(
    "model",
    [
        torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=3),
        torchvision.models.SwinTransformer([2, 2], 16, [2, 2], [2, 4], [2, 2], num_classes=3),
    ],
    ids=["vit", "swin"],
)
def test_torchvision_families(model, images):
    found = diagnose(model, images)
    written = {pair.name.split(" -> ")[1].split(" head")[0] for pair in found.pairs}
    assert len(found.root_causes) == min(10, len(written))
    assert found.skipped == ()


def test_swin_windows_are_no_images(images):
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        num_classes=4,
    )
    found = diagnose(model, torch.randn(3, 3, 32, 32))
    assert {s.worst_image for s in found.sites} <= {0, 1, 2}
    assert found.root_causes


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_plain_encoder_with_tokens_first(batch_first):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first)

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(16, 2)

        def forward(self, images):
            x = images.flatten(2)
            x = x.mT if batch_first else x.permute(2, 0, 1)
            x = self.encoder(x)
            return self.head(x.mean(1 if batch_first else 0))

    images = torch.randn(5, 16, 3, 3)
    model = Tokens()
    found = diagnose(model, images)
    held = {}

    def keep(site, operands, run):
        held[site.name] = run(*operands)
        return held[site.name]

    with torch.no_grad(), intercept(quietvit.trace(model, images), keep):
        model.eval()(images)
    assert len(found.root_causes) == 4
    for cause in found.root_causes:
        y = held[cause.site]
        place = list(cause.index)
        first = batch_first and not cause.site.endswith("out_proj")
        place[0 if first else 1] = cause.image
        assert cause.value == pytest.approx(float(y[tuple(place)]), rel=1e-3)
        assert abs(cause.value) == pytest.approx(float(y.abs().max()), rel=1e-3)


def test_channel_axes(model, images):
    trace = quietvit.trace(model, images)
    assert operand_axes(trace["blocks.0.attn.qkv"], 0) == (-1,)
    assert operand_axes(trace["patch_embed.proj"], 0) == (1,)
    scores, mix = trace["blocks.0.attn.query_key"], trace["blocks.0.attn.attention_value"]
    assert [operand_axes(scores, i) for i in (0, 1)] == [(1, -1), (1, -2)]
    assert [operand_axes(mix, i) for i in (0, 1)] == [(-1,), (1, -1)]
    found = {s.name: s for s in diagnose(model, images, pairs=()).sites}
    for side in ("left", "right"):
        assert found[f"blocks.0.attn.query_key:{side}"].channels == 24
    convolutional = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
    trace = quietvit.trace(convolutional, images)
    by_name = {site.name: site for site in trace.sites}
    assert [output_axis(site, by_name) for site in trace.sites] == [1, 1, 1]


def test_nan_names_the_first_site_that_makes_it(images):
    model = tiny()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[3, 3] = torch.nan
    with pytest.raises(QuietvitError, match=r"output of blocks\.1\.mlp\.fc1 .* holds NaN"):
        diagnose(model, images, pairs=())
    with pytest.raises(QuietvitError, match=r"blocks\.1\.mlp\.fc1\.weight holds NaN"):
        diagnose(model, images)


def test_overflow_names_its_site(images):
    model = tiny()
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight.fill_(torch.inf)
    with pytest.raises(QuietvitError, match=r"blocks\.0\.mlp\.fc2 .* holds"):
        diagnose(model, images, pairs=())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(0, 3, 16, 16), "at least one image"),
        ([], "no images to measure"),
        (torch.zeros(3, 16, 16), r"shape \(3, 16, 16\)"),
        ([torch.zeros(16, 16)], r"shape \(16, 16\)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "torch.uint8"),
        (torch.full((2, 3, 16, 16), torch.inf), "NaN or inf"),
        (["a.png"], "is a str"),
        (torch.zeros(2, 3, 20, 16), "20"),
        (torch.zeros(2, 1, 16, 16), "1, 16, 16"),
        ([{}], "mapping"),
        ([(torch.zeros(2, 1, 16, 16), torch.zeros(2))], "mappings by keyword.*a tuple holds"),
    ],
)
def test_bad_images(model, bad, message):
    with pytest.raises(QuietvitError, match=message):
        diagnose(model, bad)


def test_a_later_batch_of_another_size_is_refused(model, images):
    with pytest.raises(QuietvitError, match="does not run on images"):
        diagnose(model, [images, torch.randn(2, 3, 24, 24)])


def test_no_pairs_says_how_to_go_on(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 2))
    with pytest.raises(QuietvitError, match=r"pass pairs=\(\)"):
        diagnose(model, images)
    found = diagnose(model, images, pairs=())
    assert (found.pairs, found.root_causes) == ((), ())
    assert "Sites with the heaviest tails" in str(found)


def test_options_out_of_range(model, images):
    with pytest.raises(QuietvitError, match="top is 0"):
        diagnose(model, images, top=0)
    with pytest.raises(QuietvitError, match="batch_size is 0"):
        diagnose(model, images, batch_size=0)


def test_top_bounds_the_causes_and_the_largest_comes_first(model, images):
    found = diagnose(model, images, top=2)
    assert len(found.root_causes) == 2
    everything = diagnose(model, images, top=50).root_causes
    values = [abs(cause.value) for cause in everything]
    assert values == sorted(values, reverse=True)
    assert [c.site for c in found.root_causes] == [c.site for c in everything[:2]]


def test_json_gives_the_numbers_back(model, images, tmp_path):
    found = diagnose(model, images, top=3)
    path = found.to_json(tmp_path / "new" / "diagnosis.json")
    read = json.loads(path.read_text())
    assert read == json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [s["max"] for s in read["sites"]] == [s.max for s in found.sites]
    assert sum("channel_max" in s for s in read["sites"]) == 3
    assert tuple(read["pairs"][0]["amplification"]) == found.pairs[0].amplification
    cause = found.root_causes[0]
    assert read["root_causes"][0]["contribution"]["product"] == cause.contribution.product
    assert [entry.name for entry in path.parent.iterdir()] == ["diagnosis.json"]


def test_numbers_without_a_value_are_null_in_json(images):
    model = tiny()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.zero_()
        model.blocks[0].attn.qkv.bias.zero_()
    found = diagnose(model, images)
    site = next(s for s in found.to_dict()["sites"] if s["site"] == "blocks.0.attn.proj")
    assert (site["kurtosis"], site["percentile_ratio"], site["max_over_rms"]) == (None, None, 0)


def test_the_tables_name_what_is_worst(model, images):
    found = diagnose(model, images)
    text = str(found)
    assert found.worst_sites[0].site in text
    assert "Root causes" in text
    assert "…" not in text  # a table is wider than 120 columns if its names need it
    assert max(len(line) for line in text.splitlines()) <= 140
    console = Console(file=io.StringIO(), width=150)
    console.print(found)
    assert "Pairs that amplify most" in console.file.getvalue()


def test_a_tensor_that_is_output_and_operand_counts_once(model, images):
    names = [s.name for s in diagnose(model, images).worst_sites]
    assert "blocks.0.mlp.fc2" in names
    assert "blocks.0.mlp.act:output" not in names


def test_plots_are_pictures_and_leave_pyplot_alone(model, images, tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    paths = diagnose(model, images).plot(tmp_path / "plots")
    assert [path.name for path in paths] == [
        "outliers_by_depth.png",
        "worst_site_channels.png",
        "amplification.png",
    ]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert dict(matplotlib.rcParams) == before
    assert len(diagnose(model, images, pairs=()).plot(tmp_path / "sites")) == 2


class Windowed(nn.Module):
    """Attention under a mask that the input decides on."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.qkv, self.proj, self.scale = nn.Linear(16, 48), nn.Linear(16, 16), scale

    def forward(self, x):
        q, k, v = self.qkv(x.flatten(1).unflatten(1, (-1, 16))).chunk(3, dim=-1)
        scores = q @ k.mT
        mask = torch.where(scores < scores.mean(-1, keepdim=True), -torch.inf, 0.0) * self.scale
        return self.proj((scores + mask).softmax(-1) @ v)


def test_the_infinities_of_a_mask_are_no_broken_activations():
    images = torch.randn(4, 1, 8, 8)
    found = diagnose(Windowed(), images, pairs=(), batch_size=2)
    assert ("add", "not measured: its scores hold the -inf of a mask") in found.skipped
    assert "add" not in {site.site for site in found.sites}
    assert {"qkv", "proj", "query_key"} <= {site.site for site in found.sites}
    with pytest.raises(QuietvitError, match=r"output of add .* holds inf"):
        diagnose(Windowed(scale=-1.0), images, pairs=())  # +inf


class Proposing(nn.Module):
    """Adds inf to the boxes of cells that the input marks as invalid, as two-stage DETRs do."""

    def __init__(self, computed=False):
        super().__init__()
        self.boxes, self.last, self.computed = nn.Linear(16, 4), nn.Linear(4, 4), computed

    def forward(self, x):
        cells = x.flatten(1).unflatten(1, (-1, 16))
        offsets = self.boxes(cells)
        seen = offsets if self.computed else cells
        invalid = (seen.mean(-1, keepdim=True) < seen.mean()).expand(-1, -1, 4)
        return self.last(
            (offsets + torch.zeros_like(seen[..., :4]).masked_fill(invalid, torch.inf)).sigmoid()
        )


def test_boxes_of_invalid_cells_are_no_broken_activations():
    images = torch.randn(4, 1, 8, 8)
    found = diagnose(Proposing(), images, pairs=(), batch_size=2)
    reason = "not measured: a sum with inf where the model marks entries as invalid"
    assert ("add", reason) in found.skipped
    assert {"boxes", "last"} <= {site.site for site in found.sites}
    with pytest.raises(QuietvitError, match=r"output of add .* holds inf"):
        diagnose(Proposing(computed=True), images, pairs=())


def test_a_first_matrix_that_reads_several_positions_is_named():
    body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU())
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(4 * 64, 5))
    found = diagnose(model, torch.randn(2, 3, 8, 8))
    assert len(found.pairs) == 1
    assert "reads several positions" in dict(found.skipped)[found.pairs[0].name]
