"""Moments in fewer than 32 bits, whose values do not depend on how the parameters are sharded.

`state_bits`, an option of every param group, says how the moments of its parameters are stored:

    32    `<name>`, float32
    16    `<name>`, bfloat16, rounded at random
    8, 4  `<name>_codes` and `<name>_scale`, of blocks of a row (`distopt.kernels.blocks`), rounded at random:
          uint8 of shape [rows, row / (1 or 2)] and float32 of shape [rows, row / block]

A step reads a block, computes in float32, and writes it. Each form is made from any other that a state dict or a
checkpoint has, by name. Parameters of fewer than two dimensions and those whose rows (one index of dimension 0) are no
multiple of 32 elements keep float32: biases and norms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distopt.kernels import blocks
from distopt.kernels.blocks import CODES, SCALE, SIGNED, SQUARES, Form
from distopt.kernels.narrow import WEIGHTS, Narrow
from distopt.kernels.rules import Rule, Slot
from distopt.kernels.window import Window
from distopt.layout import ShardLayout, blocks_shape, check_shape, fit, local, zeros_per
from distopt.layout.windows import windows

if TYPE_CHECKING:
    from distopt.optim.base import ShardedOptimizer

Group = dict[str, Any]
_AT_ONCE = 2**22  # elements


def check_bits(optimizer: ShardedOptimizer, group: Group) -> None:
    """Raises ValueError for a param group whose `state_bits` its rule does not have."""
    bits = group["state_bits"]
    if bits == 32:
        return
    rule = optimizer.rule(group)
    if not (rule.signed or rule.squares):
        raise ValueError(
            f"state_bits={bits}: {type(optimizer).__name__} with these options keeps no moments that may be rounded: "
            "give 32"
        )
    for option in ("capturable", "cautious"):
        if group[option]:
            raise ValueError(f"state_bits={bits} with {option}=True, which needs float32 moments: give 32, or False")


def form_of(rule: Rule, group: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Form | None:
    """Returns how a buffer of a parameter of this full shape is stored; None where it is in float32."""
    bits, block = group["state_bits"], blocks.block_of(shape)
    kind = SIGNED if name in rule.signed else SQUARES if name in rule.squares else ""
    return Form(kind, bits, block) if bits < 32 and kind and block else None


def tensors_of(rule: Rule, group: Mapping[str, Any]) -> list[str]:
    """Returns the names of all tensors that the state of a parameter of the group may have for the rule's buffers."""
    if group["state_bits"] >= 16:
        return list(rule.buffers)
    rounded = [name for name in rule.buffers if name in (*rule.signed, *rule.squares)]
    return [*rule.buffers, *(name + part for name in rounded for part in (CODES, SCALE))]


def every_tensor_of(rule: Rule) -> list[str]:
    """Returns the names of all tensors that any `state_bits` gives the rule's buffers."""
    return [*rule.buffers, *(name + part for name in rule.buffers for part in (CODES, SCALE))]


def lacks(state: Mapping[str, Any], name: str) -> bool:
    """Whether a state has a buffer in none of its forms."""
    return state.get(name) is None and any(state.get(name + part) is None for part in (CODES, SCALE))


def check_buffer(rule: Rule, param: Tensor, state: Mapping[str, Any], name: str, of: str) -> None:
    """Raises ValueError for a buffer of another shape than its parameter has, in the form in which the state has it."""
    if state.get(name) is not None:
        check_shape(param, state[name], f"{name} of {of}", rule.slot(name, param.shape))
        return
    for part, slot in _slots(_form_in(state, rule, name, param, of), param).items():
        check_shape(param, state[name + part], f"{name}{part} of {of}", slot)


def settle_buffer(
    optimizer: ShardedOptimizer, layout: ShardLayout, group: Group, param: Tensor, name: str, of: str
) -> None:
    """Makes a buffer of a parameter's state in the form that the group asks for, and lays it out.

    From another form, if the state has one, rounded to the nearest.

    Raises:
        ValueError: For a tensor of another shape than its parameter has.
    """
    state, rule = optimizer.state[param], optimizer.rule(group)
    wanted, slot = form_of(rule, group, name, tuple(param.shape)), rule.slot(name, param.shape)
    if wanted is not None and wanted.bits == 16:
        wanted, slot = None, Slot(tuple(param.shape), dtype=torch.bfloat16)
    if state.get(name) is not None:
        value = fit(layout, param, state[name], f"{name} of {of}", None if wanted else slot)
    elif lacks(state, name):
        value = optimizer.init_slot(layout, group, name, param)
    else:
        found = _form_in(state, rule, name, param, of)
        for part, of_part in _slots(found, param).items():
            state[name + part] = fit(layout, param, state[name + part], f"{name}{part} of {of}", of_part)
        if found == wanted:
            return
        codes, scale = (local(state.pop(name + part)) for part in (CODES, SCALE))
        value = layout.zeros(param)
        local(value).copy_(blocks.decode(codes, scale, found).view(local(value).shape))
    if wanted is None:
        state[name] = value if slot is None or slot.dtype is None else value.to(slot.dtype)
        return
    state.pop(name, None)
    state[name + CODES] = zeros_per(layout, param, wanted.per_code, torch.uint8)
    state[name + SCALE] = zeros_per(layout, param, wanted.block, torch.float32)
    if local(value).any():  # not at the start, but for Adagrad
        _store(local(value), wanted, *(local(state[name + part]).view(-1) for part in (CODES, SCALE)))


