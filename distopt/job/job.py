"""A training run: its components, and the loop over its steps."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from omegaconf import DictConfig
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from distopt.data.batch import Batch, LogitsLoss, next_token_loss
from distopt.data.order import Sequences, ValidationSequences
from distopt.data.packing import PackedSequences, PackedValidationSequences
from distopt.data.prefetch import Prefetch
from distopt.data.token_cache import Corpus
from distopt.engine import Engine
from distopt.engine.train_step import Loss, Update, update
from distopt.job.checkpointer import Checkpointer, all_finite
from distopt.job.config import max_grad_norm
from distopt.job.diagnostics import by_layer, nonfinite_gradient_report
from distopt.job.evaluate import validation_loss
from distopt.job.health import Health
from distopt.job.late import Late, garbage_collected_by_hand
from distopt.job.lr_range import run_lr_range_test
from distopt.job.metrics import Monitor
from distopt.job.noise import Noise
from distopt.job.run_lock import RunLock
from distopt.job.stop import Stopped, StopSignal
from distopt.job.summary import report
from distopt.job.tracking import Trackers
from distopt.job.watchdog import Watchdog
from distopt.optim.averaged import averaged, update_average
from distopt.optim.averaging import eval_mode, train_mode
from distopt.optim.base import ShardedOptimizer
from distopt.sam import SAM

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PretrainedConfig


@dataclass(kw_only=True)
class Job:
    """A training run that is ready to start, as `distopt.job.build.build` makes it.

    Attributes:
        cfg: The composed configuration.
        folder: The run's folder.
        accelerator: The process group and the device.
        trackers: The trackers, such as TensorBoard.
        engine: Runs the model on these processes.
        corpus: The tokens of both splits.
        sequences: The training batches, by step.
        validation: The validation batches.
        config: The configuration of the model.
        model: The model, wrapped by the engine.
        optimizer: The optimizer of its parameters.
        stepper: What takes the steps: the optimizer, or SAM around it.
        schedule: The learning rates.
        monitor: The progress bar and `metrics.jsonl`.
        checkpointer: The checkpoints.
        watchdog: Ends the process if another one does not come.
        lock: This job's claim to the folder, on the first process.
        identity: What must not change when the run is resumed, for the checkpoint's manifest.
        files: Small files that a checkpoint keeps for `distopt.export`.
        micro_batch: The number of sequences in one forward pass of a process.
        notes: Lines for the user, shown before the first step.
        step: The number of steps done.
        passed_over: The number of batches that rollbacks have passed over: step s trains on batch s + passed_over.
        checkpoint: The folder of the last checkpoint, saved or resumed from.
        loss: What is minimized in place of the cross-entropy; None for that.
        health: What watches the run's health; None for nothing.
        noise: What measures the gradient noise scale; None for nothing.
    """

    cfg: DictConfig
    folder: Path
    accelerator: Accelerator
    trackers: Trackers
    engine: Engine
    corpus: Corpus
    sequences: Sequences | PackedSequences
    validation: ValidationSequences | PackedValidationSequences
    config: PretrainedConfig
    model: nn.Module
    optimizer: ShardedOptimizer
    stepper: ShardedOptimizer | SAM
    schedule: LambdaLR
    monitor: Monitor
    checkpointer: Checkpointer
    watchdog: Watchdog
    lock: RunLock | None
    identity: dict[str, Any]
    files: dict[str, bytes]
    micro_batch: int
    notes: list[str]
    step: int
    passed_over: int
    checkpoint: Path | None
    loss: LogitsLoss | None = None
    health: Health | None = None
    noise: Noise | None = None
    _late: Late | None = field(default=None, init=False)  # the loss of the last step, and whether to stop
    _asked_to_stop: bool = field(default=False, init=False)
    _evaluated: tuple[int, float] = field(default=(-1, math.nan), init=False)  # the step and its validation loss

    def run(self) -> float:
        """Trains from `step` to the last step and returns the final validation loss in nats per token.

        Raises:
            Stopped: After a checkpoint was saved, if a process was asked to stop by a signal.
            ValueError: After `train.max_skipped_steps` steps in a row without a finite gradient.
        """
        steps, every = self.cfg.train.steps, (self.cfg.evaluation.every, self.cfg.checkpoint.every)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.watchdog.guard())
            stack.enter_context(contextlib.closing(self.monitor))  # an error would be printed at the end of the bar
            for line in self.notes:
                self.monitor.say(line)
            after = self.evaluate()
            if self.cfg.train.lr_range_test is not None:
                run_lr_range_test(self, self.cfg.train.lr_range_test, max_grad_norm(self.cfg))
            self.monitor.begin("taking the next one")
            stop, batches = StopSignal(), stack.enter_context(contextlib.closing(self._batches()))
            collect_garbage = stack.enter_context(garbage_collected_by_hand())
            stack.callback(self._settle)  # the row of the last step, if the next one raises
            while self.step < steps:
                began = self.step
                done = self.train_step(batches, stop)
                collect_garbage(self.step)
                forward = self.step > began  # or the run was rolled back
                evaluates, saves = (forward and (self.step % n == 0 or self.step == steps) for n in every)
                if evaluates or saves or self._asked_to_stop:
                    self._settle()
                stopping = self._asked_to_stop and self.step < steps
                if evaluates and not stopping:
                    self._write_layers(done)
                    after = self.evaluate()
                if saves or stopping:
                    self.save()
                if stopping:
                    self._stop()
            self.checkpointer.wait()
            stop.restore()  # not before: a signal would end the process while the last checkpoint is written
        if not math.isfinite(after):
            raise ValueError(f"the run has diverged: its validation loss is {after}; {self._way_back()}")
        report(self, after)
        self._leave()
        return after

    def train_step(self, batches: Prefetch[Any], stop: StopSignal) -> Update:
        """Takes one step; returns what it did.

        Its loss, and whether a process was asked to stop, are read in the next step or by `_settle`, so that the host
        waits for the device once in a step: for the norm of the gradient, which decides whether the step is applied.
        """
        device = self.accelerator.device
        self.watchdog.enter(self.step)
        self.monitor.start_step()
        batch = batches.get(self.step + self.passed_over).to(device, non_blocking=True)
        self.monitor.got_batch()
        if isinstance(self.stepper, SAM):
            self.stepper.step_number = self.step
        parts, max_norm = batch.split(self.micro_batch), max_grad_norm(self.cfg)
        noise = self.noise is not None
        done = update(self.engine, self.model, self.stepper, parts, max_norm, self.minimized, noise=noise)
        lr = self.optimizer.param_groups[0]["lr"]  # every group follows the same curve from its own peak
        if done.applied:
            update_average(self.optimizer)
        to = self.health.rolled_back() if self.health else None
        if to is None:
            self.schedule.step()
            self.step += 1
        self._settle()
        mine = [done.loss, stop.request(done.loss), *([] if done.small_square is None else [done.small_square])]
        self._late = Late(self.accelerator.reduce(torch.stack([number.to(done.loss) for number in mine]), "mean"))
        if self.noise:
            self.noise.measured(done.grad_norm if done.applied else math.nan, self.step)
        self.watchdog.leave()
        norm, finite = done.grad_norm, math.isfinite(done.grad_norm)
        self.monitor.end_step(lr=lr, grad_norm=norm, applied=done.applied, finite=finite)
        if to is not None:
            self._settle()
            self.passed_over += self.step + 1 - to
            self.step = to
            self.trackers.go_back(to, self.monitor.done)
            self.monitor.go_back(to)
            self.monitor.say(f"health: rolled back to step {to}; {self.passed_over} batches are passed over")
        if self.monitor.skipped_in_a_row >= self.cfg.train.max_skipped_steps:
            self._settle()
            self.checkpointer.wait()
            times = self.monitor.skipped_in_a_row
            raise ValueError(nonfinite_gradient_report(self.engine.unwrap(self.model), self.stepper, self.step, times))
        return done

    @property
    def minimized(self) -> Loss:
        """The mean loss of a micro-batch that is minimized; the validation loss is always the cross-entropy."""
        return next_token_loss if self.loss is None else functools.partial(next_token_loss, of_logits=self.loss)

    def _batches(self) -> Prefetch[Any]:
        """Returns this process's training batches, by the number of a step."""
        rank, world, device = self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device
        return Prefetch(lambda step: self.sequences.batch(step, rank, world), pin=device.type == "cuda")

    def _settle(self) -> None:
        """Reads what the last step has left on the device, unless it was read: its row of the metrics is then there."""
        if self._late is None:
            return
        (loss, asked, *small), self._late = self._late.read(), None
        self._asked_to_stop = self._asked_to_stop or asked > 0
        self.monitor.end_loss(loss, self.noise.row(*small) if self.noise else None)

    def evaluate(self) -> float:
        """Returns the mean validation loss over all processes in nats per token, and logs it."""
        rank, world, device = self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device
        tell = self.monitor.begin("evaluating")
        batches: Iterable[torch.Tensor | Batch] = self.validation.batches(rank, world)
        with self.evaluated():
            own = validation_loss(self.engine, self.model, self.watchdog.watched(batches), device)
        loss: float = self.accelerator.reduce(own, "mean").item()
        bits = self.bits_per_byte(loss)
        self.monitor.write({"validation_loss": loss, "bits_per_byte": bits})
        tell(f"validation loss {loss:.4f}, {bits:.4f} bits per byte")
        self._evaluated = (self.step, loss)
        return loss

    def evaluated(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which the model has the weights to evaluate: their average, if `evaluation.average`."""
        if self.cfg.evaluation.get("average") is False:
            train_mode(self.stepper)  # a schedule-free optimizer's, since the last checkpoint
            return contextlib.nullcontext()
        return averaged(self.optimizer, self.engine.unwrap(self.model))

    def save(self) -> None:
        """Saves a checkpoint of the current step, or starts to in the background, if a run can be resumed from it.

        One without finite weights would be the newest, and the good ones before it would be pruned for it.
        """
        model, (evaluated, loss) = self.engine.unwrap(self.model), self._evaluated
        if self.monitor.skipped_in_a_row or not math.isfinite(loss) or not all_finite(model):
            self.monitor.say(f"step {self.step}: no checkpoint, since the run has diverged; {self._way_back()}")
            return
        # Schedule-free: a checkpoint has the average as its weights, and a resumed run takes the same way back.
        eval_mode(self.stepper)
        # Between two evaluations, after a signal, there is no validation loss of this step.
        extra = {
            "step": self.step,
            "tokens": self.monitor.tokens(self.step),
            **self.identity,
            **({"validation_loss": loss} if evaluated == self.step else {}),
        }
        if self.health:
            extra |= {"passed_over": self.passed_over, "health": self.health.monitor.state_dict()}
        if self.noise:
            extra |= {"noise_scale": self.noise.scale.state_dict()}
        tell = self.monitor.begin("saving a checkpoint")
        self.checkpoint = self.checkpointer.save(self.step, model, self.stepper, self.schedule, extra, self.files)
        tell(f"checkpoint {self.checkpoint.name}")

    def _write_layers(self, done: Update) -> None:
        """Writes each parameter's gradient norm before clipping and its trust ratio, or what the health watches."""
        if self.health:
            self.health.write()
            return
        self.monitor.write_layers(by_layer(self.engine.unwrap(self.model), self.stepper, done.grad_norms()))

    def bits_per_byte(self, loss: float) -> float:
        """Converts a loss in nats per token."""
        return loss / math.log(2) / self.corpus.bytes_per_token

    def _way_back(self) -> str:
        if self.checkpoint is None:
            return "it has no checkpoint to resume from: start it with a lower optimizer.lr"
        return f"train.resume=auto resumes from {self.checkpoint}, with a lower optimizer.lr for example"

    def _leave(self) -> None:
        if self.lock:
            self.lock.release()
        self.accelerator.wait_for_everyone()  # gloo may abort a process that still talks to one which has ended
        self.accelerator.end_training()

    def _stop(self) -> NoReturn:
        self.checkpointer.wait()
        self._leave()
        raise Stopped(
            f"by a signal, after step {self.step} of {self.cfg.train.steps}; train.resume=auto resumes from "
            f"{self.checkpoint or 'the start: there is no checkpoint yet'}"
        )
