"""The training loop: when to step, log, evaluate, save, resume and stop.

``setup`` builds the run, ``step`` computes a step, ``checkpoint`` writes the files.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing
from typing import Any, NoReturn

from quietvit.classes import facts_of_names, metadata_of
from quietvit.data.evaluate import worker_errors
from quietvit.errors import QuietvitError
from quietvit.files import sweep
from quietvit.progress import Meter
from quietvit.tasks import Batch
from quietvit.train.checkpoint import load_checkpoint, newest_whole, save_checkpoint
from quietvit.train.config import TrainConfig
from quietvit.train.engine import gathered
from quietvit.train.evaluation import scores
from quietvit.train.folder import (
    begun_with,
    changes,
    fresh,
    own_files,
    refuse_used,
    write_classes,
    write_config,
    written,
)
from quietvit.train.losses import Losses
from quietvit.train.memory import Stage, enough_memory
from quietvit.train.metrics import Metrics
from quietvit.train.prepare import quantize_in_place
from quietvit.train.recipe import refuse_not_utf8
from quietvit.train.regularizers import detach, figures
from quietvit.train.result import CHECKPOINTS, RESULT, TrainResult, weights_of
from quietvit.train.resume import (
    check_same_data,
    collect,
    dealt,
    differences,
    restore,
)
from quietvit.train.setup import build
from quietvit.train.step import forward_backward
from quietvit.train.stopping import StopRequestedError, Termination, end_workers
from quietvit.train.threads import threads
from quietvit.train.together import (
    alone,
    check_same_checkpoint,
    raise_together,
    set_damaged_aside,
    weights_alike,
    write_weights,
)
from quietvit.train.training import Run

logger = logging.getLogger("quietvit")


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    force: bool = False,
    discard: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Train a model as ``config`` describes and write everything to ``config.output``.

    The folder gets ``config.json``, ``classes.json``, ``metrics.jsonl``, ``tensorboard/``,
    ``checkpoints/``, and at the end ``model.safetensors`` and ``result.json``. A resumed run ends
    with the same weights bit for bit on the CPU, in one process, with as many threads.

    SIGTERM or Ctrl-C (SIGINT) finishes the step and writes a checkpoint. An evaluation is aborted,
    and ``resume`` repeats it. A second Ctrl-C stops at once.

    Args:
        resume: continue from the last intact checkpoint, or from the start if there is none. A
            finished run is returned as it is. With a checkpoint the initial weights are not read
            again. A warning reports another number of threads or another torch version.
        force: start a new run in a folder that is not empty. Once the new data, model and decay are
            checked, the files of an earlier run are deleted, with a warning. An unfinished run with
            checkpoints needs ``discard`` too. With ``resume``, ``force`` acts only if the folder
            has no ``config.json``.
        discard: with ``force``, delete an unfinished run and its checkpoints too.
        progress: show a progress bar on standard error.

    Raises:
        SystemExit: code 143, after SIGTERM.
        KeyboardInterrupt: after Ctrl-C; its message names the checkpoint.
        QuietvitError: the output folder is in use, data or weights are bad, the loss is NaN or
            infinite, memory runs out, or the configuration differs on resume. (Learning rate,
            clipping, precision, location of the data, and how processes share a step may change.)
    """
    output = config.output.expanduser()
    config = config.model_copy(update={"output": output})
    refuse_not_utf8(config)
    before = begun_with(config, force, discard) if resume else None
    begun = before is not None
    if not resume:
        refuse_used(output, force, discard)
    if before is not None and (output / RESULT).exists():
        return _finished(config, before)
    with threads(config.threads):
        files_before = written(output)
        state = load_checkpoint(output / CHECKPOINTS) if begun else None
        with enough_memory(config, Stage.BUILD):
            run = build(config, state)
        with alone(run.training, begun, force, discard, files_before):
            main = run.training.accelerator.is_main_process
            if main:
                if not begun:
                    fresh(output)
                sweep(*own_files(output))
            if main and state is None:
                write_config(config)
                write_classes(config, run.train)
            run.training.accelerator.wait_for_everyone()
            check_same_checkpoint(run.training, None if state is None else state["step"])
            if state is not None:
                set_damaged_aside(run.training, state["step"])
            elif resume:
                logger.warning("%s holds no checkpoint; the run starts from its beginning.", output)
            with enough_memory(config, Stage.BUILD):
                loop = _Loop(run, state, before)
            try:
                if main and state is not None:
                    write_config(config)
                    write_classes(config, run.train)
                with enough_memory(config, Stage.STEP):
                    loop.run_epochs(progress)
                result = loop.finish(progress)
                loop.end_if_asked()
                return result
            finally:
                loop.close()


