"""What accelerate's environment says against the recipe, and what a device cannot do."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quietvit.decay import amplification
from quietvit.errors import QuietvitError
from quietvit.tensors import widest
from quietvit.train import losses
from quietvit.train.engine import make_accelerator
from test_train_loop import MODEL, assert_same, config, run


def test_precision_accumulation_and_compilation_are_the_recipes(tmp_path, monkeypatch):
    changes = {"accumulation": 2, "batch_size": 4, "epochs": 1}
    expected = run(tmp_path / "plain", **changes)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    accelerator = make_accelerator(config(tmp_path, **changes))
    assert accelerator.gradient_accumulation_steps == 2
    assert accelerator.mixed_precision == "no"
    assert accelerator.state.dynamo_plugin.backend.value == "NO"
    assert_same(run(tmp_path / "run", **changes), expected)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_another_way_of_sharing_the_work_is_refused(tmp_path, monkeypatch, name, parallel):
    variable = f"ACCELERATE_USE_{name}"
    monkeypatch.setenv(variable, "true")
    told = rf"{variable}=true .*parallel='{parallel}' in 1 process.*unset {variable}"
    with pytest.raises(QuietvitError, match=told):
        make_accelerator(config(tmp_path, parallel=parallel))
    monkeypatch.setenv(variable, "false")
    make_accelerator(config(tmp_path, parallel=parallel))


def test_an_engine_that_is_not_what_was_asked_for_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
        with pytest.raises(
            QuietvitError, match=r"device is 'cpu', but accelerate runs with 'meta'"
        ):
            make_accelerator(config(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "gradient_accumulation_steps", 4)
        with pytest.raises(QuietvitError, match=r"accumulation is 2, but accelerate runs with 4"):
            make_accelerator(config(tmp_path, accumulation=2))
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "mixed_precision", "fp8")
        with pytest.raises(QuietvitError, match=r"precision is 'no', but .* with 'fp8'"):
            make_accelerator(config(tmp_path))
    make_accelerator(config(tmp_path))


class Doubles(TorchDispatchMode):
    """Refuses to compute in float64, as Apple's GPUs do."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64:
                raise TypeError(f"{function}: no float64 here")
        return found


def test_a_run_needs_float64_only_where_the_device_has_it(tmp_path, monkeypatch):
    assert widest(torch.device("mps")) == torch.float32
    assert widest(torch.device("cpu")) == widest(torch.device("cuda", 1)) == torch.float64
    model = {**MODEL, "kwargs": {**MODEL["kwargs"], "drop_path_rate": 0.0}}
    changes = {"epochs": 1, "model": model, "decay": {"watch_every": 1}}
    with pytest.raises(TypeError, match="no float64 here"), Doubles():
        run(tmp_path / "refused", **changes)
    for module in (amplification, losses):
        monkeypatch.setattr(module, "widest", lambda _: torch.float32)
    with Doubles():
        result = run(tmp_path / "run", **changes)
    assert result.steps == 7
