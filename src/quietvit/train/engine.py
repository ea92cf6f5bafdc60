"""The interface to accelerate: processes, precision, sharding, and unsharded state dicts.

``step`` computes a training step. ``setup`` builds the parts of a run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quietvit.errors import QuietvitError
from quietvit.tensors import has_fast_bfloat16
from quietvit.train.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("quietvit")

_FSDP2_SINCE = (1, 7)
_TAKEN_OVER = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)
_OFF = ("", "0", "f", "false", "n", "no", "off")


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Return the accelerator: device, processes, precision, accumulation, sharding.

    With ``parallel="fsdp2"`` the sharded parameters are float32. bf16 and fp16 apply to the
    computation only; gradients are averaged in float32. The configuration overrides the
    environment variables that ``accelerate launch`` sets for precision, accumulation and
    compilation.

    Raises:
        QuietvitError: fp16 on a CPU, an accelerate without FSDP2, or environment variables that
            select another kind of parallelism than the configuration.
    """
    from accelerate import Accelerator
    from accelerate.state import (
        AcceleratorState,
        DistributedType,
        GradientState,
        PartialState,
    )
    from accelerate.utils import GradientAccumulationPlugin

    if "RANK" not in os.environ:
        # accelerate keeps one state per process and refuses a second run with other settings.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    shared = _started() > 1
    plugin = _plugin(config) if config.parallel == "fsdp2" and shared else None
    _refuse_environment(config, plugin is not None)
    try:
        accelerator = Accelerator(
            mixed_precision=config.precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.accumulation),
            dynamo_backend="no",
            # accelerate shares a run between CPU processes only if it is told to use the CPU.
            cpu=config.device == "cpu" or (shared and not torch.accelerator.is_available()),
            fsdp_plugin=plugin,
        )
    finally:
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # set by accelerate itself for our plugin
    if config.precision == "fp16" and accelerator.device.type == "cpu":
        raise QuietvitError(
            "precision 'fp16' needs a GPU for loss scaling, and this run is on the CPU; set "
            "precision to 'bf16' or 'no'."
        )
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate ignores the plugin on the CPU, but FSDP2 itself works there with gloo.
        PartialState().distributed_type = DistributedType.FSDP
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    _check_as_asked(config, accelerator, plugin is not None)
    slow = config.precision == "bf16" and not has_fast_bfloat16(accelerator.device)
    if slow and accelerator.is_main_process:
        logger.warning(
            "precision 'bf16' is slower than float32 on this %s, often several times; set "
            "precision to 'no'.",
            "processor" if accelerator.device.type == "cpu" else "GPU",
        )
    return accelerator


def shard_by(accelerator: Accelerator, model: nn.Module, blocks: Sequence[str]) -> None:
    """Shard each of these modules as one unit. Do nothing if the model is not sharded."""
    if not is_sharded(accelerator):
        return
    classes = {type(model.get_submodule(name)).__name__ for name in blocks}
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(classes)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether FSDP2 shards the model."""
    return bool(getattr(accelerator, "is_fsdp2", False))


def gathered(accelerator: Accelerator, value: Any) -> list[Any]:
    """Return the values of all processes, in every process. Every process must call."""
    if accelerator.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    values: list[Any] = gather_object([value])
    return values


def whole_model(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """Return the unsharded state dict of the model. Every process must call.

    If the model is sharded, the main process gets it on the CPU and the others get an empty dict.
    """
    if not is_sharded(accelerator):
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: Any = get_model_state_dict(model, options=options)
    return dict(state)


def whole_optimizer(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer
) -> dict[str, Any]:
    """Return the unsharded state dict of the optimizer; {} on other processes if sharded."""
    if not is_sharded(accelerator):
        return optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    named: Any = get_optimizer_state_dict(model, optimizer, options=options)
    if not named:
        return {}
    place = _places(named["param_groups"])
    return {
        "state": {place[name]: named["state"][name] for name in place if name in named["state"]},
        "param_groups": [
            {**mine, "params": [place[name] for name in group["params"]]}
            for group, mine in zip(named["param_groups"], optimizer.param_groups, strict=True)
        ],
    }


def load_whole(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    model_state: Mapping[str, Any],
    optimizer_state: Any,
) -> None:
    """Load the states that ``whole_model`` and ``whole_optimizer`` gave on the main process.

    Every process must call, with the full states. If the model is sharded, remove step hooks that
    count or change weights first: torch allocates the optimizer's state by a step at rate 0.

    Raises:
        QuietvitError: the optimizer's state is from several optimizers or other groups.
    """
    check_optimizer_state(optimizer, optimizer_state)
    if not is_sharded(accelerator):
        model.load_state_dict(model_state)
        optimizer.load_state_dict(optimizer_state)
        return
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    name_of = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    named: Any = {
        "state": {name_of[place]: value for place, value in optimizer_state["state"].items()},
        "param_groups": [
            {**group, "params": [name_of[place] for place in group["params"]]}
            for group in optimizer_state["param_groups"]
        ],
    }
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, dict(model_state), options=options)
    set_optimizer_state_dict(model, optimizer, named, options=options)
    for group, saved in zip(optimizer.param_groups, optimizer_state["param_groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})


def check_optimizer_state(optimizer: Optimizer, state: Any) -> None:
    """Refuse a saved state unless it is from one optimizer with the same group sizes."""
    if isinstance(state, list | tuple):
        raise QuietvitError(
            f"the training state holds {len(state)} optimizers and this run has one; quietvit "
            "resumes its own checkpoints only. Start a new run from the weights (model.weights)."
        )
    if not isinstance(state, Mapping) or "param_groups" not in state or "state" not in state:
        raise QuietvitError(
            "the training state holds no optimizer state (keys 'state' and 'param_groups'); start "
            "a new run from the weights (model.weights)."
        )
    saved = [len(group["params"]) for group in state["param_groups"]]
    mine = [len(group["params"]) for group in optimizer.param_groups]
    if saved != mine:
        raise QuietvitError(
            f"the optimizer was saved with {sum(saved)} parameters in groups of {saved} and now "
            f"has {sum(mine)} in groups of {mine}: other layers are frozen, or another version "
            "grouped them. Resume with the settings and version that began the run, or start a "
            "new run from its weights (model.weights)."
        )


def check_groups(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse trainable parameters that are in no group or in several groups."""
    optimized = [id(p) for group in optimizer.param_groups for p in group["params"]]
    for name, parameter in model.named_parameters():
        times = optimized.count(id(parameter)) if parameter.requires_grad else 1
        if times != 1:
            raise QuietvitError(
                f"the trainable parameter {name} is in {times} groups of the optimizer; each "
                "must be in exactly one."
            )


