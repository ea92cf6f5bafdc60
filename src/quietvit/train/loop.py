"""The training loop of classifiers, on accelerate: steps, decay, averages, checkpoints, resume.

Order of data is in ``order``, the files of a checkpoint in ``checkpoint``, the run's set-up in
``setup``.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from safetensors.torch import save
from torch import Tensor, nn

from quietvit.data import evaluate, evaluation_loader, evaluation_transform
from quietvit.data.evaluate import worker_errors
from quietvit.errors import QuietvitError
from quietvit.files import refuse_nonempty, write_atomic
from quietvit.train.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from quietvit.train.config import TrainConfig
from quietvit.train.folder import CHECKPOINTS, fresh, same_run
from quietvit.train.metrics import Metrics
from quietvit.train.order import generator_states, set_generator_states
from quietvit.train.result import CONFIG, RESULT, WEIGHTS, TrainResult
from quietvit.train.setup import Run, build

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
            run is returned as it is).
        force: start anew in a folder that is in use; an earlier run's files there are replaced,
            once data, model and decay of the new one are known to be sound.
        progress: show a bar on standard error.

    Raises:
        QuietvitError: output folder in use, another configuration on resume, bad data or weights,
            a loss that is no number; the message says the remedy and the last checkpoint.
    """
    output = config.output.expanduser()
    config = config.model_copy(update={"output": output})
    if resume:
        same_run(config)
        if (output / RESULT).exists():
            logger.warning("%s is finished already; its result is returned.", output)
            return TrainResult.read(output)
    else:
        refuse_nonempty(output, force)
    with _threads(config.threads):
        run = build(config)
        if run.accelerator.is_main_process:
            if not resume:
                fresh(output)
            write_atomic(output / CONFIG, config.model_dump_json(indent=2) + "\n")
        state = load_checkpoint(output / CHECKPOINTS) if resume else None
        if resume and state is None:
            logger.warning("%s holds no checkpoint; the run starts from its beginning.", output)
        loop = _Loop(run, state)
        try:
            loop.run_epochs(progress)
            return loop.finish(progress)
        finally:
            loop.close()


