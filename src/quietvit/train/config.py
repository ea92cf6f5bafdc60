"""The configuration of a training run: frozen pydantic models that refuse unknown keys.

Each regularizer defines its own section in ``decay``. ``recipe`` reads TOML.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    create_model,
    model_validator,
)

from quietvit.data.transforms import Augmentation
from quietvit.decay import RegularizerConfig, registered_regularizers
from quietvit.decay.config import Share, StrengthScheduleConfig
from quietvit.decay.registry import RegularizerEntry
from quietvit.errors import QuietvitError
from quietvit.section import Section
from quietvit.tasks import task_named
from quietvit.train.qat import QATConfig

Beta = Annotated[float, Field(ge=0, lt=1)]


_NO_KWARGS = {
    "name": "model.name",
    "num_classes": "data.num_classes",
    "weights": "model.weights",
    "pretrained": "model.weights (a local file)",
    "preprocessing": "model.preprocessing",
}


class ModelConfig(Section):
    """The model: a timm name, or ``hf:/folder`` for a transformers image classifier in a folder.

    ``kwargs`` go to ``timm.create_model``, or to the transformers config. ``weights`` is a local
    file (timm only). ``freeze`` lists wildcards for names of parameters to freeze.
    ``freeze_blocks`` freezes the first n blocks and everything before them.
    """

    name: str
    weights: Path | None = None
    kwargs: dict[str, Any] = Field(default={})
    preprocessing: dict[str, Any] = Field(default={})
    freeze: tuple[str, ...] = ()
    freeze_blocks: int = Field(default=0, ge=0)


class DataConfig(Section):
    """The data set (see ``quietvit.data.load_dataset``), its size limits and its augmentation.

    ``num_classes`` defaults to that of the training images. A label at or above it is refused.
    ``max_bad_images``: an image that cannot be decoded is replaced by another one. The run stops
    when a process has seen more different bad images than this, including those before a resume.
    ``repeats`` puts each image n times into an epoch, each time with another augmentation (DeiT's
    repeated augmentation). An epoch keeps its length and visits 1/n of the images.
    ``shuffle_window`` is the number of shards whose images are shuffled together (None: all).
    """

    dataset: str
    num_classes: int | None = Field(default=None, ge=1)
    train_images: int | None = Field(default=None, ge=1)
    test_images: int | None = Field(default=None, ge=1)
    max_bad_images: int = Field(default=0, ge=0)
    repeats: int = Field(default=1, ge=1)
    shuffle_window: int | None = Field(default=None, ge=1)
    augmentation: Augmentation = Augmentation()


class OptimizerConfig(Section):
    """AdamW. ``decay_norms_and_biases`` applies the weight decay to every parameter.

    ``lr_batch`` is the effective batch that ``lr``, ``schedule.warmup_lr`` and ``schedule.min_lr``
    are meant for. All three are multiplied by effective batch / ``lr_batch`` (linear scaling, Goyal
    et al. 2017, arXiv 1706.02677). None does not scale. ``layer_decay``: the learning rate of a
    block is this factor times that of the next block (timm). ``lr_scale`` maps wildcards of
    parameter names to factors of their learning rates. The first wildcard that matches counts.
    """

    lr: float = Field(default=1e-3, gt=0)
    lr_batch: int | None = Field(default=None, ge=1)
    weight_decay: float = Field(default=0.05, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    decay_norms_and_biases: bool = False
    clip_grad: float | None = Field(default=None, gt=0)
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    lr_scale: dict[str, Annotated[float, Field(gt=0)]] = Field(default={})


class ScheduleConfig(Section):
    """Linear warm-up, then cosine from ``lr`` to ``min_lr``. Updated at every optimizer step."""

    warmup_epochs: float = Field(default=0.0, ge=0)
    warmup_lr: float = Field(default=1e-6, ge=0)
    min_lr: float = Field(default=0.0, ge=0)


class Rates(NamedTuple):
    """The learning rates of a run: the maximum, at the first step, and at the last step."""

    lr: float
    warmup_lr: float
    min_lr: float


class MixConfig(Section):
    """timm's mixup and cutmix. Both are off if both are 0."""

    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)
    probability: Share = 1.0
    switch_probability: Share = 0.5

    @property
    def active(self) -> bool:
        return (self.mixup > 0 or self.cutmix > 0) and self.probability > 0


class EmaConfig(Section):
    """Moving average of the weights, updated after the decay. If set, it is the result."""

    decay: float = Field(default=0.999, gt=0, lt=1)
    warmup: bool = True


class DecayConfig(Section):
    """The regularizers of a run; none by default. They act in the order of their registration.

    ``decay_config`` adds one section for each registered regularizer.
    """

    watch_every: int = Field(default=10, ge=0)
    """At every n-th logged step, also log the largest activation of any block and the largest
    amplification of any pair. 0: never."""

    def sections(self) -> dict[str, RegularizerConfig]:
        """Return the regularizer sections that are set: name -> section."""
        values = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: value for name, value in values if isinstance(value, RegularizerConfig)}

    def schedules(self) -> Iterator[tuple[str, StrengthScheduleConfig]]:
        """Yield (dotted key, schedule) for every strength schedule."""
        for name, section in self.sections().items():
            schedule = section.schedule
            if isinstance(schedule, dict):
                for kind, own in schedule.items():
                    yield f"decay.{name}.schedule.{kind}", own
            elif schedule is not None:
                yield f"decay.{name}.schedule", schedule

    def __reduce__(self) -> tuple[Any, ...]:
        # decay_config creates the class at run time, so pickle cannot find it by name.
        return _parsed_decay, (self.model_dump(),)