def columns_of(
    layout: ShardLayout, rule: Rule, name: str, params: Sequence[Tensor], states: Sequence[Mapping[str, Any]]
) -> tuple[list[Any], list[Tensor | None]]:
    """Returns a buffer of each shard, and the scales where these are codes; no scales where none are.

    A buffer is its own shard, or the full tensor where it is replicated, or None without one.
    """
    if name not in rule.slots and all(name in state for state in states):
        return layout.shards(params, [state[name] for state in states]), []
    found: list[Any] = []
    scales: list[Tensor | None] = []
    for p, state in zip(params, states):
        slot = rule.slot(name, p.shape)
        own: list[Any]
        if slot is None or slot.replicated:
            own = [state.get(name)] * len(layout.segments[p])
        elif name in state:
            own = layout.shards([p], [state[name]])
        else:
            own = [local(state[name + CODES]).view(-1)]
        found += own
        scales += [local(state[name + SCALE]).view(-1)] if name + SCALE in state else [None] * len(own)
    return found, scales if any(scale is not None for scale in scales) else []


def narrow_of(
    optimizer: ShardedOptimizer,
    layout: ShardLayout,
    index: int,
    params: Sequence[Tensor],
    scales: dict[str, list[Tensor | None]],
) -> Narrow:
    """Returns what is known of the shards of parameters of a param group, some of which are narrow.

    A layer's key is its position among the parameters of the optimizer, which no engine changes.
    """
    group = optimizer.param_groups[index]
    before = sum(len(group["params"]) for group in optimizer.param_groups[:index])
    position = {id(p): before + i for i, p in enumerate(group["params"])}
    of = [p for p in params for _ in layout.segments[p]]
    extras: list[Any] = []
    for p in params:
        remainder = optimizer.state[p].get("remainder")
        extras += [None] * len(layout.segments[p]) if remainder is None else layout.shards([p], [remainder])
    places = [window for p in params for window in _windows(layout, group, p)]
    return Narrow(places, [position[id(p)] for p in of], {WEIGHTS: extras, **scales})


def _windows(layout: ShardLayout, group: Group, param: Tensor) -> list[Window]:
    """Returns the windows of a parameter's shards; any where nothing of it is rounded."""
    if param.dtype.itemsize >= 4 and (group["state_bits"] == 32 or not blocks.block_of(layout.full_shape(param))):
        return [Window.run(0, segment.numel) for segment in layout.segments[param]]
    return windows(layout, param)


def _store(values: Tensor, form: Form, codes: Tensor, scale: Tensor) -> None:
    """Writes values to the nearest codes, some at once, since that takes 50 bytes of each."""
    pieces = zip(*(t.split(_AT_ONCE // per) for t, per in ((codes, form.per_code), (scale, form.block))))
    for piece, stored in zip(values.reshape(-1).split(_AT_ONCE), pieces):
        for tensor, found in zip(stored, blocks.encode(piece.float(), form)):
            tensor.copy_(found)


def _form_in(state: Mapping[str, Any], rule: Rule, name: str, param: Tensor, of: str) -> Form:
    """Returns the form of the codes in a state; raises ValueError if their shape is that of none."""
    codes, shape = state[name + CODES], tuple(param.shape)
    kind, block = SIGNED if name in rule.signed else SQUARES, blocks.block_of(shape)
    for form in (Form(kind, bits, block) for bits in (8, 4) if block):
        if tuple(codes.shape) == blocks_shape(shape, form.per_code):
            return form
    raise ValueError(
        f"the state {name}{CODES} of {of} has shape {tuple(codes.shape)}, which is not that of codes of a parameter of "
        f"shape {shape}: load a state that was saved with parameters of the same shapes"
    )


def _slots(form: Form, param: Tensor) -> dict[str, Slot]:
    """Returns the slots of codes and scales of a parameter, by what is appended to the buffer's name."""
    kinds = {CODES: (form.per_code, torch.uint8), SCALE: (form.block, torch.float32)}
    shape = tuple(param.shape)
    return {part: Slot(blocks_shape(shape, per), dtype=dtype, per=per) for part, (per, dtype) in kinds.items()}
