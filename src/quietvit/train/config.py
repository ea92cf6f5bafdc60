"""The whole configuration of a training run, as frozen pydantic models; extra keys are refused.

Reading it from TOML, overriding it and explaining mistakes is ``recipe``'s work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from quietvit.data.section import Section
from quietvit.data.transforms import Augmentation
from quietvit.errors import QuietvitError
from quietvit.tasks import task_named

Strength = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


_NO_KWARGS = {
    "name": "model.name",
    "num_classes": "data.num_classes",
    "weights": "model.weights",
    "pretrained": "model.weights (a local file)",
    "preprocessing": "model.preprocessing",
}


class ModelConfig(Section):
    """The model: a timm name, or ``hf:/folder`` for a transformers image classifier kept there.

    ``kwargs`` go to ``timm.create_model`` (to the transformers config), ``weights`` is a local file
    (timm only). ``freeze`` are wildcards of parameter names that do not train; ``freeze_blocks``
    keeps the first n blocks and what comes before them as they are.
    """

    name: str
    weights: Path | None = None
    kwargs: dict[str, Any] = Field(default={})
    preprocessing: dict[str, Any] = Field(default={})
    freeze: tuple[str, ...] = ()
    freeze_blocks: int = Field(default=0, ge=0)


class DataConfig(Section):
    """The data set (see ``quietvit.data.load_dataset``), how many images of it, how they vary.

    ``num_classes`` is taken from the training images where it is not given; given, a label at or
    above it is refused. An image that cannot be decoded is replaced by another one and counted; the
    run stops when a process met more than ``max_bad_images`` different ones, resumes included.
    ``repeats`` puts each image so often into an epoch, differently augmented, and takes as many
    fewer images (DeiT's repeated augmentation). ``shuffle_window``: shards whose images are mixed
    with each other, for data that comes in shards (None mixes all).
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

    ``lr_batch``: the effective batch that ``lr``, ``schedule.warmup_lr`` and ``schedule.min_lr``
    are for; at another one all three are multiplied by the ratio (linear scaling, Goyal et al.
    2017, arXiv 1706.02677). None: they hold as they are. ``layer_decay``: the learning rate of each
    block is this factor of the next one's (timm). ``lr_scale``: wildcards of parameter names, and
    the factor of their learning rate; the first that matches counts.
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
    """The learning rates of a run: highest, where the warm-up begins, where the cosine ends."""

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
    """Moving average of the weights, taken after the decay; it is the result where present."""

    decay: float = Field(default=0.999, gt=0, lt=1)
    warmup: bool = True


class StrengthScheduleConfig(Section):
    """A factor of a strength over the run, in epochs: see ``quietvit.decay.StrengthSchedule``.

    0 before ``start_epoch``, then up to 1 within ``warmup_epochs``, then ``constant``, or down to
    ``final`` at the end of the run.
    """

    shape: Literal["constant", "linear", "cosine"] = "constant"
    start_epoch: float = Field(default=0.0, ge=0)
    warmup_epochs: float = Field(default=0.0, ge=0)
    final: float = Field(default=0.0, ge=0)

    def late(self, epochs: int) -> str:
        """Why nothing of it, or no way down, is left within ``epochs``; "" where all is well."""
        if self.start_epoch >= epochs:
            return f"start_epoch ({self.start_epoch:g}) must be below epochs ({epochs})"
        up = self.start_epoch + self.warmup_epochs
        if self.shape != "constant" and up >= epochs:
            return (
                f"start_epoch + warmup_epochs ({up:g}) must be below epochs ({epochs}), or shape "
                f"{self.shape!r} has no way down"
            )
        return ""


# Pydantic judges a value by one branch of a union, the one named here, and not by each in turn.
# The names stand in the location of an error, where ``recipe`` takes them out.
ONE, EACH = "<one>", "<one for each kind>"


def _strengths(value: Any) -> str:
    return EACH if isinstance(value, Mapping) else ONE


def _schedules(value: Any) -> str:
    """A table that holds tables is one of kinds; an empty one is a schedule without settings."""
    own = isinstance(value, Mapping) and any(
        isinstance(part, Mapping | StrengthScheduleConfig) for part in value.values()
    )
    return EACH if own else ONE


Strengths = Annotated[
    Annotated[Strength, Tag(ONE)] | Annotated[dict[str, Strength], Tag(EACH)],
    Discriminator(_strengths),
]
Schedules = Annotated[
    Annotated[StrengthScheduleConfig, Tag(ONE)]
    | Annotated[dict[str, StrengthScheduleConfig], Tag(EACH)],
    Discriminator(_schedules),
]


class RegularizerConfig(Section):
    """What all regularizers have. A strength of 0 is off."""

    strength: Strength
    schedule: StrengthScheduleConfig | None = None

    @property
    def active(self) -> bool:
        return self.strength > 0


class WeightRegularizerConfig(RegularizerConfig):
    """What those that act on weights have: every n-th step, with n-fold strength."""

    every: int = Field(default=1, ge=1)


class ColinearityConfig(Section):
    """Colinearity Decay; a mapping as ``strength`` gives one per kind of pair. 0 is off.

    ``schedule`` may be a mapping from kind to schedule. ``fold_gains`` takes the gain of the norm
    in front of a first matrix as part of it, ``products`` is the precision of the matrix products
    (``auto``: bfloat16 where that is fast). ``sharded`` divides the update between the processes,
    ``compile`` compiles it.
    """

    strength: Strengths = 1.0
    penalty: Literal["energy", "peak", "cosine", "top"] = "energy"
    kinds: tuple[str, ...] | None = None
    every: int = Field(default=1, ge=1)
    schedule: Schedules | None = None
    fold_gains: bool = False
    products: Literal["auto", "float32", "bfloat16"] = "auto"
    sharded: bool = False
    compile: bool = False

    @property
    def active(self) -> bool:
        values = self.strength.values() if isinstance(self.strength, dict) else [self.strength]
        return any(value > 0 for value in values)


class NormGainConfig(WeightRegularizerConfig):
    """Decay of the norm gains alone, weighted by their squares. 0 is off."""

    strength: Strength = 3.0


class SpectralConfig(WeightRegularizerConfig):
    """S2D, ``quietvit.SpectralDecay``: the leading singular values of layers they dominate.

    ``coupled`` puts its gradient before the optimizer, as published; else it is a decoupled update.
    ``images`` of the training data tell which layers those are, every ``refresh`` applied steps.
    """

    strength: Strength = 5e-4
    threshold: Share = 0.95
    components: int = Field(default=3, ge=1)
    refresh: int = Field(default=100, ge=1)
    power: int = Field(default=2, ge=1)
    coupled: bool = True
    images: int = Field(default=16, ge=1)


class TweoConfig(RegularizerConfig):
    """TWEO, ``quietvit.TWEO``: a penalty on the largest outputs of blocks, added to the loss."""

    strength: Strength = 0.01
    threshold: float = Field(default=3.0, gt=0)
    power: float = Field(default=4.0, ge=1)


class KurtosisConfig(WeightRegularizerConfig):
    """KURE, ``quietvit.KurtosisRegularization``: kurtosis of weight matrices towards ``target``."""

    strength: Strength = 1.0
    target: float = Field(default=1.8, ge=1)
    coupled: bool = True


class PairWeightConfig(WeightRegularizerConfig):
    """Plain weight decay of the very matrices that Colinearity Decay acts on: its control."""

    strength: Strength = 1.0
    kinds: tuple[str, ...] | None = None


class DecayConfig(Section):
    """Regularizers side by side; none by default. They act in the order in which they stand here.

    ``watch_every``: every so many logged steps, also log the largest activation of any block and
    the largest amplification of any pair; 0 never.
    """

    cd: ColinearityConfig | None = None
    norm_gains: NormGainConfig | None = None
    weight: PairWeightConfig | None = None
    s2d: SpectralConfig | None = None
    kure: KurtosisConfig | None = None
    tweo: TweoConfig | None = None
    watch_every: int = Field(default=10, ge=0)

    def schedules(self) -> Iterator[tuple[str, StrengthScheduleConfig]]:
        """Each schedule of strengths, with its key."""
        for name in DecayConfig.model_fields:
            schedule = getattr(getattr(self, name), "schedule", None)
            if isinstance(schedule, dict):
                for kind, own in schedule.items():
                    yield f"decay.{name}.schedule.{kind}", own
            elif schedule is not None:
                yield f"decay.{name}.schedule", schedule


class CheckpointConfig(Section):
    """Every ``every`` optimizer steps (0: none), the last ``keep`` are kept."""

    every: int = Field(default=500, ge=0)
    keep: int = Field(default=2, ge=1)


class TrainConfig(Section):
    """A training run. ``batch_size`` is per process and forward pass.

    ``task`` is what is trained, ``task_settings`` its own keys (classification has none).

    The effective batch is batch_size x accumulation x processes; the images left over at the end
    of an epoch are left out. ``evaluate_every`` counts epochs (0: only at the end), ``log_every``
    optimizer steps; ``device`` is ``auto`` or ``cpu``; ``threads`` are torch's on the CPU.
    ``parallel`` is how several processes share the model: ``ddp`` keeps it whole in each,
    ``fsdp2`` in parts. ``compile`` compiles the model.
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
    decay: DecayConfig = DecayConfig()
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
                    "colour, of three channels (grey ones too); leave it out"
                )
        for key, owner in _NO_KWARGS.items():
            if key in self.model.kwargs:
                raise ValueError(f"model.kwargs.{key} is not taken; set {owner} in its place")
        if self.mix.active and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix need an even batch_size, not {self.batch_size}")
        if self.parallel == "fsdp2" and self.ema is not None:
            raise ValueError(
                "ema averages whole weights, and parallel='fsdp2' keeps none whole; set parallel "
                "to 'ddp', or ema to none"
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