def decay_config() -> type[DecayConfig]:
    """Return ``DecayConfig`` with an optional section for each regularizer registered so far."""
    return _decay_config(registered_regularizers())


@cache
def _decay_config(entries: tuple[RegularizerEntry, ...]) -> type[DecayConfig]:
    sections: dict[str, Any] = {entry.name: (entry.config | None, None) for entry in entries}
    doc = "The regularizers of a run; none by default."
    return create_model("DecayConfig", __base__=DecayConfig, __doc__=doc, **sections)


def _parsed_decay(value: Any) -> DecayConfig:
    return value if isinstance(value, DecayConfig) else decay_config().model_validate(value)


class CheckpointConfig(Section):
    """Write a checkpoint every ``every`` optimizer steps (0: never) and keep the last ``keep``."""

    every: int = Field(default=500, ge=0)
    keep: int = Field(default=2, ge=1)


class TrainConfig(Section):
    """A training run. ``batch_size`` is per process and forward pass.

    ``task`` names the task, ``task_settings`` holds the task's own keys (classification has none).
    The effective batch is batch_size x accumulation x processes. An epoch drops the images that do
    not fill its last batch. ``evaluate_every`` counts epochs (0: only at the end), ``log_every``
    counts optimizer steps. ``device`` is ``auto`` or ``cpu``. ``threads``: torch threads on the
    CPU. ``parallel``: ``ddp`` replicates the model in each process, ``fsdp2`` shards it.
    ``compile``: use ``torch.compile``.
    """

    recipe: Literal[1] = 1
    task: str = "classification"
    task_settings: dict[str, Any] = Field(default={})
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    mix: MixConfig = MixConfig()
    ema: EmaConfig | None = None
    decay: Annotated[SerializeAsAny[DecayConfig], BeforeValidator(_parsed_decay)] = Field(
        default_factory=lambda: decay_config()()
    )
    qat: QATConfig | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=64, ge=1)
    accumulation: int = Field(default=1, ge=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = Field(default=0, ge=0, lt=2**31)
    device: Literal["auto", "cpu"] = "auto"
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    compile: bool = False
    evaluate_every: int = Field(default=0, ge=0)
    log_every: int = Field(default=10, ge=1)
    tensorboard: bool = True
    num_workers: int = Field(default=0, ge=0)
    threads: int | None = Field(default=None, ge=1)
    output: Path = Path("runs/train")

    def rates(self, effective_batch: int) -> Rates:
        """Return the learning rates, scaled to the effective batch (see ``OptimizerConfig``)."""
        own = Rates(self.optimizer.lr, self.schedule.warmup_lr, self.schedule.min_lr)
        if self.optimizer.lr_batch is None:
            return own
        return Rates(*(rate * effective_batch / self.optimizer.lr_batch for rate in own))

    @model_validator(mode="after")
    def _task_is_known(self) -> Self:
        try:
            task_named(self.task).settings.model_validate(self.task_settings)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, ("task_settings", *first["loc"])))
            raise ValueError(f"{place}: {first['msg']}") from error
        except QuietvitError as error:
            raise ValueError(f"task: {error}") from error
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for key in ("in_chans", "num_channels"):
            if self.model.kwargs.get(key, 3) != 3:
                raise ValueError(
                    f"model.kwargs.{key} is {self.model.kwargs[key]!r}, but every image is read "
                    "with three channels, grey ones too; remove it"
                )
        for key, owner in _NO_KWARGS.items():
            if key in self.model.kwargs:
                raise ValueError(f"model.kwargs.{key} is not allowed; set {owner} instead")
        if self.mix.active and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix need an even batch_size, not {self.batch_size}")
        if self.parallel == "fsdp2" and self.ema is not None:
            raise ValueError(
                "ema needs unsharded weights, but parallel='fsdp2' shards them; set parallel to "
                "'ddp', or ema to none"
            )
        self._qat_fits()
        if self.schedule.min_lr > self.optimizer.lr:
            raise ValueError(
                f"schedule.min_lr ({self.schedule.min_lr:g}) is above optimizer.lr "
                f"({self.optimizer.lr:g})"
            )
        if self.schedule.warmup_epochs >= self.epochs:
            raise ValueError(
                f"schedule.warmup_epochs ({self.schedule.warmup_epochs:g}) must be below epochs "
                f"({self.epochs})"
            )
        for key, strength in self.decay.schedules():
            if problem := strength.late(self.epochs):
                raise ValueError(f"{key}: {problem}")
        return self

    def _qat_fits(self) -> None:
        if self.qat is None:
            return
        if self.qat.start_epoch >= self.epochs:
            raise ValueError(
                f"qat.start_epoch ({self.qat.start_epoch}) must be below epochs ({self.epochs})"
            )
        for key, value, other in (("parallel", "fsdp2", "'ddp'"), ("compile", True, "false")):
            if getattr(self, key) == value:
                raise ValueError(
                    f"qat does not work with {key}={value!r}, because its quantizers follow every "
                    f"call of the model; set {key} to {other}, or qat to none"
                )
