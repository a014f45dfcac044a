"""Training runs with bad input: one line on every rank."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.harness import jobs
from tests.harness.cells import some
from tests.harness.jobs import overrides
from tests.harness.runs import OPTIMIZERS, not_one_line

REFUSED: dict[str, tuple[str, ...]] = {  # words added to the command: what the one line has to hold
    "optimizer.lr=-1": ("lr must be a number >= 0, got -1",),
    "optimizer.lr=nan": ("lr must be a number >= 0, got nan",),
    "optimizer.lr=abc": ("lr must be a number >= 0, got 'abc'",),
    "optimizer.betas=[0.9,1.0]": ("betas must be two numbers in [0, 1), got [0.9, 1.0]",),
    "optimizer.weight_decay=-1": ("weight_decay must be a number >= 0, got -1",),
    "+optimizer.lrr=1": ("nothing reads optimizer.lrr: did you mean lr?",),
    "sam=on sam.rho=-1": ("rho must be a number > 0, got -1", "leave SAM out"),
    "schedule.warmup_steps=12": (
        "schedule.warmup_steps must be less than train.steps = 12, got 12",
        "shorten the warmup",
    ),
    "schedule.final_lr_ratio=3": ("schedule.final_lr_ratio must be a number in [0, 1], got 3",),
    "train.steps=0": ("train.steps must be an integer >= 1 or null, got 0",),
    "train.steps=1.5": ("train.steps must be an integer >= 1 or null, got 1.5",),
    "train.batch_size=7": ("train.batch_size=7 is not a multiple of the 2 processes",),
    "train.micro_batch_size=3": ("train.micro_batch_size=3 does not divide the 4 sequences",),
    "train.micro_batch_size=abc": ("train.micro_batch_size must be an integer >= 1 or null, got 'abc'",),
    "train.max_grad_norm=0": ("train.max_grad_norm must be a number > 0 or null, got 0",),
    "train.prove_every=-1": ("train.prove_every must be an integer >= 0 or null, got -1",),
    "train.max_skipped_steps=0": ("train.max_skipped_steps must be an integer >= 1, got 0",),
    "train.timeout_minutes=abc": ("train.timeout_minutes must be a number in [0.1, 525600], got 'abc'",),
    "train.sequence_length=65": ("train.sequence_length=65 is longer than the model's 64 positions", "shorten it"),
    "train.sequence_length=99999": ("train has", "one sequence needs sequence_length + 1 = 100000", "give more text"),
    "train.resume=nowhere": ("train.resume=nowhere: no such folder", "give never, auto"),
    "train.resume=cache": ("train.resume=cache: cache is not a complete checkpoint", "manifest.json"),
    "evaluation.every=0": ("evaluation.every must be an integer >= 1, got 0",),
    "evaluation.sample_tokens=-1": ("evaluation.sample_tokens must be an integer >= 0, got -1",),
    "evaluation.prompt=5": ("evaluation.prompt must be text, got 5", "quote it"),
    "checkpoint.every=0": ("checkpoint.every must be an integer >= 1, got 0",),
    "checkpoint.keep=0": ("checkpoint.keep must be an integer >= 1, got 0",),
    "seed=-1": ("seed must be an integer >= 0, got -1",),
    "seed=abc": ("seed must be an integer >= 0, got 'abc'",),
    "name=": ("name must be the name of a folder below runs/, got ''",),
    "name=..": ("name must be the name of a folder below runs/, got '..'",),
    "data.path=nowhere.txt": ("nowhere.txt does not exist", "give a file or folder"),
    "data.path=empty.txt": ("empty.txt contains no non-empty text file", "give another path"),
    "data.path=latin.txt": ("latin.txt is not UTF-8 at byte 3", "convert it"),
    "data.validation_fraction=2": ("data.validation_fraction must be a number in (0, 1), got 2",),
    "engine.precision=fp16": ("engine.precision must be one of auto, fp32, bf16, got 'fp16'",),
    "engine=hsdp engine.replicas=3": ("engine.replicas=3 does not divide the 2 processes", "choose a divisor of 2"),
    "engine=fsdp2 engine.replicas=0": ("engine.replicas must be an integer >= 1, got 0",),
    "trackers=[tensorbord]": ("trackers: unknown 'tensorbord', choose from", "tensorboard"),
    "trackers=nope": ("trackers: unknown 'nope', choose from",),
    "model.path=cache": ("model.path=cache: no config.json there", "save_pretrained"),
    "model.family=gtp2": ("model.family=gtp2 is no model type of transformers; gpt2 is one",),
    "model.config.n_layer=abc": ("model.config: ", "'n_layer' expected int, got str (value: 'abc')"),
    "model.config.n_head=3": ("`embed_dim` must be divisible by num_heads", "16", "3"),
    "model.config.vocab_size=9": ("the data has 256 tokens, model.config.vocab_size=9 is less: leave it out",),
    "model.family=mixtral model.config={num_hidden_layer:2}": (
        "model.config.num_hidden_layer: MixtralConfig has no such option: did you mean num_hidden_layers?",
    ),
    "model.config.n_iner=64": ("model.config.n_iner: GPT2Config has no such option: did you mean n_inner?",),
    "param_groups.overrides={wqe:{lr:1}}": ("no trainable parameter matches the override 'wqe'",),
    "param_groups.overrides={wte:{lr:-1}}": ("lr must be a number >= 0, got -1",),
    "param_groups.overrides={wte:{learning_rate:1}}": ("has the option 'learning_rate'", "did you mean 'lr'?"),
    "param_groups.overrides={wte:3}": (
        "overrides must be options by pattern, such as {wte: {lr: 1e-4}}, or null, got {'wte': 3}",
    ),
    "param_groups.weight_decay=abc": ("weight_decay must be a number >= 0, got 'abc'",),
    "param_groups=null": (
        "param_groups must be options by name, got None; to decay nothing, set optimizer.weight_decay=0",
    ),
    "train.resume=null": ("train.resume must be never, auto, or a checkpoint's folder, got None",),
    "name=null": ("name must be the name of a folder below runs/, got None",),
    "data.path=": ("data.path must be a path or null, got ''",),
    "data.suffixes=5": ("data.suffixes must be endings of names, such as [.txt, .md], got 5",),
    "data.validation_fraction=abc": ("data.validation_fraction must be a number in (0, 1), got 'abc'",),
    "data.cache_dir=text.txt": ("rank 0: FileExistsError: ", "text.txt"),
    "engine.activation_checkpointing=maybe": ("engine.activation_checkpointing must be true or false, got 'maybe'",),
    "engine.find_unused_parameters=1": ("engine.find_unused_parameters must be true or false, got 1",),
    "engine=fsdp2 engine.reshard_after_forward=no_": ("engine.reshard_after_forward must be true or false, got 'no_'",),
    "engine=deepspeed_zero1 engine.offload=cpu": ("engine.offload must be true or false, got 'cpu'",),
    "model.seed=abc": ("model.seed must be an integer >= 0, got 'abc'",),
    "model.config.n_head=0": ("model.config.n_head must be an integer >= 1, got 0",),
}


@pytest.fixture(scope="module")
def bad_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refused")
    jobs.write_text(folder)
    (folder / "empty.txt").touch()
    (folder / "latin.txt").write_bytes("café au lait ".encode("latin-1") * 100)
    (folder / "cache").mkdir()
    return folder


# One of each stage at which something is refused, and what is about several processes.
OF_TWO = ("train.batch_size=7", "train.micro_batch_size=3", "engine=hsdp engine.replicas=3")
STAGES = ("optimizer.lr=-1", "train.resume=nowhere", "data.cache_dir=text.txt", "param_groups.overrides={wqe:{lr:1}}")
QUICK = ("train.batch_size=7", *STAGES[2:])


@pytest.mark.parametrize("words", some(QUICK, OF_TWO + STAGES))
def test_bad_input_is_one_line_on_every_rank(bad_inputs: Path, words: str) -> None:
    """No rank trains, none hangs, none shows a traceback: each says what is wrong, and ends with 1."""
    for rank, (code, out, err) in enumerate(jobs.run(bad_inputs, [*overrides(), *words.split()], 2)):
        who = "distopt" if rank == 0 else "distopt (rank 1)"
        assert (code, out) == (1, "")
        (line,) = err.strip().splitlines()
        assert line.startswith(f"{who}: error: ")
        assert [part for part in REFUSED[words] if part not in line] == [], line


def test_bad_input_is_one_line(bad_inputs: Path) -> None:
    alone = {words: expected for words, expected in REFUSED.items() if words not in OF_TWO}
    assert not_one_line(bad_inputs, alone) == {}


# Said by Hydra, in many lines and without what was meant, or taken by it without a word.
COMMAND_LINE: dict[str, tuple[str, ...]] = {
    "optimizer=adamax": ("optimizer=adamax: there is no such optimizer: did you mean adam", *OPTIMIZERS),
    "engine=ddq": ("engine=ddq: there is no such engine: did you mean ddp?", "Choose from ddp, ", "fsdp2"),
    "experiment=quickstrat": ("there is no such experiment: did you mean quickstart?",),
    "optimiser=lamb": ("there is no optimiser: did you mean optimizer?",),
    "+optimiser=lamb": ("nothing reads optimiser: did you mean optimizer?",),
    "optimizer.lrr=1": ("there is no optimizer.lrr: did you mean lr?", "weight_decay"),
    "train.stepz=1": ("there is no train.stepz: did you mean steps?",),
    "+train.stepz=1": ("nothing reads train.stepz: did you mean steps?",),
    "optimizer lamb": ("'optimizer' is not KEY=VALUE",),
    "data.path=~/book.txt": ("'data.path=~/book.txt' is not KEY=VALUE, or has special characters that need quotes",),
    "optimizer.betas=[0.9": ("'optimizer.betas=[0.9' is not KEY=VALUE",),
    "optimizer=adamw,lamb": ("Ambiguous value for argument 'optimizer=adamw,lamb'", "--multirun"),
    "optimizer=null": ("optimizer=null: optimizer takes the name of one of its choices: adafactor, adagrad, adam",),
    "sam=true": ("sam=true: sam takes the name of one of its choices: asam", "off, on"),
    "trackers={a:1}": ("Error merging override trackers={a:1}",),
    "optimizer.lr=${nope}": ("optimizer.lr: Interpolation key 'nope' not found",),
    "optimizer=[adamw,lamb]": ("optimizer takes one choice",),
    "hydra.run.dir=/proc/nope": ("No such file or directory: '/proc/nope'",),
}


def test_what_hydra_refuses_is_one_line_too(bad_inputs: Path) -> None:
    assert not_one_line(bad_inputs, COMMAND_LINE) == {}


@pytest.mark.parametrize("words", some(["optimizer=adamax"], ["optimizer=adamax", "hydra.run.dir=/proc/nope"]))
def test_what_hydra_refuses_is_one_line_on_every_rank(bad_inputs: Path, words: str) -> None:
    for rank, (code, out, err) in enumerate(jobs.run(bad_inputs, [*overrides(), words], 2)):
        assert (code, out) == (1, ""), err
        (line,) = err.strip().splitlines()
        assert line.startswith("distopt: error: " if rank == 0 else "distopt (rank 1): error: ")
        assert [part for part in COMMAND_LINE[words] if part not in line] == []


def test_the_full_traceback_is_there_for_the_asking(bad_inputs: Path) -> None:
    (ended,) = jobs.run(bad_inputs, overrides(optimizer__lr="-1"), 1, ask_for_traceback)
    assert ended.code == 1
    assert "Traceback" in ended.err and "distopt/bounds/" in ended.err


def ask_for_traceback() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"
