"""DeepSpeed ZeRO-1, 2 and 3: its engine runs the model and gives flat partitions to distopt's optimizer."""

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
from distopt.bounds import STAGE, switch
from distopt.engine.base import Engine, Stepped
from distopt.layout import deepspeed_private as private
from distopt.sam import SAM
from distopt.sam.backup import Backup


class DeepSpeed(Engine):
    """DeepSpeed's engine with distopt's optimizer as its client optimizer.

    DeepSpeed does gradients, partitions, clipping and low precision; distopt does the update, with the norms of full
    layers although partitions may start and end inside of them. DeepSpeed gives an unused parameter a gradient of
    zeros, where other engines give it none: its state decays. bf16 weights have float32 masters, in the partitions.
    Every rank builds the full model before DeepSpeed shards it.

    Args:
        stage: What is sharded: 1 the state, 2 also the gradients, 3 also the parameters.
        precision: As in `Engine`.
        activation_checkpointing: As in `Engine`.
        offload: Keep the optimizer's state, and update it, on the host.

    Raises:
        ValueError: Any other stage, DeepSpeed is not installed, or as `Engine`.
    """

    def __init__(
        self,
        stage: int,
        precision: str = "auto",
        activation_checkpointing: bool = False,
        offload: bool = False,
    ) -> None:
        super().__init__(precision, activation_checkpointing)
        STAGE.check("engine.stage", stage, "stage 0 is engine=ddp")
        if find_spec("deepspeed") is None:
            raise ValueError("engine=deepspeed_zero*: DeepSpeed is not installed: pip install 'distopt[deepspeed]'")
        switch().check("engine.offload", offload)
        self.stage = stage
        self.offload = offload

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

    def check_health(self) -> None:
        raise ValueError(
            "a run under DeepSpeed, which hides gradients and reduces their norm on its own, cannot be watched: use "
            "engine=zero1 or fsdp2, or health=off"
        )

    def check_noise_scale(self) -> None:
        raise ValueError(
            "DeepSpeed hides the gradients of micro-batches, of which the noise scale is measured: use engine=zero1 or "
            "fsdp2, or train.noise_scale=null"
        )

    def check_forward_only(self) -> None:
        raise ValueError("DeepSpeed owns the weights, which MeZO moves itself: use engine=ddp or fsdp2")

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
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed logs that it has detected this itself
        os.environ.setdefault("LOCAL_RANK", "0")  # one process without a launcher
        # DeepSpeed 0.19.8 uses names of torch that 2.13 deprecates, in every step.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
            import deepspeed.ops

            logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
            private.skip_shared_memory_op(deepspeed.ops)
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=self._config(accumulation, max_grad_norm)
            )
        private.check_overflow_always(engine.optimizer)
        engine.ascent_applied = True  # of this model's run, not of the engine's configuration
        optimizer.bind(layout.deepspeed_layout(engine))
        return engine

    def zero_grad(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        private.zero_gradients(model.optimizer, self.stage)

    def sync(self, model: Any, last: bool) -> contextlib.AbstractContextManager[None]:
        model.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, model: Any, loss: Tensor) -> None:
        model.backward(loss, scale_wrt_gas=False)

    def step(self, model: Any, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> Stepped:
        if not isinstance(optimizer, SAM):
            model.step()
        elif model.ascent_applied:
            model.step()
            if model.was_step_applied():
                optimizer.count_step()
            else:
                optimizer.layout.update_model()  # the weights that the model computes with are still the perturbed ones
        else:  # the first gradient was not finite: this step moves nothing
            with _stepping_by(optimizer.optimizer, lambda: None):
                model.step()
        applied = model.was_step_applied() and model.ascent_applied
        # DeepSpeed returns -1 for a norm that is inf or nan.
        return Stepped(float(model.get_global_grad_norm()) if applied else math.nan, applied)

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
            norm = private.global_grad_norm(zero)
            for group in sam.param_groups:
                flats.add(group["params"])
                for flat in group["params"]:
                    flat.data.add_(flat.grad, alpha=sam.radius_now(group) / norm if norm > 0.0 else 0.0)

        try:
            with private.unclipped(zero), _stepping_by(sam.optimizer, ascend):
                model.step()
            model.ascent_applied = model.was_step_applied()
            # Masters start as bfloat16 values, which says nothing of later steps: the second ascent is measured.
            if model.ascent_applied and not sam.measured and model.global_steps > 1:
                self._measure(sam, flats)
            yield
        except BaseException:
            buffers.restore()
            flats.restore()
            sam.layout.update_model()
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
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only reports it: the batch is split already
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.0 if math.isinf(max_grad_norm) else max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
            "bf16": {"enabled": self.bf16},
            "steps_per_print": 10**9,
        }


@contextlib.contextmanager
def _stepping_by(optimizer: Any, step: Callable[[], None]) -> Iterator[None]:
    """Replaces `optimizer.step()`, which DeepSpeed calls, inside of the block."""
    own = optimizer.__dict__.get("step")  # a schedule of torch wraps it
    groups, params = optimizer.param_groups, [group["params"] for group in optimizer.param_groups]
    optimizer.step = step
    try:
        yield
    finally:
        optimizer.param_groups = groups  # 0.19.8 replaces them for each call, and does not restore them if that raises
        for group, own_params in zip(groups, params):
            group["params"] = own_params
        if own is None:
            del optimizer.step
        else:
            optimizer.step = own
