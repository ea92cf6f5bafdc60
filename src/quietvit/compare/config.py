"""The configuration of a comparison: recipe, seeds, quantization settings, numbers of images.

It derives both arms from the recipe. ``run`` runs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from quietvit.errors import QuietvitError, nearest
from quietvit.quantization.settings import setting_names, written_bits
from quietvit.section import Section
from quietvit.synthesis.settings import is_synthetic, parse_request
from quietvit.train import TrainConfig


class CompareConfig(Section):
    """A comparison of training with and without CD. Raises QuietvitError for a bad value."""

    recipe: TrainConfig
    """The arm with CD. The other arm removes ``decay.cd`` from it."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seed trains both arms."""
    bits: tuple[str, ...] = ("W8A8", "W6A6", "W4A4+attention-maps-8", "W4A4")
    """Each is combined with each of ``methods``. ``W4A4+attention-maps-8`` or
    ``W4A4+post_softmax=8`` keeps roles or sites at other bits."""
    methods: tuple[str, ...] = ("rtn-minmax", "rtn-percentile", "rtn-omse")
    """Post-training methods with their range estimators, such as ``rtn-omse``."""
    calibration_images: int = Field(default=32, ge=1)
    """Drawn from the training data, unless ``synthesis`` is set."""
    synthesis: str = ""
    """Generates the calibration images from each run's own model: ``synthetic``, or such as
    ``synthetic:32:pink`` with the number of ``calibration_images``. Empty: real images."""
    calibration_seed: int = Field(default=0, ge=0)
    """Decides which images are drawn for calibration and diagnosis."""
    diagnosed_images: int = Field(default=32, ge=1)
    """Drawn from the test data. Outliers and noise are measured on them."""
    noise_setting: str = ""
    """Noise is measured per site at this setting. By default: the last bits, the first method."""

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise QuietvitError(_explained(error)) from error

    @field_validator("bits", "methods")
    @classmethod
    def _written_one_way(cls, names: tuple[str, ...], info: Any) -> tuple[str, ...]:
        if info.field_name == "bits":
            return tuple(map(written_bits, names))
        return tuple(name.strip().lower() for name in names)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for what in ("seeds", "bits", "methods"):
            values = getattr(self, what)
            if not values or len(set(values)) != len(values):
                raise QuietvitError(
                    f"{what} are {', '.join(map(str, values)) or 'empty'}; give at least one, each "
                    "once."
                )
        if any(seed < 0 for seed in self.seeds):
            raise QuietvitError(f"seeds are {self.seeds}; a seed is 0 or more.")
        settings = self.settings
        if self.noise_setting and self.noise_setting not in settings:
            raise QuietvitError(
                f"noise_setting {self.noise_setting!r} is not compared"
                f"{nearest(self.noise_setting, settings)}; choose one of: {', '.join(settings)}."
            )
        if self.synthesis and not is_synthetic(self.synthesis):
            raise QuietvitError(
                f"synthesis is {self.synthesis!r}; write synthetic:32 or synthetic:32:pink, or "
                "leave it empty for calibration images of the training data."
            )
        count = parse_request(self.synthesis).count if self.synthesis else None
        if count not in (None, self.calibration_images):
            raise QuietvitError(
                f"synthesis asks for {count} images, but calibration_images is "
                f"{self.calibration_images}; give the same number."
            )
        cd = self.recipe.decay.sections().get("cd")
        if cd is None or not cd.active:
            raise QuietvitError(
                "the recipe trains without Colinearity Decay, so there is nothing to compare; set "
                "a strength, for example --set decay.cd.strength=1."
            )
        if self.recipe.qat is not None:
            raise QuietvitError(
                "the recipe trains a quantized model (qat), but a comparison quantizes after "
                "training; leave it out with --set qat=none, or run both arms with quietvit train."
            )
        return self

    @property
    def settings(self) -> tuple[str, ...]:
        """Names of all quantization settings, such as ``W4A4 rtn-minmax``."""
        return setting_names(self.bits, self.methods)

    @property
    def measured_noise(self) -> str:
        return self.noise_setting or f"{self.bits[-1]} {self.methods[0]}"

    def arm(self, seed: int, decay: bool) -> TrainConfig:
        """Return the recipe of one run with this seed, with or without ``decay.cd``."""
        changes: dict[str, Any] = {"seed": seed}
        if not decay:
            changes["decay"] = self.recipe.decay.model_copy(update={"cd": None})
        return self.recipe.model_copy(update=changes)

    def order(self) -> tuple[tuple[int, bool], ...]:
        """Return (seed, decay) of all runs. The arm that runs first alternates between seeds."""
        return tuple(
            (seed, bool(decay))
            for at, seed in enumerate(self.seeds)
            for decay in ((0, 1) if at % 2 == 0 else (1, 0))
        )

    def flat(self) -> dict[str, str]:
        """Return every setting as dotted key -> text, for the report and to find differences."""
        whole = self.model_dump(mode="json")
        for key in ("seed", "output"):
            del whole["recipe"][key]
        if not self.synthesis:  # as in comparisons of earlier versions, which can be resumed
            del whole["synthesis"]
        return dict(_flat(whole, ""))


def calibration_of(text: str) -> dict[str, Any]:
    """Return the fields that ``32``, ``synthetic`` or ``synthetic:32:METHOD`` stands for.

    Raises QuietvitError for anything else.
    """
    if is_synthetic(text):
        count = parse_request(text).count
        return {"synthesis": text} | ({} if count is None else {"calibration_images": count})
    if text.isdecimal():
        return {"calibration_images": int(text)}
    raise QuietvitError(
        f"the calibration is {text!r}; give the number of images of the training data, such as 32, "
        "or synthetic:32 for generated ones."
    )


def _flat(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, entry in value.items():
            yield from _flat(entry, f"{key}.{name}" if key else name)
    elif isinstance(value, list | tuple):
        yield key, ", ".join(map(str, value))
    else:
        yield key, str(value)


def _explained(error: ValidationError) -> str:
    parts = []
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            parts.append(f"there is no key {key!r}{nearest(key, CompareConfig.model_fields)}")
        else:
            parts.append(f"{key}={problem['input']!r}: {problem['msg'].lower()}")
    return f"the comparison: {'; '.join(parts)}."
