"""A forward and backward pass on fake tensors, which records memory and operations without allocating anything."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from distopt.data.cross_entropy import trust_head
from distopt.engine.mezo import MeZO
from distopt.engine.train_step import next_token_loss
from distopt.engine.units import ends
from distopt.kernels.rules import Rule
from distopt.models.configuration import check_length
from distopt.models.language_model import LanguageModel, blocks
from distopt.optim.averaged import average_of
from distopt.optim.mixed import split_of
from distopt.optim.narrow_state import form_of
from distopt.optim.options import COMMON
from distopt.plan.allocations import Allocations
from distopt.plan.flops import Flops
from distopt.plan.footprint import Footprint, Param

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping

    from distopt.engine import Engine

_CPU = torch.device("cpu")


class Moment(NamedTuple):
    """The memory at one moment of the backward pass.

    Attributes:
        activations: The bytes in addition to parameters and gradients.
        share: The share of the gradients that exist already.
        inside: Whether the backward pass has reached the blocks.
    """

    activations: int
    share: float
    inside: bool


@dataclass(frozen=True)
class Rehearsal:
    """The memory and the operations of a pass over one micro-batch.

    Attributes:
        units: The parameters of each block, and last those outside of the blocks.
        flops: The operations of the forward and of the backward pass, including recomputation by activation
            checkpointing.
        moments: The memory at each allocation of the backward pass, or of the forward pass where there is no other.
        trusts: Whether any param group needs a norm before its weights move.
        forward_only: Whether there is no backward pass (MeZO).
    """

    units: list[list[Param]]
    flops: tuple[int, int]
    moments: list[Moment]
    trusts: bool
    forward_only: bool = False

    @property
    def activations(self) -> int:
        """The peak of the memory in addition to parameters and gradients, in bytes."""
        return max(moment.activations for moment in self.moments)

    def peak(self, footprint: Footprint, early: bool) -> int:
        """Return the peak of activations, gradients and temporary unsharded tensors together, in bytes.

        Args:
            footprint: The memory of the engine.
            early: Whether the gradients are allocated at the start of the pass, instead of one by one.
        """
        passes = max(
            self.moments[-1].activations + footprint.gradients + footprint.ending,
            *(
                moment.activations
                + int(footprint.gradients * (1.0 if early else moment.share))
                + (footprint.gathered if moment.inside else footprint.outside)
                for moment in self.moments
            ),
        )
        return max(passes, footprint.noise)


def rehearse(
    engine: Engine,
    language_model: LanguageModel,
    make_groups: Callable[[Any], list[dict[str, Any]]],
    make_optimizer: Callable[[Any], Any],
    vocabulary: int,
    sequences: int,
    length: int,
) -> Rehearsal:
    """Run a pass on fake tensors, with the CPU's operators and in the precision of the engine.

    bfloat16 is the engine's autocast, or weights that are cast before the pass.

    Args:
        engine: The engine.
        language_model: The model to build.
        make_groups: Makes the param groups of a model.
        make_optimizer: Makes the optimizer of these groups.
        vocabulary: The number of tokens of the vocabulary.
        sequences: The number of sequences of the micro-batch.
        length: The number of tokens of a sequence.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    with engine.autocast(_CPU):
        low = engine.bf16 and not torch.is_autocast_enabled("cpu")
    with FakeTensorMode():
        config = language_model.describe(vocabulary)
        check_length(config, length, "sequence_length")
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if low else torch.float32)
        if engine.activation_checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        model.chunked_loss = language_model.chunked_loss
        trust_head(model)
        params = list(model.parameters())
        optimizer = make_optimizer(make_groups(model, **split_of(make_optimizer([torch.zeros(2, 2)]))))
        forward_only = isinstance(optimizer, MeZO)
        entered: list[int] = []  # the events at which the blocks begin and end
        units, trusts = units_of(model, optimizer), any(group.get("trust_ratio") for group in optimizer.param_groups)
        batch = torch.zeros(sequences, length + 1, dtype=torch.int64)
        allocations = Allocations([*params, *model.buffers(), batch])
        for block in blocks(model) if forward_only else ():
            block.register_forward_pre_hook(lambda *_: entered.append(len(allocations.events)))
            block.register_forward_hook(lambda *_: entered.append(len(allocations.events)))
        with torch.set_grad_enabled(not forward_only), engine.autocast(_CPU), Flops() as forward, allocations:
            loss = next_token_loss(model, batch)
        if forward_only:
            return Rehearsal(units, (forward.total, 0), _forward(allocations, entered), trusts, forward_only)
        start = len(allocations.events)
        with Flops() as backward, allocations:
            loss.backward()
        gradients = allocations.indices(p.grad for p in params if p.grad is not None)
        inner = {p for block in blocks(model) for p in block.parameters()}
        of_blocks = allocations.indices(p.grad for p in inner if p.grad is not None)
    total = sum(p.numel() * p.element_size() for p in params if p.requires_grad)
    moments = _backward(allocations.events, start, gradients, of_blocks, total)
    return Rehearsal(units, (forward.total, backward.total), moments, trusts)


def _backward(
    events: list[tuple[int, int]], start: int, gradients: Container[int], of_blocks: Container[int], total: int
) -> list[Moment]:
    """Return the moments from event `start` on; `total` is the size of all gradients in bytes."""
    moments, activations, allocated, inside = [], 0, 0, False
    for i, (index, change) in enumerate(events):
        if index in gradients:
            allocated += change
        else:
            activations += change
        inside = inside or index in of_blocks
        if i >= start - 1:
            moments.append(Moment(activations, allocated / total, inside))
    return moments


def _forward(allocations: Allocations, entered: list[int]) -> list[Moment]:
    sizes = itertools.accumulate(change for _, change in allocations.events)
    return [Moment(size, 0.0, inside=min(entered) <= i < max(entered)) for i, size in enumerate(sizes)]


def units_of(model: Any, optimizer: Any) -> list[list[Param]]:
    """Return the parameters of each block of a model, and last those outside of the blocks, with their state."""
    trained = not isinstance(optimizer, MeZO)  # which moves weights without gradients
    groups = {p: group for group in optimizer.param_groups for p in group["params"] if trained}
    of_ends = {p: end for end, module in ends(model)._asdict().items() if module for p in module.parameters()}
    units: list[list[Param]] = []
    seen: set[Tensor] = set()
    for unit in (*blocks(model), model):
        own = [p for p in unit.parameters() if p not in seen]
        seen.update(own)
        units.append([])
        for p in own:
            rule = optimizer.rule(groups[p]) if p in groups else Rule()
            kept = len(getattr(average_of(optimizer), "buffers", ())) if p in groups else 0
            units[-1].append(_param(p, rule, of_ends.get(p, ""), trained, groups.get(p, COMMON), kept))
    return units


def _param(param: Tensor, rule: Rule, end: str, trained: bool, group: Mapping[str, Any], averages: int) -> Param:
    slots = {name: slot for name in rule.buffers if (slot := rule.slot(name, param.shape)) is not None}
    replicated = [math.prod(slot.shape) for slot in slots.values() if slot.replicated]
    forms = [form_of(rule, group, name, tuple(param.shape)) for name, slot in slots.items() if not slot.replicated]
    bytes_of = [4.0 if form is None else form.nbytes for form in forms]
    return Param(
        tuple(param.shape),
        param.requires_grad and trained,
        slots=sum(bytes_of) / 4 + averages,
        replicated=sum(replicated),
        end=end,
        beside={"float32": 4, "remainder": 2, "none": 0}[group["master_weights"]],
        work=rule.work,
    )
