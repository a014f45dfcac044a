"""The CPU time of rank 0 in saves of a checkpoint with the tensors of Llama-70B, in one process that plays rank 0."""

from __future__ import annotations

import argparse
import pickle
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import distopt
from benchmarks.arguments import COUNT
from distopt import collective
from distopt.checkpoint import checkpoint_path, save_checkpoint


def add_parser(benchmarks: Any) -> None:
    """Add the options of `python -m benchmarks checkpoint`."""
    parser = benchmarks.add_parser("checkpoint", help="CPU time of rank 0 in saves of Llama-70B's tensors")
    parser.add_argument("--ranks", type=COUNT, default=512, help="number of ranks that rank 0 is made to see")
    parser.add_argument("--columns", type=COUNT, default=2, help="number of columns of each matrix; 8192 is the model")
    parser.add_argument("--saves", type=COUNT, default=3, help="number of saves")
    parser.set_defaults(run=run)


class Rank0:
    """Collectives of rank 0, to which the other ranks send what rank 0 itself sends, from their own rows.

    Attributes:
        excluded: CPU seconds of what the other ranks would have done.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks, self.excluded = ranks, 0.0

    def gather(self, thing: Any, group: Any = None) -> list[Any]:
        """Stands in for `collective.gather`: unpickles what the ranks have sent."""
        start = time.process_time()
        sent = [pickle.dumps(_moved(thing, rank)) for rank in range(self.ranks)]
        self.excluded += time.process_time() - start
        return [pickle.loads(blob) for blob in sent]

    def all_gather_object(self, every: list[Any], mine: Any) -> None:
        """Stands in for that of torch."""
        sent = pickle.dumps(mine)
        every[:] = [pickle.loads(sent) for _ in every]

    def scatter(self, things: list[Any]) -> Any:
        """Stands in for `collective.scatter`: pickles what the ranks receive."""
        return [pickle.dumps(thing) for thing in things] and things[0]


def _moved(thing: Any, rank: int) -> Any:
    """What another rank sends: the same pieces, from its rows on."""
    if not isinstance(thing, list):
        return thing
    return [(name, dtype, shape, (o[0] + rank * s[0], *o[1:]), s) for name, dtype, shape, o, s in thing]


def model(ranks: int, columns: int) -> nn.Module:
    """Return a module with the rows of rank 0 of each parameter of Llama-70B, whose matrices have `columns` columns."""
    mesh = init_device_mesh("cpu", (ranks,))
    block = {
        "self_attn.q_proj": 8192,
        "self_attn.k_proj": 1024,
        "self_attn.v_proj": 1024,
        "self_attn.o_proj": 8192,
        "mlp.gate_proj": 28672,
        "mlp.up_proj": 28672,
        "mlp.down_proj": 8192,
        "input_layernorm": 0,
        "post_attention_layernorm": 0,
    }
    names = {f"layers.{i}.{name}": rows for i in range(80) for name, rows in block.items()}
    made = nn.Module()
    for name, rows in {"embed_tokens": 128256, **names, "norm": 0, "lm_head": 128256}.items():
        shape = (rows, columns) if rows else (8192,)
        local = torch.zeros(shape[0] // ranks, *shape[1:])
        stride = (columns, 1) if rows else (1,)
        full = (local.shape[0] * ranks, *shape[1:])  # the same for every rank
        tensor = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size(full), stride=stride)
        *path, last = f"{name}.weight".split(".")
        module = made
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, nn.Parameter(tensor))
    return made


def run(options: argparse.Namespace) -> None:
    """Print the CPU seconds of each save and the bytes of the files."""
    for save, (seconds, sizes) in enumerate(measure(options.ranks, options.columns, options.saves), 1):
        named = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sorted(sizes.items()))
        print(f"{options.ranks} ranks, save {save}: {seconds:.2f} s of CPU on rank 0; {named}", flush=True)


def measure(ranks: int, columns: int, saves: int) -> Iterator[tuple[float, dict[str, int]]]:
    """Yield the CPU seconds of rank 0 in each save, and the bytes of the files by name."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    net = model(ranks, columns)
    optimizer = distopt.AdamW(net.parameters())
    optimizer.init_state()
    rank0 = Rank0(ranks)
    with (
        mock.patch.object(collective, "gather", rank0.gather),
        mock.patch.object(collective, "scatter", rank0.scatter),
        mock.patch.object(dist, "all_gather_object", rank0.all_gather_object),
        tempfile.TemporaryDirectory() as folder,
    ):
        for save in range(1, saves + 1):
            rank0.excluded, start = 0.0, time.process_time()
            path = save_checkpoint(checkpoint_path(folder, save), net, optimizer, extra={"step": save})
            seconds = time.process_time() - start - rank0.excluded
            yield seconds, {file.name: file.stat().st_size for file in Path(path).rglob("*") if file.is_file()}
    dist.destroy_process_group()
