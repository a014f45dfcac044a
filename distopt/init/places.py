"""This rank's part of a parameter, and which elements of the full parameter it has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distopt.layout import full_shape, local, refuse_foreign
from distopt.layout.deepspeed_private import is_partitioned, own_part
from distopt.proof.content import Box, Place, Run, full_place, size
from distopt.proof.places import own_indices

__all__ = ["Place", "indices", "part_of"]

_CHUNK = 2**20  # elements at once, which take some 40 MB of scratch memory


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
    place = Box(own_indices(param)) if hasattr(param, "placements") else full_place(full_shape(param))
    return part, place


def indices(place: Place, shape: Sequence[int], device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Yields the indices in the flattened parameter of the elements at a place, in chunks.

    Args:
        place: The elements that a local tensor has.
        shape: The full shape of the parameter.
        device: The device of the indices.

    Yields:
        The first element of the chunk in the flattened local tensor, and the indices, int64.
    """
    for start in range(0, total := size(place), _CHUNK):
        rest = torch.arange(start, min(start + _CHUNK, total), device=device)
        yield start, rest + place.start if isinstance(place, Run) else _of_box(place, shape, rest)


def _of_box(box: Box, shape: Sequence[int], rest: Tensor) -> Tensor:
    """Returns the indices in the full parameter of elements of a box, given by their place in the box."""
    index, stride = torch.zeros_like(rest), 1
    for own, full in zip(reversed(box.indices), reversed(shape)):
        at = rest % len(own)
        index += stride * (at + own.start if isinstance(own, range) else own.to(rest.device)[at])
        rest, stride = rest // len(own), stride * full
    return index
