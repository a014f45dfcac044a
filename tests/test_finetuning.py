"""Fine-tuning by the command line: a small pretrained model is taught, exported, and says what it was taught."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from distopt.models.export import export
from tests.harness import jobs
from tests.harness.cells import some
from tests.harness.jobs import metrics
from tests.harness.pretrained import WORDS, chats, pairs, write_lines, write_model, write_tokenizer
from tests.test_export import PROMPT, keep_logits


def overrides(**changes: str | None) -> list[str]:
    """The words of a short fine-tuning, changed; None leaves a word out."""
    words: dict[str, str | None] = {
        "experiment": "finetune",
        "model.path": "base",
        "data.path": "chats.jsonl",
        "data.cache_dir": "cache",
        "train.sequence_length": "64",
        "train.steps": "80",
        "optimizer.lr": "1e-2",
        "evaluation.every": "40",
        "evaluation.sample_tokens": "8",
        "checkpoint.every": "40",
        "trackers": "[]",
    }
    words |= {name.replace("__", "."): value for name, value in changes.items()}
    return [f"{name}={value}" for name, value in words.items() if value is not None]


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetuning")
    write_model(folder / "base")
    write_lines(folder / "chats.jsonl", chats())
    write_lines(folder / "pairs.jsonl", pairs())
    return folder


def finetune(cwd: Path, world: int = 1, **changes: str | None) -> list[jobs.Ended]:
    ended = jobs.run(cwd, overrides(**changes), world)
    assert [rank.code for rank in ended] == [0] * world, "\n".join(rank.err for rank in ended)
    return ended


def answers(folder: Path | str, chat: bool) -> dict[str, str]:
    """What a model says greedily when it is asked for each word, loaded as anyone would."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    said = {}
    for word in WORDS:
        text = f"Say {word} 2 times"
        if chat:
            tokens = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            tokens = tokenizer(text + ":", return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            out = model.generate(**tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
        said[word] = tokenizer.decode(out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return said


def sampled_from(run: Path, chat: bool) -> None:
    """`distopt sample`: the answer alone of a run of conversations; of one of pairs the prompt and what follows."""
    question = f"Say {WORDS[0]} 2 times" + ":" * (not chat)
    words = ["-m", "distopt.sample", run, question, "--temperature", "0"]
    for more in ([], ["--step", "10000"], *([["--chat"]] if chat else [])):
        ended = jobs.python(*words, *more)
        if "--step" in more:
            assert ended.code == 1 and "has no checkpoint of step 10000; it has " in ended.err
            continue
        assert (ended.code, ended.err) == (0, "")  # it ended by itself
        assert ended.out.removeprefix("" if chat else question).strip() == TAUGHT[WORDS[0]]
    assert "--chat uses the chat template, and --raw does not" in jobs.python(*words, "--chat", "--raw").err


def test_a_run_without_a_chat_template_has_no_conversation(finished: Path) -> None:
    ended = jobs.python("-m", "distopt.sample", finished / "runs" / "done", "--chat", "the")
    assert ended.code == 1 and "the tokenizer of this run has no chat template: leave out --chat" in ended.err


TAUGHT = {word: f"{word} {word}" for word in WORDS}
# engine, processes, what else
RUNS: dict[str, tuple[int, dict[str, str | None]]] = {
    "full": (2, {"engine": "fsdp2", "train__micro_batch_size": "4"}),
    "pairs": (
        1,
        {
            "data__path": "pairs.jsonl",
            "data__packing": "false",
            "optimizer": "lamb",
            "optimizer__lr": "5e-2",
            "sam": "on",
        },
    ),
}


@pytest.mark.parametrize("name", some(["full"], RUNS))
def test_a_model_says_what_it_was_taught(cwd: Path, name: str) -> None:
    world, changes = RUNS[name]
    out = finetune(cwd, world, name=name, **changes)[0].out
    losses = [row["validation_loss"] for row in metrics(cwd / "runs" / name) if "validation_loss" in row]
    assert losses[0] > 5.0 and losses[-1] < 0.3, losses
    assert ("packed 1" in out and "train examples into" in out) == (name == "full")
    found = re.search(r"^prompt: +(.*?)\nsample: +(.*?)\nvalidation loss: ", out, re.MULTILINE | re.DOTALL)
    assert found, out
    prompt, sampled = found.groups()
    assert "Say " in prompt and "Say " not in sampled  # the first held-out example's prompt
    assert sampled.endswith("  [end of text]"), sampled  # it was forbidden, and the rest was noise
    sampled_from(cwd / "runs" / name, chat=name == "full")
    export(cwd / "runs" / name, cwd / f"{name} out")
    before = answers(cwd / "base", name == "full")
    assert all(before[word] != TAUGHT[word] for word in WORDS)
    assert answers(cwd / f"{name} out", name == "full") == TAUGHT


@pytest.fixture(scope="module")
def lora(cwd: Path) -> Path:
    """A model that was pretrained on the task's half, adapted: the run's folder."""
    finetune(cwd, name="pretrain", train__steps="20", checkpoint__every="20")
    export(cwd / "runs" / "pretrain", cwd / "half")
    changes = {"adapter": "lora", "adapter.r": "4", "adapter.dropout": "0.1", "train.steps": "60"}
    words = overrides(name="lora", model__path="half", engine="fsdp2", **changes)
    ended = jobs.run(cwd, words, 2, keep_logits, str(cwd / "lora.pt"))
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    return cwd / "runs" / "lora"


def test_lora_is_merged_or_stands_by_itself(cwd: Path, lora: Path) -> None:
    """The merged weights, and the adapter on the pretrained ones, give the logits of the trained model."""
    from transformers import AutoModelForCausalLM

    losses = [row["validation_loss"] for row in metrics(lora) if "validation_loss" in row]
    assert losses[-1] < 0.95 * losses[0]
    export(lora, cwd / "merged")
    said = export(lora, cwd / "adapter", adapter_only=True)
    assert "0.01M parameters" in said
    assert {path.name for path in (cwd / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (cwd / "merged" / "adapter_config.json").exists()
    assert json.loads((cwd / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        cwd / "half"
    )
    trained = torch.load(cwd / "lora.pt")
    for folder in ("merged", "adapter"):
        model = AutoModelForCausalLM.from_pretrained(cwd / folder).eval()
        with torch.no_grad():
            logits = model(input_ids=PROMPT).logits
        assert (logits - trained).abs().max() < 1e-4 * trained.abs().max(), folder  # float32, added in another order
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(cwd / "half").eval()(input_ids=PROMPT).logits
    assert (base - trained).abs().max() > 0.05 * trained.abs().max()


def test_a_run_without_an_adapter_has_none_to_export(cwd: Path, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="contains no adapter: export it without --adapter"):
        export(cwd / "runs" / "pretrain", tmp_path / "out", adapter_only=True)


@pytest.mark.matrix
def test_a_run_resumes_bit_for_bit_and_not_with_another_adapter(cwd: Path) -> None:
    same = {"adapter": "lora", "adapter__dropout": "0.2", "engine": "zero1", "train__micro_batch_size": "2"}
    short = {"schedule": "constant", "schedule__warmup_steps": "0", "checkpoint__every": "4"}
    finetune(cwd, 2, name="unbroken", train__steps="8", **same, **short)
    finetune(cwd, 2, name="broken", train__steps="4", **same, **short)
    again = {"name": "broken", "train__steps": "8", "train__resume": "auto", **same, **short}
    (ended,) = jobs.run(cwd, overrides(**{**again, "adapter__alpha": "7"}))
    assert ended.code == 1 and "was trained with adapter {'r': 16, 'alpha': 32" in ended.err
    finetune(cwd, 2, **again)
    rows = [[row["loss"] for row in metrics(cwd / "runs" / name) if "loss" in row] for name in ("broken", "unbroken")]
    assert len(rows[0]) == 8 and rows[0] == rows[1]


def test_text_is_tokenized_as_the_model_was_and_the_export_keeps_that(cwd: Path) -> None:
    """A pretrained model was trained on bytes as its token ids, and its tokenizer replaced by one of bytes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = jobs.write_text(cwd, words=6000)
    changes = {"data": "text", "data__path": text.name, "evaluation__prompt": "the", "train__steps": "1"}
    more = {"name": "continued", "model.config.attention_dropout": "0.25", "schedule.warmup_steps": "0"}
    finetune(cwd, **changes, **more)
    export(cwd / "runs" / "continued", cwd / "continued out")
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (cwd / "base", cwd / "continued out"))
    assert after.get_vocab() == before.get_vocab() and after.chat_template == before.chat_template
    losses = [row for row in metrics(cwd / "runs" / "continued") if "validation_loss" in row]
    # One token of its BPE is several bytes, and one of bytes would be one.
    assert losses[0]["validation_loss"] / losses[0]["bits_per_byte"] > 1.5 * 0.6931
    assert AutoModelForCausalLM.from_pretrained(cwd / "continued out").config.attention_dropout == 0.25


REFUSED: dict[str, tuple[str, ...]] = {
    "data.path=null": ("data.path is not set: give data.path=",),
    "data.path=bad.jsonl": ("bad.jsonl:2 ",),
    "data.tokenizer=plain": ("chats.jsonl:1 has messages", "no chat template", "save it"),
    "data=text data.path=book.txt data.tokenizer=null": (
        "data.tokenizer=null (bytes) is not the tokenizer of the model in base",
        "leave data.tokenizer out",
    ),
    "data.ignore=messages": ("data.ignore must be names of fields, such as [id, source], got 'messages'",),
    "model.config.num_hidden_layers=99": ("base has no weights for model.layers.2.", "the sizes of weights cannot"),
    "adapter=lora adapter.target_modules=[q_proj,vproj]": ("vproj is not found", "there are", "v_proj"),
    "adapter=lora adapter.target_modules=1": (
        "adapter.target_modules must be all-linear, or names such as [q_proj, v_proj], or null, got 1",
    ),
    "train.sequence_length=8 data.path=bad.jsonl": ("bad.jsonl:2",),
    "train.sequence_length=200": ("train.sequence_length=200 is longer than the model's 128 positions",),
    "adapter=lora adapter.r=0": ("adapter.r must be an integer >= 1, got 0",),
    "adapter=lora adapter.dropout=1": ("adapter.dropout must be a number in [0, 1), got 1",),
    "adapter=lora adapter.target_modules=[qq]": ("adapter.target_modules=['qq']", "not found"),
    "adapter=lora model.path=null data.path=pairs.jsonl": ("adapter=lora adapts a pretrained model: give model.path=",),
}


@pytest.fixture(scope="module")
def refused(cwd: Path) -> dict[str, jobs.Ended]:
    """The end of each of these commands, all of them in one process."""
    write_lines(cwd / "bad.jsonl", [{"prompt": "a", "completion": "b"}, {"text": "c"}])
    write_tokenizer(cwd / "plain", None)
    (cwd / "book.txt").write_text("It was a dark and stormy night.\n" * 200)
    commands = [[*overrides(), *words.split()] for words in REFUSED]
    return dict(zip(REFUSED, jobs.one_after_another(cwd, commands)))


@pytest.mark.parametrize(("words", "expected"), REFUSED.items(), ids=REFUSED)
def test_bad_input_is_one_line(refused: dict[str, jobs.Ended], words: str, expected: tuple[str, ...]) -> None:
    ended = refused[words]
    assert (ended.code, ended.out) == (1, "")
    (line,) = ended.err.strip().splitlines()
    assert line.startswith("distopt: error: ")
    assert [part for part in expected if part not in line] == []
