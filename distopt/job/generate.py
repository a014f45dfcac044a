"""Text that a model in training writes: after one prompt, or after many at an evaluation, compared with answers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distopt import collective
from distopt.job.prompts import Prompt
from distopt.job.run_folder import printable
from distopt.models.generation import end_tokens, sampling

if TYPE_CHECKING:
    from distopt.engine import Engine
    from distopt.job.job import Job

_BATCH = 16  # prompts of a call
_SHOWN = 3  # samples of an evaluation, on the terminal


@torch.no_grad()
def generate(
    engine: Engine,
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    length: int,
    seed: int,
    device: torch.device,
    ends: Sequence[int] = (),
    temperature: float = 0.8,
) -> list[list[int]]:
    """Continues prompts of one length by sampled tokens, the top 50; every rank has to call it, with its own prompts.

    A sharded model is gathered block by block for each token: a rank that is done computes until all are.

    Args:
        engine: The engine that runs the model.
        model: The wrapped model.
        prompts: The tokens of the prompts, of each as many and at least one: nothing is padded.
        length: The largest number of tokens to sample.
        seed: The seed of the sampling.
        device: The device of this process.
        ends: The tokens that end a text.
        temperature: The temperature of the sampling; 0 takes the most likely token.

    Returns:
        The tokens that follow each prompt, with the one that ends it, if one does.
    """
    inner: Any = engine.unwrap(model)
    tokens = torch.tensor([list(prompt) for prompt in prompts], device=device)
    config, several = sampling(length, ends, temperature), collective.world() > 1
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), engine.autocast(device):
        torch.manual_seed(seed)
        mask = torch.ones_like(tokens)
        out = inner.generate(tokens, attention_mask=mask, generation_config=config, synced_gpus=several)
    model.train()
    engine.refresh(model)
    return [_until(row, ends) for row in out[:, tokens.shape[1] :].tolist()]


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens up to the first one that ends a text; what follows is padding."""
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in ends), tokens)


def sample(
    engine: Engine,
    model: nn.Module,
    prompt: list[int],
    length: int,
    seed: int,
    device: torch.device,
    ends: Sequence[int] = (),
) -> list[int]:
    """As `generate`, of one prompt on all ranks; returns its tokens and those of its continuation."""
    return [*prompt, *generate(engine, model, [prompt], length, seed, device, ends)[0]]


class Generation:
    """Lets a job's model write at its evaluations.

    The prompts are divided over the processes. Those of one length are a batch, so that nothing is padded, and each
    batch has a seed of its own: what is written does not depend on the number of processes, but for rounding.

    Args:
        job: The job.
        prompts: The prompts, with their tokens; at least one.
    """

    def __init__(self, job: Job, prompts: Sequence[Prompt]) -> None:
        self._job, self._prompts = job, prompts
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))
        same = [list(group) for _, group in itertools.groupby(by_length, key=lambda i: len(prompts[i].tokens))]
        self._batches = [group[i : i + _BATCH] for group in same for i in range(0, len(group), _BATCH)]
        self._ends = end_tokens(job.corpus.pretrained_tokenizer(), job.config)

    def measure(self) -> dict[str, float]:
        """Writes samples.jsonl; every rank has to call it.

        Returns:
            `exact_match`: the share of the prompts with an answer whose sample is the answer, but for space around it.
            Nothing without answers, and between the evaluations of `evaluation.generate_every`.
        """
        job, options = self._job, self._job.cfg.evaluation
        if job.step % (options.every * options.generate_every) and not job.ends:
            return {}
        rows = []
        for prompt, tokens in zip(self._prompts, self._written()):
            ended = bool(tokens) and tokens[-1] in self._ends
            text = job.corpus.decode(tokens[:-1] if ended else tokens)
            row: dict[str, Any] = {"prompt": prompt.text, "sample": text, "ended": ended}
            if prompt.answer is not None:
                row |= {"answer": prompt.answer, "match": text.strip() == prompt.answer.strip()}
            rows.append(row)
        job.monitor.write_samples(rows)
        for row in rows[:_SHOWN]:
            job.monitor.say(printable(f"  {row['prompt']!r} -> {row['sample']!r}"))
        known = [row["match"] for row in rows if "match" in row]
        return {"exact_match": sum(known) / len(known)} if known else {}

    def _written(self) -> list[list[int]]:
        """What follows each prompt, on every rank. Each calls the model as often: the last ones may do so in vain."""
        job, options = self._job, self._job.cfg.evaluation
        mine: list[tuple[int, list[int]]] = []
        rank, world = job.accelerator.process_index, job.accelerator.num_processes
        turns = world * -(-len(self._batches) // world)
        for turn in job.watchdog.watched(range(rank, turns, world)):
            chosen = self._batches[turn % len(self._batches)]
            written = generate(
                job.engine,
                job.model,
                [self._prompts[i].tokens for i in chosen],
                options.generate_tokens,
                job.cfg.seed + turn % len(self._batches),
                job.accelerator.device,
                self._ends,
                options.temperature,
            )
            mine += zip(chosen, written) if turn < len(self._batches) else []
        found = dict(pair for pairs in collective.on_all(lambda: mine) for pair in pairs)
        return [found[i] for i in range(len(self._prompts))]