def _places(groups: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    names = [name for group in groups for name in group["params"]]
    return {name: place for place, name in enumerate(names)}


def _plugin(config: TrainConfig) -> Any:
    from accelerate import FullyShardedDataParallelPlugin

    installed = version("accelerate")
    if tuple(int(part) for part in installed.split(".")[:2]) < _FSDP2_SINCE:
        raise QuietvitError(
            f"parallel='fsdp2' needs accelerate {'.'.join(map(str, _FSDP2_SINCE))} or later, but "
            f"{installed} is installed; pip install -U accelerate, or set parallel to 'ddp'."
        )
    from torch.distributed.fsdp import MixedPrecisionPolicy

    reduced = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    policy = MixedPrecisionPolicy(
        param_dtype=reduced, reduce_dtype=torch.float32, output_dtype=torch.float32
    )
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_offload=False,
        activation_checkpointing=False,
        mixed_precision_policy=policy,
        cpu_ram_efficient_loading=False,
    )


def _started() -> int:
    """Return the number of processes that torchrun or accelerate launch started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _refuse_environment(config: TrainConfig, sharded: bool) -> None:
    """Refuse environment variables that make accelerate use another kind of parallelism."""
    for name in (*_TAKEN_OVER, *(() if sharded else ("ACCELERATE_USE_FSDP",))):
        value = os.environ.get(name, "")
        if value.lower() not in _OFF:
            raise QuietvitError(
                f"the environment sets {name}={value} (the file of `accelerate config` does this), "
                f"but this run asks for parallel={config.parallel!r} in "
                f"{_started()} process(es); unset {name}, or start with "
                "torchrun. parallel='fsdp2' in several processes shards the model."
            )


def _check_as_asked(config: TrainConfig, accelerator: Accelerator, sharded: bool) -> None:
    """Refuse an accelerator whose settings differ from the configuration."""
    kind = getattr(accelerator.distributed_type, "value", "")
    shared = "fsdp2" if is_sharded(accelerator) else kind
    started = _started()
    if accelerator.num_processes != started:
        raise QuietvitError(
            f"{started} processes were started, but accelerate runs {accelerator.num_processes} on "
            f"the device {accelerator.device.type!r}. Set device to 'cpu', or start one process."
        )
    in_parts = is_sharded(accelerator) or kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM")
    compared = {
        "device": (config.device, accelerator.device.type, config.device == "cpu"),
        "precision": (config.precision, accelerator.mixed_precision, True),
        "accumulation": (config.accumulation, accelerator.gradient_accumulation_steps, True),
        "parallel": (config.parallel, shared, in_parts != sharded),
    }
    for key, (wanted, used, counts) in compared.items():
        if counts and wanted != used:
            raise QuietvitError(
                f"{key} is {wanted!r}, but accelerate runs with {used!r}, because of its "
                "environment or an earlier run in the same processes. Unset the variables whose "
                "names begin with ACCELERATE_, and start the run in new processes."
            )
