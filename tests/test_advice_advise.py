"""The ladder, its Pareto rows, causes, steps, and the two commands."""

from __future__ import annotations

import json
import sys
import tomllib
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn
from typer.testing import CliRunner

import quietvit
import zoo
from quietvit import cli
from quietvit.advice import Advice, Effect, Row
from quietvit.advice.budget import Budget
from quietvit.advice.causes import find_causes
from quietvit.advice.ladder import Ladder, lowest_first, pareto, settings
from quietvit.advice.sizes import average_bits, stored_bytes
from quietvit.advice.steps import next_steps
from quietvit.advice.switches import Switches
from quietvit.errors import QuietvitError

module = sys.modules["quietvit.advice.advise"]
SMALL = {"methods": ("rtn-omse", "smoothquant"), "bits": ("W8A8", "W4A4+attention-maps-8")}


def model_and_images(count: int = 24) -> tuple[nn.Module, torch.Tensor]:
    model, example = zoo.build("timm-vit")
    model.head.weight.data.mul_(100)
    return model, torch.randn(count, *example.shape[1:])


def row(method: str, bits: str, kl: float, average: float, deployable: bool = True) -> Row:
    effect = Effect(kl**0.5, kl, min(1.0, kl), kl / 2)
    return Row(method, bits, effect, average, average, 1.0, deployable, 1.0)


@pytest.fixture(scope="module")
def advice() -> Advice:
    torch.manual_seed(0)
    model, images = model_and_images()
    return quietvit.advise(model, images, minutes=5, progress=False, **SMALL)


def test_rows_are_measured_on_images_that_do_not_calibrate(advice):
    torch.manual_seed(0)
    model, images = model_and_images()
    assert advice.images == (12, 12)
    method = quietvit.RTN(activation_range="omse", weight_bits=4, activation_bits=4)
    method = method.model_copy(
        update={"overrides": quietvit.RTN(overrides="attention-maps-8").overrides}
    )
    with torch.no_grad():
        z = quietvit.quantize(model, method, images[::2], progress=False)(images[1::2])
        y = model(images[1::2])
    found = next(r for r in advice.rows if r.name == "rtn-omse W4A4+attention-maps-8")
    assert found.agreement == pytest.approx(float((y.argmax(1) == z.argmax(1)).float().mean()))
    assert found.effect.error == pytest.approx(float((z - y).norm() / y.norm()), rel=1e-3)
    kept = y.softmax(1).gather(1, z.argmax(1, keepdim=True))
    drop = float((y.softmax(1).amax(1) - kept[:, 0]).mean())
    assert found.effect.drop == pytest.approx(drop, abs=1e-5)


def test_advice_names_sites_and_writes_itself(advice, tmp_path):
    assert len(advice.causes) == 3
    assert all(cause.share >= 0 for cause in advice.causes)
    text = str(advice)
    assert "Next steps" in text
    assert advice.causes[0].site in text
    held = json.loads(advice.to_json(tmp_path / "a.json").read_text())
    assert sum(r["pareto"] for r in held["rows"]) == len(advice.pareto) > 0
    tried = [r.bits for r in advice.rows if r.bits.count("+") == 2]
    assert len(tried) == 2
    assert all(r.endswith("=8") for r in tried)


def test_a_row_stays_only_if_nothing_beats_it():
    rows = [
        row("a", "W8A8", 0.01, 8),
        row("b", "W8A8", 0.02, 8),
        row("c", "W4A4", 0.5, 4),
        row("d", "W4A4", 0.1, 4, deployable=False),
        row("e", "W4A4", 0.2, 4, deployable=False),
    ]
    assert [r.method for r in pareto(rows)] == ["a", "c", "d"]
    assert len(pareto([rows[0], replace(rows[0])])) == 2


