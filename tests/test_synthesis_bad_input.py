"""Models and arguments that give no images: each is refused at once, with the remedy, unchanged."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import timm
import torch
from torch import nn

import quietvit
import zoo
from quietvit.errors import QuietvitError
from quietvit.origin import origin_of
from quietvit.synthesis import DGH, PSAQ, Pink
from quietvit.synthesis.dgh import Statistics
from quietvit.synthesis.psaq import PatchSimilarity
from test_synthesis import HALF, QUICK, Convolutions, quickly


def build_vit() -> nn.Module:
    torch.manual_seed(0)
    model = zoo.build("timm-vit")[0].eval()
    model.pretrained_cfg = {**model.pretrained_cfg, **HALF}
    return model


def build_cnn() -> nn.Module:
    torch.manual_seed(0)
    return Convolutions().eval()


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Nothing of the model changes inside: values, flags, gradients, modes; nor do generators."""
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    drawn = torch.random.get_rng_state()
    yield
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert torch.is_grad_enabled()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) is (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)


def marked(model: nn.Module) -> nn.Module:
    """Give the parameters different flags and gradients."""
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
        if number % 4 == 0:
            parameter.grad = torch.full_like(parameter, number)
    return model


def no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: object) -> float:
        raise AssertionError("the long work began")

    monkeypatch.setattr(PatchSimilarity, "step", step)
    monkeypatch.setattr(Statistics, "step", step)


class Around(nn.Module):
    """A model whose forward pass another function runs."""

    def __init__(self, inner: nn.Module, run: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.run = inner, run
        self.pretrained_cfg = inner.pretrained_cfg

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self.inner, x)


