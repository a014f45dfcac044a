"""Builds a training job from its configuration; refuses what cannot run, the cheapest checks first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from distopt import collective
from distopt.checkpoint import load_checkpoint
from distopt.engine import Engine
from distopt.engine.group import connect
from distopt.job import run_folder
from distopt.job.about import write_about
from distopt.job.agreement import check_agreement, environment
from distopt.job.check import check
from distopt.job.checkpointer import Checkpointer
from distopt.job.components import Components
from distopt.job.config import (
    check_batch_schedule,
    check_best,
    check_steps,
    instantiate,
    micro_batch_size,
    refuse_swept_ranks,
    steps_of,
)
from distopt.job.device import watch
from distopt.job.downloads import download, hub_names
from distopt.job.errors import end_from_thread
from distopt.job.health import Health
from distopt.job.job import Job
from distopt.job.metrics import Monitor
from distopt.job.noise import Noise, check_noise_scale
from distopt.job.phases import find_init
from distopt.job.resume import Start, find_start, hyperparameters, keep_configured
from distopt.job.run_lock import claim
from distopt.job.terminal import Terminal
from distopt.job.text import open_text
from distopt.job.tracking import Trackers, check_trackers
from distopt.job.trainee import Trainee, build_trainee, decay_unneeded
from distopt.job.watchdog import Watchdog
from distopt.models import pretrained
from distopt.models.language_model import check_length
from distopt.proof import prove_every

if TYPE_CHECKING:
    from accelerate import Accelerator


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
    refuse_swept_ranks()
    terminal.phase("checking the configuration")
    check(cfg, "train")
    check_steps(cfg)
    check_best(cfg)
    engine, downloaded, names = instantiate(cfg, "engine", Engine), list[str](), hub_names(cfg)
    if names:
        accelerator = join(cfg, engine)  # now, so that one process downloads while the others wait
        terminal.phase("asking the hub")
        downloaded = download(names)
    parts = Components.of(cfg, engine)
    if not names:
        terminal.phase("waiting for the other processes")
        accelerator = join(cfg, engine)
    micro_batch = micro_batch_size(options.batch_size, options.micro_batch_size, accelerator.num_processes)
    lock, restarted, taken = claim(folder)
    start, notes = find_start(folder / "checkpoints", options.resume, restarted)
    init = find_init(options, folder, start)
    if init:
        init.check_parts(parts, type(parts.probe()))
    sizes = {"sequence_length": options.sequence_length, "batch_size": options.batch_size}
    batches = check_batch_schedule(cfg, micro_batch, accelerator.num_processes)
    check_noise_scale(cfg, parts, micro_batch * accelerator.num_processes)
    grows = {"batch_schedule": [list(change) for change in batches.changes[1:]] or None}
    identity = {"seed": cfg.seed, **sizes, **grows, "adapter": parts.adapter and parts.adapter.describe()}
    identity["frozen"] = parts.language_model.freeze or None
    if start:
        start.check(identity, options.steps)  # before the text is tokenized
    terminal.phase("reading the data")
    text = open_text(cfg, parts.data, sizes, batches)
    if options.steps is None:
        options.steps = steps_of(options.epochs, text.sequences.count, batches)
        parts = parts.of_steps(cfg)
    parts.language_model.check_added(text.corpus.pretrained_tokenizer())
    config = parts.language_model.describe(text.corpus.vocab_size)
    check_length(config, options.sequence_length, "train.sequence_length")
    identity |= {"data": text.corpus.digest, **text.sequences.identity}
    check_agreement({"the digest of the data": text.corpus.digest}, "they have to read the same files")
    if start:
        start.check(identity | start.architecture(config), options.steps)  # before the model is built
    files = pretrained.description(config, text.corpus.pretrained_tokenizer(), parts.language_model.path)
    if init:
        init.check_model(pretrained.architecture(config), files)
    terminal.phase("building the model")
    trainee = build_trainee(cfg, parts, text.corpus, config, accelerator, micro_batch, files)
    if loaded := start or (init and init.start):
        terminal.phase(f"loading {loaded.path.name}")
    saved = _load(start, parts.engine, trainee) if start else {}
    if init:
        init.load(trainee, parts.engine.unwrap(trainee.model))
    record = init.record() if init else saved.get("init")
    moved, trackers = _open_folder(cfg, folder, start, accelerator)
    if lock:
        lock.opened()
    step = start.step if start else 0
    resumed = [f"resuming after step {step} from {start.path}"] if start else [str(init)] if init else []
    job = Job(
        cfg=cfg,
        folder=folder,
        accelerator=accelerator,
        engine=parts.engine,
        config=config,
        trackers=trackers,
        monitor=Monitor(
            folder,
            step,
            options.steps,
            lambda done: batches.before(done) * options.sequence_length,
            accelerator.is_main_process,
            trackers.log,
            terminal,
            watch(parts.engine.unwrap(trainee.model), options.sequence_length, parts.engine.bf16, accelerator),
        ),
        checkpointer=_checkpointer(cfg, folder),
        watchdog=Watchdog(connect(), options.timeout_minutes, end_from_thread),
        lock=lock,
        identity=identity | ({"init": record} if record else {}),
        micro_batch=micro_batch,
        notes=[
            *(*downloaded, *taken, *moved, *notes, *parts.language_model.notes),
            *(*text.sequences.notes, *text.validation.notes),
            *(*decay_unneeded(trainee, options.steps), *resumed),
        ],
        step=step,
        passed_over=saved.get("passed_over", 0),
        checkpoint=start.path if start else None,
        loss=parts.loss,
        **text._asdict(),
        **trainee._asdict(),
    )
    _watch(job, parts, saved)
    return job


def _watch(job: Job, parts: Components, saved: dict[str, Any]) -> None:
    """Sets what looks at a job while it trains: its report, proofs, the noise scale and its health."""
    options = job.cfg.train
    if job.accelerator.is_main_process:
        write_about(job)
    heal = job.monitor.say if options.on_drift == "heal" else None
    prove_every(job.optimizer, parts.engine.unwrap(job.model), options.prove_every, heal=heal)
    if options.get("noise_scale") is not None:
        job.noise = Noise(job, options.noise_scale, saved.get("noise_scale"))
    if parts.make_health:
        job.health = Health(job, parts.make_health, saved.get("health"))


def join(cfg: DictConfig, engine: Engine) -> Accelerator:
    """Joins the processes of the launch, with the trackers of the run."""
    accelerator = engine.start(cfg.train.timeout_minutes)
    accelerator.wait_for_everyone()  # gloo fails a rank that still connects when one that has connected ends
    names = {"what is named on the hub": [name.value for name in hub_names(cfg)]}
    check_agreement(environment(cfg) | names, "start all with the same command, in the same environment")
    accelerator.log_with = check_trackers(cfg.trackers)
    return accelerator


def _checkpointer(cfg: DictConfig, folder: Path) -> Checkpointer:
    options = {name: value for name, value in cfg.checkpoint.items() if name != "every"}
    return Checkpointer(folder / "checkpoints", **options)


def _load(start: Start, engine: Engine, trainee: Trainee) -> dict[str, Any]:
    """Loads the checkpoint, except the hyper-parameters, which stay those of this configuration; returns its extra."""
    configured = hyperparameters(trainee.optimizer)
    extra = load_checkpoint(start.path, engine.unwrap(trainee.model), trainee.stepper, trainee.schedule)
    keep_configured(trainee.optimizer, trainee.schedule, configured)
    return extra


def _open_folder(
    cfg: DictConfig, folder: Path, start: Start | None, accelerator: Accelerator
) -> tuple[list[str], Trackers]:
    """Opens the run's folder, with its configuration; returns a line if an older run was moved, and the trackers."""
    moved = collective.on_first(lambda: run_folder.open_folder(folder, start.path if start else None))
    if accelerator.is_main_process:
        OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    resumed = start.step if start and run_folder.is_own(folder, start.path) else None
    trackers = Trackers(accelerator, folder, folder.name, run_folder.sweep(), values, resumed)
    return [moved] if moved else [], trackers