def test_steps_follow_from_the_numbers():
    target = row("rtn-omse", "W4A4", 0.5, 4)
    rows = [
        row("rtn-omse", "W8A8", 0.001, 8),
        target,
        row("smoothquant", "W4A4", 0.8, 4),
        row("repq-vit", "W4A4", 0.1, 4, deployable=False),
    ]
    kept = [("post_gelu", row("rtn-omse", "W4A4+post_gelu=8", 0.3, 5))]
    steps = next_steps(rows, target, kept, ())
    texts = [step.do for step in steps]
    assert texts[0].startswith("Deploy rtn-omse W8A8")
    assert texts[1] == "Keep post_gelu at 8 bits: --keep post_gelu=8"
    assert texts[2:4] == ["Use repq-vit for this model", "Do not use SmoothQuant for this model"]
    assert "recipe section qat" in texts[4]
    assert steps[4].because.startswith("the best of 3 methods tried at W4A4 is repq-vit: ")
    (*_, alone) = next_steps(rows[:2], target, [], ())
    assert alone.because.startswith("only rtn-omse was tried at W4A4: ")
    better = [replace(r, effect=Effect(0.0, 0.0, 0.0, 0.0)) for r in rows]
    assert len(next_steps(better, None, [], ())) == 1
    assert not any(
        "SmoothQuant" in step.do or "repq" in step.do
        for step in next_steps([*rows[:2], replace(target, method="smoothquant")], target, [], ())
    )


def test_causes_name_the_outlier_channel_and_the_flat_map():
    model, images = model_and_images(16)
    with torch.no_grad():
        model.blocks[1].norm2.weight[7] = 60.0
    method = quietvit.RTN(weight_bits=4, activation_bits=4)
    switches = Switches(model, method, images, progress=False)
    sites = ["blocks.1.mlp.fc1", "blocks.0.attn.attention_value"]
    outlier, flat = find_causes(switches, sites, "kl")
    assert (outlier.kind, outlier.operand) == ("outlier", "input")
    assert "channel 7" in outlier.why
    if flat.kind == "flat map":
        assert "% of the attention" in flat.why
    assert flat.cost == switches.effect(switches.sites[sites[1]]).kl


def test_sizes_count_packed_weights_and_both_operands():
    model, images = model_and_images(2)
    uniform = {"patch_embed_bits": "same", "head_bits": "same"}
    six = quietvit.RTN(weight_bits=6, activation_bits=6, **uniform)
    quantized = quietvit.quantize(model, six, images, progress=False)
    assert average_bits(quantized.trace, six) == 6
    weights = sum(
        slot.site.weight.read(model).numel() for slot in quantized.slots() if slot.is_weight
    )
    whole = 4 * sum(p.numel() for p in model.parameters())
    assert stored_bytes(quantized) == whole - weights * 26 // 8
    mixed = quietvit.RTN(weight_bits=4, activation_bits=8, exclude="head", **uniform)
    trace = quantized.trace
    by_hand = sum(
        site.macs * (32 if site.role == "head" else 6 if site.weight else 8)
        for site in trace.matmuls
    )
    assert average_bits(trace, mixed) == pytest.approx(by_hand / trace.macs)


def test_ctrl_c_returns_the_rows_so_far(monkeypatch):
    model, images = model_and_images()
    measure = Ladder._measure

    def interrupted(self, *given):
        if len(self.rows) == 2:
            raise KeyboardInterrupt
        measure(self, *given)

    monkeypatch.setattr(Ladder, "_measure", interrupted)
    found = quietvit.advise(model, images, progress=False, **SMALL)
    assert not found.complete
    assert len(found.rows) == 2
    assert "stopped early" in str(found)


