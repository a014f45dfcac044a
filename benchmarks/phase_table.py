"""The table of `python -m benchmarks sam_phase`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.phase_methods import METHODS, Chosen, Size
from benchmarks.phase_runs import Record

_COLUMNS = (
    *("phase", "steps", "option", "time", "loss", "by 4 bits", "difference"),
    *("second domain, fine-tuned", "first domain, fine-tuned", "forgotten", "difference"),
)


class Row(NamedTuple):
    """The records of a phase and of the fine-tuning after it, by seed."""

    phases: list[Record]
    tuned: list[Record]

    @property
    def seconds(self) -> float:
        """The time of a step, the mean of the runs that know it."""
        known = [record["seconds"] for record in self.phases if record["seconds"] is not None]
        return statistics.mean(known) if known else math.nan

    @property
    def rounded(self) -> list[float]:
        """How much four bits add to the loss."""
        return [record["quantized"] - record["loss"] for record in self.phases]

    @property
    def forgotten(self) -> list[float]:
        """How much fine-tuning on the second domain adds to the loss of the first."""
        return [after["loss"] - before["loss"] for before, after in zip(self.phases, self.tuned)]


def table(size: Size, chosen: Chosen, base: Sequence[Record], rows: Mapping[str, Row]) -> str:
    """Return what was trained, and a Markdown table with a row for each phase.

    Args:
        size: The model and its training.
        chosen: The learning rates and radii.
        base: The records of the pretrained models, by seed.
        rows: The records of each phase, by its name in `METHODS`; differences are to that of AdamW, seed by seed.
    """
    tokens = size.batch_size * size.sequence_length
    steps = {"pretraining": size.steps, "a phase": size.phase_steps, "fine-tuning": size.tuning_steps}
    trained = ", ".join(f"{name} {count} steps ({count * tokens / 1e6:.3g}M bytes)" for name, count in steps.items())
    lines = [
        f"{base[0]['parameters'] / 1e6:.2f}M parameters, {size.layers} layers of width {size.width}; {trained}; "
        f"learning rates {size.lr:g}, {chosen.lr:g}, {chosen.tuning_lr:g}. Nats per byte, means ± standard deviations, "
        f"n = {len(base)} seeds. Pretrained: loss {_spread([b['loss'] for b in base])}, by 4 bits "
        f"{_spread([b['quantized'] - b['loss'] for b in base])}.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'---|' * len(_COLUMNS)}",
    ]
    first = rows.get("AdamW")
    return "\n".join([*lines, *(_row(name, row, first, size, chosen) for name, row in rows.items())]) + "\n"


def _row(name: str, row: Row, first: Row | None, size: Size, chosen: Chosen) -> str:
    method = METHODS[name]
    steps = method.factor * size.phase_steps
    compared = first is not None and first is not row
    cells = [
        *(method.label, str(steps)),
        f"rho {getattr(chosen, method.radius):g}" if method.radius else "",
        f"{row.seconds * method.factor / first.seconds:.2f}" if first else "",
        _spread([record["loss"] for record in row.phases]),
        _spread(row.rounded),
        _percent(row.rounded, first.rounded) if compared and first else "",
        _spread([record["second"] for record in row.tuned]),
        _spread([record["loss"] for record in row.tuned]),
        _spread(row.forgotten),
        _percent(row.forgotten, first.forgotten) if compared and first else "",
    ]
    return f"| {' | '.join(cells)} |"


def _percent(values: Sequence[float], base: Sequence[float]) -> str:
    """Return how much larger values are than others of the same seeds."""
    return _spread([100.0 * (value / other - 1.0) for value, other in zip(values, base)], "+.0f", " %")


def _spread(values: Sequence[float], digits: str = ".4f", unit: str = "") -> str:
    deviation = f" ± {statistics.stdev(values):{digits.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{digits}}{deviation}{unit}"
