"""The contents of a checkpoint under DeepSpeed, whose flat partitions are saved as on any other engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distopt.checkpoint import manifest
from distopt.checkpoint.average import is_optional
from distopt.checkpoint.contents import State
from distopt.layout import FlatLayout
from distopt.layout.deepspeed_private import full_shape, is_partitioned
from distopt.layout.names import bare_name, bare_parameters
from distopt.optim.averaged import GROUP_STATE
from distopt.optim.base import ShardedOptimizer


class FlatContents:
    """`Contents` for parameters in flat partitions, each of which is assembled and partitioned separately.

    A save sums the ranks' elements of one parameter at a time and keeps the local rows as a DTensor, as FSDP2 and
    ZeRO-1 do. 16-bit weights are saved from their float32 masters. DeepSpeed steps the parameters of a partition
    together, so all of them share its counts: `step`, and the running sums of a rule.

    Attributes:
        tensors: The tensors of the model on the meta device, by name. A checkpoint is compared with their shapes and
            dtypes.
        state: The state buffers on the meta device, by the names of parameter and buffer; compared likewise.
        groups: The param groups, with names in place of parameters.
    """

    def __init__(self, model: nn.Module, optimizer: ShardedOptimizer, layout: FlatLayout) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.model = getattr(model, "module", model)  # without DeepSpeedEngine
        self.optimizer, self.layout = optimizer, layout
        self.mesh = init_device_mesh(layout.device.type, (dist.get_world_size(),))
        self.params = bare_parameters(self.model, remove_duplicate=False)
        kept = {bare_name(self.model, name): b for name, b in self.model.state_dict(keep_vars=True).items()}
        self.buffers = {name: b for name, b in kept.items() if name not in self.params}
        first_names = {p: name for name, p in bare_parameters(self.model).items()}
        self.layers = {first_names[p]: p for p in layout.params}
        self.flats = layout.updated_in

        self.tensors = {name: _meta(t) for name, t in (self.params | self.buffers).items()}
        self.state: State = {
            name: {key: _meta(p) if value.ndim else value for key, value in self._state_of(p).items()}
            for name, p in self.layers.items()
        }
        members = [[first_names[p] for p in part.members] for part in layout.partitions]
        self.groups = [
            {
                **{key: value for key, value in group.items() if key != "param_names"},
                "params": [n for part, names in zip(layout.partitions, members) if part.group == i for n in names],
            }
            for i, group in enumerate(optimizer.param_groups)
        ]

    def saved(self) -> dict[str, Any]:
        """The tensors to write: on every rank new tensors with its rows of each."""
        weights = {flat: flat for flat in self.flats.values()}
        rows: dict[Tensor, Tensor] = {}  # by parameter, since tied weights have several names
        for p in dict.fromkeys(self.params.values()):
            rows[p] = self._rows(self.layout.gather(p, weights) if p in self.flats else self._full_frozen(p))
        model = {name: rows[p] for name, p in self.params.items()}
        model |= {name: buffer.to(_wide(buffer.dtype)) for name, buffer in self.buffers.items()}
        state: State = {}
        for name, p in self.layers.items():
            state[name] = {key: self._rows(self.layout.gather(p, self._values(key))) for key in self._names(p)}
            state[name] |= {key: value.clone() for key, value in self._counts(p).items()}
        return {"model": model, "optimizer": {"state": state}}

    def to_fill(self, like: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The tensors into which to read a checkpoint whose state is described by `like`: the local rows of each."""
        state: State = {}
        for name, buffers in self.state.items() if like else ():
            there = like.get(name, {})
            ours = {key: of for key, of in manifest.described(buffers).items() if key in there or not is_optional(key)}
            if there != ours:
                raise ValueError(f"the state of {name} is {there} in the checkpoint, {ours} here")
            counts = self._counts(self.layers[name])
            state[name] = {
                key: torch.zeros_like(buffers[key]) if key in counts else self._rows(buffers[key]) for key in ours
            }
        return {"model": {name: self._rows(t) for name, t in self.tensors.items()}, "optimizer": {"state": state}}

    @torch.no_grad()
    def fill(self, read: Mapping[str, Any], groups: list[dict[str, Any]] | None) -> None:
        """Loads the tensors that were read, and the checkpoint's param groups, into the partitions and the model.

        Without groups, None, the optimizer keeps its own, and its state.

        Raises:
            ValueError: If parameters of one partition have taken different numbers of steps.
        """
        state = read["optimizer"]["state"]
        for part in self.layout.partitions if state else ():
            for key, count in self._counts(part.members[0]).items():
                found = {float(state[name][key]) for name, p in self.layers.items() if self.flats[p] is part.flat}
                if len(found) > 1:
                    what = f"{sorted(found)} steps" if key == "step" else f"steps whose {key} is {sorted(found)}"
                    raise ValueError(
                        f"parameters of one group have taken {what}: DeepSpeed steps them together, so "
                        "give those that had no gradient at some steps a param group of their own, or use another "
                        "engine"
                    )
                self.optimizer.state[part.flat][key] = torch.tensor(found.pop(), dtype=count.dtype)
        for name, value in read["model"].items():
            full = self._gathered(value).view(-1)
            if name in self.buffers:
                self.buffers[name].view(-1).copy_(full)
                continue
            p = self.params[name]
            if p in self.flats:
                self.layout.scatter(p, full, {flat: flat for flat in self.flats.values()})
            self.layout.update_param(p, full)
        for name, p in self.layers.items():
            for key in self._names(p):
                if key in state.get(name, ()):
                    self.layout.scatter(p, self._gathered(state[name][key]).view(-1), self._values(key))
        for group, saved in zip(self.optimizer.param_groups, groups or ()):
            for key in GROUP_STATE:  # of an average that the checkpoint lacks
                group.pop(key, None)
            group.update({key: value for key, value in saved.items() if key not in ("params", "param_names")})

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        """The state of the partition that contains a parameter."""
        return self.optimizer.state[self.flats[param]]

    def _names(self, param: Tensor) -> list[str]:
        return [key for key, value in self._state_of(param).items() if value.ndim]

    def _counts(self, param: Tensor) -> dict[str, Tensor]:
        """What a parameter shares with its partition, by name: 0-D tensors on the host."""
        return {key: value for key, value in self._state_of(param).items() if not value.ndim}

    def _values(self, key: str) -> dict[Tensor, Tensor]:
        """One state buffer, by its flat tensor."""
        state = self.optimizer.state
        return {flat: state[flat][key] for flat in self.flats.values() if key in state[flat]}

    def _full_frozen(self, param: Tensor) -> Tensor:
        """The full weights of a frozen parameter, which is in no partition but sharded by stage 3."""
        piece = self.layout.pieces(param)[0]
        if piece.weights.numel() == full_shape(param).numel() and not is_partitioned(param):
            return param.detach().to(_wide(param.dtype))
        return self.layout.add_up(param, _wide(param.dtype), [(piece.offset, piece.weights)])

    def _rows(self, full: Tensor) -> Tensor:
        """The local rows of a full tensor, sharded as DTensor does; uninitialised memory for a meta tensor."""
        from torch.distributed.tensor import DTensor, Shard

        if full.ndim == 0:
            return torch.empty_like(full, device=self.layout.device) if full.is_meta else full.clone()
        start, stop = self._range(full.shape[0])
        mine = torch.empty_like(full[start:stop], device=self.layout.device)
        if not full.is_meta:
            mine.copy_(full[start:stop])
        return DTensor.from_local(mine, self.mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride())

    def _gathered(self, rows: Any) -> Tensor:
        """The full tensor of local rows: the inverse of `_rows`."""
        if rows.ndim == 0:
            return rows
        start, _ = self._range(rows.shape[0])
        offset = start * (rows.numel() // max(1, rows.shape[0]))
        return self.layout.add_up(rows, rows.dtype, [(offset, rows.to_local().view(-1))])

    def _range(self, rows: int) -> tuple[int, int]:
        chunk = -(-rows // self.mesh.size())
        start = min(self.mesh.get_local_rank() * chunk, rows)
        return start, min(start + chunk, rows)


def _meta(like: Tensor) -> Tensor:
    """A meta tensor of the shape and dtype that a checkpoint stores."""
    return torch.empty(full_shape(like), dtype=_wide(like.dtype), device="meta")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype
