"""Builds a training job from its configuration; refuses what cannot run, the cheapest checks first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from distopt import collective
from distopt.data.batch_sizes import BatchSizes
from distopt.data.token_cache import Corpus
from distopt.engine import Engine
from distopt.engine.group import connect
from distopt.job import run_folder
from distopt.job.about import write_about
from distopt.job.agreement import check_agreement, environment
from distopt.job.callbacks import Callbacks
from distopt.job.check import check
from distopt.job.checkpointer import Checkpointer
from distopt.job.components import Components
from distopt.job.config import instantiate, refuse_swept_ranks
from distopt.job.device import watch
from distopt.job.downloads import download, hub_names
from distopt.job.errors import end_from_thread
from distopt.job.generate import Generation
from distopt.job.health import Health
from distopt.job.job import Job
from distopt.job.lengths import check_batch_schedule, micro_batch_size, steps_of
from distopt.job.metrics import Monitor
from distopt.job.noise import Noise, check_noise_scale
from distopt.job.origin import Origin, identity_of
from distopt.job.prompts import Prompt, encoded, read_prompts
from distopt.job.terminal import Terminal
from distopt.job.text import Text, open_text, resume
from distopt.job.totals import Totals
from distopt.job.tracking import Trackers, check_trackers
from distopt.job.trainee import Trainee, build_trainee, decay_unneeded
from distopt.job.watchdog import Watchdog
from distopt.models import pretrained
from distopt.models.configuration import check_length
from distopt.proof import prove_every

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PretrainedConfig


def build(cfg: DictConfig, terminal: Terminal) -> Job:
    """Builds the job of a configuration: model, optimizer and schedule at the step to start from, and its folder.

    Every process has to call it.

    Args:
        cfg: The configuration.
        terminal: Shows what is being built.

    Raises:
        ValueError: On every process alike, for a configuration that cannot run.
    """
    options, folder = cfg.train, Path(HydraConfig.get().runtime.output_dir)
    parts, accelerator, downloaded = _checked(cfg, terminal)
    callbacks, world = Callbacks.of(cfg), accelerator.num_processes
    micro_batch, batches = _sizes(cfg, parts, world)
    origin = Origin.find(options, folder, parts)
    identity = identity_of(cfg, parts, batches)
    origin.check(identity, options.steps)  # before the text is tokenized
    terminal.phase("reading the data")
    text = open_text(cfg, parts.data, batches)
    if options.steps is None:
        options.steps = steps_of(options.epochs, text.sequences.count, batches)
        parts = parts.of_steps(cfg)
    config, files, prompts = _described(cfg, parts, text.corpus)
    identity |= {"data": text.corpus.digest, **text.sequences.identity}
    origin.check_model(identity, options.steps, config, files)  # before it is built
    terminal.phase("building the model")
    trainee = build_trainee(cfg, parts, text.corpus, config, accelerator, micro_batch, files)
    saved = origin.load(trainee, parts.engine, terminal)
    resume(text.sequences, saved.get("stream", []))
    moved, trackers = _open_folder(cfg, folder, origin, accelerator)
    job = Job(
        cfg=cfg,
        folder=folder,
        accelerator=accelerator,
        engine=parts.engine,
        config=config,
        trackers=trackers,
        monitor=_monitor(cfg, folder, origin.step, saved, parts.engine, trainee, accelerator, trackers, terminal),
        checkpointer=_checkpointer(cfg, folder),
        watchdog=Watchdog(connect(), options.timeout_minutes, end_from_thread),
        lock=origin.lock,
        identity=identity | origin.record(saved),
        micro_batch=micro_batch,
        notes=[*downloaded, *origin.notes, *moved, *_notes(parts, text, trainee, options.steps), *origin.told()],
        step=origin.step,
        passed_over=saved.get("passed_over", 0),
        checkpoint=origin.checkpoint,
        loss=parts.loss,
        callbacks=callbacks,
        **text._asdict(),
        **trainee._asdict(),
    )
    _watch(job, parts, saved, prompts)
    return job


def _checked(cfg: DictConfig, terminal: Terminal) -> tuple[Components, Accelerator, list[str]]:
    """Checks a configuration and joins the processes; returns its components, the process group and lines to tell."""
    refuse_swept_ranks()
    terminal.phase("checking the configuration")
    check(cfg, "train")
    read_prompts(cfg.evaluation.generate)
    terminal.phase("loading the libraries that it needs")
    engine, names = instantiate(cfg, "engine", Engine), hub_names(cfg)
    if names:
        accelerator = join(cfg, engine)  # now, so that one process downloads while the others wait
        terminal.phase("asking the hub")
        downloaded = download(names)
        return Components.of(cfg, engine), accelerator, downloaded
    parts = Components.of(cfg, engine)
    terminal.phase("waiting for the other processes")
    return parts, join(cfg, engine), []


def _sizes(cfg: DictConfig, parts: Components, world: int) -> tuple[int, BatchSizes]:
    """Returns the number of sequences of a forward pass of a process, and of each step."""
    micro_batch = micro_batch_size(cfg.train.batch_size, cfg.train.micro_batch_size, world)
    check_noise_scale(cfg, parts, micro_batch * world)
    return micro_batch, check_batch_schedule(cfg, micro_batch, world)


def _described(
    cfg: DictConfig, parts: Components, corpus: Corpus
) -> tuple[PretrainedConfig, dict[str, bytes], list[Prompt]]:
    """Returns the model's configuration, with the vocabulary of the data, the files that describe both, and prompts."""
    tokenizer = corpus.pretrained_tokenizer()
    parts.language_model.check_added(tokenizer)
    config = parts.language_model.describe(corpus.vocab_size)
    check_length(config, cfg.train.sequence_length, "train.sequence_length")
    check_agreement({"the digest of the data": corpus.digest}, "they have to read the same files")
    given = collective.on_first(lambda: read_prompts(cfg.evaluation.generate))
    prompts = encoded(given, corpus.encode, config, cfg.evaluation.generate_tokens)
    return config, pretrained.description(config, tokenizer, parts.language_model.path), prompts