class _Loop:
    """Where a run stands, and the steps from there."""

    def __init__(self, run: Run, state: dict[str, Any] | None) -> None:
        self.r, self.config = run, run.config
        self.step = self.batch = self.epoch = 0
        self.train_seconds = 0.0
        self.losses = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=run.accelerator.device)
        if state is not None:
            self._restore(state)
            logger.warning("resuming at step %d of %d.", self.step, run.total_steps)
        main = run.accelerator.is_main_process
        self.metrics = (
            Metrics(self.config.output, self.step, self.config.tensorboard) if main else None
        )

    def run_epochs(self, progress: bool) -> None:
        """Train from where the run stands to the end of the last epoch."""
        main = self.r.accelerator.is_main_process
        with worker_errors(), _bar(progress and main) as bar:
            task = bar.add_task("training", total=self.r.total_steps, completed=self.step, loss="")
            while self.epoch < self.config.epochs:
                self.r.batches.seek(self.epoch, self.batch)
                self.r.model.train()
                self._mark = time.perf_counter()
                for images, labels in self.r.loader:
                    if self._forward_backward(images, labels):
                        loss = self._after_step()
                        bar.update(task, completed=self.step)
                        if loss is not None:
                            bar.update(task, loss=f"loss {loss:.3f}")
                        self._mark = time.perf_counter()
                self.epoch, self.batch = self.epoch + 1, 0
                every = self.config.evaluate_every
                if every and self.epoch % every == 0 and self.epoch < self.config.epochs:
                    self._write(top1=self.top1(), epoch=self.epoch)
            self._finite("at the end")

    def _forward_backward(self, images: Tensor, labels: Tensor) -> bool:
        """One forward and backward pass; True where the optimizer stepped after it."""
        r = self.r
        targets: Tensor = labels
        if r.mix is not None:
            images, targets = r.mix(images, labels)
        with r.accelerator.accumulate(r.model):
            outputs = r.model(images)
            heads = outputs if isinstance(outputs, tuple) else (outputs,)
            loss = torch.stack([r.criterion(head, targets) for head in heads]).mean()
            r.accelerator.backward(loss)
            if r.accelerator.sync_gradients:
                if self.config.optimizer.clip_grad is not None:
                    r.accelerator.clip_grad_norm_(
                        r.model.parameters(), self.config.optimizer.clip_grad
                    )
                r.scheduler.step_update(self.step)
            r.optimizer.step()
            r.optimizer.zero_grad()
        self.loss_sum += loss.detach()
        self.losses += 1
        self.batch += r.accelerator.num_processes
        return bool(r.accelerator.sync_gradients)

    def _after_step(self) -> float | None:
        """Average, log and save. Returns the mean loss where it was logged."""
        r, config = self.r, self.config
        self.step += 1
        if r.ema is not None:
            r.ema.update(r.plain, self.step)
        logged = None
        if self.step % config.log_every == 0 or self.step == r.total_steps:
            logged = self._finite(f"at step {self.step}")
            self._tick()
            values = {"loss": logged, "lr": r.optimizer.param_groups[0]["lr"]}
            seen = self.step * r.effective_batch
            values |= {"images_per_second": seen / self.train_seconds}
            for name, decay in r.decays.items():
                if hasattr(decay, "penalty"):
                    with r.stopwatch.running():
                        penalty = decay.penalty()
                    values[f"penalty_{name}"] = float(penalty)
            self._write(**values, epoch=self.step / r.steps_per_epoch)
            self.loss_sum.zero_()
            self.losses = 0
        every = config.checkpoint.every
        if every and self.step % every == 0:
            self._finite(f"at step {self.step}")
            self._tick()
            self._save()
        self._tick()
        return logged

    def _tick(self) -> None:
        now = time.perf_counter()
        self.train_seconds += now - self._mark
        self._mark = now

    def _write(self, **values: float) -> None:
        if self.metrics is not None:
            self.metrics.write(self.step, **values)

    def _finite(self, when: str) -> float:
        mean = float(self.loss_sum) / max(1, self.losses)
        if math.isfinite(mean):
            return mean
        saved = list_checkpoints(self.config.output / CHECKPOINTS)
        last = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint"
        raise QuietvitError(
            f"the loss became {mean} {when} ({self.losses} batches since it was last a number); "
            f"{last}. Lower optimizer.lr (now {self.config.optimizer.lr:g}), set "
            "optimizer.clip_grad, or train with precision 'no'."
        )

    def _save(self) -> None:
        from accelerate.utils import gather_object

        r = self.r
        generators: list[Any] = gather_object([generator_states()])
        if not r.accelerator.is_main_process:
            return
        state = {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "processes": r.accelerator.num_processes,
            "model": r.plain.state_dict(),
            "ema": None if r.ema is None else r.ema.module.state_dict(),
            "optimizer": r.inner.state_dict(),
            "scaler": None if r.accelerator.scaler is None else r.accelerator.scaler.state_dict(),
            "decays": {name: decay.state_dict() for name, decay in r.decays.items()},
            "generators": generators,
            "seconds": (self.train_seconds, r.stopwatch.seconds),
            "loss": (float(self.loss_sum), self.losses),
        }
        folder = self.config.output / CHECKPOINTS
        save_checkpoint(folder, self.step, state, self.config.checkpoint.keep)

    def _restore(self, state: dict[str, Any]) -> None:
        r = self.r
        processes = r.accelerator.num_processes
        if state["processes"] != processes:
            raise QuietvitError(
                f"the checkpoint was written by {state['processes']} processes and this run has "
                f"{processes}; resume with the same number."
            )
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
        r.plain.load_state_dict(state["model"])
        if r.ema is not None:
            r.ema.module.load_state_dict(state["ema"])
        r.inner.load_state_dict(state["optimizer"])
        if r.accelerator.scaler is not None:
            r.accelerator.scaler.load_state_dict(state["scaler"])
        for name, decay in r.decays.items():
            decay.load_state_dict(state["decays"][name])
        self.train_seconds, decay_seconds = state["seconds"]
        r.stopwatch.reset(decay_seconds)
        self.loss_sum.fill_(state["loss"][0])
        self.losses = state["loss"][1]
        set_generator_states(state["generators"][r.accelerator.process_index])

    def top1(self, average: bool = True, progress: bool = False) -> float:
        """Top-1 in percent on the test images, of the moving average if there is one."""
        r = self.r
        model = r.evaluated
        source: nn.Module = r.ema.module if average and r.ema is not None else r.plain
        model.load_state_dict(source.state_dict())
        loader = evaluation_loader(
            r.test, evaluation_transform(model), 2 * self.config.batch_size, self.config.num_workers
        )
        return evaluate(model, loader, r.accelerator.device, progress)

    def finish(self, progress: bool) -> TrainResult:
        """Evaluate, write weights and result."""
        r, output = self.r, self.config.output
        progress = progress and r.accelerator.is_main_process
        result = TrainResult(
            output=output,
            config=self.config,
            num_classes=r.train.num_classes,
            top1=self.top1(progress=progress),
            top1_without_ema=None if r.ema is None else self.top1(average=False),
            steps=self.step,
            train_seconds=self.train_seconds,
            decay_seconds=r.stopwatch.seconds,
        )
        if r.accelerator.is_main_process:
            final = r.plain if r.ema is None else r.ema.module
            weights = {
                key: value.detach().to("cpu").clone(memory_format=torch.contiguous_format)
                for key, value in final.state_dict().items()
            }
            write_atomic(output / WEIGHTS, save(weights))
            self._write(top1=result.top1, epoch=self.epoch)
            result.write()
        r.accelerator.wait_for_everyone()
        return result

    def close(self) -> None:
        for decay in self.r.decays.values():
            decay.detach()
        if self.metrics is not None:
            self.metrics.close()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _bar(shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
        console=Console(stderr=True),
        disable=not shown,
    )
