"""The claims of one rank, all of them collected before the first message."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distopt.layout import ShardLayout, layout_of, local
from distopt.layout.names import bare_parameters
from distopt.layout.places import full_place
from distopt.layout.replicas import positions
from distopt.proof.content import balanced, cover
from distopt.proof.faults import check_locally
from distopt.proof.places import counted, coverage, elements_per, full_sums, parts, replicated, sums

COVERAGE = "coverage"
WHETHER = "whether there is a gradient"
_NUMBERS = (bool, int, float, str, type(None))  # options by value; another object's repr is an address


@dataclass
class Column:
    """One number per parameter, to which every rank contributes a share.

    Attributes:
        what: The name of the content, for errors.
        shares: The shares of this rank: int64, shape [num_layers]. Their sums over `groups` must be equal on all ranks,
            or 0 where they are differences of replicas.
        groups: The process groups over which the shares are summed.
        copies: Whether the shares are differences of replicas.
    """

    what: str
    shares: Tensor
    groups: tuple[dist.ProcessGroup, ...]
    copies: bool = False

    @property
    def zero(self) -> bool:
        """Whether the sum over `groups` must be 0."""
        return self.copies or self.what == COVERAGE


@dataclass
class Claims:
    """The claims of this rank: `plain` must be equal on all ranks; `fault` is an error of this rank alone."""

    fault: str = ""
    error: Exception | None = None
    layers: list[tuple[str, tuple[int, ...], str]] = field(default_factory=list)  # name, full shape, dtype
    options: list[list[tuple[str, Any]]] = field(default_factory=list)  # by param group
    steps: list[float | None] = field(default_factory=list)
    buffers: list[Any] = field(default_factory=list)  # of the state: parameter, name, dtype
    kind: str = ""
    unclaimed: list[str] = field(default_factory=list)
    groups: list[tuple[int, ...]] = field(default_factory=list)
    full: list[int] = field(default_factory=list)  # the hash of complete coverage, by parameter
    columns: list[Column] = field(default_factory=list)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # from which the groups communicate

    @property
    def plain(self) -> dict[str, Any]:
        return {
            "layers": self.layers,
            "options": self.options,
            "steps": self.steps,
            "kind": self.kind,
            "unclaimed": self.unclaimed,
            "buffers": self.buffers,
            "columns": [column.what for column in self.columns],
        }


def claims(
    optimizer: torch.optim.Optimizer, model: nn.Module | None, state: bool, gradients: bool, ranks: tuple[int, ...]
) -> Claims:
    """Collects the claims of this rank about an optimizer; an exception becomes their `fault` instead."""
    found = Claims()
    try:
        _find(found, optimizer, model, state, gradients, ranks)
    except Exception as error:  # raised on this rank alone, it would leave the others waiting
        found.fault = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        found.error = error
    return found


@torch.no_grad()
def _find(
    found: Claims, optimizer: Any, model: nn.Module | None, state: bool, gradients: bool, ranks: tuple[int, ...]
) -> None:
    check_locally(optimizer, model if gradients else None)
    layout: ShardLayout = getattr(optimizer, "layout", None) or layout_of(optimizer)
    model_layout, gradient_layout = layout.model or layout, layout.gradients or layout
    found.kind, found.device = type(layout).__name__, layout.wire or layout.device
    found.groups = [tuple(dist.get_process_group_ranks(group)) for group in layout.groups]
    if foreign := {rank for group in found.groups for rank in group} - set(ranks):
        raise ValueError(
            f"the optimizer communicates with ranks {sorted(foreign)}, which are not asked: prove with a group that "
            f"has them, now it has {list(ranks)}"
        )
    names = _names(optimizer, layout, model)
    found.layers = [(names[i], tuple(layout.full_shape(p)), str(p.dtype)) for i, p in enumerate(layout.params)]
    found.full = [cover(shape, full_place(shape)) for _, shape, _ in found.layers]
    found.options = [_options(group) for group in optimizer.param_groups]
    found.steps = _steps(optimizer, layout)
    if model is not None:
        found.unclaimed = _unclaimed(layout, model)

    weights = sums(model_layout, parts(model_layout))
    found.columns = [
        Column(COVERAGE, coverage(layout, parts(layout)) * counted(layout), layout.groups),
        Column("weights", weights * counted(model_layout), model_layout.groups),
        *_copies("weights", weights, model_layout),
    ]
    if gradients and not layout.flat:  # flat partitions get theirs one after the other
        gradient = sums(gradient_layout, parts(gradient_layout, lambda p: p.grad))
        found.columns += [
            Column(WHETHER, _there(layout), () if _stepped_alone(layout) else layout.groups),
            Column("gradient", gradient * counted(gradient_layout), gradient_layout.groups),
            *_copies("gradient", gradient, gradient_layout),
        ]
    if state:
        found.columns += _state(found, optimizer, layout)
    for column in found.columns:
        column.shares = column.shares.to(found.device)


def _stepped_alone(layout: ShardLayout) -> bool:
    """Whether every rank steps each parameter as a tensor of its own; else its flat tensors have parts of some."""
    return len(layout.params) == len(layout.segments) and all(map(operator.is_, layout.params, layout.segments))


def _there(layout: ShardLayout) -> Tensor:
    """Returns, for each parameter, the number of its local tensors that have a gradient."""
    there = [0] * layout.num_layers
    for owner, segments in layout.segments.items():
        for segment in segments if owner.grad is not None else ():
            there[segment.layer] += 1
    return torch.tensor(there, dtype=torch.int64, device=layout.device)


def _state(found: Claims, optimizer: Any, layout: ShardLayout) -> Iterator[Column]:
    """Yields a column for each state buffer; numbers are claimed by value."""
    own = hasattr(optimizer, "layout")  # another optimizer's buffers of other shapes, as Adafactor's, are its business
    held: dict[str, dict[Tensor, Tensor]] = {}
    copies: dict[str, dict[Tensor, Tensor]] = {}
    is_replicated = replicated(optimizer)
    for index, owner in enumerate(layout.segments):
        for name, value in sorted(optimizer.state.get(owner, {}).items()):
            if not isinstance(value, Tensor) or (value.ndim == 0 and owner.ndim > 0):
                if name != "step":
                    found.buffers.append((index, name, float(value) if isinstance(value, Tensor) else repr(value)))
            elif value.shape == owner.shape or own:
                (copies if is_replicated(owner, name) else held).setdefault(name, {})[owner] = value
                found.buffers.append((index, name, str(value.dtype)))
    for name, buffers in sorted(held.items()):
        for owner, value in buffers.items():
            per = elements_per(layout, owner, value)
            has, wanted = local(value).numel() * per, sum(s.numel for s in layout.segments[owner])
            if has != layout.state_numel(owner):
                raise ValueError(
                    f"the state's {name} of a parameter of shape {tuple(owner.shape)} has {has} elements on this rank, "
                    f"which steps {wanted}: load it by distopt.load_checkpoint, and bind before the first step"
                )
        shares = sums(layout, parts(layout, buffers.get)) * counted(layout)
        yield Column(f"the state's {name}", shares, layout.groups)
    for name, full in sorted(copies.items()):
        yield Column(f"the state's {name}", full_sums(layout, full), ())


def _copies(what: str, own: Tensor, layout: ShardLayout) -> Iterator[Column]:
    """Yields, for each group of the layout, a column whose sum is 0 if replicas of a parameter within it are equal.

    Args:
        what: The name of the content.
        own: The hash of the local shard of each parameter.
        layout: The layout.
    """
    if type(layout) is not ShardLayout or not _stepped_alone(layout):  # each element is on one rank
        return
    for group in layout.groups:
        found = positions(layout.params, dist.get_process_group_ranks(group))
        factors = {each: balanced(*each) for each in set(found)}
        of_params = torch.tensor([factors[each] for each in found], dtype=torch.int64, device=own.device)
        yield Column(what, own * of_params, (group,), copies=True)


def _names(optimizer: Any, layout: ShardLayout, model: nn.Module | None) -> list[str]:
    """Returns the name of each parameter: the model's, else its param group's (`param_names`), else its index."""
    names: dict[Tensor, str] = {}
    for group in optimizer.param_groups:
        given = group.get("param_names", ())
        if len(given) == len(group["params"]):
            names |= dict(zip(group["params"], given))
    if model is not None:
        names |= {param: name for name, param in bare_parameters(model).items()}
    return [names.get(p, f"layer {i}") for i, p in enumerate(layout.params)]


def _unclaimed(layout: ShardLayout, model: nn.Module) -> list[str]:
    """Returns the names of the trainable parameters of the model that the optimizer does not step."""
    claimed, own = set(layout.params), bare_parameters(model)
    if claimed and claimed.isdisjoint(own.values()):
        raise ValueError(
            f"none of the optimizer's {len(claimed)} parameters are the model's {len(own)}: make the optimizer from "
            "model.parameters() after the model has been wrapped or sharded"
        )
    return [name for name, p in own.items() if p.requires_grad and p not in claimed]


def _options(group: dict[str, Any]) -> list[tuple[str, Any]]:
    options = {name: _said(value) for name, value in group.items() if name not in ("params", "param_names")}
    return [("number of parameters", len(group["params"])), *sorted(options.items())]


def _said(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (tuple, list)):
        return [_said(each) for each in value]
    return value if isinstance(value, _NUMBERS) else type(value).__name__


def _steps(optimizer: Any, layout: ShardLayout) -> list[float | None]:
    """Returns the step count of each parameter according to its state; None without one."""
    counts = [optimizer.state.get(owner, {}).get("step") for owner in layout.segments]
    tensors = [local(count).detach().float() for count in counts if isinstance(count, Tensor)]
    if len({tensor.device for tensor in tensors}) > 1:
        tensors = [tensor.cpu() for tensor in tensors]
    values = iter(torch.stack(tensors).tolist() if tensors else [])  # read at once
    steps = [next(values) if isinstance(count, Tensor) else count for count in counts]
    return [None if step is None else float(step) for step in steps]
