"""What a checkpoint holds of a model and its optimizer where DeepSpeed has flattened them: the same as everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distopt.checkpoint import manifest
from distopt.checkpoint.contents import State
from distopt.layout import FlatLayout
from distopt.layout.flat import full_shape, is_partitioned
from distopt.layout.names import bare_name, bare_parameters
from distopt.optim.base import ShardedOptimizer


class FlatContents:
    """As `Contents`, for parameters that lie in flat partitions: each is put together, or taken apart, on its own.

    A save adds up what the ranks hold of a layer, one layer at a time, and keeps this rank's rows as a DTensor, which
    is what FSDP2 and ZeRO-1 have. Weights of 16 bits are saved from their float32 masters. DeepSpeed steps the layers
    of a partition together, so that all of them have its `step`.

    tensors, state: on the meta device; their shapes and dtypes are what a checkpoint is compared with.
    groups: the param groups, with names for their params.
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
            name: {key: value if key == "step" else _meta(p) for key, value in self._held(p).items()}
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
        """What is to be written, by every rank: new tensors, this rank's rows of each."""
        weights = {flat: flat for flat in self.flats.values()}
        rows: dict[Tensor, Tensor] = {}  # by parameter, since tied weights have several names
        for p in dict.fromkeys(self.params.values()):
            rows[p] = self._rows(self.layout.whole(p, weights) if p in self.flats else self._whole_frozen(p))
        model = {name: rows[p] for name, p in self.params.items()}
        model |= {name: buffer.to(_wide(buffer.dtype)) for name, buffer in self.buffers.items()}
        state: State = {}
        for name, p in self.layers.items():
            state[name] = {key: self._rows(self.layout.whole(p, self._values(key))) for key in self._names(p)}
            state[name]["step"] = self._held(p)["step"].clone()
        return {"model": model, "optimizer": {"state": state}}

    def to_fill(self, like: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """What a checkpoint, whose state is described by `like`, is to be read into: this rank's rows of everything."""
        state: State = {}
        for name, buffers in self.state.items():
            ours = manifest.described(buffers)
            if like.get(name) != ours:
                raise ValueError(f"the state of {name} is {like.get(name)} in the checkpoint, {ours} here")
            state[name] = {key: self._rows(t) for key, t in buffers.items() if key != "step"}
            state[name]["step"] = torch.zeros((), dtype=torch.float32)
        return {"model": {name: self._rows(t) for name, t in self.tensors.items()}, "optimizer": {"state": state}}

    @torch.no_grad()
    def fill(self, read: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
        """Puts what was read, and the checkpoint's param groups, into the partitions and the model.

        Raises ValueError if parameters of one partition have taken different numbers of steps.
        """
        state = read["optimizer"]["state"]
        for part in self.layout.partitions:
            steps = {float(state[name]["step"]) for name, p in self.layers.items() if self.flats[p] is part.flat}
            if len(steps) > 1:
                raise ValueError(
                    f"parameters of one group have taken {sorted(steps)} steps: DeepSpeed steps them together, so "
                    "give those that had no gradient at some steps a param group of their own, or use another engine"
                )
            self.optimizer.state[part.flat]["step"] = torch.tensor(steps.pop(), dtype=torch.float32)
        for name, value in read["model"].items():
            whole = self._gathered(value).view(-1)
            if name in self.buffers:
                self.buffers[name].view(-1).copy_(whole)
                continue
            p = self.params[name]
            if p in self.flats:
                self.layout.spread(p, whole, {flat: flat for flat in self.flats.values()})
            self.layout.show_layer(p, whole)
        for name, p in self.layers.items():
            for key in self._names(p):
                self.layout.spread(p, self._gathered(state[name][key]).view(-1), self._values(key))
        for group, saved in zip(self.optimizer.param_groups, groups):
            group.update({key: value for key, value in saved.items() if key not in ("params", "param_names")})

    def _held(self, param: Tensor) -> dict[str, Tensor]:
        """The state of the partition that a parameter lies in."""
        return self.optimizer.state[self.flats[param]]

    def _names(self, param: Tensor) -> list[str]:
        return [key for key in self._held(param) if key != "step"]

    def _values(self, key: str) -> dict[Tensor, Tensor]:
        """One buffer of the state, by the flat tensor that it belongs to."""
        state = self.optimizer.state
        return {flat: state[flat][key] for flat in self.flats.values() if key in state[flat]}

    def _whole_frozen(self, param: Tensor) -> Tensor:
        """A whole parameter that lies in no partition, but is cut up in stage 3."""
        piece = self.layout.pieces(param)[0]
        if piece.weights.numel() == full_shape(param).numel() and not is_partitioned(param):
            return param.detach().to(_wide(param.dtype))
        return self.layout.add_up(param, _wide(param.dtype), [(piece.offset, piece.weights)])

    def _rows(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor, as DTensor cuts them; memory without values for one that is on meta."""
        from torch.distributed.tensor import DTensor, Shard

        if whole.ndim == 0:
            return torch.empty_like(whole, device=self.layout.device) if whole.is_meta else whole.clone()
        start, stop = self._range(whole.shape[0])
        mine = torch.empty_like(whole[start:stop], device=self.layout.device)
        if not whole.is_meta:
            mine.copy_(whole[start:stop])
        return DTensor.from_local(
            mine, self.mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )

    def _gathered(self, rows: Any) -> Tensor:
        """The reverse of `_rows`."""
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
    """A tensor without memory, of the shape and the dtype that a checkpoint has."""
    return torch.empty(full_shape(like), dtype=_wide(like.dtype), device="meta")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype
