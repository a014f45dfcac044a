"""The specification of an update rule, which its reference function, its C kernel and its Triton kernel all read.

A kernel computes in float32. Whatever can be computed beforehand is computed in the specification, once, in Python's
double precision: 1 - beta of a float32 beta of 0.999 is off by 1e-5, and of 0.9999 by 2e-4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

# A function of the number of steps that a tensor has taken: a float, or a float64 tensor with one for each tensor.
OfStep = Callable[[Any], Any]


class Slot(NamedTuple):
    """The shape, the placement and the dtype of a state buffer of a parameter.

    Attributes:
        shape: The full shape.
        replicated: Whether every rank has all of it, in a plain tensor, and makes it equal to those of the others.
            Otherwise it has the shape of its parameter and is laid out as it.
        dtype: The dtype; None for float32, or the parameter's own if that is wider.
        per: The consecutive elements of the parameter for each element of the buffer, which has as many rows then.
    """

    shape: tuple[int, ...]
    replicated: bool = False
    dtype: torch.dtype | None = None
    per: int = 1


OfShape = Callable[[tuple[int, ...]], "Slot | None"]
SCALES = 2  # values per tensor that a kernel takes, besides lr * ratio, which every kernel takes


@dataclass(frozen=True)
class Rule:
    """The inputs of an update rule for the options of one param group, by the names that its formula gives them.

    Attributes:
        kernel: The name of the function in cpu.c and in triton_rules.py; "" if the rule has no kernel.
        buffers: The names of the state buffers, in the order in which kernels take them.
        scalars: The hyper-parameters and what is computed from them, in the order in which Triton's kernel takes them.
        scales: Values that differ between tensors, as functions of the number of steps. `ratio` is special: where the
            trust ratio multiplies the gradient (LARS), it is that.
        divisors: As `scales`. Kernels multiply by the reciprocal, which they call `inverse_<name>`.
        decay: The name of the scalar, or of the scale, that is multiplied by the weights and added to the direction; ""
            if there is none.
        penalty: As `decay`, where it is added to the gradient. Cautious updates need to know.
        sums: Running sums over the steps of a tensor, which are state: functions of the number of steps that return the
            addend of a step. The rule gets the sum with this step's addend.
        slots: By name of a buffer that not every parameter has, or that has another shape than its parameter: a
            function of the parameter's full shape, None where it has no such buffer. Rules with such buffers have no
            kernel.
        signed: The names of the buffers that may be stored in fewer bits (`distopt.kernels.blocks`) as first moments,
            of either sign.
        squares: Those that may be as second moments, which are >= 0 and whose roots are denominators.
        work: For a rule on full matrices, the multiplications for one of so many rows and columns, by which ranks get
            equal shares of the work; None for a rule on elements.
    """

    kernel: str = ""
    buffers: tuple[str, ...] = ()
    scalars: Mapping[str, float] = field(default_factory=dict)
    scales: Mapping[str, OfStep] = field(default_factory=dict)
    divisors: Mapping[str, OfStep] = field(default_factory=dict)
    decay: str = ""
    penalty: str = ""
    sums: Mapping[str, OfStep] = field(default_factory=dict)
    slots: Mapping[str, OfShape] = field(default_factory=dict)
    signed: tuple[str, ...] = ()
    squares: tuple[str, ...] = ()
    work: Callable[[int, int], float] | None = None

    def slot(self, name: str, shape: tuple[int, ...]) -> Slot | None:
        """Returns the slot of a buffer of a parameter of this full shape; None if it has no such buffer."""
        return self.slots[name](tuple(shape)) if name in self.slots else Slot(tuple(shape))

    def names(self, shape: tuple[int, ...]) -> list[str]:
        """Returns the names of the buffers of a parameter of this full shape."""
        return [name for name in self.buffers if self.slot(name, shape) is not None]

    @property
    def factors(self) -> dict[str, OfStep]:
        """The scales and the reciprocals of the divisors, in the order in which Triton's kernel takes them."""
        return {**self.scales, **{f"inverse_{name}": _inverse(divisor) for name, divisor in self.divisors.items()}}


def _inverse(divisor: OfStep) -> OfStep:
    return lambda step: 1.0 / divisor(step)