class Clock:
    """A clock that counts the images in forward passes, one second each, of all models."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        forward = timm.models.VisionTransformer.forward

        def counting(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
            self.seconds += len(x)
            return forward(model, x)

        monkeypatch.setattr(timm.models.VisionTransformer, "forward", counting)

    def advise(self, seconds: float) -> Advice:
        self.seconds = 0.0
        model, images = model_and_images(16)
        budget = Budget(seconds, lambda: self.seconds)
        return module._within(budget, model, images, None, *SMALL.values(), progress=False)


def test_the_time_covers_all_work_and_what_is_skipped_is_named(monkeypatch):
    monkeypatch.setattr(module, "_PASSES", 12)  # the clock does not count backward passes
    clock = Clock(monkeypatch)
    whole = clock.advise(1e9)
    assert whole.causes
    assert not whole.skipped
    setting = max(row.seconds for row in whole.rows) + 8
    for share in (0.9, 0.4, 0.01):
        limit = share * whole.seconds
        found = clock.advise(limit)
        assert found.seconds <= limit + setting + 16
        assert found.rows[0].name == "rtn-omse W8A8"
        assert found.causes or share < 0.9
        assert len(found.rows) == 1 or share > 0.1
        left_out = {row.name for row in whole.rows[:4]} - {row.name for row in found.rows}
        if not found.causes and found.target:
            left_out |= {f"causes of {found.target}", "roles at 8 bits"}
        assert left_out <= set(found.skipped)
        assert "give more minutes" in str(found)


def test_methods_are_compared_at_the_lowest_bits_first():
    model, images = model_and_images(16)
    trace = quietvit.trace(model, images[:1])
    found = lowest_first(settings(("rtn-omse", "smoothquant", "erq"), ("W8A8", "W4A8"), trace))
    assert [f"{method} {bits}" for method, bits, _ in found] == [
        *("rtn-omse W8A8", "rtn-omse W4A8", "smoothquant W4A8", "erq W4A8"),
        *("smoothquant W8A8", "erq W8A8"),
    ]


def test_what_takes_longer_than_expected_is_stopped_and_the_rows_stay(monkeypatch):
    monkeypatch.setattr(module, "_PASSES", 0)
    clock = Clock(monkeypatch)
    found = clock.advise(140)
    assert len(found.rows) == 4
    assert found.complete
    assert "roles at 8 bits" in found.skipped
    assert found.seconds <= 140 + 24


@pytest.mark.parametrize(
    ("change", "fields", "text"),
    [
        ({}, {"images": 15}, "at least 16 images"),
        ({}, {"minutes": 0}, "give more than 0"),
        ({}, {"minutes": "3"}, "give more than 0"),
        ({}, {"methods": ("rnt",)}, "did you mean"),
        ({}, {"methods": "rtn"}, "methods is the text 'rtn'"),
        ({}, {"bits": ("W8A8", "W4A4+post_sofmax=8")}, "^overrides: 'post_sofmax'"),
        ({}, {"bits": ("W1A4",)}, "outside 2..16"),
        ({}, {"bits": ()}, "at least one"),
        ({"train": True}, {}, "Call model.eval"),
    ],
)
def test_bad_input_is_refused(change, fields, text):
    model, images = model_and_images(fields.pop("images", 16))
    model.train(change.get("train", False))
    with pytest.raises(QuietvitError, match=text):
        quietvit.advise(model, images, progress=False, **(SMALL | fields))


def test_the_commands_print_and_write(tmp_path):
    model = ["test_vit", "--size", "32", "--images", "embedded:digits", "--count", "16"]

    def run(*given: str) -> str:
        done = CliRunner().invoke(cli.app, [*given[:1], *model, *given[1:]])
        assert done.exit_code == 0, done.output
        return done.stdout

    out = tmp_path / "s"
    text = run("sensitivity", "--estimate", "--keep", "post_softmax=8", "-o", str(out))
    assert "Roles, the most expensive first" in text
    assert {path.name for path in out.iterdir()} == {"sensitivity.json", "sensitivity.png"}
    text = run("advise", "--methods", "rtn", "--bits", "W8A8,W4A4", "-o", str(tmp_path / "a.json"))
    assert "measured on 8 images without labels" in text
    assert json.loads((tmp_path / "a.json").read_text())["rows"][0]["bits"] == "W8A8"
    one = ("advise", "--methods", "rtn", "--bits", "W8A8", "--calibration", "synthetic:4:noise")
    text = run(*one)
    assert "calibrated on 4 generated images, measured on 16 images without labels" in text
    assert "generated images are not yours" not in text
    text = run(*one, "--images", "synthetic:16:pink", "-o", str(tmp_path / "b.json"))
    assert "calibrated on 4 generated images, measured on 16 generated images" in text
    assert "calibration images generated without data: noise, seed 0" in text
    assert "measured on images generated without data: pink, seed 1" in text
    assert "generated images are not yours" in text
    made = json.loads((tmp_path / "b.json").read_text())["origins"]
    assert [each["method"] for each in made] == ["noise", "pink"]
    made = ("--images", "synthetic:4:noise", "-o", str(tmp_path / "c"), "--force")
    text = run("sensitivity", "--estimate", *made)
    assert "4 generated images" in text
    assert "measured on images generated without data: noise, seed 0" in text
    made = json.loads((tmp_path / "c" / "sensitivity.json").read_text())["origins"]
    assert [each["method"] for each in made] == ["noise", "noise"]
    bits = tmp_path / "bits.toml"
    given = ("--average", "7", "--choices", "W4A8,W8A8", "--images", "synthetic:16:pink")
    text = run("choose-bits", *given, "-o", str(bits))
    assert "measured on images generated without data: pink, seed 0" in text
    assert "generated without data: pink, seed 0" in bits.read_text().splitlines()[0]
    assert tomllib.loads(bits.read_text())["overrides"]
    done = CliRunner().invoke(cli.app, [*one[:1], *model, "--calibration", "synthetic:no"])
    assert done.exit_code == 2
    assert "'no' images" in " ".join(done.stderr.split())


def test_calibration_images_of_their_own_leave_all_others_to_measure():
    model, images = model_and_images(16)
    made = quietvit.synthesize(model, 4, "noise", progress=False)
    advice = quietvit.advise(model, images, calibration=made, progress=False, **SMALL)
    assert advice.images == (4, 16)
    assert [origin and origin["method"] for origin in advice.origins] == ["noise", None]
    quantized = quietvit.quantize(model, advice.rows[0].method, made, bits=advice.rows[0].bits)
    found = quietvit.sensitivity(
        model, "rtn", images[:4], bits="W8A8", calibration=made, estimate=True, progress=False
    )
    assert [origin and origin["method"] for origin in found.origins] == ["noise", None]
    assert "4 images\ncalibration images generated without data: noise" in str(found)
    choice = quietvit.choose_bits(
        model, "rtn", images[:4], average=7, choices=("W4A8", "W8A8"), calibration=made,
        progress=False,
    )  # fmt: skip
    assert choice.origins == found.origins == advice.origins
    assert choice.to_dict()["origins"][0]["seed"] == 0
    assert "calibration images generated without data: noise, seed 0" in str(choice)
    real = quietvit.sensitivity(
        model, "rtn", images[:4], bits="W8A8", estimate=True, progress=False
    )
    assert real.origins == (None, None)
    assert "generated" not in str(real)
    with torch.no_grad():
        kept = (quantized(images).argmax(1) == model(images).argmax(1)).double().mean()
    assert advice.rows[0].agreement == pytest.approx(float(kept))
    with pytest.raises(QuietvitError, match="at least 16 images, because they measure"):
        quietvit.advise(model, images[:8], calibration=made, progress=False, **SMALL)


@pytest.mark.parametrize(
    ("command", "place", "name", "told"),
    [
        (["sensitivity", "--estimate"], "estimate", "_follow", "parts are estimated on 4 of the"),
        (["advise", "--methods", "rtn"], "advise", "Ladder._measure", "stopped early: only these"),
        (
            ["choose-bits", "--average", "7", "-o", "b.toml"],
            "bits",
            "operand_costs",
            "stopped early",
        ),
    ],
)
def test_ctrl_c_prints_what_was_measured(command, place, name, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *holder, last = name.split(".")
    owner = sys.modules[f"quietvit.advice.{place}"]
    owner = getattr(owner, holder[0]) if holder else owner
    whole, calls = getattr(owner, last), []

    def interrupted(*given, **fields):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*given, **fields)

    monkeypatch.setattr(owner, last, interrupted)
    given = ["test_vit", "--size", "32", "--images", "embedded:digits", "--count", "16"]
    done = CliRunner().invoke(cli.app, [command[0], *given, *command[1:]])
    assert done.exit_code == 130, done.output
    assert told in " ".join(done.stdout.split())
    assert [path.name for path in tmp_path.iterdir()] == ["b.toml"] * ("-o" in command)
