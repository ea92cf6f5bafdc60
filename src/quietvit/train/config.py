"""The configuration of a training run: frozen pydantic models that refuse unknown keys.

Each regularizer defines its own section in ``decay``. ``recipe`` reads TOML.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
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
    """The model: a timm name, or ``hf:/folder`` for a transformers image classifier in a folder."""

    name: str
    """A timm name, or ``hf:/folder``."""
    weights: Path | None = None
    """A local file of weights (timm models only). None: random weights."""
    kwargs: dict[str, Any] = Field(default={})
    """Passed on to ``timm.create_model``, or to the transformers config."""
    preprocessing: dict[str, Any] = Field(default={})
    """Changes to the model's own preprocessing: mean, std, crop_pct, interpolation."""
    freeze: tuple[str, ...] = ()
    """Wildcards of parameter names that are not trained."""
    freeze_blocks: int = Field(default=0, ge=0)
    """Freeze the first n blocks and everything before them."""


class DataConfig(Section):
    """The data set, its size limits and its augmentation."""

    dataset: str
    """See ``quietvit.data.load_dataset``, for example ``imagefolder:/my/images``."""
    num_classes: int | None = Field(default=None, ge=1)
    """None: as many as the training images have. A label at or above it is refused."""
    train_images: int | None = Field(default=None, ge=1)
    """Use only this many training images, drawn at random. None: all."""
    test_images: int | None = Field(default=None, ge=1)
    """Use only this many test images, drawn at random. None: all."""
    max_bad_images: int = Field(default=0, ge=0)
    """Images that cannot be decoded are replaced by others. The run stops when a process has seen
    more different ones than this, those before a resume included."""
    repeats: int = Field(default=1, ge=1)
    """Put each image n times into an epoch, each time with another augmentation (DeiT's repeated
    augmentation). An epoch keeps its length, so it visits 1/n of the images."""
    shuffle_window: int | None = Field(default=None, ge=1)
    """The number of shards whose images are shuffled together. None: all."""
    augmentation: Augmentation = Augmentation()


class OptimizerConfig(Section):
    """AdamW and the learning rate."""

    lr: float = Field(default=1e-3, gt=0)
    """The maximum learning rate."""
    lr_batch: int | None = Field(default=None, ge=1)
    """The effective batch that ``lr``, ``schedule.warmup_lr`` and ``schedule.min_lr`` are meant
    for. All three are multiplied by effective batch / ``lr_batch`` (linear scaling, Goyal et al.
    2017, arXiv 1706.02677). None does not scale."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Acts on matrices only, unless ``decay_norms_and_biases`` is set."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of the moving averages of the gradient and its square."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second average."""
    decay_norms_and_biases: bool = False
    """Apply the weight decay to every parameter."""
    clip_grad: float | None = Field(default=None, gt=0)
    """Clip the norm of the whole gradient at this value. None: no clipping."""
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    """The learning rate of a block is this factor times that of the next block (timm)."""
    lr_scale: dict[str, Annotated[float, Field(gt=0)]] = Field(default={})
    """Wildcards of parameter names with factors of their learning rates. The first that matches
    counts."""


class ScheduleConfig(Section):
    """Linear warm-up, then cosine from ``lr`` to ``min_lr``. Updated at every optimizer step.

    With ``milestones`` the rate falls in steps instead, as with torch's ``MultiStepLR``.
    """

    warmup_epochs: float = Field(default=0.0, ge=0)
    """Epochs of linear warm-up from ``warmup_lr`` to ``lr``."""
    warmup_lr: float = Field(default=1e-6, ge=0)
    """The learning rate of the first step of a warm-up."""
    min_lr: float = Field(default=0.0, ge=0)
    """The learning rate of the last step (cosine only)."""
    milestones: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Finished epochs at which the learning rate is multiplied by ``gamma``, in ascending order.
    Example: (8, 11). They need not be whole numbers. Empty: cosine."""
    gamma: float = Field(default=0.1, gt=0, lt=1)
    """See ``milestones``."""


class Rates(NamedTuple):
    """The learning rates of a run: the maximum, at the first step, and at the last step."""

    lr: float
    warmup_lr: float
    min_lr: float


class MixConfig(Section):
    """timm's mixup and cutmix. Both are off if both are 0."""

    mixup: float = Field(default=0.0, ge=0)
    """Alpha of mixup. 0: off."""
    cutmix: float = Field(default=0.0, ge=0)
    """Alpha of cutmix. 0: off."""
    probability: Share = 1.0
    """The share of batches that are mixed."""
    switch_probability: Share = 0.5
    """The share of cutmix among mixed batches if both are on."""

    @property
    def active(self) -> bool:
        return (self.mixup > 0 or self.cutmix > 0) and self.probability > 0


