"""The bounds of a schedule's phases, which depend on each other and on the length of the training."""

from __future__ import annotations

from distopt.bounds import integer

_COUNTS = "it counts optimizer steps"


def check_phases(
    warmup_steps: int,
    total_steps: int | None,
    decay_steps: int | None = None,
    names: tuple[str, str, str] = ("warmup_steps", "total_steps", "decay_steps"),
) -> None:
    """Checks that the warmup, a peak of at least one step, and a decay at the end have room in the training.

    Args:
        warmup_steps: The steps of the warmup.
        total_steps: The steps of the training; None if they are not known.
        decay_steps: The steps of the decay; None for a schedule that has no such phase.
        names: What the user calls these three.

    Raises:
        ValueError: Unless `warmup_steps` is an integer in [0, total_steps), and `decay_steps` one in
            [1, total_steps - max(warmup_steps, 1)].
    """
    warmup, total, decay = names
    integer(0).check(warmup, warmup_steps, _COUNTS)
    if decay_steps is not None:
        integer(1).check(decay, decay_steps, _COUNTS)
    if total_steps is None:
        return
    integer(1).check(total, total_steps, _COUNTS)
    if warmup_steps >= total_steps:
        raise ValueError(
            f"warmup longer than the run: {warmup} must be less than {total} = {total_steps}, got {warmup_steps}; "
            "shorten the warmup or train for longer"
        )
    if decay_steps is not None and decay_steps > (longest := total_steps - max(warmup_steps, 1)):
        raise ValueError(
            f"{decay} must be at most {longest}, what {total} = {total_steps} leaves after {warmup} = {warmup_steps}, "
            f"got {decay_steps}; shorten the decay or the warmup, or train for longer"
        )