def _notes(parts: Components, text: Text, trainee: Trainee, steps: int) -> list[str]:
    """Lines for the user about the model, the data and the schedule."""
    of_data = [*text.sequences.notes, *text.validation.notes]
    return [*parts.language_model.notes, *of_data, *decay_unneeded(trainee, steps)]


def _watch(job: Job, parts: Components, saved: dict[str, Any], prompts: list[Prompt]) -> None:
    """Sets what looks at a job while it trains: its report, proofs, the noise scale, health, samples, callbacks."""
    options = job.cfg.train
    if job.accelerator.is_main_process:
        write_about(job)
    heal = job.monitor.say if options.on_drift == "heal" else None
    prove_every(job.optimizer, parts.engine.unwrap(job.model), options.prove_every, heal=heal)
    if options.get("noise_scale") is not None:
        job.noise = Noise(job, options.noise_scale, saved.get("noise_scale"))
    if parts.make_health:
        job.health = Health(job, parts.make_health, saved.get("health"))
    if prompts:
        job.generation = Generation(job, prompts)
    job.callbacks.load_state_dict(saved.get("callbacks", {}))


def join(cfg: DictConfig, engine: Engine) -> Accelerator:
    """Joins the processes of the launch, with the trackers of the run."""
    accelerator = engine.start(cfg.train.timeout_minutes)
    accelerator.wait_for_everyone()  # gloo fails a rank that still connects when one that has connected ends
    names = {"what is named on the hub": [name.value for name in hub_names(cfg)]}
    check_agreement(environment(cfg) | names, "start all with the same command, in the same environment")
    accelerator.log_with = check_trackers(cfg.trackers)
    return accelerator


def _monitor(
    cfg: DictConfig,
    folder: Path,
    step: int,
    saved: dict[str, Any],
    engine: Engine,
    trainee: Trainee,
    accelerator: Accelerator,
    trackers: Trackers,
    terminal: Terminal,
) -> Monitor:
    length = cfg.train.sequence_length
    return Monitor(
        folder,
        step,
        cfg.train.steps,
        Totals(step, saved),
        accelerator.is_main_process,
        trackers.log,
        terminal,
        watch(engine.unwrap(trainee.model), length, engine.bf16, accelerator),
    )


def _checkpointer(cfg: DictConfig, folder: Path) -> Checkpointer:
    options = {name: value for name, value in cfg.checkpoint.items() if name != "every"}
    return Checkpointer(folder / "checkpoints", **options)


def _open_folder(cfg: DictConfig, folder: Path, origin: Origin, accelerator: Accelerator) -> tuple[list[str], Trackers]:
    """Opens the run's folder, with its configuration; returns a line if an older run was moved, and the trackers."""
    moved = collective.on_first(lambda: run_folder.open_folder(folder, origin.checkpoint))
    if accelerator.is_main_process:
        OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    resumed = origin.step if origin.start and run_folder.is_own(folder, origin.start.path) else None
    trackers = Trackers(accelerator, folder, folder.name, run_folder.sweep(), values, resumed)
    if origin.lock:
        origin.lock.opened()
    return [moved] if moved else [], trackers
