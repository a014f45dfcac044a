"""The metrics of a run: progress, metrics.jsonl and trackers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distopt.data.accuracy import Counts
from distopt.job.progress import Progress, shown
from distopt.job.records import ALARMS, LAYERS, METRICS, SAMPLES, append, forget_after, read_lines
from distopt.job.terminal import Terminal
from distopt.job.totals import Totals


class Monitor:
    """Records one line of metrics per step; only the main process writes and shows.

    Args:
        folder: The run's folder; its `metrics.jsonl` gets one JSON object per line.
        first_step: The number of steps done before (a resumed run).
        steps: The number of steps in all.
        totals: The tokens of all steps before, over all processes.
        main: Whether this process writes.
        track: Called with (metrics, step), for Accelerate's trackers.
        terminal: Shows the progress; None for standard output.
        device: Called with the tokens per second of a step; returns what is known of the device (`distopt.job.device`).

    Attributes:
        done: The number of steps done.
        skipped: The number of steps without a finite gradient, over all runs from step 0.
        skipped_in_a_row: The number of such steps since the last applied one.
        seconds: The time of this run's steps, without evaluation and checkpoints.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        steps: int,
        totals: Totals,
        main: bool,
        track: Callable[[Mapping[str, float], int], None],
        terminal: Terminal | None = None,
        device: Callable[[float], Mapping[str, float]] = lambda speed: {},
    ) -> None:
        self.terminal, self._device = terminal or Terminal(main), device
        self.main, self.track, self.totals = main, track, totals
        self.done, self.first_step = first_step, first_step
        self.skipped, self.skipped_in_a_row = 0, 0
        self.seconds = 0.0
        if not main:
            return
        names = (LAYERS, ALARMS, SAMPLES, METRICS)
        self.layers, self.alarms, self.samples, self.metrics = (folder / name for name in names)
        forget_after(self.samples, first_step - 1)  # those of the checkpoint are written again
        forget_after(self.layers, first_step)
        forget_after(self.alarms, first_step)
        kept = forget_after(self.metrics, first_step)
        self.skipped = next((row["skipped"] for row in reversed(kept) if "skipped" in row), 0)
        self.file = self.metrics.open("a")
        self.progress = Progress(self.terminal, first_step, steps)

    def start_step(self) -> None:
        """Starts the clock of a step."""
        self._started, self._waited = time.perf_counter(), 0.0

    def got_batch(self, counts: Counts) -> None:
        """Marks the moment of a step at which its batch is there, and takes its tokens over all processes."""
        self._waited = time.perf_counter() - self._started
        self.totals.add(counts)

    def end_step(
        self, *, lr: float, grad_norm: float, applied: bool, finite: bool = False, loss: float | None = None
    ) -> None:
        """Records a step.

        Args:
            lr: The learning rate of the first param group; every group follows the same curve from its own peak.
            grad_norm: The global gradient norm before clipping.
            applied: False if the step was skipped: the gradient was not finite, or the run's health asked for it.
            finite: Whether the gradient of a step that was not applied was finite.
            loss: The mean loss of the step in nats per token; None if `end_loss` gives it, before the next step ends.
        """
        seconds = time.perf_counter() - self._started
        self.seconds += seconds
        self.done += 1
        self.skipped += not applied
        self.skipped_in_a_row = 0 if applied or finite else self.skipped_in_a_row + 1
        self._step_seconds, self._step_tokens = seconds, self.totals.last.tokens
        speed = self.totals.last.tokens / seconds
        self._row = (
            self.done,
            {
                "lr": lr,
                "grad_norm": grad_norm,
                **self.totals.row(),
                "tokens_per_second": round(speed, 1),
                "data_seconds": round(self._waited, 6),
                "skipped": self.skipped,
                **(self._device(speed) if self.main else {}),
            },
        )
        if loss is not None:
            self.end_loss(loss)

    def end_loss(
        self,
        loss: float,
        more: Mapping[str, float] | None = None,
        also: Callable[[Mapping[str, float]], Mapping[str, float]] = lambda row: {},
    ) -> None:
        """Writes the row of the last step.

        Args:
            loss: Its loss.
            more: More numbers by name.
            also: Called with the row, on every process; returns what is written beside it.
        """
        step, row = self._row
        row |= more or {}
        added = also({"loss": loss, **row})
        if self.main:
            self._write(step, {"loss": loss, **row, **added})
            self.progress.update(step, self._step_seconds, self._step_tokens, shown({"loss": loss, **row}))

    def write(self, metrics: Mapping[str, float]) -> None:
        """Writes a line of metrics.jsonl for the current step, and passes the metrics to the trackers."""
        if self.main:
            self._write(self.done, metrics)

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        self.track(metrics, step)

    def write_layers(self, values: Mapping[str, Mapping[str, float]], step: int | None = None) -> None:
        """Writes a line of layers.jsonl: for each quantity its values by parameter name, of a step or the last one."""
        if self.main and values:
            append(self.layers, {"step": self.done if step is None else step, **values})

    def write_samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes lines of samples.jsonl: what the model has written at the current step."""
        if self.main:
            for row in rows:
                append(self.samples, {"step": self.done, **row})

    def write_alarm(self, alarm: Mapping[str, Any]) -> None:
        """Writes a line of alarms.jsonl, and counts it for the trackers."""
        if self.main:
            append(self.alarms, alarm)
            self.track({"health/alarm": 1.0}, alarm["step"])

    def go_back(self, step: int) -> None:
        """Forgets the rows after a step, which a run that was rolled back to it writes again; but not its alarms."""
        self.done = step
        self.totals.go_back(step)
        if self.main:
            self.file.close()
            forget_after(self.layers, step)
            forget_after(self.samples, step)
            forget_after(self.metrics, step)
            self.file = self.metrics.open("a")
            self.progress.go_back(step)
            for alarm in read_lines(self.alarms):
                if alarm["step"] > step:  # which the trackers have forgotten, too
                    self.track({"health/alarm": 1.0}, alarm["step"])

    def begin(self, doing: str) -> Callable[[str], None]:
        """Shows what begins now; returns a function that says how it has ended, and after what time."""
        began = time.monotonic()
        self.terminal.phase(f"step {self.done}: {doing}")
        return lambda line: self.say(f"step {self.done}: {line}, in {time.monotonic() - began:.1f} s")

    def say(self, line: str) -> None:
        """Shows a line."""
        if self.main:
            self.terminal.say(line)

    def close(self) -> None:
        """Shows the last step, and closes the file."""
        if self.main:
            self.progress.close()
            self.file.close()
