"""The results of a comparison: runs, paired statistics over seeds, and the verdict in words.

Plain data for JSON. ``tables``, ``plots`` and ``page`` present it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import AliasChoices, ConfigDict, Field
from scipy.special import stdtrit

from quietvit.errors import QuietvitError
from quietvit.signatures import ReadableModel
from quietvit.tasks import Metric, task_named

ARMS = ("without CD", "with CD")
FLOAT = "float"
NO_DIFFERENCE = "no difference seen"


class Frozen(ReadableModel):
    """Plain data that does not change, as JSON holds it."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SiteOutlier(Frozen):
    """One activation site: ``ratio`` = ``maximum`` (largest magnitude) / root mean square."""

    site: str
    role: str
    ratio: float
    maximum: float


class SiteNoise(Frozen):
    """Signal-to-quantization-noise ratio in dB at the output of one site."""

    site: str
    role: str
    db: float


class Run(Frozen):
    """One trained model: its score in float and at each quantization setting; times in seconds.

    ``coverage`` is the smallest fraction of multiply-accumulates quantized at any setting.
    ``shares`` gives their shares by bits for each setting, in words.
    ``figures`` holds all figures of the task by setting and name, such as mask AP.
    ``outliers`` and ``noise`` are in forward order. ``curve`` holds (step, training loss).
    """

    seed: int
    decay: bool
    float_score: float = Field(validation_alias=AliasChoices("float_score", "float_top1"))
    quantized: Mapping[str, float]
    figures: Mapping[str, Mapping[str, float]] = {}
    images: int
    steps: int
    train_seconds: float
    decay_seconds: float
    coverage: float
    shares: Mapping[str, str] = {}
    curve: tuple[tuple[int, float], ...] = ()
    outliers: tuple[SiteOutlier, ...] = ()
    noise: tuple[SiteNoise, ...] = ()

    @property
    def arm(self) -> str:
        return ARMS[self.decay]

    @property
    def overhead(self) -> float:
        """Time of the decay in percent of the other training time."""
        return 100 * self.decay_seconds / max(self.train_seconds - self.decay_seconds, 1e-9)

    def score(self, setting: str) -> float:
        """Return the task's metric at a setting or at ``float``."""
        return self.float_score if setting == FLOAT else self.quantized[setting]

    def figure(self, setting: str, name: str) -> float | None:
        """Return another figure of the task. None if it was not measured."""
        return self.figures.get(setting, {}).get(name)


class Results(Frozen):
    """All runs of a comparison, with its configuration and provenance."""

    task: str = "classification"
    model: str
    model_arguments: str = ""
    data: str
    settings: tuple[str, ...]
    noise_setting: str
    seeds: tuple[int, ...]
    runs: tuple[Run, ...]
    configuration: Mapping[str, str]
    versions: Mapping[str, str]
    command: str
    machine: str
    date: str
    notes: tuple[str, ...] = ()

    @property
    def metric(self) -> Metric:
        """The name and unit of the scores."""
        return task_named(self.task).metric

    @property
    def further(self) -> tuple[str, ...]:
        """The names of the task's figures besides its metric, such as ``mask_ap``."""
        names = (name for run in self.runs for each in run.figures.values() for name in each)
        return tuple(name for name in dict.fromkeys(names) if name != self.metric.key)

    def pairs(self) -> tuple[tuple[Run, Run], ...]:
        """Return (without CD, with CD) for each seed that has both runs."""
        by_arm = {(run.seed, run.decay): run for run in self.runs}
        return tuple(
            (by_arm[seed, False], by_arm[seed, True])
            for seed in self.seeds
            if (seed, False) in by_arm and (seed, True) in by_arm
        )

    @property
    def unfinished(self) -> tuple[str, ...]:
        done = {(run.seed, run.decay) for run in self.runs}
        return tuple(
            f"seed {seed} {ARMS[decay]}"
            for seed in self.seeds
            for decay in (False, True)
            if (seed, decay) not in done
        )


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds. The deviation is None for one seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.deviation is None else f" ± {self.deviation:.2f}")


@dataclass(frozen=True)
class Row:
    """One setting: both arms, and the mean difference (with minus without) paired over seeds.

    ``low`` and ``high`` are the 95 % interval of ``difference`` (see ``paired_interval``), None for
    a single seed. ``saved`` is ``difference`` minus that of the float models: the points that
    quantization costs less with CD. It has its own interval.
    """

    setting: str
    without: Spread
    with_decay: Spread
    difference: float
    low: float | None
    high: float | None
    better: int
    worse: int
    seeds: int
    saved: float = 0.0
    saved_low: float | None = None
    saved_high: float | None = None

    @property
    def outcome(self) -> str:
        """``better``, ``worse``, ``no difference seen``, or ``one seed, spread unknown``."""
        return _outcome(self.low, self.high)

    @property
    def saved_outcome(self) -> str:
        """``outcome`` for ``saved``: whether quantization itself costs less with CD."""
        return _outcome(self.saved_low, self.saved_high)

    @property
    def agreement(self) -> str:
        """How many seeds agree with the sign of the mean difference."""
        if self.better >= self.worse and self.difference >= 0:
            return f"{self.better} of {self.seeds} better"
        if self.difference < 0:
            return f"{self.worse} of {self.seeds} worse"
        return f"{self.better} better, {self.worse} worse of {self.seeds}"

    @property
    def interval(self) -> str:
        if self.low is None or self.high is None:
            return "–"
        return f"{signed(self.low)} to {signed(self.high)}"


