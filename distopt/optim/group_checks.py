"""What is checked of param groups: all when one is added, and before every step what may have changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from distopt.kernels.cautious import check_cautious
from distopt.optim.masters import check_beside
from distopt.optim.narrow_state import check_bits
from distopt.optim.options import check_torch_options, drop_torch_options
from distopt.optim.validate import check_group, check_values

if TYPE_CHECKING:
    from distopt.optim.base import ShardedOptimizer


def check_new(optimizer: ShardedOptimizer, group: dict[str, Any]) -> None:
    """Checks a param group that was added, and removes torch's options from it.

    Raises:
        ValueError: For a hyper-parameter that is out of bounds, mistyped or misspelt, and for a combination that the
            rule does not have.
    """
    check_torch_options(group, optimizer.torch_options)
    drop_torch_options(group, optimizer.torch_options)
    check_group(group, optimizer.defaults, optimizer.bounds)
    optimizer.check(group)
    _check_together(optimizer, group)


def check_before_step(optimizer: ShardedOptimizer) -> None:
    """Checks the values that schedules, users and state dicts have set; raises ValueError as `check_new`."""
    _refuse_host_counts_in_graph(optimizer)
    for group in optimizer.param_groups:
        check_values(group, optimizer.bounds)
        check_torch_options(group, optimizer.torch_options)
        _check_together(optimizer, group)


def _check_together(optimizer: ShardedOptimizer, group: dict[str, Any]) -> None:
    check_cautious(optimizer, group)
    check_beside(optimizer, group)
    check_bits(optimizer, group)


def _refuse_host_counts_in_graph(optimizer: ShardedOptimizer) -> None:
    """Refuses a CUDA graph that would repeat the step count of its capture for ever."""
    if all(group["capturable"] for group in optimizer.param_groups) or not torch.cuda.is_available():
        return
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"a CUDA graph captures {type(optimizer).__name__}.step(), which counts its steps on the host: make the "
            "optimizer with capturable=True (and with lr a tensor on the device, if a schedule is to move it)"
        )
