"""DeepSpeed ZeRO-1, 2 and 3: its engine runs the model and hands flat partitions to distopt's optimizer."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from distopt import layout
from distopt.engine.base import Engine, check_switch
from distopt.sam import SAM
from distopt.sam.backup import Backup


class DeepSpeed(Engine):
    """DeepSpeed's engine with distopt's optimizer as its client optimizer.

    Gradients, partitions, clipping and low precision are DeepSpeed's; the update is distopt's, with norms of whole
    layers although the partitions cut them anywhere. DeepSpeed gives a parameter that was not used a gradient of zeros,
    where others give it none: its state decays. bf16 weights have float32 masters, in the partitions. Every rank builds
    the whole model before DeepSpeed cuts it up.

    Args: precision and activation_checkpointing as `Engine`, and
        stage: what is sharded: 1 state, 2 gradients too, 3 parameters too.
        offload: keep the optimizer's state and step it on the host.

    Raises ValueError for another stage, and where DeepSpeed is not installed.
    """

    def __init__(
        self,
        stage: int,
        precision: str = "auto",
        activation_checkpointing: bool = False,
        offload: bool = False,
    ) -> None:
        super().__init__(precision, activation_checkpointing)
        if stage not in (1, 2, 3):
            raise ValueError(f"engine.stage must be 1, 2 or 3, got {stage!r}; stage 0 is engine=ddp")
        if find_spec("deepspeed") is None:
            raise ValueError("engine=deepspeed_zero*: DeepSpeed is not installed: pip install 'distopt[deepspeed]'")
        check_switch("offload", offload)
        self.stage = stage
        self.offload = offload
        self._ascended = True  # whether SAM's first gradient was finite

    def check_sam(self, sam: SAM) -> None:
        if type(sam) is not SAM or sam.scope == "local":
            raise ValueError(
                f"{type(sam).__name__} with scope={sam.scope} does not run under DeepSpeed, which owns the gradients: "
                "only SAM with scope=global does; use engine=zero1 or fsdp2"
            )
        if any(sam.radius(group) == 0.0 for group in sam.param_groups):
            raise ValueError(
                "a param group has sam_rho=0, which takes it out of SAM's norm; under DeepSpeed that is the norm which "
                "DeepSpeed has of all gradients: use engine=zero1 or fsdp2"
            )

    def build(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        fill: Callable[[nn.Module, torch.device], None],
        device: torch.device,
    ) -> nn.Module:
        for unit in (*blocks, model):
            fill(unit, device)
        self._checkpoint_activations(model)
        return model

    def attach(self, model: nn.Module, optimizer: Any, accumulation: int, max_grad_norm: float) -> nn.Module:
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it says that it has found out by itself
        os.environ.setdefault("LOCAL_RANK", "0")  # one process without a launcher
        # DeepSpeed 0.19.8 uses names of torch that 2.13 deprecates, in every step.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
            import deepspeed.ops

            logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
            # DeepSpeed 0.19.8 builds this op for a minute, with ninja and g++, and training never uses it.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=self._config(accumulation, max_grad_norm)
            )
        # In float32 stages 1 and 2 of DeepSpeed 0.19.8 step with gradients that are not finite unless told to look.
        engine.optimizer.check_grad_overflow = True
        optimizer.bind(layout.deepspeed_layout(engine))
        return engine

    def zero_grad(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        # 0.19.8 overwrites the gradients of parameters that are used, and steps with those of others again (stage 3,
        # and offload). With offload it needs the buffers, which the optimizer's own zero_grad would drop.
        zero: Any = model.optimizer
        if self.stage == 3:
            zero.grad_partitions_flat_buffer.zero_()
        for flat in zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups:
            if flat.grad is not None:
                flat.grad.zero_()

    def sync(self, model: Any, last: bool) -> contextlib.AbstractContextManager[None]:
        model.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, model: Any, loss: Tensor) -> None:
        model.backward(loss, scale_wrt_gas=False)

    def step(self, model: Any, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> tuple[float, bool]:
        if not isinstance(optimizer, SAM):
            model.step()
        elif self._ascended:
            model.step()
            if model.was_step_applied():
                optimizer.count_step()
            else:
                optimizer.layout.show()  # the weights that the model computes with are still the perturbed ones
        else:  # the first gradient was not finite: this step moves nothing
            with _stepping_by(optimizer.optimizer, lambda: None):
                model.step()
        applied = model.was_step_applied() and self._ascended
        # DeepSpeed says -1 for a norm that is inf or nan.
        return (float(model.get_global_grad_norm()) if applied else math.nan), applied

    @contextlib.contextmanager
    def perturbed(self, model: Any, sam: SAM) -> Iterator[None]:
        """Perturbs by a step of DeepSpeed, which casts and gathers the perturbed weights as after any other.

        On exit the partitions are restored. The weights that the model computes with follow in the descent's step.
        """
        if not sam.ascends:
            yield
            return
        zero, buffers, flats = model.optimizer, Backup(sam.buffers_of_model()), Backup()

        def ascend() -> None:
            norm = float(zero._global_grad_norm)  # 0.19.8: over all partitions, known before the first is stepped
            for group in sam.param_groups:
                flats.add(group["params"])
                for flat in group["params"]:
                    flat.data.add_(flat.grad, alpha=sam.radius(group) / norm if norm > 0.0 else 0.0)

        try:
            with _unclipped(zero), _stepping_by(sam.optimizer, ascend):
                model.step()
            self._ascended = model.was_step_applied()
            # Masters start as bfloat16 values, which says nothing of later steps: the second ascent is measured.
            if self._ascended and not sam.measured and model.global_steps > 1:
                self._measure(sam, flats)
            yield
        except BaseException:
            buffers.restore()
            flats.restore()
            sam.layout.show()
            raise
        buffers.restore()
        flats.restore()

    def _measure(self, sam: SAM, flats: Backup) -> None:
        """The model computes with the partitions, rounded."""
        partitions = sam.layout
        after, before = partitions.weights(flats.tensors), partitions.shards(flats.tensors, flats.copies)
        sam.measure(partitions, partitions.layers(flats.tensors), before, after, (a - b for a, b in zip(after, before)))

    def unwrap(self, model: Any) -> nn.Module:
        return getattr(model, "module", model)

    def _config(self, accumulation: int, max_grad_norm: float) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.stage}
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        return {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only reports it: batches are cut before
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.0 if math.isinf(max_grad_norm) else max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
            "bf16": {"enabled": self.bf16},
            "steps_per_print": 10**9,
        }


@contextlib.contextmanager
def _unclipped(zero: Any) -> Iterator[None]:
    """DeepSpeed's steps do not clip for a while: it is SAM's second gradient that is clipped."""
    clip, zero.clip_grad = zero.clip_grad, 0.0
    try:
        yield
    finally:
        zero.clip_grad = clip


@contextlib.contextmanager
def _stepping_by(optimizer: Any, step: Callable[[], None]) -> Iterator[None]:
    """DeepSpeed's calls of `optimizer.step()` do something else for a while."""
    own = optimizer.__dict__.get("step")  # a schedule of torch wraps it
    groups, params = optimizer.param_groups, [group["params"] for group in optimizer.param_groups]
    optimizer.step = step
    try:
        yield
    finally:
        optimizer.param_groups = groups  # 0.19.8 exchanges them for each call, and leaves them so if that raises
        for group, own_params in zip(groups, params):
            group["params"] = own_params
        if own is None:
            del optimizer.step
        else:
            optimizer.step = own
