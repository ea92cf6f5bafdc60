"""``compare``: make every run of a comparison, save each one when finished, and write the report.

A run trains a model, evaluates it in float and at every quantization setting, and measures it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.compare.config import CompareConfig
from quietvit.compare.earlier import COMPARISON, earlier_runs, named, refusal
from quietvit.compare.made import made
from quietvit.errors import QuietvitError
from quietvit.files import (
    held,
    json_text,
    leftovers,
    refuse_nonempty,
    sweep,
    write_atomic,
)
from quietvit.measure import diagnose, sqnr
from quietvit.origin import origin_of
from quietvit.quantization import QuantizedModel, quantize
from quietvit.quantization.settings import parse_method, setting_names
from quietvit.report import (
    Results,
    Run,
    SiteNoise,
    SiteOutlier,
    Table,
    render_page,
    summarize,
    summary_csv,
    summary_table,
    tidy_csv,
    verdict,
)
from quietvit.report.results import ARMS, FLOAT, Spread, overhead
from quietvit.synthesis import synthesize
from quietvit.synthesis.settings import parse_request
from quietvit.tracing import Trace
from quietvit.tracing import trace as record_trace
from quietvit.train import TrainConfig, TrainResult, train
from quietvit.train.folder import begun_with, changes, fresh
from quietvit.train.metrics import METRICS
from quietvit.train.recipe import refuse_not_utf8
from quietvit.train.setup import task_of
from quietvit.train.threads import threads

_BATCH = 64
_POINTS = 200


@dataclass(frozen=True)
class Comparison:
    """The results of a comparison and their folder."""

    results: Results
    folder: Path

    @property
    def page(self) -> Path:
        return self.folder / "report.html"

    @property
    def table(self) -> Table:
        return summary_table(self.results)

    @property
    def verdict(self) -> str:
        return verdict(summarize(self.results), self.results.metric.name)

    @property
    def overhead(self) -> Spread | None:
        """Training time that CD adds, in percent of the other training time."""
        return overhead(self.results)


def compare(
    config: CompareConfig,
    output: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    discard: bool = False,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> Comparison:
    """Train with and without CD for every seed, quantize every model at every setting, and report.

    Both arms of a seed start from the same weights and see the same images in the same order. All
    runs use the same calibration images. Float and quantized models are evaluated with the same
    transform, from the model's own data config.

    Args:
        config: what to compare.
        output: folder for ``report.html``, ``results.csv`` (every run), ``table.csv``,
            ``results.json`` and one folder per run. Rewritten whenever a seed is finished.
        resume: keep the finished runs in ``output`` and continue.
        force: write into a folder that is not empty. The runs of an earlier comparison in it are
            listed and deleted, once the new data has been checked. An unfinished comparison with
            runs needs ``discard`` too.
        discard: with ``force``, delete an unfinished comparison and its runs too.
        say: called with each line of progress.

    Raises:
        QuietvitError: the folder is not empty or, with ``resume``, holds another comparison, or
            training or quantization refuses its settings. Finished runs are kept.
        KeyboardInterrupt, SystemExit: on Ctrl-C and SIGTERM, as in ``quietvit.train``.
    """
    folder = Path(output)
    refuse_not_utf8(config.recipe.model_copy(update={"output": folder}))
    if not resume and (refused := refusal(folder, force, discard)):
        raise refused
    refuse_nonempty(folder, resume or force, ignored=leftovers(folder / COMPARISON))
    _enough_images(config)
    _prepare(config, folder, resume, say)
    metric = task_of(config.recipe).metric
    runs: dict[tuple[int, bool], Run] = {}
    order = config.order()
    for at, (seed, decay) in enumerate(order, start=1):
        place = folder / "runs" / f"seed{seed}-{named(ARMS[decay])}"
        kept = place / "run.json"
        name = f"[{at}/{len(order)}] seed {seed} {ARMS[decay]}"
        if resume and kept.is_file():
            runs[seed, decay] = _read_run(kept)
            say(f"{name}: finished before")
        else:
            say(f"{name}: training, then quantizing")
            started = time.perf_counter()
            arm = config.arm(seed, decay).model_copy(update={"output": place / "train"})
            trained = _trained(arm, resume, force, discard)
            with threads(arm.threads):
                run = _quantized(config, trained, seed, decay)
            run = run.model_copy(update={"curve": _curve(place / "train")})
            write_atomic(kept, json_text(run.model_dump(mode="json"), indent=1) + "\n")
            runs[seed, decay] = run
            say(
                f"{name}: float {metric.text(run.float_score)}, "
                f"{min(run.quantized.values()):.2f} {metric.unit} at worst when quantized "
                f"({time.perf_counter() - started:.0f} s)"
            )
        if (seed, not decay) in runs:
            _write(_results(config, tuple(runs.values())), folder)
    return Comparison(_results(config, tuple(runs.values())), folder)


def _enough_images(config: CompareConfig) -> None:
    train_set, _ = task_of(config.recipe).open_data()
    if not config.synthesis and config.calibration_images > len(train_set):
        raise QuietvitError(
            f"calibration_images is {config.calibration_images}, but {train_set.name} has only "
            f"{len(train_set)} images for training; set fewer."
        )


def _prepare(config: CompareConfig, folder: Path, resume: bool, say: Callable[[str], None]) -> None:
    kept = folder / COMPARISON
    wanted = config.flat()
    if resume and kept.is_file():
        try:
            before = json.loads(kept.read_text(encoding="utf-8"))
        except ValueError as error:
            raise QuietvitError(
                f"{kept} is damaged ({error}); start a new comparison with --force or in another "
                "folder."
            ) from error
        changed = [
            f"{key} was {before.get(key)} and is {wanted.get(key)}"
            for key in dict.fromkeys([*before, *wanted])
            if before.get(key) != wanted.get(key) and key != "seeds"
        ]
        if changed:
            raise QuietvitError(
                f"{folder} holds another comparison: {'; '.join(changed[:3])}. To continue it, "
                "give the same settings (seeds may differ). Else choose another folder."
            )
    elif resume and set(folder.iterdir()) - set(leftovers(kept)):
        raise QuietvitError(
            f"{folder} holds no comparison to continue (no {COMPARISON}); choose another folder."
        )
    if not resume:
        earlier = earlier_runs(folder)
        if earlier:
            say(f"a new comparison in {folder} deletes: {'; '.join(earlier.values())}")
        for place in earlier:
            with held(place / "train") if (place / "train").is_dir() else nullcontext():
                (place / "run.json").unlink(missing_ok=True)
                fresh(place / "train")
    sweep(kept)
    write_atomic(kept, json_text(wanted, indent=1) + "\n")


def _read_run(path: Path) -> Run:
    try:
        return Run.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise QuietvitError(
            f"the finished run {path} could not be read ({str(error).splitlines()[0]}); delete "
            "that file to repeat the run."
        ) from error


def _trained(arm: TrainConfig, resume: bool, force: bool, discard: bool) -> TrainResult:
    place = arm.output
    resume = resume and place.is_dir()
    before = begun_with(arm, force, discard) if resume else None
    if before is not None and (differing := changes(before, arm)):
        raise QuietvitError(
            f"{place} was continued with other settings than the comparison has: {differing[0]}. "
            "Both arms must be trained alike; remove that folder to train the run again."
        )
    return train(arm, resume=resume, force=force, discard=discard)


def _quantized(config: CompareConfig, trained: TrainResult, seed: int, decay: bool) -> Run:
    """Evaluate a trained model in float and at every setting, and measure outliers and noise."""
    from accelerate.utils import send_to_device

    arm = trained.config
    device = "cuda" if arm.device == "auto" and torch.cuda.is_available() else "cpu"
    model = trained.load_model().to(device)
    task = trained.task
    train_set, test_set = task.open_data()
    loader = task.evaluation_loader(model, test_set, _BATCH, arm.num_workers)

    def drawn(images: Any, count: int) -> Any:
        batch = task.calibration(model, images, count, config.calibration_seed)
        return send_to_device(batch, device)

    def figures(model: nn.Module) -> dict[str, float]:
        return task.figures([task.judge(model, loader, device)])

    if config.synthesis:
        calibration = synthesize(
            model,
            config.calibration_images,
            parse_request(config.synthesis).method,
            seed=config.calibration_seed,
        )
        if (origin_of(calibration) or {}).get("stopped"):
            raise KeyboardInterrupt  # half-made images must not stand for those of this arm
    else:
        calibration = drawn(train_set, config.calibration_images)
    looked_at = drawn(test_set, min(config.diagnosed_images, len(test_set)))
    trace = record_trace(model, calibration[:1])
    found: dict[str, dict[str, float]] = {}
    covered, shares = 1.0, {}
    noise: tuple[SiteNoise, ...] = ()
    for setting in config.settings:
        bits, _, method = setting.partition(" ")
        quantized = quantize(
            model, parse_method(method, bits), calibration, trace=trace, progress=False
        )
        found[setting] = figures(quantized)
        covered = min(covered, quantized.coverage.fraction)
        shares[setting] = quantized.coverage.shares()
        if setting == config.measured_noise:
            noise = _noise(model, quantized, looked_at, trace)
    key, floating = task.metric.key, figures(model)
    return Run(
        seed=seed,
        decay=decay,
        float_score=floating[key],
        quantized={setting: each[key] for setting, each in found.items()},
        figures={FLOAT: floating} | found,
        images=len(test_set),
        steps=trained.steps,
        train_seconds=trained.train_seconds,
        decay_seconds=trained.decay_seconds,
        coverage=covered,
        shares=shares,
        outliers=_outliers(model, looked_at, trace),
        noise=noise,
    )


def _curve(folder: Path) -> tuple[tuple[int, float], ...]:
    """Return (step, training loss) of a run, at most ``_POINTS``. Empty if its log is gone."""
    if not (folder / METRICS).is_file():
        return ()
    found = [
        (entry["step"], entry["loss"])
        for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()
        if isinstance((entry := json.loads(line)).get("loss"), float)
    ]
    return tuple(found[:: -(-len(found) // _POINTS) or 1])


def _outliers(model: nn.Module, images: Tensor, trace: Trace) -> tuple[SiteOutlier, ...]:
    diagnosis = diagnose(model, images, pairs=(), trace=trace)
    return tuple(
        SiteOutlier(
            site=f"{site.site}:{site.operand}",
            role=site.role,
            ratio=site.max_over_rms,
            maximum=site.max,
        )
        for site in diagnosis.sites
        if site.operand != "output"
    )


def _noise(
    model: nn.Module, quantized: QuantizedModel, images: Tensor, trace: Trace
) -> tuple[SiteNoise, ...]:
    decibels = sqnr(model, quantized, images)
    return tuple(
        SiteNoise(site=name, role=trace[name].role, db=db)
        for name, db in decibels.items()
        if isfinite(db)
    )


def _results(config: CompareConfig, runs: tuple[Run, ...]) -> Results:
    covered = 100 * min(run.coverage for run in runs)
    return Results(
        task=config.recipe.task,
        model=task_of(config.recipe).model_name,
        model_arguments=", ".join(f"{k} {v}" for k, v in config.recipe.model.kwargs.items()),
        data=config.recipe.data.dataset,
        settings=config.settings,
        noise_setting=config.measured_noise,
        seeds=config.seeds,
        runs=runs,
        configuration=config.flat(),
        **made(config.recipe.threads),
        notes=(
            f"{covered:.1f} % of all multiply-accumulates run on quantized operands, products "
            "inside attention included; patch embedding and head at 8 bits. Ranges come from "
            f"{_calibrated_on(config)}; "
            f"{task_of(config.recipe).metric.name} is on {runs[0].images} test images, one of "
            f"which is {100 / runs[0].images:.2f} points.",
            *_shares(config, runs[0]),
        ),
    )


def _shares(config: CompareConfig, run: Run) -> list[str]:
    """Return one line for each choice of bits: the shares of multiply-accumulates by bits."""
    first = {bits: setting_names((bits,), config.methods)[0] for bits in config.bits}
    return [f"{bits}: {run.shares[name]}." for bits, name in first.items() if name in run.shares]


def _calibrated_on(config: CompareConfig) -> str:
    if not config.synthesis:
        return f"{config.calibration_images} images of the training data, the same for every run"
    return (
        f"{config.calibration_images} images that were generated from each run's own model "
        f"({config.synthesis}, seed {config.calibration_seed})"
    )


def _write(results: Results, folder: Path) -> None:
    write_atomic(
        folder / "results.json", json_text(results.model_dump(mode="json"), indent=1) + "\n"
    )
    write_atomic(folder / "results.csv", tidy_csv(results))
    write_atomic(folder / "table.csv", summary_csv(results))
    write_atomic(folder / "report.html", render_page(results))
