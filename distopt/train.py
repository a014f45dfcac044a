"""Trains a language model: `accelerate launch --config_file launch/local.yaml -m distopt.train [overrides]`."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import sys
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from distopt import collective
from distopt.checkpoint import load_checkpoint
from distopt.engine.train_step import update
from distopt.job import cli
from distopt.job import run_folder as runs
from distopt.job.checkpointer import Saver
from distopt.job.config import CONF, check_options, dry_run, instantiate, micro_batch_size, refuse_swept_ranks
from distopt.job.contamination import check_no_cross_contamination
from distopt.job.diagnostics import by_layer, nonfinite_gradient_report
from distopt.job.errors import one_line_errors
from distopt.job.evaluate import sample, validation_loss
from distopt.job.metrics import Monitor, plot
from distopt.job.process import end_of_process, end_on_interrupt
from distopt.job.stop import Stopped, StopSignal
from distopt.models import pretrained
from distopt.models.language_model import blocks, check_length, positions
from distopt.proof import prove_every


def train(cfg: DictConfig, ending: contextlib.ExitStack) -> float:
    """Trains as configured and returns the final validation loss in nats a token.

    ending: takes what has to be done before an error is told.

    Raises ValueError, on every process alike, for a configuration that cannot be run as it is.
    """
    options = cfg.train
    folder = Path(HydraConfig.get().runtime.output_dir)

    # Everything that can be refused is refused before anything that takes time.
    refuse_swept_ranks()
    check_options(cfg)
    engine, language_model, data = instantiate(cfg.engine), instantiate(cfg.model), instantiate(cfg.data)
    adapter = instantiate(cfg.adapter) if cfg.adapter else None
    make_optimizer, make_schedule, make_groups = (
        instantiate(cfg.optimizer),
        instantiate(cfg.schedule),
        instantiate(cfg.param_groups),
    )
    make_sam = instantiate(cfg.sam) if cfg.sam else None
    dry_run(engine, make_optimizer, make_schedule, make_sam, options)
    language_model.check()
    data.check()
    language_model.check_tokenizer(getattr(data, "tokenizer", cfg.model.get("path")))
    accelerator = engine.start(options.timeout_minutes)
    accelerator.wait_for_everyone()  # gloo has a rank that still connects fail when one that has connected ends
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    micro_batch = micro_batch_size(options.batch_size, options.micro_batch_size, world)
    accelerator.log_with = trackers(cfg.trackers)

    checkpoint, notes = collective.on_first(lambda: runs.find_checkpoint(folder / "checkpoints", options.resume))
    corpus = collective.one_after_another(data.build)
    sizes = {"sequence_length": options.sequence_length, "batch_size": options.batch_size}
    sequences = data.sequences(corpus, **sizes, seed=cfg.seed)
    validation = data.validation_sequences(corpus, **sizes, max_sequences=cfg.evaluation.max_sequences)

    config = language_model.describe(corpus.vocab_size)
    check_length(config, options.sequence_length, "train.sequence_length")
    files = pretrained.description(config, corpus.pretrained_tokenizer(), language_model.path)  # for distopt.export
    torch.manual_seed(cfg.seed + rank)
    empty = language_model.empty(config)
    if adapter:
        files |= adapter.add(empty, language_model.path)
    names = {p: name for name, p in empty.named_parameters()}
    param_groups = make_groups(empty)  # before the marks of parameters are lost in wrapping them
    model = engine.build(empty, blocks(empty), lambda unit, where: language_model.fill(empty, unit, where), device)
    params = dict(engine.unwrap(model).named_parameters())
    for group in param_groups:
        group["params"] = [params[names[p]] for p in group["params"]]
    optimizer = make_optimizer(param_groups, lr=cfg.optimizer.lr * cfg.lr_scale)
    schedule = make_schedule(optimizer, total_steps=options.steps)
    stepper = make_sam(optimizer) if make_sam else optimizer
    if make_sam:
        stepper.model = engine.unwrap(model)
        stepper.compute_dtype = torch.bfloat16 if engine.bf16 else None
    max_norm = math.inf if options.max_grad_norm is None else options.max_grad_norm
    model = engine.attach(model, optimizer, options.batch_size // world // micro_batch, max_norm)
    prove_every(optimizer, engine.unwrap(model), options.prove_every)

    if getattr(data, "packing", False):
        check_no_cross_contamination(engine, model, device, corpus.vocab_size)

    # What must not change when a run is resumed: with it the batches are those of the unbroken run.
    identity = {"seed": cfg.seed, **sizes, "data": corpus.digest, "adapter": adapter and adapter.describe()}
    step = 0
    if checkpoint is not None:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        extra = load_checkpoint(checkpoint, engine.unwrap(model), stepper, schedule)
        step = extra.pop("step")
        there = collective.on_first(functools.partial(pretrained.saved_architecture, checkpoint))
        here = pretrained.architecture(config) if there else {}
        refuse_other_run(checkpoint, extra | there, here | identity, step, options.steps)
        configure_again(optimizer, schedule, groups)
    moved = collective.on_first(lambda: runs.open_folder(folder, checkpoint))
    if accelerator.is_main_process:
        OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
        hydra_cfg = HydraConfig.get()
        command = runs.command(hydra_cfg.overrides.task, world, **runs.elsewhere(folder, str(cfg.name)))
        runs.write_about(folder, command, hydra_cfg.runtime.choices)
    accelerator.project_configuration.set_directories(str(folder / "logs"))
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    accelerator.init_trackers("distopt", runs.flat(values), init_kwargs={"wandb": {"name": folder.name}})
    tokens = options.batch_size * options.sequence_length
    monitor = Monitor(folder, step, options.steps, tokens, accelerator.is_main_process, accelerator.log)
    ending.callback(monitor.close)  # an error would stand at the end of the progress bar
    resumed = f"resuming after step {step} from {checkpoint}" if checkpoint else None
    for line in filter(None, [moved, *notes, *language_model.notes, *sequences.notes, *validation.notes, resumed]):
        monitor.say(line)

    def evaluate() -> float:
        loss = accelerator.reduce(
            validation_loss(engine, model, validation.batches(rank, world), device), "mean"
        ).item()
        monitor.write({"validation_loss": loss, "bits_per_byte": loss / math.log(2) / corpus.bytes_per_token})
        return loss

    saver = Saver(folder / "checkpoints", cfg.checkpoint.keep, cfg.checkpoint.asynchronous)
    before = after = evaluate()
    stop = StopSignal()
    while step < options.steps:
        monitor.start_step()
        batch = sequences.batch(step, rank, world).to(device)
        done = update(engine, model, stepper, batch.split(micro_batch), max_norm)
        lr = optimizer.param_groups[0]["lr"]
        schedule.step()
        step += 1
        loss, asked = accelerator.reduce(torch.stack([done.loss, stop.request(done.loss)]), "mean").tolist()
        monitor.end_step(loss=loss, lr=lr, grad_norm=done.grad_norm, applied=done.applied)
        if monitor.skipped_in_a_row >= options.max_skipped_steps:
            saver.wait()
            monitor.close()
            raise ValueError(nonfinite_gradient_report(engine.unwrap(model), stepper, step, monitor.skipped_in_a_row))
        stopping = asked > 0 and step < options.steps
        if (step % cfg.evaluation.every == 0 and not stopping) or step == options.steps:
            clipped = min(1.0, max_norm / done.grad_norm) if done.applied and done.grad_norm else 1.0
            monitor.write_layers(by_layer(engine.unwrap(model), stepper, clipped))
            after = evaluate()
        if step % cfg.checkpoint.every == 0 or step == options.steps or stopping:
            extra = {"step": step, **identity}
            checkpoint = saver.save(step, engine.unwrap(model), stepper, schedule, extra, files)
        if stopping:
            saver.wait()
            monitor.close()
            accelerator.wait_for_everyone()
            accelerator.end_training()
            raise Stopped(f"by a signal, after step {step} of {options.steps}; train.resume=auto goes on: {checkpoint}")
    stop.restore()
    saver.wait()
    monitor.close()

    prompt = corpus.encode(cfg.evaluation.prompt) or [0]
    length = min(cfg.evaluation.sample_tokens, positions(config) - len(prompt))
    written = sample(engine, model, prompt, length, cfg.seed, device) if length > 0 else prompt
    if accelerator.is_main_process:
        changes = {"train__resume": "auto", "train__steps": str(2 * options.steps)}
        changes |= runs.elsewhere(folder, str(cfg.name))
        resume = runs.command(HydraConfig.get().overrides.task, world, **changes)
        bits = [loss / math.log(2) / corpus.bytes_per_token for loss in (before, after)]
        print(f"\nsample: {runs.printable(corpus.decode(written))}\n")
        print(f"validation loss: {before:.4f} -> {after:.4f} nats a token, {bits[0]:.4f} -> {bits[1]:.4f} bits a byte")
        print(f"curves:          {plot(folder)}")
        print(f"checkpoint:      {checkpoint}")
        print(f"go on:           {resume}")
    accelerator.wait_for_everyone()  # gloo may abort a process that still talks to one which has ended
    accelerator.end_training()
    return after


def refuse_other_run(checkpoint: Path, saved: dict[str, Any], mine: dict[str, Any], step: int, steps: int) -> None:
    """A checkpoint is gone on with only where the batches continue, and not by a shorter run."""
    for name, value in mine.items():
        if saved.get(name) != value:
            raise ValueError(f"{checkpoint} was trained with {name} {saved.get(name)}, now it is {value}: start anew")
    if step > steps:
        raise ValueError(f"{checkpoint} is already at step {step} of {steps}: raise train.steps to go on")


def configure_again(optimizer: torch.optim.Optimizer, schedule: Any, groups: list[dict[str, Any]]) -> None:
    """After loading: the options of this run's configuration hold, those of the checkpoint's run do not come back.

    So a run that diverged goes on with a lower lr, and a longer one follows the longer schedule from its first step on.
    """
    for group, options in zip(optimizer.param_groups, groups):
        group.update(options)
    schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    for group, base, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas):
        group["lr"] = base * factor(schedule.last_epoch)


def trackers(names: str | list[str] | None) -> list[str]:
    """Accelerate's trackers of these names; ValueError for one that is unknown or not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    names = [names] if isinstance(names, str) else list(names or [])
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"trackers: unknown {name!r}, choose from {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in {str(tracker.value) for tracker in get_available_trackers()}:
            raise ValueError(f"trackers: {name} is not installed: pip install {name}")
    return names


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def job(cfg: DictConfig) -> float | None:
    """What Hydra calls, once for each configuration of a command."""
    with one_line_errors(), contextlib.ExitStack() as ending:
        return train(cfg, ending)


def main() -> None:
    """The entry point of the command line."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a sample may hold what the terminal has no character for
        sys.stdout.reconfigure(errors="backslashreplace")
    end_on_interrupt()
    sys.argv[1:] = cli.model_words(sys.argv[1:])
    with end_of_process(), one_line_errors(), cli.explained():
        job()


if __name__ == "__main__":
    main()
