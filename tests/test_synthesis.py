"""Generated calibration images: what every generator promises, on tiny models of each library."""

from __future__ import annotations

import copy
import importlib
import logging

import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import quietvit
import zoo
from quietvit import cli
from quietvit.commands.images import Minutes
from quietvit.data import create_model
from quietvit.detection import faster_rcnn
from quietvit.errors import QuietvitError
from quietvit.origin import origin_of
from quietvit.synthesis import DGH, PSAQ, Pink, save_images, synthesize
from quietvit.synthesis import loop as loops
from quietvit.synthesis.scale import pixel_scale
from quietvit.synthesis.settings import Noise, parse_request

HALF = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
QUICK = {"psaq": PSAQ(iterations=2, batch_size=2), "dgh": DGH(iterations=2, batch_size=2)}


class Convolutions(nn.Module):
    """A CNN with BatchNorms of known statistics; ``depth`` of them."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [nn.Conv2d(8 if i else 3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(8, 5)
        self.pretrained_cfg = {**HALF, "input_size": (3, 16, 16)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


@pytest.fixture(scope="module")
def cnn() -> nn.Module:
    torch.manual_seed(0)
    model = Convolutions()
    natural = synthesize(model.eval(), 64, "pink", seed=9)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(natural)
    return model.eval()


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    model = zoo.build("timm-vit")[0]
    model.pretrained_cfg = {**model.pretrained_cfg, **HALF}
    return model


def quickly(model: nn.Module, count: int = 3, method: object = None, **given) -> torch.Tensor:
    return synthesize(model, count, method or QUICK["psaq"], progress=False, **given)


@pytest.mark.parametrize(
    "name", ["timm-swin", "hf-yolos", "hf-siglip", "hf-detr", "tv-vit", "tv-swin", "timm-qk-norm"]
)
def test_patch_similarity_works_on_every_library_through_the_trace(name):
    model, example = zoo.build(name)
    image = example["pixel_values"] if isinstance(example, dict) else example
    if not name.startswith("tv"):
        model.pretrained_cfg = {**HALF, "input_size": tuple(image.shape[1:])}
    images = quickly(model, size=tuple(image.shape[-2:]))
    assert images.shape == (3, *image.shape[1:])
    assert images.isfinite().all()


@pytest.mark.parametrize("name", ["levit_128s", "efficientformer_l1", "mobilevit_xxs"])
def test_hybrids_with_batch_norm_take_their_statistics_by_default(name):
    model = timm.create_model(name).eval()
    side = 64 if name == "mobilevit_xxs" else 224
    images = quickly(model, 1, DGH(iterations=1), size=side)
    assert images.shape == (1, 3, side, side)
    assert images.isfinite().all()


def test_detectors_are_stretched_where_they_have_no_classes():
    tiny = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
    ours = faster_rcnn(create_model("vit_tiny_patch16_224", 0, **tiny), 2, channels=16).eval()
    for model, entropy in ((zoo.detector("retinanet"), 0), (ours, 1)):
        method = PSAQ(iterations=1, entropy=entropy, stretching=1)
        images = quickly(model, 2, method, size=None if model is ours else 64)
        assert 0 <= float(images.min()) < float(images.max()) <= 1
        assert origin_of(images)["iterations_done"] == 1
    assert images.shape == (2, 3, 32, 32)


@pytest.mark.parametrize("method", [Noise(), Pink(), *QUICK.values()], ids=lambda m: m.name)
def test_images_follow_the_seed_and_leave_model_and_generators_alone(method, cnn, vit):
    model = cnn if method.name == "dgh" else vit
    before = copy.deepcopy(model.state_dict())
    drawn = torch.random.get_rng_state()
    first, other = (quickly(model, method=method, seed=seed) for seed in (3, 4))
    with torch.no_grad():
        again = quickly(model, method=method, seed=3)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    low, high = -1.0, 1.0  # of pixels in 0..1 with mean and deviation 0.5
    assert low - 1e-5 <= float(first.min()) < float(first.max()) <= high + 1e-5


def test_images_do_not_depend_on_the_normalization_of_the_model(cnn):
    other = copy.deepcopy(cnn)
    other.pretrained_cfg = {**cnn.pretrained_cfg, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    with torch.no_grad():  # it computes the same from pixels in 0..1, apart from the border
        first = other.body[0]
        first.bias += (first.weight.sum((2, 3)) * -1.0).sum(1)
        first.weight *= 2.0
    pixels = [pixel_scale(model).to_pixels(quickly(model, method=Pink())) for model in (cnn, other)]
    torch.testing.assert_close(*pixels)
    assert abs(float(pixels[0].mean()) - 0.449) < 0.02


def test_pink_noise_falls_with_frequency(cnn):
    images = pixel_scale(cnn, 64).to_pixels(quickly(cnn, 16, Pink(), size=64))
    power = torch.fft.rfft2(images - images.mean((2, 3), keepdim=True)).abs().square().mean((0, 1))
    ratio = float(power[4, 0] / power[16, 0])
    assert 8 < ratio < 32  # amplitude 1/f: power falls to 1/16


def test_a_better_image_set_lowers_the_distance_of_batch_norm_statistics(cnn):
    def apart(images: torch.Tensor) -> float:
        found = []
        norms = [m for m in cnn.modules() if isinstance(m, nn.BatchNorm2d)]
        hooks = [m.register_forward_pre_hook(lambda m, x: found.append((x[0], m))) for m in norms]
        with torch.no_grad():
            cnn(images)
        for hook in hooks:
            hook.remove()
        return sum(
            float((x.mean((0, 2, 3)) - m.running_mean).square().mean())
            + float((x.std((0, 2, 3)) - m.running_var.sqrt()).square().mean())
            for x, m in found
        )

    generated = quickly(cnn, 8, DGH(iterations=60, batch_size=4))
    assert apart(generated) < 0.5 * apart(quickly(cnn, 8, Noise()))


def test_the_default_fits_the_model(cnn, vit, monkeypatch):
    monkeypatch.setattr(loops, "optimize", None)
    for model, name in ((cnn, "dgh"), (vit, "psaq")):
        made = synthesize(model, 1, minutes=1e-9, progress=False)
        assert origin_of(made)["method"] == name


def test_a_quantized_model_says_how_its_images_were_made(vit, tmp_path):
    images = quickly(vit, 4, seed=7)
    loader = DataLoader(TensorDataset(images), batch_size=2)
    for given in (images, images[:2], [images[:2], images[2:]], {"pixel_values": images}, loader):
        quantized = quietvit.quantize(vit, "rtn", given, progress=False)
        assert quantized.origin["synthetic"] is True
        assert quantized.origin["seed"] == 7
    quantized.save(tmp_path / "m.qvit")
    origin = quietvit.load(tmp_path / "m.qvit", vit).origin
    assert origin == quantized.origin
    assert (origin["method"], origin["count"], origin["iterations_done"]) == ("psaq", 4, 2)
    assert origin["fields"]["bandwidth"] == 0.01
    assert "generated without data (psaq, seed 7, 2 iterations)" in quantized.report()
    hptq = quietvit.quantize(vit, quietvit.HPTQ(conv_output_bits=8), images, progress=False)
    assert hptq.origin == origin
    real = quietvit.quantize(vit, "rtn", images.clone(), progress=False)
    assert real.origin is None
    assert "generated" not in real.report()


def test_ctrl_c_and_the_time_limit_return_the_images_as_they_are(vit, caplog, monkeypatch):
    calls = []
    step = quietvit.synthesis.psaq.PatchSimilarity.step

    def interrupted(self, index, share):
        calls.append(index)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(self, index, share)

    monkeypatch.setattr(quietvit.synthesis.psaq.PatchSimilarity, "step", interrupted)
    with caplog.at_level(logging.WARNING, "quietvit"):
        images = quickly(vit, 4, PSAQ(iterations=100, batch_size=2))
    assert "2 of 100 iterations" in caplog.text
    assert sorted(calls[:2]) == sorted(calls[2:4]) == [0, 1]
    assert images.shape[0] == 4
    assert origin_of(images)["iterations_done"] == 2
    assert origin_of(images)["stopped"] == "by Ctrl-C"
    limited = quickly(vit, 2, PSAQ(iterations=10**6), minutes=0.002)
    assert origin_of(limited)["iterations_done"] < 10**6
    assert origin_of(limited)["stopped"] == "after 0.002 minutes"


def test_images_are_saved_to_look_at_and_to_calibrate_with(vit, tmp_path):
    images = quickly(vit, 10, Pink())
    sheet = save_images(images, vit, tmp_path / "seen")
    files = sorted((tmp_path / "seen" / "images").iterdir())
    assert [file.name for file in files] == [f"{i}.png" for i in range(10)]
    assert min(Image.open(sheet).size) > 3 * 32
    stored = torchvision.transforms.functional.to_tensor(Image.open(files[3]))
    expected = pixel_scale(vit).to_pixels(images)[3]
    assert float((stored - expected).abs().max()) <= 1 / 255
    with pytest.raises(QuietvitError, match="not empty"):
        save_images(images, vit, tmp_path / "seen")


class _Plain(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach().mean((1, 2, 3))[:, None] @ torch.ones(1, 4)


def test_bad_input_is_refused_with_the_remedy(cnn, vit):
    broken = copy.deepcopy(vit)
    with torch.no_grad():
        broken.head.weight[0, 0] = torch.nan
    unknown = copy.deepcopy(cnn)
    del unknown.pretrained_cfg
    gray = timm.create_model("test_vit", in_chans=1)
    gray.pretrained_cfg = {**gray.pretrained_cfg, "input_size": (1, 160, 160)}
    stuck = _Plain()
    stuck.pretrained_cfg = HALF
    quantized = quietvit.quantize(vit, "rtn", torch.zeros(1, 3, 32, 32), progress=False)
    bare = PSAQ(iterations=1, entropy=0, variation=0)
    for given, told in (
        ((vit, 0), "0 images were requested"),
        ((vit, True), "True images"),
        ((broken, 1), "head.weight of VisionTransformer holds NaN"),
        ((unknown, 1), "model.pretrained_cfg"),
        ((quantized, 1), "is quantized"),
        ((lambda x: x, 1), "torch.nn.Module"),
        ((vit, 1, "dgh"), "no BatchNorm.*'psaq'"),
        ((cnn, 1, "psaq"), "no attention.*'dgh'"),
        ((vit, 1, "pinc"), "did you mean 'pink'"),
        ((gray, 1, "noise"), "1 channels"),
        ((stuck, 1, bare), "no gradient"),
    ):
        with pytest.raises(QuietvitError, match=told):
            synthesize(*given, progress=False)
    for keyword, told in (
        ({"size": 33}, r"33 x 33 pixels.*size="),
        ({"size": -1}, "whole pixels"),
        ({"seed": -1}, "seed"),
        ({"minutes": 0}, "above 0"),
    ):
        with pytest.raises(QuietvitError, match=told):
            quickly(vit, **keyword)
    with pytest.raises(QuietvitError, match="class loss needs logits"):
        quickly(zoo_encoder(), method=PSAQ(iterations=1, classes=1))
    with pytest.raises(QuietvitError, match="loss of iteration 2 is nan"):
        quickly(vit, method=PSAQ(iterations=3, stretching=1e38, lr=1e38))


def zoo_encoder() -> nn.Module:
    model = zoo.build("hf-siglip")[0]
    model.pretrained_cfg = HALF
    return model


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("synthetic:none", "'none' images"),
        ("synthetic:0", "'0' images"),
        ("synthetic:4:psaqq", "did you mean 'psaq'"),
        ("synthetic:4:psaq:iteration=3", "did you mean 'iterations'"),
        ("synthetic:4:psaq:iterations", "sets no field"),
        ("synthetic:4:psaq:iterations=0", "greater than or equal to 1"),
        ("synthetic:pink", "such as synthetic:32:pink"),
        ("synthetic:4:psaq:lr=1,lr=2", "sets lr twice"),
        ("synthetic:4:psaq:variation_range=9", "both ends, such as 2500..3000"),
        ("synthetic:4:psaq:bandwidth=1e-200", "bandwidth"),
    ],
)
def test_a_wrong_request_is_explained(text, told):
    with pytest.raises(QuietvitError, match=told):
        parse_request(text)


def test_a_request_sets_count_method_and_fields():
    assert parse_request("synthetic").count is None
    found = parse_request("synthetic:12:psaq:iterations=7,lr=none,entropy=0.5")
    assert found.count == 12
    assert found.method == PSAQ(iterations=7, lr=None, entropy=0.5)
    ends = parse_request("synthetic:1:psaq:variation_range=10..20").method.variation_range
    assert ends == (10.0, 20.0)


class Clock:
    """A clock that only moves when a test moves it."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds

    def takes(self, minutes: float) -> torch.Tensor:
        self.seconds += 60 * minutes
        return torch.zeros(1)


