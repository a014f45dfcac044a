"""The interface of an engine: it joins the process group, builds the model, exchanges gradients and takes steps."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from distopt.bounds import PRECISION, switch
from distopt.engine.compiling import check_compiler, compile_blocks
from distopt.engine.group import accelerator_of
from distopt.layout import local
from distopt.optim.clip import Clip, step_clipped
from distopt.optim.observer import vetoed

if TYPE_CHECKING:
    from accelerate import Accelerator

    from distopt.sam import SAM


class Stepped(NamedTuple):
    """What a step did.

    Attributes:
        norm: The global gradient norm before clipping.
        applied: Whether weights moved.
        norms: Returns the gradient norm of each layer before clipping, by parameter; none where an engine hides them.
    """

    norm: float
    applied: bool
    norms: Callable[[], Mapping[Tensor, Tensor]] = dict


class Engine:
    """One way to run a model on several processes.

    An engine is configuration: the state of a run belongs to the model that `build` or `attach` returns, so that one
    engine may run several models.

    Args:
        precision: `fp32`; `bf16` computes in bfloat16 and keeps parameters, gradients and state in float32; `auto` is
            bf16 on GPUs that support it, else fp32.
        activation_checkpointing: Recompute each block's activations in the backward pass instead of storing them.
        compile: Compile each block by `torch.compile`, which takes a minute before the first step. Losses differ by
            rounding, since operations are fused: 1e-5 relative in float32.

    Attributes:
        bf16: Whether the model computes in bfloat16.
        offload: Whether the optimizer's state is kept, and updated, on the host.

    Raises:
        ValueError: An unknown precision, bf16 on a GPU without it, a switch that is not a boolean, or `compile` without
            a C++ compiler.
    """

    offload = False

    def __init__(self, precision: str = "auto", activation_checkpointing: bool = False, compile: bool = False) -> None:
        PRECISION.check("engine.precision", precision)
        switch().check("engine.activation_checkpointing", activation_checkpointing)
        switch().check("engine.compile", compile)
        if compile:
            check_compiler()
        self.compile = compile
        gpu = torch.cuda.is_available()
        if precision == "bf16" and gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ValueError(f"engine.precision=bf16: {torch.cuda.get_device_name()} has no bfloat16; use fp32")
        native = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        self.bf16 = precision == "bf16" or (precision == "auto" and native)
        self.activation_checkpointing = activation_checkpointing

    def start(self, timeout_minutes: float = 30.0) -> Accelerator:
        """Joins the processes that the launcher started.

        Args:
            timeout_minutes: How long a collective waits for the other ranks.

        Raises:
            ValueError: There are fewer GPUs than processes, `check` refuses their number, or Accelerate does not run
                all of them together.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        gpus = torch.cuda.device_count()
        if gpus and local > gpus:
            raise ValueError(f"{local} processes on a machine with {gpus} GPUs: launch with --num_processes {gpus}")
        self.check(world)
        return accelerator_of(world, self.backend, timeout_minutes)

    @property
    def backend(self) -> str:
        """The backend of the process group: NCCL with GPUs, gloo beside it for what is on the host, else gloo."""
        if not torch.cuda.is_available():
            return "gloo"
        return "cpu:gloo,cuda:nccl" if self.offload else "nccl"

    def check(self, world: int) -> None:
        """Raises ValueError if this engine cannot run on `world` processes."""

    def check_sam(self, sam: SAM) -> None:
        """Raises ValueError for a SAM that this engine cannot run."""

    def check_health(self) -> None:
        """Raises ValueError if this engine does not show the norms of layers to a `distopt.health.Monitor`."""

    def check_forward_only(self) -> None:
        """Raises ValueError if this engine cannot run `MeZO`, which moves the weights itself and has no gradients."""

    def check_noise_scale(self) -> None:
        """Raises ValueError if the gradient of a micro-batch cannot be read before those of others are added to it."""

    def small_batches(self, world: int) -> int:
        """Returns of how many ranks' micro-batches `small_square` measures the gradient."""
        return 1

    @torch.no_grad()
    def small_square(self, model: nn.Module) -> Tensor:
        """Returns a float64 scalar whose mean over the ranks is the mean of |g|^2 after the first micro-batch."""
        grads = [local(p.grad) for p in self.unwrap(model).parameters() if p.grad is not None]
        norms = torch._foreach_norm([g for g in grads if g.numel()], 2.0, torch.float32)
        return torch.stack(norms).double().square().sum() if norms else torch.zeros((), dtype=torch.float64)

    def build(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        fill: Callable[[nn.Module, torch.device], None],
        device: torch.device,
    ) -> nn.Module:
        """Fills a model on the meta device and wraps it for training.

        Args:
            model: The model, without values.
            blocks: The units to fill, and to shard, one at a time.
            fill: `fill(unit, device)` allocates a unit on the device and gives it its values.
            device: This rank's device.

        Returns:
            The wrapped model.
        """
        raise NotImplementedError

    def share(self) -> tuple[int, int]:
        """Returns the index of this process's rows of each parameter, and the number of shares; (0, 1) for all rows.

        `build` may leave values of other rows out of account.
        """
        return 0, 1

    def sync(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
        """Returns a context for the forward and backward pass of a micro-batch.

        Args:
            model: The wrapped model.
            last: Whether this is the last micro-batch of a step, after which gradients are exchanged.
        """
        raise NotImplementedError

    def attach(self, model: nn.Module, optimizer: Any, accumulation: int, max_grad_norm: float) -> nn.Module:
        """Gives the optimizer the layout of the model's parameters.

        Args:
            model: The model that `build` returned.
            optimizer: An optimizer of the model's parameters.
            accumulation: The number of micro-batches in a step.
            max_grad_norm: The norm to which gradients are clipped; inf for no clipping.

        Returns:
            The model to train with.
        """
        return model

    def zero_grad(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Clears the gradients."""
        optimizer.zero_grad()

    def backward(self, model: nn.Module, loss: Tensor) -> None:
        """Adds the gradient of a micro-batch's share of the loss to the gradients."""
        loss.backward()

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> Stepped:
        """Steps by the clipped gradients, which are lost.

        If the norm is inf or nan, or a monitor of the run's health skips the step, which is the same on all ranks,
        weights and state stay as they are, and so do the gradients, in which the layer can be found.
        """
        clip = Clip(optimizer, max_grad_norm)
        norm = float(clip.norm)
        applied = math.isfinite(norm) and not vetoed(optimizer)
        if norm <= max_grad_norm:
            clip.factor = 1.0  # known on the host, so that no rule has to multiply
        if applied:
            step_clipped(optimizer, clip, consumes_grads=True)
        return Stepped(norm, applied, clip.by_param)

    @contextlib.contextmanager
    def perturbed(self, model: nn.Module, sam: SAM) -> Iterator[None]:
        """Around the second pass of SAM; if that raises, the weights are as before."""
        try:
            with sam.perturbed():
                self.refresh(model)
                yield
        except BaseException:
            self.abort_pass(model)
            raise
        finally:
            self.refresh(model)

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """Returns a context for the forward pass."""
        return contextlib.nullcontext()

    def refresh(self, model: nn.Module) -> None:
        """Drops full copies of parameters that may be stale.

        Call it after parameters have changed, and after a forward pass without a backward pass.
        """

    def abort_pass(self, model: nn.Module) -> None:
        """Resets the model after a pass that raised, so that the next pass starts cleanly."""

    def unwrap(self, model: nn.Module) -> nn.Module:
        """Returns the model without its wrapper, as `transformers` created it."""
        return model

    def _checkpoint_activations(self, model: nn.Module) -> None:
        if self.activation_checkpointing:
            model.activation_checkpointing_enable()  # type: ignore[operator]

    def _compile(self, blocks: Sequence[nn.Module]) -> None:
        if self.compile:
            compile_blocks(blocks)
