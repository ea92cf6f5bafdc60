"""The training loop of classifiers, on accelerate: steps, decay, averages, checkpoints, resume.

Order of data is in ``order``, the files of a checkpoint in ``checkpoint``, the run's set-up in
``setup``.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from quietvit.data.evaluate import worker_errors
from quietvit.decay.plan import widest
from quietvit.errors import QuietvitError
from quietvit.files import sweep, write_atomic
from quietvit.train.checkpoint import (
    load_checkpoint,
    newest_whole,
    save_checkpoint,
    set_aside_after,
)
from quietvit.train.config import TrainConfig
from quietvit.train.engine import gathered, whole_model
from quietvit.train.evaluation import top1
from quietvit.train.folder import CHECKPOINTS, fresh, own_files, refuse_used, same_run
from quietvit.train.metrics import Metrics
from quietvit.train.progress import bar_of, threads
from quietvit.train.regularizers import detach, figures
from quietvit.train.result import CONFIG, RESULT, WEIGHTS, TrainResult
from quietvit.train.resume import check_same_checkpoint, collect, raise_together, restore
from quietvit.train.setup import Run, build
from quietvit.train.step import forward_backward
from quietvit.train.stopping import EXIT_CODE, Termination, end_workers

logger = logging.getLogger("quietvit")


def train(
    config: TrainConfig, *, resume: bool = False, force: bool = False, progress: bool = True
) -> TrainResult:
    """Train as ``config`` says and write everything below ``config.output``.

    There come ``config.json``, ``metrics.jsonl``, ``tensorboard/``, ``checkpoints/``, and at the
    end ``model.safetensors`` and ``result.json``. On the CPU, in one process with the same number
    of threads, a run interrupted anywhere and resumed ends with the same weights bit for bit.

    Args:
        resume: go on from the last whole checkpoint (from the start if there is none; a finished
            run is returned as it is). With a checkpoint the weights that the run began with are not
            read again, and a warning tells of another number of threads or torch version.
        force: start anew in a folder that is in use; an earlier run's files there are replaced,
            once data, model and decay of the new one are known to be sound. With ``resume`` only
            where the folder holds no ``config.json``.
        progress: show a bar on standard error.

    Raises:
        QuietvitError: output folder in use, another configuration on resume, bad data or weights,
            a loss that is no number; the message says the remedy and the last checkpoint.
    """
    output = config.output.expanduser()
    config = config.model_copy(update={"output": output})
    begun = resume and same_run(config, force)
    if not resume:
        refuse_used(output, force)
    if begun and (output / RESULT).exists():
        logger.warning("%s is finished already; its result is returned.", output)
        return TrainResult.read(output)
    with threads(config.threads):
        state = load_checkpoint(output / CHECKPOINTS) if begun else None
        run = build(config, resumed=state is not None)
        accelerator = run.parts.accelerator
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if not begun:
                fresh(output)
            sweep(*own_files(output))
            write_atomic(output / CONFIG, config.model_dump_json(indent=2) + "\n")
        accelerator.wait_for_everyone()
        check_same_checkpoint(run.parts, None if state is None else state["step"])
        if state is not None:
            _set_aside(run, state["step"])
        elif resume:
            logger.warning("%s holds no checkpoint; the run starts from its beginning.", output)
        loop = _Loop(run, state)
        try:
            loop.run_epochs(progress)
            return loop.finish(progress)
        finally:
            loop.close()


def _set_aside(run: Run, step: int) -> None:
    """Set damaged checkpoints after ``step`` aside, by the main process; a failure stops all."""
    problem, p = None, run.parts
    if p.accelerator.is_main_process:
        try:
            set_aside_after(p.config.output / CHECKPOINTS, step, p.config.checkpoint.keep)
        except (OSError, QuietvitError) as error:
            problem = str(error)
    raise_together(p, problem)


class _Loop:
    """Where a run stands, and the steps from there."""

    def __init__(self, run: Run, state: dict[str, Any] | None) -> None:
        self.r, self.p, self.config = run, run.parts, run.parts.config
        self.accelerator = run.parts.accelerator
        self.step = self.batch = self.epoch = 0
        self.saved = -1
        self.train_seconds = 0.0
        self.losses, device = 0, self.accelerator.device
        self.loss_sum = torch.zeros((), dtype=widest(device), device=device)
        # The first step whose loss was no number, kept on the device: looking would wait for it.
        self.bad_step = torch.zeros((), dtype=torch.int64, device=device)
        if state is not None:
            self._restore(state)
            logger.warning("resuming at step %d of %d.", self.step, self.p.total_steps)
        main = self.accelerator.is_main_process
        self.metrics = (
            Metrics(self.config.output, self.step, self.config.tensorboard) if main else None
        )
        self.termination = Termination(self.accelerator)

    def run_epochs(self, progress: bool) -> None:
        """Train from where the run stands to the end of the last epoch."""
        main = self.accelerator.is_main_process
        with worker_errors(), bar_of(progress and main) as bar:
            task = bar.add_task("training", total=self.p.total_steps, completed=self.step, loss="")
            while self.epoch < self.config.epochs:
                self.r.batches.seek(self.epoch, self.batch)
                self.p.model.train()
                self._mark = time.perf_counter()
                # A checkpoint may lie at the end of an epoch, and some loaders refuse to be empty.
                for images, labels in self.r.loader if len(self.r.batches) else ():
                    if self._batch(images, labels):
                        loss = self._after_step(images)
                        bar.update(task, completed=self.step)
                        if loss is not None:
                            bar.update(task, loss=f"loss {loss:.3f}")
                        self._mark = time.perf_counter()
                self.epoch, self.batch = self.epoch + 1, 0
                every = self.config.evaluate_every
                if every and self.epoch % every == 0 and self.epoch < self.config.epochs:
                    self._sound()
                    self._write(top1=self.top1(), epoch=self.epoch)
            self._sound()

    def _batch(self, images: Tensor, labels: Tensor) -> bool:
        """One forward and backward pass; True where the optimizer stepped after it."""
        try:
            loss = forward_backward(self.p, images, labels, self.step)
        except QuietvitError as error:
            told = f"at step {self.step + 1}: {error}{self._last_finite()} {self._last_saved()}"
            raise QuietvitError(told) from error
        self.loss_sum += loss
        first = (self.bad_step == 0) & ~loss.isfinite()
        self.bad_step.masked_fill_(first, self.step + 1)
        self.losses += 1
        self.batch += self.accelerator.num_processes
        return bool(self.accelerator.sync_gradients)

    def _after_step(self, images: Tensor) -> float | None:
        """Average, log and save. Returns the mean loss where it was logged."""
        p, config = self.p, self.config
        self.step += 1
        if p.ema is not None:
            p.ema.update(p.plain, self.step)
        logged = None
        if self.step % config.log_every == 0 or self.step == p.total_steps:
            logged = self._finite()
            self._tick()
            self._log(logged, images)
            self.loss_sum.zero_()
            self.losses = 0
        every = config.checkpoint.every
        if every and self.step % every == 0:
            self._save()
        self._tick()
        if self.termination.due() and self.step < p.total_steps:
            self._terminate()
        return logged

    def _log(self, loss: float, images: Tensor) -> None:
        p, every = self.p, self.config.decay.watch_every
        rate = max(group["lr"] for group in p.optimizer.param_groups)
        seen = self.step * p.effective_batch / self.train_seconds
        values: dict[str, float | str] = {"loss": loss, "lr": rate, "images_per_second": seen}
        with p.stopwatch.running():
            values |= figures(p.regularizers)
            if every and (self.step // self.config.log_every) % every == 0:
                values |= self._watched(images)
        self._write(**values, epoch=self.step / p.steps_per_epoch)

    def _watched(self, images: Tensor) -> dict[str, float | str]:
        values: dict[str, float | str] = {}
        watch = self.p.watch
        seen = watch.amplification(self.step)
        if seen is not None:
            values = {"worst_amplification": seen.amplification, "worst_pair": seen.pair}
        with self.accelerator.autocast():
            own = watch.activation(images)
        if own is not None:
            name, value = max(gathered(self.accelerator, own), key=lambda found: found[1])
            values |= {"largest_activation": value, "largest_block": name}
        return values

    def _tick(self) -> None:
        now = time.perf_counter()
        self.train_seconds += now - self._mark
        self._mark = now

    def _write(self, **values: float | str) -> None:
        if self.metrics is not None:
            self.metrics.write(self.step, **values)

    def _finite(self) -> float:
        """Return the mean loss over all processes since it was last logged."""
        total = self.accelerator.reduce(self.loss_sum, reduction="mean")
        mean = float(total) / max(1, self.losses)
        if not math.isfinite(mean):
            bad = [step for step in gathered(self.accelerator, int(self.bad_step)) if step]
            step = min(bad, default=self.step)
            seen = f" (seen at step {self.step})" if self.step > step else ""
            raise self._diverged(f"the loss became {mean} at step {step}{seen}")
        return mean

    def _sound(self) -> None:
        """Refuse to go on with a loss or with weights that are no numbers."""
        self._finite()
        self._finite_weights()

    def _finite_weights(self) -> None:
        own = [getattr(p, "to_local", lambda p=p: p)() for p in self.p.plain.parameters()]
        bad = sum((~part.isfinite()).sum() for part in own)
        if int(self.accelerator.reduce(torch.as_tensor(bad), reduction="sum")):
            raise self._diverged(f"weights became NaN or infinite at step {self.step}")

    def _diverged(self, what: str) -> QuietvitError:
        """Every process must call."""
        before = self._last_finite()
        seen = self.p.watch.amplification(self.step)
        pair = "" if seen is None else f" The largest amplification is {seen}."
        return QuietvitError(
            f"{what}.{pair}{before} {self._last_saved()} Lower optimizer.lr (now "
            f"{self.config.optimizer.lr:g}, here at most "
            f"{self.config.rates(self.p.effective_batch).lr:g}), set optimizer.clip_grad, or train "
            "with precision 'no'."
        )

    def _last_finite(self) -> str:
        last = self.p.watch.last
        if last is None:
            return ""
        return f" The largest amplification was last finite at step {last.step}: {last}."

    def _last_saved(self) -> str:
        path = newest_whole(self.config.output / CHECKPOINTS)
        return "There is no checkpoint." if path is None else f"The last checkpoint is {path}."

    def _terminate(self) -> None:
        if self.saved != self.step:
            self._save()
        if self.accelerator.is_main_process:
            logger.warning(
                "SIGTERM: stopped after step %d of %d; the checkpoint %s is written. Go on with "
                "resume (--resume).",
                self.step,
                self.p.total_steps,
                newest_whole(self.config.output / CHECKPOINTS),
            )
        self.accelerator.wait_for_everyone()
        raise SystemExit(EXIT_CODE)

    def _save(self) -> None:
        self._sound()
        self._tick()
        state = {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "seconds": (self.train_seconds, self.p.stopwatch.seconds),
            "loss": (gathered(self.accelerator, float(self.loss_sum)), self.losses),
            "bad_images": gathered(self.accelerator, self.r.images.bad_images),
            **collect(self.p),
        }
        problem = None
        if self.accelerator.is_main_process:
            folder = self.config.output / CHECKPOINTS
            try:
                save_checkpoint(folder, self.step, state, self.config.checkpoint.keep)
            except QuietvitError as error:
                problem = str(error)
        raise_together(self.p, problem)
        self.saved = self.step

    def _restore(self, state: dict[str, Any]) -> None:
        restore(self.p, state)
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
        self.train_seconds, decay_seconds = state["seconds"]
        self.p.stopwatch.reset(decay_seconds)
        sums, self.losses = state["loss"]
        self.loss_sum.fill_(sums[self.accelerator.process_index])
        if "bad_images" in state:  # checkpoints of earlier versions have none
            self.r.images.mark_bad(state["bad_images"][self.accelerator.process_index])
        self.saved = self.step

    def top1(self, average: bool = True, progress: bool = False) -> float:
        """Top-1 in percent on the test images, of the moving average if there is one."""
        return top1(self.p, self.r.test, average=average, progress=progress)

    def finish(self, progress: bool) -> TrainResult:
        """Evaluate, write weights and result."""
        p, output = self.p, self.config.output
        progress = progress and self.accelerator.is_main_process
        result = TrainResult(
            output=output,
            config=self.config,
            num_classes=self.r.train.num_classes,
            top1=self.top1(progress=progress),
            top1_without_ema=None if p.ema is None else self.top1(average=False),
            steps=self.step,
            train_seconds=self.train_seconds,
            decay_seconds=p.stopwatch.seconds,
        )
        state = whole_model(self.accelerator, p.plain) if p.ema is None else None
        if self.accelerator.is_main_process:
            final = p.ema.module.state_dict() if state is None else state
            weights = {
                key: value.detach().to("cpu").clone(memory_format=torch.contiguous_format)
                for key, value in final.items()
            }
            write_atomic(output / WEIGHTS, save(weights))
            self._write(top1=result.top1, epoch=self.epoch)
            result.write()
        self.accelerator.wait_for_everyone()
        return result

    def close(self) -> None:
        self.termination.close()
        end_workers(self.r.loader)
        detach(self.p.regularizers, self.p.stopwatch)
        if self.metrics is not None:
            self.metrics.close()
