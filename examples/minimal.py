"""LAMB on a sharded model, with torch alone: `torchrun --standalone --nproc_per_node 2 examples/minimal.py`."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distopt


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank)
    mesh = init_device_mesh(device, (world,))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 1)).to(device)
    fully_shard(model, mesh=mesh)

    # No decay and no trust ratio for biases and norms. The layout is inferred from FSDP2's parameters.
    optimizer = distopt.LAMB(distopt.param_groups(model, weight_decay=0.01), lr=2e-2)
    schedule = distopt.warmup_cosine(optimizer, warmup_steps=10, total_steps=100)

    teacher = torch.randn(32, 1, generator=torch.Generator().manual_seed(1))
    for step in range(100):
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(step)).chunk(world)[rank]
        loss = (model(x.to(device)) - (x @ teacher).sin().to(device)).square().mean()
        loss.backward()
        norm = distopt.clip_grad_norm_(optimizer, max_norm=1.0)  # over all ranks, the same on every rank
        optimizer.step()  # one all-reduce for all trust ratios
        optimizer.zero_grad()
        schedule.step()
        if rank == 0 and step % 20 == 19:
            print(f"step {step + 1}: loss {loss.item():.4f}, gradient norm {norm.item():.3f}")
    dist.barrier()  # gloo may abort a process that still talks to one which has ended
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
