"""What a model writes at evaluations: alike on every engine, at any number of processes, compared with answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distopt.engine.base import Engine
from distopt.job.generate import generate
from distopt.job.prompts import Prompt, encoded, read_prompts
from distopt.job.records import read_lines
from distopt.models.language_model import LanguageModel
from distopt.optim import SGD
from tests.harness import jobs
from tests.harness.cells import some
from tests.harness.distributed import run
from tests.harness.engines import CONFIGS, CPU, ENGINES, made
from tests.harness.runs import not_one_line

PROMPTS = [[1, 2, 3], [7, 8, 9], [5, 6], [4, 4], [11, 12, 13, 14]]


def written(kind: str, temperature: float) -> dict[int, list[int]]:
    """What follows each prompt, of which every rank has others, of other lengths, with texts that end early."""
    engine: Engine = ENGINES[kind](precision="fp32")
    model = made(LanguageModel("gpt2", CONFIGS["gpt2"]), engine)
    model = engine.attach(model, SGD(list(engine.unwrap(model).parameters()), lr=0.1), 1, 1.0)
    rank, world, found = dist.get_rank(), dist.get_world_size(), {}
    for turn in range(rank, 6, world):
        prompt = PROMPTS[turn % len(PROMPTS)]
        before = torch.get_rng_state()
        (text,) = generate(engine, model, [prompt], 12, turn, CPU, ends=range(40, 61), temperature=temperature)
        assert torch.equal(before, torch.get_rng_state()) and model.training
        if turn < len(PROMPTS):
            found[turn] = text
    return found


def together(world: int, kind: str, temperature: float) -> dict[int, list[int]]:
    return {turn: text for rank in run(world, written, kind, temperature) for turn, text in rank.items()}


@pytest.mark.parametrize("kind", some(["fsdp2"], list(ENGINES)))
def test_every_engine_writes_what_one_process_writes(kind: str) -> None:
    alone = together(1, "ddp", 1.0)
    assert len({len(text) for text in alone.values()}) > 1, "no text ends before another"
    assert all(token < 40 for text in alone.values() for token in text[:-1])
    assert together(2, kind, 1.0) == alone


SUMS = [{"prompt": f"{a}+{b}=", "answer": a + b} for a, b in ((1, 1), (2, 3), (12, 1), (4, 4))]


def test_a_run_writes_samples_and_measures_how_many_are_the_answer(cwd: Path) -> None:
    """On two processes, of sums that are learnt by heart; again after it is resumed on one."""
    (cwd / "sums.jsonl").write_text("\n".join(map(json.dumps, SUMS)) + "\n")
    lines = [json.dumps({"prompt": s["prompt"], "completion": str(s["answer"])}) for s in SUMS * 10]
    (cwd / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    words = {
        "name": "sums",
        "data": "chat",
        "data__path": "pairs.jsonl",
        "optimizer__lr": "0.02",
        "schedule": "constant",
        "schedule__warmup_steps": "0",
        "evaluation__every": "10",
        "evaluation__generate": "sums.jsonl",
        "evaluation__generate_every": "2",
        "evaluation__generate_tokens": "4",
        "checkpoint__every": "20",
    }
    first, _ = jobs.train(cwd, 2, **words, engine="fsdp2", train__steps="20")
    folder = cwd / "runs" / "sums"
    rows = {row["step"]: row for row in jobs.metrics(folder) if "validation_loss" in row}
    assert "exact_match" not in rows[10] and rows[0]["exact_match"] < 1.0
    samples = read_lines(folder / "samples.jsonl")
    assert [row["step"] for row in samples] == [0] * 4 + [20] * 4
    jobs.train(cwd, 1, **words, train__steps="50", train__resume="auto")
    samples = read_lines(folder / "samples.jsonl")
    assert [row["step"] for row in samples] == [step for step in (0, 20, 40, 50) for _ in SUMS]
    rows = {row["step"]: row for row in jobs.metrics(folder) if "validation_loss" in row}
    assert [row["prompt"] for row in samples[-4:]] == [s["prompt"] for s in SUMS]
    assert rows[50]["exact_match"] == sum(row["match"] for row in samples[-4:]) / 4 >= 0.75
    assert samples[-4] | {"ended": True, "match": True} == samples[-4] and samples[-4]["sample"] == "2"
    assert re.search(r"'1\+1=' -> ", first.out) and "exact match" in first.out


REFUSED = {
    "evaluation.generate=nowhere.jsonl": ("evaluation.generate=nowhere.jsonl: no such file",),
    "evaluation.generate=empty.txt": ("evaluation.generate=empty.txt has no prompt",),
    "evaluation.generate=odd.jsonl": ("odd.jsonl:1 has no text in its field 'prompt'; it has question",),
    "evaluation.generate=[{prompt:a,anwser:b}]": (
        "evaluation.generate[0] has 'anwser': a prompt has the fields prompt",
    ),
    "evaluation.generate=[]": ("evaluation.generate must be a file of prompts, or a list such as",),
    "evaluation.generate=[3]": ("evaluation.generate must be a file of prompts",),
    "evaluation.generate=[a] evaluation.generate_tokens=64": (
        "evaluation.generate_tokens=64 after the 1 tokens of 'a' are more than the model's 64 positions",
    ),
    "evaluation.generate=[a] evaluation.temperature=-1": ("evaluation.temperature must be a number >= 0, got -1",),
}


def test_prompts_that_cannot_be_are_refused_in_a_line(cwd: Path) -> None:
    (cwd / "empty.txt").write_text("\n\n")
    (cwd / "odd.jsonl").write_text('{"question": "1+1="}\n')
    assert not_one_line(cwd, REFUSED) == {}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", "one $HOME\n\ntwo\n", [Prompt("one $HOME", None), Prompt("two", None)]),
        ("p.csv", 'prompt,answer\n"1,5+1=","2,5"\n', [Prompt("1,5+1=", "2,5")]),
        ("p.jsonl", '{"prompt": "a", "completion": "b", "id": 3}\n', [Prompt("a", "b")]),
        ("p.json", '[{"prompt": "a", "answer": null}]', [Prompt("a", None)]),
    ],
)
def test_a_file_of_prompts_is_read_by_its_ending(tmp_path: Path, name: str, content: str, expected: list[Any]) -> None:
    (tmp_path / name).write_text(content)
    assert read_prompts(str(tmp_path / name)) == expected


def test_prompts_with_two_answers_or_without_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.generate\[0\]: a prompt has one answer"):
        read_prompts([{"prompt": "a", "answer": "b", "completion": "c"}])
    config = LanguageModel("gpt2", CONFIGS["gpt2"]).describe(61)
    with pytest.raises(ValueError, match="the prompt 'a' has no tokens"):
        encoded([Prompt("a", None)], lambda text: [], config, 1)
