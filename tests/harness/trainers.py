"""The Trainer of transformers with real FSDP2 and real DeepSpeed on the CPU, where Accelerate silently drops them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from distopt.integrations.transformers import SAMTrainerMixin
from tests.harness.engines import CONFIGS, LENGTH, SEQUENCES, VOCABULARY

SETUPS = ("ddp", "fsdp2_full", "fsdp2_sharded", "deepspeed1", "deepspeed2", "deepspeed3")


def sequences(steps: int) -> Tensor:
    numbers = torch.Generator().manual_seed(0)
    return torch.randint(0, VOCABULARY, (steps * SEQUENCES, LENGTH), generator=numbers)


def language_model(config: dict[str, Any] = CONFIGS["gpt2"]) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=None, **config))
    model.loss_type = "ForCausalLM"
    return model


def reset() -> None:
    """Accelerate keeps what it is for the whole process, in which several tests run."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    unset_hf_deepspeed_config()
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(name, None)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # asked for, not used


def arguments(folder: Path, setup: str, arguments_type: Any = None, **options: Any) -> Any:
    """TrainingArguments for the CPU, with what the Trainer needs to set up DDP, FSDP2 or DeepSpeed by itself."""
    from transformers import TrainingArguments

    reset()
    more: dict[str, Any] = {"use_cpu": True}
    if setup.startswith("deepspeed"):
        from accelerate.state import PartialState

        _quiet_deepspeed()
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")  # which TrainingArguments has no option for on the CPU
        more = {
            "accelerator_config": {"use_configured_state": True},
            "deepspeed": {
                "zero_optimization": {"stage": int(setup[-1])},
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": 10**9,
            },
        }
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    world = dist.get_world_size() if dist.is_initialized() else 1
    accumulation = options.pop("gradient_accumulation_steps", 1)
    return (arguments_type or TrainingArguments)(
        str(folder),
        per_device_train_batch_size=SEQUENCES // world // accumulation,
        gradient_accumulation_steps=accumulation,
        **{
            "num_train_epochs": 1,
            "max_grad_norm": 1.0,
            "seed": 3,
            "ddp_find_unused_parameters": False,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "logging_steps": 100,
            **more,
            **options,
        },
    )


def sharding(trainer_type: Any, setup: str) -> Any:
    """A Trainer that gets FSDP2 where it asks for it."""

    class Sharding(trainer_type):  # type: ignore[misc, valid-type]
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            if setup.startswith("fsdp2"):
                from accelerate import FullyShardedDataParallelPlugin
                from accelerate.state import PartialState
                from accelerate.utils import DistributedType

                plugin = FullyShardedDataParallelPlugin(
                    fsdp_version=2,
                    auto_wrap_policy="TRANSFORMER_BASED_WRAP",
                    cpu_ram_efficient_loading=False,
                    state_dict_type=f"{setup[6:].upper()}_STATE_DICT",
                )
                for state in (self.accelerator.state.__dict__, PartialState._shared_state):
                    state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
                self.is_fsdp_enabled = True

    return Sharding


def trainer(
    folder: Path, setup: str, steps: int, options: dict[str, Any], config: Any = CONFIGS["gpt2"], **args: Any
) -> Any:
    """A Trainer that goes over `steps` batches of `SEQUENCES` over all ranks."""
    from transformers import Trainer

    class SAMTrainer(SAMTrainerMixin, Trainer):
        pass

    data = [{"input_ids": row, "labels": row} for row in sequences(steps)]
    model = language_model(config) if isinstance(config, dict) else config
    made = sharding(SAMTrainer, setup)(model, arguments(folder, setup, **args), train_dataset=data, **options)
    kind = str(made.accelerator.distributed_type).rpartition(".")[2]
    world = dist.get_world_size() if dist.is_initialized() else 1
    assert made.accelerator.num_processes == world
    wanted = {"ddp": "MULTI_CPU", "fsd": "FSDP", "dee": "DEEPSPEED"}[setup[:3]]
    assert kind == wanted, kind
    return made


@torch.no_grad()
def whole(trainer: Any) -> list[Tensor]:
    """Copies of the full parameters, as they are trained."""
    found = []
    for p in trainer.model_wrapped.parameters():
        if isinstance(p, DTensor):
            p = p.full_tensor()
        elif hasattr(p, "_hp_mapping") or hasattr(p, "ds_tensor"):
            import deepspeed

            p = deepspeed.utils.safe_get_full_fp32_param(p)
        found.append(p.detach().clone())
    return found


def error(ours: list[Tensor], expected: list[Tensor]) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, expected, strict=True))


def _quiet_deepspeed() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed 0.19.8 uses names of torch that 2.13 deprecates, in every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed.ops
        import deepspeed.runtime.zero.muon.muon_optimizer  # compiles at import, with names that torch deprecates

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # built for a minute, and not used
