"""One forward and backward pass of a model on fake tensors: what it keeps in memory and computes, nothing allocated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from distopt.engine.train_step import next_token_loss
from distopt.models.language_model import LanguageModel, blocks, check_length
from distopt.plan.allocations import Allocations
from distopt.plan.flops import Flops
from distopt.plan.footprint import Footprint, Layer

if TYPE_CHECKING:
    from collections.abc import Callable

    from distopt.engine import Engine

_CPU = torch.device("cpu")


class Moment(NamedTuple):
    """Bytes that live beside parameters and gradients, the share of the gradients that is there, whether in a block."""

    held: int
    share: float
    inside: bool


@dataclass(frozen=True)
class Rehearsal:
    """What a pass over one micro-batch takes.

    units: the layers of the blocks, and of what lies outside of them. flops: of the forward and of the backward pass,
    with what activation checkpointing computes again. moments: at each allocation of the backward pass. trusts: whether
    any param group needs a norm before its weights move.
    """

    units: list[list[Layer]]
    flops: tuple[int, int]
    moments: list[Moment]
    trusts: bool

    @property
    def activations(self) -> int:
        """The most that lives beside parameters and gradients, in bytes."""
        return max(moment.held for moment in self.moments)

    def peak(self, footprint: Footprint, early: bool) -> int:
        """The most that activations, gradients and what is gathered for a while take together.

        early: the gradients take their memory from the start of the pass, and not one after the other.
        """
        return max(
            moment.held
            + int(footprint.gradients * (1.0 if early else moment.share))
            + (footprint.gathered if moment.inside else footprint.outside)
            for moment in self.moments
        )


def rehearse(
    engine: Engine,
    language_model: LanguageModel,
    make_groups: Callable[[Any], list[dict[str, Any]]],
    make_optimizer: Callable[[Any], Any],
    vocabulary: int,
    sequences: int,
    length: int,
) -> Rehearsal:
    """Runs a pass of `sequences` sequences of `length` tokens on the CPU's operators, on tensors without memory.

    In the precision that the engine computes in: bfloat16 by its autocast, or with weights cast before.
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
        params = list(model.parameters())
        optimizer = make_optimizer(make_groups(model))
        units, trusts = _units(model, optimizer), any(map(optimizer.trusts, optimizer.param_groups))
        batch = torch.zeros(sequences, length + 1, dtype=torch.int64)
        allocations = Allocations([*params, *model.buffers(), batch])
        with _one_sequence_a_row(), engine.autocast(_CPU), Flops() as forward, allocations:
            loss = next_token_loss(model, batch)
        start = len(allocations.events)
        with Flops() as backward, allocations:
            loss.backward()
        gradients = allocations.numbers(p.grad for p in params if p.grad is not None)
        inner = {p for block in blocks(model) for p in block.parameters()}
        of_blocks = allocations.numbers(p.grad for p in inner if p.grad is not None)
    whole = sum(p.numel() * p.element_size() for p in params if p.requires_grad)
    moments, held, made, inside = [], 0, 0, False
    for i, (number, change) in enumerate(allocations.events):
        if number in gradients:
            made += change
        else:
            held += change
        inside = inside or number in of_blocks
        if i >= start - 1:
            moments.append(Moment(held, made / whole, inside))
    return Rehearsal(units, (forward.total, backward.total), moments, trusts)


@contextlib.contextmanager
def _one_sequence_a_row() -> Iterator[None]:
    """transformers 5.23 looks whether positions are those of packed sequences, and for fake tensors takes them to be:
    every layer would keep a mask of length times length, and no kernel with fewer key heads would be taken."""
    from transformers import masking_utils

    find = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find


def _units(model: Any, optimizer: Any) -> list[list[Layer]]:
    slots = {p: len(optimizer.slots(group)) for group in optimizer.param_groups for p in group["params"]}
    units, seen = [], set()
    for unit in (*blocks(model), model):
        own = [p for p in unit.parameters() if p not in seen]
        seen.update(own)
        units.append([Layer(tuple(p.shape), p.requires_grad, slots.get(p, 0)) for p in own])
    return units