class EmaConfig(Section):
    """Moving average of the weights, updated after the decay. If set, it is the result."""

    decay: float = Field(default=0.999, gt=0, lt=1)
    """The share of the average that remains at each step."""
    warmup: bool = True
    """Start with a smaller decay, which grows with the steps (timm)."""


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
    """When checkpoints are written, and how many remain."""

    every: int = Field(default=500, ge=0)
    """Write a checkpoint every n optimizer steps. 0: never."""
    keep: int = Field(default=2, ge=1)
    """The number of checkpoints that remain."""


class TrainConfig(Section):
    """A training run.

    The effective batch is batch_size x accumulation x processes. An epoch drops the images that do
    not fill its last batch.
    """

    recipe: Literal[1] = 1
    """The version of this format."""
    task: str = "classification"
    """The name of the task: ``classification``, ``detection`` or your own."""
    task_settings: dict[str, Any] = Field(default={})
    """Keys of the task itself. Classification has none."""
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    mix: MixConfig = MixConfig()
    ema: EmaConfig | None = None
    """A moving average of the weights, which becomes the result. None: off."""
    decay: Annotated[SerializeAsAny[DecayConfig], BeforeValidator(_parsed_decay)] = Field(
        default_factory=lambda: decay_config()()
    )
    qat: QATConfig | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    epochs: int = Field(default=10, ge=1)
    """Passes over the training images."""
    batch_size: int = Field(default=64, ge=1)
    """Images per process and forward pass."""
    accumulation: int = Field(default=1, ge=1)
    """Forward passes per optimizer step."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """The share of the label that is spread over all classes."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """``bf16`` and ``fp16`` use autocast. ``no`` computes in float32."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of weights, order, augmentation and dropout."""
    device: Literal["auto", "cpu"] = "auto"
    """``auto`` takes an accelerator if there is one."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """``ddp`` replicates the model in each process, ``fsdp2`` shards it."""
    compile: bool = False
    """Use ``torch.compile``."""
    evaluate_every: int = Field(default=0, ge=0)
    """Evaluate every n epochs. 0: only at the end."""
    log_every: int = Field(default=10, ge=1)
    """Log every n optimizer steps."""
    tensorboard: bool = True
    """Also write the figures for TensorBoard."""
    num_workers: int = Field(default=0, ge=0)
    """Processes that decode images, per process of training. 0: none."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of torch on the CPU, also where ``compare`` quantizes. None: torch's own choice."""
    output: Path = Path("runs/train")
    """The folder of the run."""

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
        self._milestones_fit()
        if self.schedule.warmup_epochs >= self.epochs:
            raise ValueError(
                f"schedule.warmup_epochs ({self.schedule.warmup_epochs:g}) must be below epochs "
                f"({self.epochs})"
            )
        for key, strength in self.decay.schedules():
            if problem := strength.late(self.epochs):
                raise ValueError(f"{key}: {problem}")
        return self

    def _milestones_fit(self) -> None:
        chosen = self.schedule
        if not chosen.milestones:
            return
        places = (chosen.warmup_epochs, *chosen.milestones, self.epochs)
        if any(later <= earlier for earlier, later in pairwise(places)):
            raise ValueError(
                f"schedule.milestones ({', '.join(f'{m:g}' for m in chosen.milestones)}) must "
                f"ascend, after schedule.warmup_epochs ({chosen.warmup_epochs:g}) and before "
                f"epochs ({self.epochs})"
            )
        if chosen.min_lr > 0:
            raise ValueError(
                "schedule.min_lr belongs to the cosine schedule; remove it, or schedule.milestones"
            )

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
