"""The whole configuration of a training run, as frozen pydantic models; extra keys are refused.

Reading it from TOML, overriding it and explaining mistakes is ``recipe``'s work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from quietvit.data.transforms import Augmentation

Strength = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


_NO_KWARGS = {
    "name": "model.name",
    "num_classes": "data.num_classes",
    "weights": "model.weights",
    "pretrained": "model.weights (a local file)",
    "preprocessing": "model.preprocessing",
}


class Section(BaseModel):
    """A part of the configuration: frozen, no keys beside the ones declared."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelConfig(Section):
    """The timm model: ``kwargs`` go to ``timm.create_model``, ``weights`` is a local file."""

    name: str
    weights: Path | None = None
    kwargs: dict[str, Any] = {}
    preprocessing: dict[str, Any] = {}


class DataConfig(Section):
    """The data set (see ``quietvit.data.load_dataset``), how many images of it, how they vary.

    ``num_classes`` is taken from the training images where it is not given; given, a label at or
    above it is refused.
    """

    dataset: str
    num_classes: int | None = Field(default=None, ge=1)
    train_images: int | None = Field(default=None, ge=1)
    test_images: int | None = Field(default=None, ge=1)
    augmentation: Augmentation = Augmentation()


class OptimizerConfig(Section):
    """AdamW. ``decay_norms_and_biases`` applies the weight decay to every parameter."""

    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    decay_norms_and_biases: bool = False
    clip_grad: float | None = Field(default=None, gt=0)


class ScheduleConfig(Section):
    """Cosine from ``lr`` to ``min_lr`` after a linear warm-up, both counted in optimizer steps."""

    warmup_epochs: float = Field(default=0.0, ge=0)
    warmup_lr: float = Field(default=1e-6, ge=0)
    min_lr: float = Field(default=0.0, ge=0)


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


class ColinearityConfig(Section):
    """Colinearity Decay; a mapping as ``strength`` gives one per kind of pair. 0 is off."""

    strength: Strength | dict[str, Strength] = 1.0
    penalty: Literal["energy", "peak", "cosine", "top"] = "energy"
    kinds: tuple[str, ...] | None = None
    every: int = Field(default=1, ge=1)

    @property
    def active(self) -> bool:
        values = self.strength.values() if isinstance(self.strength, dict) else [self.strength]
        return any(value > 0 for value in values)


class NormGainConfig(Section):
    """Decay of the norm gains alone, weighted by their squares. 0 is off."""

    strength: Strength = 3.0

    @property
    def active(self) -> bool:
        return self.strength > 0


class DecayConfig(Section):
    """Decoupled updates after each optimizer step; none by default."""

    cd: ColinearityConfig | None = None
    norm_gains: NormGainConfig | None = None


class CheckpointConfig(Section):
    """Every ``every`` optimizer steps (0: none), the last ``keep`` are kept."""

    every: int = Field(default=500, ge=0)
    keep: int = Field(default=2, ge=1)


class TrainConfig(Section):
    """A training run. ``batch_size`` is per process and forward pass.

    The effective batch is batch_size x accumulation x processes; the images left over at the end
    of an epoch are left out. ``evaluate_every`` counts epochs (0: only at the end), ``log_every``
    optimizer steps; ``device`` is ``auto`` or ``cpu``; ``threads`` are torch's on the CPU.
    """

    recipe: Literal[1] = 1
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
    evaluate_every: int = Field(default=0, ge=0)
    log_every: int = Field(default=10, ge=1)
    tensorboard: bool = True
    num_workers: int = Field(default=0, ge=0)
    threads: int | None = Field(default=None, ge=1)
    output: Path = Path("runs/train")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for key, owner in _NO_KWARGS.items():
            if key in self.model.kwargs:
                raise ValueError(f"model.kwargs.{key} is not taken; set {owner} in its place")
        if self.mix.active and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix need an even batch_size, not {self.batch_size}")
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
        return self
