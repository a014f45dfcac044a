"""This rank's part of a parameter, and which elements of the full parameter it has."""

from __future__ import annotations

from torch import Tensor

from distopt.layout import local, refuse_foreign
from distopt.layout.deepspeed_private import is_partitioned, own_part
from distopt.layout.places import Place, Run, own_place


def part_of(name: str, param: Tensor) -> tuple[Tensor, Place]:
    """Returns the local tensor of a parameter, which shares its memory, and its place in the full parameter.

    Args:
        name: The name of the parameter, for messages.
        param: A plain tensor, a DTensor, or a parameter that `deepspeed.zero.Init` has partitioned.

    Raises:
        ValueError: If it has no values yet, or if it is a shard that does not say of what.
    """
    if is_partitioned(param):
        part, offset = own_part(param)
        return part, Run(offset, part.numel())
    try:
        refuse_foreign([param])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    part = local(param.detach())
    if part.is_meta:
        raise ValueError(f"{name} is on the meta device, without memory: call model.to_empty(device=...) first")
    return part, own_place(param)
