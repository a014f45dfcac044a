"""Mixins for the Trainer of transformers, on one process and under DDP, FSDP2 and DeepSpeed."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from distopt.engine.fsdp2 import leave_pass
from distopt.integrations.accelerate.attach import attach_ddp, attach_deepspeed, check_processes
from distopt.integrations.accelerate.sam import attach_sam, sam_of
from distopt.layout import unwrap_optimizer
from distopt.layout.fsdp2 import reshard
from distopt.optim.averaging import eval_mode
from distopt.optim.mixed import MixedOptimizer
from distopt.optim.param_groups import param_groups
from distopt.rng import RandomState, random_state
from distopt.sam import SAM
from distopt.sam.two_passes import Pass, two_passes

# These of TRL 1.16 wrap the Trainer's training_step in a context that leaves no trace (offloaded activations).
_SAME_IN_BOTH_PASSES = (
    "trl.trainer.sft_trainer.SFTTrainer",
    "trl.trainer.reward_trainer.RewardTrainer",
    "trl.trainer.dpo_trainer.DPOTrainer",
    "trl.trainer.kto_trainer.KTOTrainer",
)


class ShardedTrainerMixin:
    """Binds distopt's optimizers to the layout that the Trainer gives the model, so that they step and resume rightly.

        class Trainer(ShardedTrainerMixin, transformers.Trainer): pass

        Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=(distopt.LAMB, {"lr": 2e-3}))

    DeepSpeed: binds the layout of its partitions, without which a step raises ValueError. FSDP2: creates all state
    before a checkpoint is loaded, since torch fills only existing state. DDP: its processes share the matrices of Muon;
    other optimizers, and one process, need nothing. Works with any subclass of the Trainer, including TRL's.

    `distopt.Muon` gets the param groups of `distopt.param_groups(model, matrices="muon")`, with the `weight_decay` of
    its own arguments or else of the TrainingArguments, unless its arguments have `params`.

    Raises:
        ValueError: If DeepSpeed's optimizer is SAM or not distopt's, and if several processes were launched, each of
            which would train on its own.
    """

    optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None  # the Trainer's
    _starts = False  # whether the next pass is the first one of `train`

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Overrides the Trainer's, whose two groups, with and without decay, say nothing of matrices."""
        kind, options = self.optimizer_cls_and_kwargs or (None, {})
        missing = self.optimizer is None and "params" not in options  # type: ignore[attr-defined]
        if missing and isinstance(kind, type) and issubclass(kind, MixedOptimizer):
            decay: Any = options.get("weight_decay", self.args.weight_decay)  # type: ignore[attr-defined]
            groups = param_groups(model or self.model, decay, matrices=kind.own)  # type: ignore[attr-defined]
            self.optimizer_cls_and_kwargs = kind, options | {"params": groups}
        made: torch.optim.Optimizer = super().create_optimizer(model)  # type: ignore[misc]
        return made

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Overrides the Trainer's, which calls it after preparing the optimizer and before loading a checkpoint."""
        check_processes(self.accelerator)  # type: ignore[attr-defined]
        wrapped = getattr(self.accelerator, "deepspeed_engine_wrapped", None)  # type: ignore[attr-defined]
        if wrapped is not None:
            attach_deepspeed(wrapped.engine, None)
        elif self.is_fsdp_enabled:  # type: ignore[attr-defined]
            inner = unwrap_optimizer(self.optimizer, lambda inner: hasattr(inner, "init_state"))  # type: ignore[attr-defined]
            if hasattr(inner, "init_state"):
                inner.init_state()
        self._starts = True
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Overrides the Trainer's, whose first call is the first that has the model in DDP."""
        if self._starts:
            attach_ddp(model, self.optimizer)  # type: ignore[attr-defined]
            self._starts = False
        loss: Tensor = super().training_step(model, *args, **kwargs)  # type: ignore[misc]
        return loss

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Overrides the Trainer's: saves the weights that a schedule-free optimizer evaluates."""
        eval_mode(self.optimizer)  # type: ignore[attr-defined]  # and the next training_step calls train()
        super().save_model(*args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # The Trainer's own (transformers 5): weights and state are saved in the same mode.
        eval_mode(self.optimizer)  # type: ignore[attr-defined]
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Overrides the Trainer's: frees what FSDP2 has gathered, before a schedule-free optimizer moves weights."""
        output = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        reshard(self.model)  # type: ignore[attr-defined]
        return output


class SAMTrainerMixin(ShardedTrainerMixin):
    """Gives a Trainer both passes of SAM: over the same micro-batches, with the same random numbers.

        class SAMTrainer(SAMTrainerMixin, transformers.Trainer): pass

        trainer = SAMTrainer(model, args, train_dataset=data, sam=partial(distopt.SAM, rho=0.05),
                             optimizer_cls_and_kwargs=(distopt.LAMB, {"lr": 2e-3}))

    The second pass runs after the last micro-batch of a step, before the Trainer clips, logs the gradient norm and
    steps: all of these use its gradient. Works on one process, under DDP and under FSDP2. A step with loss scaling
    (fp16) that overflows in either pass is skipped, as without SAM. The statistics of batch norm are those of the first
    pass. If a pass raises, the weights are restored; between micro-batches they are unperturbed. The second pass does
    not change the Trainer's own counts and metrics (`self.count += 1`, TRL's `_metrics`), so that nothing is counted
    twice. Includes everything that `ShardedTrainerMixin` does.

    A subclass may override `compute_loss`. One that overrides `training_step` or `_prepare_inputs`, which may keep
    state between calls, is refused, unless it sets the class attribute `same_in_both_passes = True`: these methods
    compute the same when called again with the same micro-batch. Those of TRL's SFT, Reward, DPO and KTO trainers do.

    Args:
        args: The arguments of the Trainer.
        sam: Wraps the optimizer in SAM; None trains without SAM.
        kwargs: The keyword arguments of the Trainer.

    Raises:
        ValueError: Under DeepSpeed, since Accelerate steps inside its backward pass; for FriendlySAM with fp16; for
            scope=local under FSDP2; and for a Trainer whose passes may differ (TRL's GRPO, RLOO and others that
            generate).
    """

    same_in_both_passes = False

    def __init__(self, *args: Any, sam: Callable[[torch.optim.Optimizer], SAM] | None = None, **kwargs: Any) -> None:
        self._make_sam = sam
        self._sam: SAM | None = None
        self._batches: list[Any] = []
        self._start: RandomState = random_state()
        if sam is not None:
            self._check_passes()
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Wraps the Trainer's optimizer in SAM."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._make_sam is not None and sam_of(optimizer) is None:
            optimizer = self.optimizer = self._make_sam(optimizer)
        attach_sam(self.accelerator, self.model, optimizer)  # type: ignore[attr-defined]
        self._sam = sam_of(optimizer)
        if self._sam is not None:
            self._check_passes()
        return optimizer

    def _check_passes(self) -> None:
        """Raises ValueError if a second pass over a micro-batch might not be the same computation."""
        kinds = type(self).__mro__
        inner = kinds[kinds.index(SAMTrainerMixin) + 1 :]  # what runs in each pass
        for kind, names in [(kind, ("training_step", "_prepare_inputs")) for kind in inner] + [
            (kind, ("_prepare_inputs",)) for kind in kinds if kind not in inner
        ]:
            path = f"{kind.__module__}.{kind.__qualname__}"
            known = kind is ShardedTrainerMixin or path.startswith("transformers.") or path in _SAME_IN_BOTH_PASSES
            if self.same_in_both_passes or known:
                continue
            if own := [name for name in names if name in vars(kind)]:
                raise ValueError(
                    f"{kind.__name__} has its own {own[0]}, which SAM's second pass would call again, at perturbed "
                    "weights, and which may count or generate anew, as that of TRL's GRPO does: train without sam, or "
                    "set the class attribute same_in_both_passes = True if it keeps no state between calls"
                )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of a step, remembered for the second pass."""
        batches, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self._batches = batches
        return batches, items

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's, and after the last micro-batch of a step SAM's second pass over all of them."""
        sam = self._sam
        if sam is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if inputs is self._batches[0]:
            self._start = random_state(self.args.device)  # type: ignore[attr-defined]
        step = super().training_step

        def run_pass(this: Pass) -> Tensor:
            if this.second:
                with _unrecorded(self):
                    return self._second_pass(model, num_items_in_batch)
            with contextlib.nullcontext() if this.exchange else self.accelerator.no_sync(model):  # type: ignore[attr-defined]
                loss: Tensor = step(model, inputs, num_items_in_batch)
            return loss

        try:
            # MomentumSAM perturbs around each micro-batch: between them the Trainer shows the weights to callbacks.
            return two_passes(
                sam,
                run_pass,
                self._start,
                perturbed=lambda: _perturbed(sam, model),
                complete=lambda: self.accelerator.sync_gradients,  # type: ignore[attr-defined]
            )
        except BaseException:
            leave_pass(model)
            reshard(model)
            raise

    def _second_pass(self, model: nn.Module, num_items_in_batch: Any) -> Tensor:
        model.zero_grad()
        *others, last = self._batches
        for batch in others:
            with self.accelerator.no_sync(model):  # type: ignore[attr-defined]
                super().training_step(model, batch, num_items_in_batch)
        loss: Tensor = super().training_step(model, last, num_items_in_batch)
        return loss


@contextlib.contextmanager
def _perturbed(sam: SAM, model: nn.Module) -> Iterator[None]:
    """`sam.perturbed` for a model under FSDP2, which drops its stale unsharded parameters."""
    with sam.perturbed():
        reshard(model)
        yield
    reshard(model)


@contextlib.contextmanager
def _unrecorded(trainer: Any) -> Iterator[None]:
    """A block that leaves no trace in a Trainer's own numbers, and in its dictionaries of metrics.

    TRL's trainers add to `_metrics` and `_total_train_tokens` (1.16) whenever they compute a loss.
    """
    own = vars(trainer)
    kept = {name: value for name, value in own.items() if type(value) in (int, float) or _holds_metrics(name, value)}
    own.update({name: copy.deepcopy(value) for name, value in kept.items()})
    try:
        yield
    finally:
        own.update(kept)


def _holds_metrics(name: str, value: object) -> bool:
    return isinstance(value, dict) and "metrics" in name