def without_gradient(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def inferring(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(x)


def late(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model.blocks(model.patch_embed(x).detach())


@pytest.mark.parametrize(
    ("run", "told"),
    [
        (without_gradient, "proj is the first part without one.*torch.no_grad"),
        (inferring, "proj is the first part without one.*inference_mode"),
        (lambda model, x: model(x.detach()), "proj is the first part.*detach"),
        (lambda model, x: model((127 * x).round() / 127), "proj is the first part.*round"),
        (lambda model, x: model((9 * x).to(torch.uint8).float()), "proj is the first.*integers"),
        (late, r"inner.blocks.0.norm1 is the first part.*detached"),
        (lambda model, x: model(torch.ones_like(x)), "None of its parts depends on the pixels"),
    ],
    ids=["no_grad", "inference", "detach", "round", "integers", "late", "constant"],
)
def test_a_gradient_that_does_not_reach_the_pixels_is_found_with_its_place(run, told, monkeypatch):
    no_steps(monkeypatch)
    model = Around(build_vit(), run)
    with untouched(model), pytest.raises(QuietvitError, match=f"no gradient reaches.*{told}"):
        quickly(model, method=PSAQ(iterations=1, entropy=0))
    assert quickly(model, method=Pink()).isfinite().all()  # what the message recommends
    if run is not late:
        model = Around(build_cnn(), run)
        where = told.replace("proj is", "inner.body.0 is")
        with untouched(model), pytest.raises(QuietvitError, match=f"no gradient reaches.*{where}"):
            quickly(model, method=QUICK["dgh"])


def test_a_constant_part_of_a_model_is_not_blamed():
    model = build_vit()
    fixed = nn.Linear(4, 4)

    def run(inner: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            constant = fixed(torch.ones(1, 4)).sum()
        return inner(x.detach()) + constant

    with pytest.raises(QuietvitError, match=r"inner\.patch_embed\.proj is the first part"):
        quickly(Around(model, run))


def quantized() -> nn.Module:
    return quietvit.quantize(build_vit(), "rtn", torch.zeros(1, 3, 32, 32), progress=False)


def nested() -> nn.Module:
    model = nn.Sequential(quantized())
    model.pretrained_cfg = HALF
    return model


def torchao() -> nn.Module:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = build_vit()
    quantize_(model, Int8WeightOnlyConfig())
    return model


def dynamic() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(build_vit(), {nn.Linear}, dtype=torch.qint8)


def static() -> nn.Module:
    if "x86" not in torch.backends.quantized.supported_engines:
        pytest.skip("torch's quantized kernels for x86 are not built in")
    model = build_cnn()
    model.qconfig = torch.ao.quantization.get_default_qconfig("x86")
    prepared = torch.ao.quantization.prepare(model)
    prepared(torch.randn(2, 3, 16, 16))
    return torch.ao.quantization.convert(prepared)


def aware() -> nn.Module:
    model = build_cnn().train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    return torch.ao.quantization.prepare_qat(model).eval()


def codes() -> nn.Module:
    model = build_vit()
    stored = (100 * model.head.weight.data).to(torch.int8)
    model.head.weight = nn.Parameter(stored, requires_grad=False)
    return model


def exported() -> nn.Module:
    model = torch.export.export(build_vit(), (torch.randn(1, 3, 32, 32),)).module()
    model.pretrained_cfg = HALF
    return model


def pt2e() -> nn.Module:
    pytest.importorskip("torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    example = torch.randn(1, 3, 16, 16)
    prepared = prepare_pt2e(torch.export.export(build_cnn(), (example,)).module(), quantizer)
    prepared(example)
    return convert_pt2e(prepared)


def scripted() -> nn.Module:
    return torch.jit.trace(build_vit(), torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (quantized, "this QuantizedModel is quantized.*float model"),
        (nested, "0 of Sequential is quantized"),
        (torchao, r"blocks.0.attn.qkv.weight of .* is quantized \(torchao.*Int8Tensor\)"),
        (dynamic, r"blocks.0.attn.qkv of .* is quantized \(torch.ao.*Linear\)"),
        (static, "body.0 of Convolutions is quantized"),
        (aware, "body.0 of Convolutions is quantized"),
        (codes, "head.weight of VisionTransformer holds torch.int8, so it is quantized"),
        (exported, "exported by torch.export.*float model"),
        (pt2e, "exported by torch.export.*float model"),
        (scripted, "TorchScript"),
        (lambda: torch.export.export(build_cnn(), (torch.randn(1, 3, 16, 16),)), "ExportedProgram"),
        (lambda: "model.onnx", "of type str"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
@pytest.mark.parametrize("method", ["pink", None])
def test_quantized_and_exported_models_are_named(make, told, method):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about the age of its quantization
        model = make()
    with pytest.raises(QuietvitError, match=told):
        quietvit.synthesize(model, 2, method, progress=False)


def test_compiled_wrapped_and_low_precision_models_give_the_images_of_the_plain_one():
    model = build_vit()
    first = quickly(model)
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        assert torch.equal(quickly(wrapped), first)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        other = copy.deepcopy(model).to(dtype)
        with untouched(other):
            images = quickly(other)
        assert images.dtype == torch.float32
        assert images.isfinite().all()


def broken(path: str, change: Callable[[torch.Tensor], object]) -> nn.Module:
    model = build_cnn()
    owner, _, name = path.rpartition(".")
    with torch.no_grad():
        change(getattr(model.get_submodule(owner), name))
    return model


@pytest.mark.parametrize(
    ("path", "change", "told"),
    [
        ("body.1.running_var", lambda x: x[0].fill_(-1), "body.1.running_var.*holds -1, below 0"),
        ("body.1.running_var", torch.Tensor.zero_, "body.1.running_var.*0 in every channel"),
        ("body.4.running_var", lambda x: x[1].fill_(torch.nan), "body.4.running_var.*NaN"),
        ("body.4.running_var", lambda x: x[1].fill_(torch.inf), "body.4.running_var.*inf"),
        ("body.1.running_mean", lambda x: x[0].fill_(torch.inf), "body.1.running_mean.*inf"),
        ("head.weight", lambda x: x[0].fill_(torch.inf), "head.weight.*holds NaN or inf"),
        ("body.1.bias", lambda x: x[0].fill_(torch.nan), "body.1.bias.*holds NaN or inf"),
    ],
)
def test_statistics_and_weights_that_no_images_fit_are_named(path, change, told, monkeypatch):
    no_steps(monkeypatch)
    model = marked(broken(path, change))
    with untouched(model), pytest.raises(QuietvitError, match=told):
        quickly(model, method=QUICK["dgh"])


def test_one_dead_channel_is_no_error():
    model = broken("body.1.running_var", lambda x: x[0].zero_())
    assert quickly(model, method=QUICK["dgh"]).isfinite().all()


def test_statistics_of_new_modules_get_a_warning(caplog):
    model = build_cnn()
    with caplog.at_level(logging.WARNING, "quietvit"):
        quickly(model, method=QUICK["dgh"])
    assert "statistics of new modules" in caplog.text
    caplog.clear()
    model.body[1].running_mean += 0.5
    with caplog.at_level(logging.WARNING, "quietvit"):
        quickly(model, method=QUICK["dgh"])
    assert caplog.text == ""


def test_batch_norm_without_statistics_is_told_with_a_method_that_works():
    model = build_cnn()
    for name in (1, 4):
        model.body[name] = nn.BatchNorm2d(8, track_running_stats=False).eval()
    with pytest.raises(QuietvitError, match=r"body.1 .*track_running_stats=False.*'pink'"):
        quickly(model, method="dgh")
    for method in (None, "psaq"):
        with pytest.raises(QuietvitError, match=r"no attention.*no BatchNorm.*'pink'"):
            quietvit.synthesize(model, 2, method, progress=False)
    with pytest.raises(QuietvitError, match=r"no BatchNorm.*'psaq'"):
        quickly(build_vit(), method="dgh")
    with pytest.raises(QuietvitError, match=r"no attention.*'dgh', because the model has"):
        quickly(build_cnn(), method="psaq")


def test_a_batch_norm_that_takes_no_part_is_told():
    model = build_vit()
    model.unused = nn.BatchNorm2d(3)
    with pytest.raises(QuietvitError, match="takes part in a pass"):
        quickly(model, method="dgh")


def test_a_model_in_train_mode_keeps_its_statistics_and_gets_the_same_images():
    model = marked(build_cnn())
    evaluated = quickly(model, method=QUICK["dgh"])
    model.train()
    with untouched(model):
        assert torch.equal(quickly(model, method=QUICK["dgh"]), evaluated)


@pytest.mark.parametrize("method", QUICK.values(), ids=QUICK)
@pytest.mark.parametrize("ends", [None, KeyboardInterrupt, RuntimeError])
def test_flags_and_gradients_are_the_same_after_success_ctrl_c_and_errors(
    method, ends, monkeypatch
):
    model = marked(build_cnn() if isinstance(method, DGH) else build_vit())
    kind = Statistics if isinstance(method, DGH) else PatchSimilarity
    step, calls = kind.step, []

    def ending(self: object, index: int, share: float) -> float:
        loss = step(self, index, share)
        calls.append(index)
        if ends is not None and len(calls) == 2:
            raise ends("told")
        return loss

    monkeypatch.setattr(kind, "step", ending)
    with untouched(model):
        if ends is RuntimeError:
            with pytest.raises(RuntimeError, match="told"):
                quickly(model, method=method)
        else:
            stopped = origin_of(quickly(model, method=method))["stopped"]
            assert stopped == (None if ends is None else "by Ctrl-C")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}, "0 to 255, divide both"),
        ({"mean": (103.9, 116.8, 123.7), "std": (1.0,) * 3}, "0 to 255, divide both"),
        ({"mean": (0.0,) * 3, "std": (255.0,) * 3}, "0 to 255, divide both"),
        ({"mean": (torch.nan, 0.5, 0.5)}, "nan.*finite numbers"),
        ({"std": (0.0, 0.5, 0.5)}, "cannot be read .*0.0, 0.5, 0.5.*pretrained_cfg"),
        ({"mean": "imagenet"}, "cannot be read .*'imagenet'.*pretrained_cfg"),
        ({"mean": (0.5, 0.5)}, r"cannot be read .*\(0.5, 0.5\)"),
        ({"mean": None, "std": None}, "is unknown"),
        ({"input_size": (32, 32)}, r"input_size .* is \(32, 32\)"),
        ({"input_size": (4, 16, 16)}, "4 channels, but"),
        ({"input_size": (1, 16, 16), "mean": (0.5,), "std": (0.5,)}, "1 channels .*does not run"),
    ],
)
def test_a_normalization_that_cannot_be_right_is_told(given, told):
    model = build_cnn()
    model.pretrained_cfg = {**model.pretrained_cfg, **given}
    with pytest.raises(QuietvitError, match=told):
        quickly(model, method=QUICK["dgh"])


def test_one_number_for_all_channels_is_taken():
    model = build_cnn()
    images = quickly(model, method=Pink())
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": 0.5, "std": 0.5}
    assert torch.equal(quickly(model, method=Pink()), images)


@pytest.mark.parametrize("method", ["noise", "pink"])
def test_noise_that_the_model_does_not_take_is_told(method):
    with pytest.raises(QuietvitError, match=r"40 x 40 pixels.*does not run.*size="):
        quickly(build_vit(), method=method, size=40)


class _Drawing(Convolutions):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + 0.1 * torch.randn_like(x))


def test_a_model_that_draws_in_a_pass_follows_the_seed():
    model = _Drawing().eval()
    with untouched(model):
        first = quickly(model, method=QUICK["dgh"])
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        assert torch.equal(quickly(model, method=QUICK["dgh"]), first)


def test_inference_mode_outside_changes_nothing():
    model = build_vit()
    with torch.inference_mode():
        inside = quickly(model)
    assert not inside.is_inference()
    assert torch.equal(inside, quickly(model))


class _Quantizable(Convolutions):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.plus = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.plus.add(super().forward(x), super().forward(x))


def test_a_float_model_that_torch_can_quantize_later_is_taken():
    assert quickly(_Quantizable().eval(), method=QUICK["dgh"]).isfinite().all()


def test_the_scale_of_255_of_a_model_for_bytes_is_taken():
    model = build_cnn()
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.0,) * 3, "std": (1 / 255,) * 3}
    assert 100 < float(quickly(model, method=Pink()).max()) <= 255.01


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"count": 0}, "0 images were requested"),
        ({"count": -3}, "-3 images were requested"),
        ({"count": 2.0}, "2.0 images"),
        ({"count": None}, "None images"),
        ({"seed": -1}, "the seed is -1"),
        ({"seed": 2**64}, r"the seed is 18446744073709551616.*2\^64 - 1"),
        ({"seed": True}, "the seed is True"),
        ({"minutes": 0}, "minutes is 0.*above 0"),
        ({"minutes": "5"}, "minutes is '5'"),
        ({"minutes": float("nan")}, "minutes is nan"),
        ({"size": 0}, "image size is 0"),
        ({"size": 32.0}, "image size is 32.0"),
        ({"size": (3, 32, 32)}, "image size"),
        ({"size": 33}, r"33 x 33 pixels.*does not run.*size="),
        ({"method": PSAQ}, r"the class PSAQ.*PSAQ\(\)"),
        ({"method": PSAQ(entropy=0, stretching=0)}, "entropy, stretching and classes are all 0"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_told(given, told, monkeypatch):
    no_steps(monkeypatch)
    model = marked(build_vit())
    arguments = {"count": 2, "method": QUICK["psaq"]} | given
    with untouched(model), pytest.raises(QuietvitError, match=told):
        quietvit.synthesize(model, progress=False, **arguments)


def test_the_largest_seed_and_numbers_of_numpy_are_taken():
    np = pytest.importorskip("numpy")
    model = build_vit()
    images = quickly(model, np.int64(2), Pink(), seed=2**64 - 1)
    assert (len(images), origin_of(images)["count"]) == (2, 2)
    assert type(origin_of(images)["count"]) is int
    other = quickly(model, 2, Pink(), seed=np.uint8(7), size=np.int64(32))
    assert torch.equal(other, quickly(model, 2, Pink(), seed=7))


def test_tensors_without_values_are_named():
    with torch.device("meta"):
        empty = timm.create_model("test_vit")
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(5))
    lazy.pretrained_cfg = HALF
    sparse = build_vit()
    sparse.head.weight = nn.Parameter(sparse.head.weight.data.to_sparse())
    for model, told in (
        (empty.eval(), "is on the device 'meta'.*load the weights"),
        (lazy, "1.weight of Sequential has no shape yet"),
        (sparse, "head.weight of VisionTransformer is sparse.*to_dense"),
    ):
        with pytest.raises(QuietvitError, match=told):
            quickly(model)


def test_weights_that_old_functions_computed_are_told():
    model = build_cnn()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(model.head)
    model(torch.randn(1, 3, 16, 16))
    with pytest.raises(QuietvitError, match=r"head.weight is a tensor with a gradient"):
        quickly(model, method=Pink())


def test_a_model_that_needs_float32_is_told_how(monkeypatch):
    def strict(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("expected scalar type Float\nand more")
        return model(x)

    model = Around(build_vit(), strict)
    with pytest.raises(QuietvitError, match=r"type Float\).*precision='float32'"):
        quickly(model, method=PSAQ(iterations=1, precision="bfloat16"))
    images = quickly(model, method=PSAQ(iterations=1, precision="float32"))
    assert origin_of(images)["precision"] == "float32"
