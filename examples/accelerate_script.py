"""An Accelerate script with LAMB: `accelerate launch --config_file launch/local.yaml examples/accelerate_script.py`.

An argument is the ZeRO stage: 0 or 1 (the default) for DDP; 2 or 3 if the launcher uses FSDP2, 1 to 3 if it uses
DeepSpeed. It is checked, since Accelerate may silently run something else.
"""

import sys

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import distopt

ZERO = int(sys.argv[1]) if sys.argv[1:] else 1
EPOCHS, BATCH, SAMPLES = 4, 64, 1024
FOLDER = "runs/accelerate_script"


def main() -> None:
    # Without cpu=True on the CPU, Accelerate runs independent processes of one rank each.
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, 32)
    data = TensorDataset(x, (x @ torch.randn(32, 1)).sin())
    loader = DataLoader(data, batch_size=BATCH // accelerator.num_processes)

    model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 1))
    optimizer = distopt.LAMB(distopt.param_groups(model, weight_decay=0.01), lr=2e-2)
    updates = EPOCHS * SAMPLES // BATCH // accelerator.gradient_accumulation_steps
    schedule = distopt.warmup_cosine(optimizer, warmup_steps=8, total_steps=updates)

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(schedule)  # prepared, it would step once per process
    distopt.attach(accelerator, model, optimizer, zero_stage=ZERO)  # the only additional line

    def train(epoch: int) -> None:
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = (model(x) - y).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    schedule.step()
        loss = accelerator.reduce(loss.detach(), "mean").item()
        accelerator.print(f"epoch {epoch}: loss {loss:.4f}, gradient norm {float(norm):.3f}")

    for epoch in range(1, EPOCHS + 1):
        train(epoch)
        if epoch == EPOCHS - 1:
            accelerator.save_state(FOLDER)  # on every process; loads at any number of processes, with zero_stage=0 or 1

    accelerator.load_state(FOLDER)
    train(EPOCHS)  # the last epoch again, with the same losses
    accelerator.wait_for_everyone()  # gloo may abort a process that still talks to one which has ended
    accelerator.end_training()


if __name__ == "__main__":
    main()