@pytest.mark.parametrize(
    ("total", "used", "limits", "left"),
    [
        (10.0, [5.0], [5.0], 5.0),
        (10.0, [1.0], [5.0], 9.0),
        (10.0, [2.5, 2.5], [2.5, 2.5], 5.0),
        (10.0, [0.5, 4.5], [2.5, 4.5], 5.0),
        (10.0, [4.0, 1.0], [2.5, 1.0], 5.0),
        (10.0, [7.0, 0.2], [2.5, 0.1], 2.8),  # one step overran
        (10.0, [30.0], [5.0], 0.1),
        (10.0, [], [], 10.0),
        (None, [50.0], [None], float("inf")),
    ],
)
def test_at_most_half_of_the_minutes_generate_images(total, used, limits, left):
    clock, given = Clock(), []
    minutes = Minutes(total, len(used), clock)
    for each in used:
        clock.seconds += 1000  # time between the sources is not counted
        minutes.generate(lambda limit, each=each: (given.append(limit), clock.takes(each))[1])
    assert given == limits == pytest.approx(given)
    assert minutes.left == pytest.approx(left)


@pytest.mark.parametrize("total", [0.0, -1.0, float("nan")])
def test_minutes_that_are_not_above_0_are_refused_before_anything_is_opened(total):
    with pytest.raises(QuietvitError, match="--minutes"):
        Minutes(total, 1)