def _finished(config: TrainConfig, before: dict[str, Any]) -> TrainResult:
    differing = changes(before, config)
    if differing:
        raise QuietvitError(
            f"{config.output} is finished already, and {'; '.join(differing[:3])}; start a new "
            "run in another output folder."
        )
    logger.warning("%s is finished already; its result is returned.", config.output)
    return TrainResult.read(config.output)


class _Loop:
    """The position of a run (epoch, batch, step), and the steps from there."""

    def __init__(
        self, run: Run, state: dict[str, Any] | None, before: dict[str, Any] | None
    ) -> None:
        self.r, self.t, self.config = run, run.training, run.training.config
        self.accelerator, self.metric = run.training.accelerator, run.training.task.metric
        self.step = self.batch = self.epoch = 0
        self.saved, self.alike = -1, True
        self.train_seconds = 0.0
        self.losses = Losses(run.training)
        self.data = self.t.task.facts(run.train)
        differing: list[str] = []
        if state is not None:
            differing = self._restore(state, before or {})
            logger.warning("resuming at step %d of %d.", self.step, self.t.total_steps)
        self._logged = self.step, self.train_seconds
        main = self.accelerator.is_main_process
        self.metrics = (
            Metrics(self.config.output, self.step, self.config.tensorboard, self.metric.key)
            if main
            else None
        )
        if differing:
            self._write(changed="; ".join(differing))
            if main:
                logger.warning("from step %d on: %s.", self.step + 1, "; ".join(differing))
        self.termination = Termination(self.accelerator)

    def run_epochs(self, progress: bool) -> None:
        """Train from the current position to the end of the last epoch."""
        main = self.accelerator.is_main_process
        meter = Meter("training", self.t.total_steps, progress and main)
        told = ""
        with worker_errors(), closing(meter):
            meter.update(self.step)
            while self.epoch < self.config.epochs:
                qat = self.config.qat
                if (
                    qat
                    and qat.start_epoch == self.epoch
                    and self.t.models.core is self.t.models.plain
                ):
                    quantize_in_place(self.t)
                self.r.batches.seek(self.epoch, self.batch)
                self.t.models.wrapped.train()
                self._mark = time.perf_counter()
                # A checkpoint at the end of an epoch leaves no batch, which some loaders refuse.
                for batch in self.r.loader if len(self.r.batches) else ():
                    if self._pass(batch):
                        loss = self._after_step(batch)
                        told = told if loss is None else f"loss {loss:.3f}"
                        meter.update(self.step, told)
                        self._mark = time.perf_counter()
                every, done = self.config.evaluate_every, self.epoch + 1
                if every and done % every == 0 and done < self.config.epochs:
                    self.losses.refuse_unless_sound(self.step)
                    self._write(**self.figures(), epoch=done)
                self.epoch, self.batch = done, 0
            self.losses.refuse_unless_sound(self.step)

    def _pass(self, batch: Batch) -> bool:
        """Run one forward and backward pass. Return whether the optimizer stepped after it."""
        try:
            loss = forward_backward(self.t, batch, self.step)
        except QuietvitError as error:
            raise self.losses.told(error, self.step + 1) from error
        self.losses.add(loss, self.step + 1)
        self.batch += self.accelerator.num_processes
        return bool(self.accelerator.sync_gradients)

    def _after_step(self, batch: Batch) -> float | None:
        """Update the average, log and save as due. Return the mean loss if it was logged."""
        t, config = self.t, self.config
        self.step += 1
        if t.models.average is not None:
            t.models.average.update(t.models.plain, self.step)
        logged = None
        if self.step % config.log_every == 0 or self.step == t.total_steps:
            logged = self.losses.mean(self.step)
            self._tick()
            self._log(logged, batch)
            self.losses.clear()
        every = config.checkpoint.every
        if every and self.step % every == 0:
            self._save()
        self._tick()
        if self.termination.due() and self.step < t.total_steps:
            self._terminate()
        return logged

    def _log(self, loss: float, batch: Batch) -> None:
        t, every = self.t, self.config.decay.watch_every
        rate = max(group["lr"] for group in t.optim.wrapped.param_groups)
        speed = self._speed()
        values: dict[str, float | str] = {"loss": loss, "lr": rate, "images_per_second": speed}
        if self.config.data.max_bad_images:
            bad = gathered(self.accelerator, self.r.images.bad_images)
            values["bad_images"] = len({index for own in bad for index in own})
        with t.observers.stopwatch.running():
            values |= figures(t.optim.regularizers)
            if every and (self.step // self.config.log_every) % every == 0:
                values |= self._watched(batch)
        self._write(**values, epoch=self.step / t.steps_per_epoch)

    def _speed(self) -> float:
        """Return the images per second since the last call."""
        steps, seconds = self.step - self._logged[0], self.train_seconds - self._logged[1]
        self._logged = self.step, self.train_seconds
        return steps * self.t.effective_batch / seconds

    def _watched(self, batch: Batch) -> dict[str, float | str]:
        values: dict[str, float | str] = {}
        watch = self.t.observers.watch
        worst = watch.amplification(self.step)
        if worst is not None:
            values = {"worst_amplification": worst.amplification, "worst_pair": worst.pair}
        with self.accelerator.autocast():
            own = watch.activation(batch[0])
        if own is not None:
            name, value = max(gathered(self.accelerator, own), key=lambda block: block[1])
            values |= {"largest_activation": value, "largest_block": name}
        return values

    def _tick(self) -> None:
        now = time.perf_counter()
        self.train_seconds += now - self._mark
        self._mark = now

    def _write(self, **values: float | str) -> None:
        if self.metrics is not None:
            self.metrics.write(self.step, **values)

    def _terminate(self) -> NoReturn:
        if self.saved != self.step:
            self._save()
        told = (
            f"{self.termination.by}: stopped after step {self.step} of {self.t.total_steps}; the "
            f"checkpoint {newest_whole(self.config.output / CHECKPOINTS)} is written. Continue "
            "with resume (--resume)."
        )
        if self.accelerator.is_main_process:
            logger.warning(told)
        self.accelerator.wait_for_everyone()
        self.termination.end(told)

    def end_if_asked(self) -> None:
        """End the program if a signal came after the last step."""
        if self.termination.pending():
            told = (
                f"{self.termination.by}: the run was already finished; its result is in "
                f"{self.config.output}."
            )
            if self.accelerator.is_main_process:
                logger.warning(told)
            self.termination.end(told)

    def _save(self) -> None:
        self.losses.refuse_unless_sound(self.step)
        self.alike = self.alike and weights_alike(self.t, self.step)
        self._tick()
        state = {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "seconds": (self.train_seconds, self.t.observers.stopwatch.seconds),
            "loss": self.losses.state(),
            "bad_images": gathered(self.accelerator, self.r.images.bad_images),
            "data": self.data,
            **collect(self.t),
        }
        problem = None
        if self.accelerator.is_main_process:
            folder = self.config.output / CHECKPOINTS
            try:
                save_checkpoint(
                    folder,
                    self.step,
                    state,
                    self.config.checkpoint.keep,
                    metadata_of(facts_of_names(self.t.models.core)),
                )
            except QuietvitError as error:
                problem = str(error)
        raise_together(self.t, problem)
        self.saved = self.step
        self._mark = time.perf_counter()

    def _restore(self, state: dict[str, Any], before: dict[str, Any]) -> list[str]:
        """Load ``state`` and return how the settings differ from it. Every process must call.

        ``before`` is the configuration that the run began with.
        """
        differing = differences(self.t, state, before)
        check_same_data(self.t, state.get("data"), self.data, self.r.train.name)
        batches = restore(self.t, state)
        self.step, self.epoch = state["step"], state["epoch"]
        self.batch = round(state["batch"] * batches)
        self.train_seconds, decay_seconds = state["seconds"]
        self.t.observers.stopwatch.reset(decay_seconds)
        self.losses.restore(state["loss"], batches)
        for bad in dealt(self.t, state.get("bad_images", ())):  # earlier versions have none
            self.r.images.mark_bad(bad)
        self.saved = self.step
        return differing

    def figures(self, average: bool = True, progress: bool = False) -> dict[str, float]:
        """Return ``evaluation.scores``. A signal during the evaluation ends the run."""
        try:
            with enough_memory(self.config, Stage.EVALUATION):
                return scores(
                    self.t, self.r.test, self.termination, average=average, progress=progress
                )
        except StopRequestedError:
            self._terminate()

    def finish(self, progress: bool) -> TrainResult:
        """Write the weights, evaluate, write the result."""
        t, output, key = self.t, self.config.output, self.metric.key
        main = self.accelerator.is_main_process
        write_weights(self.t)
        try:
            found = self.figures(progress=progress and main)
            without = None if t.models.average is None else self.figures(average=False)
        except QuietvitError as error:
            told = f"{error} The trained weights are in {weights_of(self.config)}."
            raise QuietvitError(told) from error
        result = TrainResult(
            output=output,
            config=self.config,
            num_classes=self.r.train.num_classes,
            class_names=self.r.train.class_names,
            score=found[key],
            score_without_ema=None if without is None else without[key],
            figures=found,
            steps=self.step,
            train_seconds=self.train_seconds,
            decay_seconds=t.observers.stopwatch.seconds,
        )
        if main:
            self._write(**found, epoch=self.epoch)
            result.write()
        self.accelerator.wait_for_everyone()
        return result

    def close(self) -> None:
        self.termination.close()
        end_workers(self.r.loader)
        detach(self.t.optim.regularizers, self.t.observers.stopwatch)
        if self.metrics is not None:
            self.metrics.close()