def summarize(results: Results) -> tuple[Row, ...]:
    """Return one row per setting, ``float`` first, over the seeds that have both runs.

    Raises:
        QuietvitError: no seed has a run with CD and a run without.
    """
    pairs = results.pairs()
    if not pairs:
        raise QuietvitError(
            f"no seed has both a run with and without CD ({len(results.runs)} of "
            f"{2 * len(results.seeds)} runs are finished); run again with --resume to finish them."
        )
    rows = []
    float_differences = [pair[1].float_score - pair[0].float_score for pair in pairs]
    for setting in (FLOAT, *results.settings):
        without = [pair[0].score(setting) for pair in pairs]
        with_decay = [pair[1].score(setting) for pair in pairs]
        differences = [b - a for a, b in zip(without, with_decay, strict=True)]
        saved = [d - f for d, f in zip(differences, float_differences, strict=True)]
        image = 100 / pairs[0][0].images
        low, high = paired_interval(differences, image)
        saved_low, saved_high = paired_interval(saved, image)
        rows.append(
            Row(
                setting=setting,
                without=Spread.of(without),
                with_decay=Spread.of(with_decay),
                difference=statistics.fmean(differences),
                low=low,
                high=high,
                better=sum(d > 0 for d in differences),
                worse=sum(d < 0 for d in differences),
                seeds=len(differences),
                saved=statistics.fmean(saved),
                saved_low=saved_low,
                saved_high=saved_high,
            )
        )
    return tuple(rows)


def paired_interval(
    differences: Sequence[float], resolution: float
) -> tuple[float, float] | tuple[None, None]:
    """Return the 95 % interval of the mean of paired differences (Student's t).

    The deviation is at least ``resolution`` (one test image in points): equal counts must not look
    certain. (None, None) for fewer than two differences.
    """
    if len(differences) < 2:
        return None, None
    mean = statistics.fmean(differences)
    deviation = max(statistics.stdev(differences), resolution)
    t = float(stdtrit(len(differences) - 1, 0.975))
    half = t * deviation / math.sqrt(len(differences))
    return mean - half, mean + half


def _outcome(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "one seed, spread unknown"
    if low > 0:
        return "better"
    return "worse" if high < 0 else NO_DIFFERENCE


def headline(rows: Sequence[Row], metric: str = "top-1") -> str:
    """Return the result in one sentence: how many settings are better, worse, or neither."""
    ends = signed(min(row.difference for row in rows)), signed(max(row.difference for row in rows))
    spread = f"{ends[0]} points" if ends[0] == ends[1] else f"{ends[0]} to {ends[1]} points"
    if rows[0].low is None:
        return f"With CD, {metric} differs by {spread}: one seed, so nothing follows from it."
    words = {"better": "better", "worse": "worse", NO_DIFFERENCE: "without a clear difference"}
    counts = ", ".join(
        f"{count} {'is' if count == 1 else 'are'} {text}"
        for outcome, text in words.items()
        if (count := sum(row.outcome == outcome for row in rows))
    )
    return f"With CD, {metric} differs by {spread}. Of {len(rows)} settings, {counts}."


def verdict(rows: Sequence[Row], metric: str = "top-1") -> str:
    """Return the result in words, rows that got worse first.

    A second sentence says whether CD improves quantization itself, not only the float model.
    """
    total = len(rows)
    if rows[0].low is None:
        return (
            f"With CD, {metric} differs by {_listed(rows)}: one seed, so the spread is unknown and "
            "nothing follows from it."
        )
    parts = [
        f"{outcome} in {len(alike)} of {total} rows, {_listed(alike)}"
        for outcome in ("worse", "better", NO_DIFFERENCE)
        if (alike := [row for row in rows if row.outcome == outcome])
    ]
    return f"Training with CD: {'; '.join(parts)}. {_saved(rows[1:])}".rstrip()


def _saved(rows: Sequence[Row]) -> str:
    """Return the sentence on ``Row.saved``: the difference without that of the float models."""
    parts = [
        f"{words} in {', '.join(f'{row.setting} ({signed(row.saved)} points)' for row in alike)}"
        for outcome, words in (("worse", "it costs more"), ("better", "it costs less"))
        if (alike := [row for row in rows if row.saved_outcome == outcome])
    ]
    if not rows:
        return ""
    if not parts:
        return "What quantization itself costs: no difference seen in any row."
    decided = sum(row.saved_outcome != NO_DIFFERENCE for row in rows)
    rest = "; no difference seen in the others" if decided < len(rows) else ""
    return f"What quantization itself costs, with CD: {'; '.join(parts)}{rest}."


def _listed(rows: Sequence[Row]) -> str:
    if len(rows) <= 3:
        return ", ".join(f"{row.setting} ({signed(row.difference)} points)" for row in rows)
    names = ", ".join(row.setting for row in rows)
    differences = [row.difference for row in rows]
    return f"{signed(min(differences))} to {signed(max(differences))} points ({names})"


def signed(value: float) -> str:
    """Format points with a sign (a typographic minus), and zero as ``0.00``."""
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "−")


def overhead(results: Results) -> Spread | None:
    """Return the training time that CD adds, in percent of the other training time."""
    values = [run.overhead for run in results.runs if run.decay]
    return Spread.of(values) if values else None
