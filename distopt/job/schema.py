"""The schema of the configuration: type, bound and meaning of every key of conf/.

Errors (`distopt.job.check`), `--help` and docs/configuration.md (`distopt.job.reference`) come from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from distopt import bounds
from distopt.bounds import POSITIVE, Bound, choice, integer, number, or_null, switch, text, texts
from distopt.bounds.evaluation import EARLY_STOPPING as EARLY
from distopt.bounds.evaluation import PROMPTS
from distopt.bounds.health import BOUNDS as HEALTH
from distopt.bounds.health import NOISE_DECAY
from distopt.bounds.optimizer import AVERAGE, BOUNDS, RHO_FACTORS
from distopt.data.batch_sizes import SCHEDULE as BATCHES
from distopt.job.key import Key
from distopt.job.model_keys import MODEL_KEYS
from distopt.job.optimizer_keys import OPTIMIZER_KEYS


def _is_name(value: object) -> bool:
    parts = PurePath(value).parts if isinstance(value, str) else ()
    return bool(parts) and ".." not in parts


SECTIONS = {
    "train": "the steps",
    "evaluation": "the validation loss and the sample",
    "checkpoint": "what is saved",
    "optimizer": "the update rule",
    "param_groups": "which parameters get which options",
    "sam": "sharpness-aware minimization; `sam=off` for none",
    "average": "an average of the weights over the steps; `average=none` for none",
    "health": "the norms of layers in every step, with alarms; `health=off` for none",
    "schedule": "the learning rate over the steps, as a factor of `optimizer.lr`",
    "engine": "how model, gradients and state are distributed",
    "model": "the language model",
    "init": "the first values of the weights; `init=family` for those of transformers",
    "adapter": "parameter-efficient fine-tuning; `adapter=none` for none",
    "data": "the text",
    "loss": "what is minimized, a sum over tokens of what their logits give; one of your own by its `_target_`",
    "early_stopping": "the end of a run that no longer improves; `early_stopping=off` for none",
    "cluster": "the hardware of a plan",
}
OPTIONAL = ("sam", "adapter", "health", "init", "average", "early_stopping")

STEP_OR_SHARE = Bound(
    "a step >= 0, or a fraction in [0.0, 1.0] of train.steps",
    lambda value: integer(0).accepts(value) or (isinstance(value, float) and 0.0 <= value <= 1.0),
)

SCHEMA: dict[str, Key] = {
    "name": Key(
        Bound("the name of a folder below runs/", _is_name),
        "of `runs/NAME`; an older run there is moved aside",
    ),
    "seed": Key(bounds.SEED, "seed of the data order, of dropout and of the first values"),
    "lr_scale": Key(POSITIVE, "factor on `optimizer.lr`, to sweep around each optimizer's own"),
    "trackers": Key(
        or_null(texts("names such as [tensorboard, wandb],", one=True)), "Accelerate's experiment trackers"
    ),
    "callbacks": Key(bounds.CALLBACKS, "what is called after steps, evaluations and checkpoints, by its `_target_`"),
    "nodes": Key(integer(1), "machines"),
    "gpus_per_node": Key(integer(1), "GPUs of each machine"),
    "vocabulary": Key(integer(1), "tokens in the vocabulary"),
    "sequence_length": Key(integer(1), "tokens in a sequence"),
    "micro_batch_size": Key(integer(1), "sequences in one forward pass of a GPU"),
    "accumulation": Key(integer(1), "forward passes of a GPU in a step"),
    "train.steps": Key(or_null(integer(1)), "optimizer steps in all; null if `train.epochs` says how many"),
    "train.epochs": Key(
        or_null(POSITIVE), "passes over the training sequences, or a fraction of one; null if `train.steps` says"
    ),
    "train.batch_size": Key(integer(1), "sequences per step, over all processes"),
    "train.batch_schedule": Key(
        BATCHES, "sequences per step from a step on, as {1000: 64, 3000: 128}; null: `train.batch_size` at every step"
    ),
    "train.noise_scale": Key(
        or_null(NOISE_DECAY), "measure the gradient noise scale: decay rate of its means, as 0.99; null: do not"
    ),
    "train.micro_batch_size": Key(
        or_null(integer(1)), "sequences in one forward pass of a process; null: its whole share, without accumulation"
    ),
    "train.sequence_length": Key(integer(1), "tokens in a sequence"),
    "train.max_grad_norm": Key(
        or_null(POSITIVE), "bound of the global gradient norm; null: measure it without clipping"
    ),
    "train.prove_every": Key(
        bounds.PROVE_EVERY,
        "steps between two proofs that the processes agree; null: only before the first step, 0: never",
    ),
    "train.on_drift": Key(
        choice("stop", "heal"),
        "what to do if a proof finds that replicas have drifted apart; heal: from the majority, if there is one",
    ),
    "train.lr_range_test": Key(
        or_null(integer(3)), "steps of a learning-rate range test before the training, which it leaves as it is"
    ),
    "train.max_skipped_steps": Key(integer(1), "stop after so many steps in a row without a finite gradient"),
    "train.resume": Key(
        text("never, auto, or a checkpoint's folder", empty=False),
        "never; auto: the newest complete checkpoint of this run, if any; or a checkpoint's folder",
    ),
    "train.init": Key(
        or_null(text("a folder", empty=False)),
        "start from another run: its folder or a checkpoint's, for the weights and the optimizer state; null: anew",
    ),
    "train.init_state": Key(switch(), "false: from the weights of `train.init` alone, as for another optimizer"),
    "train.timeout_minutes": Key(number(0.1, 525600), "how long a process waits for the others before it gives up"),
    "evaluation.every": Key(integer(1), "steps between evaluations; also before the first and after the last step"),
    "evaluation.average": Key(
        or_null(switch()),
        "evaluate, and sample from, the average of the weights; null: if there is one; false: the weights themselves",
    ),
    "evaluation.max_sequences": Key(or_null(integer(1)), "validation sequences; null: all"),
    "evaluation.prompt": Key(text(), "what the sample at the end continues", "quote it twice, as '\"5\"'"),
    "evaluation.generate": Key(
        or_null(PROMPTS),
        "prompts that the model continues at evaluations: a file, or a list; with answers, `exact_match` is measured",
    ),
    "evaluation.generate_every": Key(integer(1), "evaluations between two of which it does"),
    "evaluation.generate_tokens": Key(integer(1), "the largest number of tokens that it writes after each"),
    "evaluation.temperature": Key(number(0), "the temperature of their sampling; 0: the most likely token"),
    "evaluation.sample_tokens": Key(integer(0), "tokens of the sample; 0: none"),
    "checkpoint.every": Key(integer(1), "steps between checkpoints; also after the last step"),
    "checkpoint.keep": Key(integer(1), "checkpoints to keep, the newest ones, beside those of the next two keys"),
    "checkpoint.keep_every": Key(or_null(integer(1)), "checkpoints whose step is a multiple of this stay for good"),
    "checkpoint.best": Key(
        or_null(choice("validation_loss")), "the checkpoint with the least one stays, under the name checkpoints/best"
    ),
    "checkpoint.asynchronous": Key(switch(), "write in the background, from a copy of the local shards in host memory"),
    **OPTIMIZER_KEYS,
    "param_groups.weight_decay": Key(
        BOUNDS["weight_decay"], "weight decay of matrices and embeddings; biases and norms have none"
    ),
    "param_groups.overrides": Key(
        bounds.OVERRIDES,
        "options of the parameters whose name a regular expression is found in, as {wte: {lr: 1e-4}}",
    ),
    "param_groups.independent_decay": Key(
        switch(), "decay by `weight_decay` times the schedule's factor, whatever the learning rate; AdamW only"
    ),
    "sam.rho": Key(POSITIVE, "radius of the neighbourhood", "leave SAM out for rho = 0"),
    "sam.interval": Key(integer(1), "perturb at every so many steps"),
    "sam.scope": Key(bounds.SCOPE, "perturb by the global gradient or each process by its own"),
    "sam.start": Key(STEP_OR_SHARE, "the first step that perturbs; a fraction such as 0.8 is one of `train.steps`"),
    "sam.stop": Key(or_null(STEP_OR_SHARE), "the first step that no longer perturbs, likewise; null: never"),
    "sam.rho_schedule": Key(
        RHO_FACTORS, "factors of rho by step, with straight lines between them, as {0: 0.0, 1000: 1.0}; null: 1"
    ),
    "sam.eta": Key(number(0), "added to |parameter| in ASAM's scale"),
    "sam.sigma": Key(number(0, 1), "how much of the mean gradient is removed from the perturbation"),
    "sam.decay": Key(number(0, 1), "decay rate of the mean gradient"),
    "sam.alpha": Key(number(0), "weight of the gap's gradient (GSAM), or of the remembered gradient (LookSAM)"),
    "sam.precondition": Key(switch(), "perturb along the gradient as Adam scales it"),
    "sam.eps": Key(POSITIVE, "added to the denominator of Adam's scale"),
    "average.decay": Key(AVERAGE["decay"], "decay rate of the exponential moving average of the weights"),
    "average.window": Key(AVERAGE["window"], "snapshots of the weights whose mean is the latest weight average"),
    "average.every": Key(AVERAGE["every"], "steps between two snapshots"),
    "early_stopping.metric": Key(EARLY["metric"], "the metric of an evaluation, by its name in metrics.jsonl"),
    "early_stopping.patience": Key(EARLY["patience"], "evaluations in a row without an improvement that end the run"),
    "early_stopping.min_delta": Key(EARLY["min_delta"], "the least change of the metric that is an improvement"),
    "early_stopping.mode": Key(EARLY["mode"], "min for a metric that falls, max for one that rises"),
    "health.action": Key(HEALTH["action"], "what to do about a spike: reload loads the last checkpoint"),
    "health.threshold": Key(HEALTH["threshold"], "deviations above the running mean of a layer that are a spike"),
    "health.decay": Key(HEALTH["decay"], "decay rate of the running statistics"),
    "health.warmup": Key(HEALTH["warmup"], "steps before a layer can have a spike"),
    "health.depth_factor": Key(HEALTH["depth_factor"], "factor over the whole depth that is vanishing or exploding"),
    "health.dead_steps": Key(HEALTH["dead_steps"], "steps in a row without gradient after which a layer is dead"),
    "health.copy_every": Key(HEALTH["copy_every"], "steps between copies in host memory, for action=rollback"),
    "health.max_rollbacks": Key(HEALTH["max_rollbacks"], "rollbacks and reloads after which the run ends"),
    "schedule.warmup_steps": Key(integer(0), "steps of linear warmup"),
    "schedule.decay_steps": Key(integer(1), "last steps, in which the factor falls"),
    "schedule.final_lr_ratio": Key(bounds.RATIO, "factor at the last step"),
    "engine.precision": Key(
        bounds.PRECISION, "of the computation; parameters and state stay in float32; auto: bf16 on GPUs"
    ),
    "engine.activation_checkpointing": Key(switch(), "recompute each block's activations in the backward pass"),
    "engine.compile": Key(switch(), "compile each block by torch.compile; not under DeepSpeed"),
    "engine.find_unused_parameters": Key(switch(), "for models that leave out parameters in some steps"),
    "engine.reduce_dtype": Key(bounds.REDUCE_DTYPE, "in which gradients are sent; null: their own dtype"),
    "engine.overlap_gather": Key(
        switch(), "gather updated shards during the next forward pass, which waits for them block by block"
    ),
    "engine.param_dtype": Key(
        bounds.PARAM_DTYPE, "bf16: weights and gradients in bfloat16, with sharded float32 masters; null: float32"
    ),
    "engine.reshard_after_forward": Key(switch(), "free gathered parameters between forward and backward"),
    "engine.replicas": Key(integer(1), "groups of processes that each have the full model between them"),
    "engine.sync_each_batch": Key(switch(), "false: full gradients until the last micro-batch, for less communication"),
    "engine.unit_mib": Key(
        or_null(integer(0)),
        "MiB of weights that are gathered together; 0: one block; null: 16, or 1/4 for each process if that is more",
    ),
    "engine.stage": Key(bounds.STAGE, "DeepSpeed's ZeRO stage"),
    "engine.offload": Key(switch(), "keep and update the optimizer's state on the host"),
    **MODEL_KEYS,
}

# What Hydra reads in a section with a target.
HYDRA: dict[str, Key] = {
    "_target_": Key(text("the import path of a class or function", empty=False), "what the section makes"),
    "_partial_": Key(switch(), "make it later, with what the program adds"),
    "_convert_": Key(choice("all"), "lists and dictionaries as Python's own"),
    "_recursive_": Key(switch(), "make nested targets first"),
}


def keys_of(section: str) -> Iterator[str]:
    """The names of the keys of a section; of the top level, which is the empty section, without the sections."""
    for name in SCHEMA:
        head, _, tail = name.rpartition(".")
        if head == section:
            yield tail


def find(section: str, name: str) -> Key | None:
    """The key of a section, None for an unknown one."""
    return HYDRA.get(name) or SCHEMA.get(f"{section}.{name}" if section else name)


def is_ours(section: Any) -> bool:
    """Whether a section has no target or one of distopt's; somebody's own class has keys of its own."""
    return str(section.get("_target_", "distopt.")).startswith("distopt.")
