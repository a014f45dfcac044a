"""A training run: its components, and the loop over its steps."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from distopt.data.accuracy import TokenAccuracy
from distopt.data.batch import LogitsLoss, counted
from distopt.data.order import Sequences, ValidationSequences
from distopt.data.packing import PackedSequences, PackedValidationSequences
from distopt.data.prefetch import Prefetch
from distopt.data.token_cache import Corpus
from distopt.engine import Engine
from distopt.engine.train_step import Update, update
from distopt.job.callbacks import Callbacks
from distopt.job.checkpointer import Checkpointer
from distopt.job.config import max_grad_norm
from distopt.job.diagnostics import nonfinite_gradient_report, write_layers
from distopt.job.evaluate import Evaluation
from distopt.job.generate import Generation
from distopt.job.health import Health
from distopt.job.late import Late, garbage_collected_by_hand
from distopt.job.loss import minimized
from distopt.job.lr_range import run_lr_range_test
from distopt.job.metrics import Monitor
from distopt.job.noise import Noise
from distopt.job.run_lock import RunLock
from distopt.job.saving import save, way_back, written
from distopt.job.stop import StopSignal, leave, stop
from distopt.job.summary import report
from distopt.job.tracking import Trackers
from distopt.job.watchdog import Watchdog
from distopt.optim.averaged import update_average
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
        callbacks: What is called after steps, evaluations and checkpoints.
        generation: Lets the model write at evaluations; None for nothing.
        evaluation: Measures its loss on the validation batches.
        accuracy: That of the tokens of the last step.
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
    generation: Generation | None = None
    callbacks: Callbacks = field(default_factory=lambda: Callbacks({}))
    evaluation: Evaluation = field(init=False)
    accuracy: TokenAccuracy = field(default_factory=TokenAccuracy, init=False)
    _late: Late | None = field(default=None, init=False)  # the loss of the last step, and whether to stop
    _asked_to_stop: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.evaluation = Evaluation(self)
        self.checkpointer.written = functools.partial(written, self)

    def run(self) -> float:
        """Trains from `step` to the last step and returns the final validation loss in nats per token.

        Raises:
            Stopped: After a checkpoint was saved, if a process was asked to stop by a signal.
            ValueError: After `train.max_skipped_steps` steps in a row without a finite gradient.
        """
        every = self.cfg.evaluation.every
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.watchdog.guard())
            stack.enter_context(contextlib.closing(self.monitor))  # an error would be printed at the end of the bar
            for line in self.notes:
                self.monitor.say(line)
            after = self.evaluation.measure()
            if self.cfg.train.lr_range_test is not None:
                run_lr_range_test(self, self.cfg.train.lr_range_test, max_grad_norm(self.cfg))
            self.monitor.begin("taking the next one")
            signals, batches = StopSignal(), stack.enter_context(contextlib.closing(self._batches()))
            collect_garbage = stack.enter_context(garbage_collected_by_hand())
            stack.callback(self._settle)  # the row of the last step, if the next one raises
            while not self.ends:
                began = self.step
                done = self.train_step(batches, signals)
                collect_garbage(self.step)
                forward = self.step > began  # or the run was rolled back
                evaluates = forward and (self.step % every == 0 or self.ends)
                if evaluates or (forward and self._saves) or self._asked_to_stop:
                    self._settle()
                stopping = self._asked_to_stop and not self.ends
                if evaluates and not stopping:
                    write_layers(self, done)
                    after = self.evaluation.measure()
                if (forward and self._saves) or stopping:
                    save(self)
                if stopping:
                    stop(self)
            self.checkpointer.wait()
            if self.evaluation.step != self.step:  # a callback has ended the run after a checkpoint
                after = self.evaluation.measure()
            signals.restore()  # not before: a signal would end the process while the last checkpoint is written
        if not math.isfinite(after):
            raise ValueError(f"the run has diverged: its validation loss is {after}; {way_back(self)}")
        report(self, after)
        leave(self)
        return after

    def train_step(self, batches: Prefetch[Any], signals: StopSignal) -> Update:
        """Takes one step; returns what it did.

        Its loss, and whether a process was asked to stop, are read in the next step or by `_settle`, so that the host
        waits for the device once in a step: for the norm of the gradient, which decides whether the step is applied.
        """
        device = self.accelerator.device
        self.watchdog.enter(self.step)
        self.monitor.start_step()
        batch = batches.get(self.step + self.passed_over).to(device, non_blocking=True)
        self.monitor.got_batch(counted(batch, self.accelerator.num_processes))
        if isinstance(self.stepper, SAM):
            self.stepper.step_number = self.step
        parts, max_norm = batch.split(self.micro_batch), max_grad_norm(self.cfg)
        self.accuracy.start(len(parts))
        loss, noise = minimized(self.loss, self.accuracy), self.noise is not None
        done = update(self.engine, self.model, self.stepper, parts, max_norm, loss, noise=noise)
        lr = self.optimizer.param_groups[0]["lr"]  # every group follows the same curve from its own peak
        if done.applied:
            update_average(self.optimizer)
        to = self.health.rolled_back() if self.health else None
        if to is None:
            self.schedule.step()
            self.step += 1
        self._settle()
        mine = [done.loss, signals.request(done.loss), self.accuracy.value(done.loss)]
        mine += [] if done.small_square is None else [done.small_square]
        self._late = Late(self.accelerator.reduce(torch.stack([number.to(done.loss) for number in mine]), "mean"))
        if self.noise:
            self.noise.measured(done.grad_norm if done.applied else math.nan, self.step)
        self.watchdog.leave()
        norm, finite = done.grad_norm, math.isfinite(done.grad_norm)
        self.monitor.end_step(lr=lr, grad_norm=norm, applied=done.applied, finite=finite)
        if to is None and self.callbacks.wants("after_step"):
            self._settle(lambda row: self.callbacks.call("after_step", self, row))
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

    def _batches(self) -> Prefetch[Any]:
        """Returns this process's training batches, by the number of a step."""
        rank, world, device = self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device
        return Prefetch(lambda step: self.sequences.batch(step, rank, world), pin=device.type == "cuda")

    def _settle(self, also: Callable[[Mapping[str, float]], Mapping[str, float]] = lambda row: {}) -> None:
        """Reads what the last step has left on the device, unless it was read: its row of the metrics is then there."""
        if self._late is None:
            return
        (loss, asked, accuracy, *small), self._late = self._late.read(), None
        self._asked_to_stop = self._asked_to_stop or asked > 0
        more = {} if math.isnan(accuracy) else {"token_accuracy": accuracy}
        self.monitor.end_loss(loss, more | (self.noise.row(*small) if self.noise else {}), also)

    @property
    def ends(self) -> bool:
        """Whether the last step was taken, or a callback has ended the run."""
        return bool(self.step >= self.cfg.train.steps or self.callbacks.stopped)

    @property
    def _saves(self) -> bool:
        return self.step % self.cfg.checkpoint.every == 0 or self.ends
