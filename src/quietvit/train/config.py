"""The configuration of a training run, as frozen pydantic models that refuse unknown keys.

The section of each regularizer is in its own module in ``decay``. ``recipe`` reads TOML.
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

    ``kwargs`` go to ``timm.create_model`` (to the transformers config). ``weights`` is a local file
    (timm only). ``freeze`` are wildcards of the names of parameters that do not train.
    ``freeze_blocks`` freezes the first n blocks and everything before them.
    """

    name: str
    weights: Path | None = None
    kwargs: dict[str, Any] = Field(default={})
    preprocessing: dict[str, Any] = Field(default={})
    freeze: tuple[str, ...] = ()
    freeze_blocks: int = Field(default=0, ge=0)


class DataConfig(Section):
    """The data set (see ``quietvit.data.load_dataset``), how many of its images, how they vary.

    ``num_classes`` defaults to that of the training images; a label at or above it is refused.
    An image that cannot be decoded is replaced by another one and counted. The run stops when a
    process has met more than ``max_bad_images`` different ones, resumed runs included.
    ``repeats`` puts each image so often into an epoch, differently augmented, and takes as many
    fewer images (DeiT's repeated augmentation). ``shuffle_window`` is the number of shards whose
    images are mixed with each other (None mixes all).
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
    are meant for. At another batch all three are multiplied by the ratio (linear scaling, Goyal et
    al. 2017, arXiv 1706.02677). None does not scale them. ``layer_decay``: the learning rate of
    each block is this factor of the next block's (timm). ``lr_scale`` maps wildcards of parameter
    names to factors of their learning rates. The first wildcard that matches counts.
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
    """Cosine from ``lr`` to ``min_lr`` after a linear warm-up, both counted in optimizer steps."""

    warmup_epochs: float = Field(default=0.0, ge=0)
    warmup_lr: float = Field(default=1e-6, ge=0)
    min_lr: float = Field(default=0.0, ge=0)


class Rates(NamedTuple):
    """The learning rates of a run: the highest, that of the first step, and that of the last."""

    lr: float
    warmup_lr: float
    min_lr: float


class MixConfig(Section):
    """timm's mixup and cutmix; both 0 is off."""

    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)
    probability: Share = 1.0
    switch_probability: Share = 0.5

    @property
    def active(self) -> bool:
        return (self.mixup > 0 or self.cutmix > 0) and self.probability > 0


class EmaConfig(Section):
    """Moving average of the weights, taken after the decay. If it is set, it is the result."""

    decay: float = Field(default=0.999, gt=0, lt=1)
    warmup: bool = True


class DecayConfig(Section):
    """Regularizers side by side; none by default. They act in the order of their registration.

    It has one more section for each registered regularizer, see ``decay_config``.
    """

    watch_every: int = Field(default=10, ge=0)
    """Also log the largest activation of any block and the largest amplification of any pair, at
    every n-th logged step; 0 never does."""

    def sections(self) -> dict[str, RegularizerConfig]:
        """Return the sections that are set, by name."""
        values = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: value for name, value in values if isinstance(value, RegularizerConfig)}

    def schedules(self) -> Iterator[tuple[str, StrengthScheduleConfig]]:
        """Return each schedule of strengths, with its key."""
        for name, section in self.sections().items():
            schedule = section.schedule
            if isinstance(schedule, dict):
                for kind, own in schedule.items():
                    yield f"decay.{name}.schedule.{kind}", own
            elif schedule is not None:
                yield f"decay.{name}.schedule", schedule

    def __reduce__(self) -> tuple[Any, ...]:
        # The class of an instance is made by decay_config, and pickle finds classes by name.
        return _parsed_decay, (self.model_dump(),)


def decay_config() -> type[DecayConfig]:
    """Return ``DecayConfig`` with an optional section for each regularizer registered so far."""
    return _decay_config(registered_regularizers())


@cache
def _decay_config(entries: tuple[RegularizerEntry, ...]) -> type[DecayConfig]:
    sections: dict[str, Any] = {entry.name: (entry.config | None, None) for entry in entries}
    doc = "Regularizers side by side; none by default."
    return create_model("DecayConfig", __base__=DecayConfig, __doc__=doc, **sections)


def _parsed_decay(value: Any) -> DecayConfig:
    return value if isinstance(value, DecayConfig) else decay_config().model_validate(value)


class CheckpointConfig(Section):
    """Every ``every`` optimizer steps (0: none), the last ``keep`` are kept."""

    every: int = Field(default=500, ge=0)
    keep: int = Field(default=2, ge=1)


class TrainConfig(Section):
    """A training run. ``batch_size`` is per process and forward pass.

    ``task`` is what is trained, ``task_settings`` its own keys (classification has none).

    The effective batch is batch_size x accumulation x processes. Images that do not fill a batch at
    the end of an epoch are left out. ``evaluate_every`` counts epochs (0: only at the end),
    ``log_every`` optimizer steps. ``device`` is ``auto`` or ``cpu``. ``threads`` are torch's on the
    CPU. ``parallel`` says how several processes share the model: ``ddp`` keeps it whole in each,
    ``fsdp2`` keeps it in parts. ``compile`` compiles the model.
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
        """Return the learning rates at steps of so many images, see ``OptimizerConfig``."""
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
                    f"model.kwargs.{key} is {self.model.kwargs[key]!r}, but images are read in "
                    "colour, with three channels (grey ones too); remove it"
                )
        for key, owner in _NO_KWARGS.items():
            if key in self.model.kwargs:
                raise ValueError(f"model.kwargs.{key} is not taken; set {owner} in its place")
        if self.mix.active and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix need an even batch_size, not {self.batch_size}")
        if self.parallel == "fsdp2" and self.ema is not None:
            raise ValueError(
                "ema averages whole weights, but parallel='fsdp2' keeps them in parts; set "
                "parallel to 'ddp', or ema to none"
            )
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