def test_the_commands_share_their_minutes_between_generating_and_working(monkeypatch, tmp_path):
    clock, limits, worked = Clock(), [], []

    def slow(model, count, method, *, seed, minutes):
        limits.append(minutes)
        clock.takes(minutes)
        return synthesize(model, count, "noise", seed=seed, progress=False)

    def advising(*_, minutes, **__):
        worked.append(minutes)
        raise QuietvitError("far enough")

    monkeypatch.setattr(quietvit.synthesis, "synthesize", slow)
    monkeypatch.setattr(importlib.import_module("quietvit.advice"), "advise", advising)
    monkeypatch.setattr(Minutes.__init__, "__defaults__", (clock,))
    model = ["test_vit", "--size", "32", "--minutes", "8"]
    made = ["--images", "synthetic:16:psaq"]
    run = CliRunner().invoke
    run(cli.app, ["advise", *model, *made])
    run(cli.app, ["advise", *model, *made, "--calibration", "synthetic:4"])
    assert limits == [4, 2, 2]
    assert worked == [4, 4]
    given = ["--calibration", "synthetic:2:psaq", "--method", "rtn-minmax"]
    done = run(cli.app, ["quantize", *model, *given, "-o", str(tmp_path / "m.qvit")])
    assert done.exit_code == 0, done.output
    assert limits == [4, 2, 2, 4]
    for command in ("advise", "quantize"):
        told = " ".join(run(cli.app, [command, "--help"], env={"COLUMNS": "300"}).output.split())
        assert "At most half of it generates images" in told


def test_commands_refuse_before_they_generate(monkeypatch, tmp_path):
    """Generating can take an hour, so too few images and a wrong place are told first."""

    def generated(*_, **__):
        raise AssertionError("generated")

    monkeypatch.setattr(quietvit.synthesis, "synthesize", generated)
    bits = ["--average", "6", "-o", str(tmp_path / "bits.toml")]
    few = ["--images", "synthetic:4"]
    for command, told in (
        (["advise", "test_vit", *few], "one half calibrates"),
        (["choose-bits", "test_vit", *few, *bits], "at least 16 images, and there are 4"),
        (["diagnose", "test_vit", "--images", "Synthetic:4"], "Synthetic:4 cannot be opened"),
    ):
        done = CliRunner().invoke(cli.app, command)
        assert done.exit_code == 2, done.output
        assert told in " ".join(done.output.split())
