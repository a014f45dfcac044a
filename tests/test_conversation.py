"""Examples of fine-tuning: which tokens are targets, as transformers tokenizes what the model is given; bad lines."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distopt.data.chat import Encoder
from distopt.data.sft import CompletionData
from tests.harness.pretrained import MARKED, TEMPLATE, chats, pairs, write_lines, write_tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi  there\n"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "日本語?"},
    {"role": "assistant", "content": "  import os\n"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    write_tokenizer(folder / "chat")
    write_tokenizer(folder / "marked", MARKED)
    write_tokenizer(folder / "plain", None)
    write_tokenizer(folder / "endless", end=None)
    write_tokenizer(folder / "changing", "{{ messages | length }}" + TEMPLATE)
    write_tokenizer(folder / "strict", "{{ raise_exception('roles must alternate') }}")
    return folder


def encoded(folder: Path, name: str | None, record: dict[str, Any]) -> tuple[Encoder, list[int], list[int]]:
    encoder = Encoder(None if name is None else str(folder / name))
    (example,) = encoder.encode([record], ["file:1"])
    return encoder, example.tokens.tolist(), example.targets.tolist()


@pytest.mark.parametrize("name", ["chat", "marked"])
def test_the_assistants_turns_are_targets_with_what_ends_them(folder: Path, name: str) -> None:
    encoder, tokens, targets = encoded(folder, name, {"messages": TALK})
    tokenizer = encoder.tokenizer
    assert tokens == tokenizer.apply_chat_template(TALK, tokenize=True)["input_ids"]
    end = "" if name == "marked" else "\n"  # the template's marks leave out the new line after the end
    text = "".join(
        f"[{part}]" if flag else part
        for flag, part in (
            (targets[start], tokenizer.decode(tokens[start:stop]))
            for cuts in [[0, *(np.flatnonzero(np.diff(targets)) + 1).tolist(), len(tokens)]]
            for start, stop in itertools.pairwise(cuts)
        )
    )
    answers = (f"[Hello!<|end|>{end}]", f"[  import os\n<|end|>{end}]")
    rest = "" if end else "\n"
    assert text == (
        f"<|system|>\nBe brief.<|end|>\n<|user|>\nHi  there\n<|end|>\n<|assistant|>\n{answers[0]}{rest}"
        f"<|user|>\n日本語?<|end|>\n<|assistant|>\n{answers[1]}{rest}"
    )


def test_what_is_given_is_tokenized_as_in_generation(folder: Path) -> None:
    """Up to each answer the tokens are those of transformers for the conversation so far, prompted for an answer."""
    encoder, tokens, targets = encoded(folder, "chat", {"messages": TALK})
    starts = (np.flatnonzero(np.diff(targets) == 1) + 1).tolist()
    assert len(starts) == 2
    for start, turns in zip(starts, (2, 4)):
        given = encoder.tokenizer.apply_chat_template(TALK[:turns], tokenize=True, add_generation_prompt=True)
        assert tokens[:start] == given["input_ids"]


@pytest.mark.parametrize("prompt", ["Say it:", "imp", ""])
@pytest.mark.parametrize("name", ["chat", "plain", None])
def test_a_prompt_is_tokenized_without_its_completion(folder: Path, name: str | None, prompt: str) -> None:
    """`imp` + `ort` would be one token, which the model never sees when it is given `imp`."""
    encoder, tokens, targets = encoded(folder, name, {"prompt": prompt, "completion": "ort é"})
    given = encoder.tokenizer(prompt)["input_ids"] if prompt else []
    assert tokens[: len(given)] == given
    assert encoder.tokenizer.decode(tokens[len(given) : -1]) == "ort é"
    assert tokens[-1] == encoder.tokenizer.eos_token_id
    # Nothing comes before the first token of all, of which it could be predicted.
    assert targets == [0] * max(1, len(given)) + [1] * (len(tokens) - max(1, len(given)))


def test_a_beginning_is_put_where_the_tokenizer_puts_it(folder: Path, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = write_tokenizer(tmp_path)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", 3)]
    )
    tokenizer.save_pretrained(tmp_path)
    encoder, tokens, targets = encoded(tmp_path, ".", {"prompt": "a", "completion": "b"})
    assert tokens == [*encoder.tokenizer("a")["input_ids"], *encoder.tokenizer.encode("b")[1:], encoder.end[0]]
    assert (tokens[0], targets) == (3, [0, 0, 1, 1])
    encoder, tokens, _ = encoded(tmp_path, ".", {"messages": TALK})
    assert tokens.count(3) == 1  # the template's own


def build(folder: Path, **arguments: Any) -> Any:
    data = CompletionData(cache_dir=str(folder / "cache"), tokenizer=str(folder / "chat"), **arguments)
    data.check()
    return data.build()


def test_examples_are_read_back_and_split_in_two(folder: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", chats() + pairs())
    corpus = build(folder, path=str(path), validation_fraction=0.2)
    texts = [
        corpus.decode(examples.tokens[start:end])
        for examples in (corpus.train, corpus.validation)
        for start, end in zip(examples.starts, examples.starts[1:])
    ]
    template = "<|user|>\n{}<|end|>\n<|assistant|>\n{}<|end|>\n"
    asked = [[message["content"] for message in chat["messages"]] for chat in chats()]
    wanted = [template.format(*both) for both in asked] + [f"{a}: {b}<|end|>" for a, b in asked]
    assert sorted(texts) == sorted(wanted)
    assert 20 < len(corpus.validation) < 80
    taught = corpus.decode(corpus.train.tokens[corpus.train.targets > 0])
    assert "Say" not in taught and "cat" in taught
    assert 1.0 < corpus.bytes_per_token < 3.0
    assert (
        corpus.encode("Hi")
        == corpus.encoder.tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], add_generation_prompt=True
        )["input_ids"]
    )
    assert "Say" in corpus.decode(corpus.encode("")) and not corpus.decode(corpus.encode("")).endswith("<|end|>\n")


@pytest.mark.parametrize("rows, chat", [(pairs(4), False), (chats()[:4], True)], ids=["pairs", "conversations"])
def test_a_prompt_is_tokenized_as_those_that_were_learnt(
    folder: Path, tmp_path: Path, rows: list[dict[str, Any]], chat: bool
) -> None:
    """Also where the tokenizer has a chat template, which pairs are not rendered by."""
    path, held = write_lines(tmp_path / "a.jsonl", rows), write_lines(tmp_path / "b.jsonl", rows[:1])
    corpus = build(folder, path=str(path), validation_path=str(held))
    asked = rows[0]["messages"][0]["content"] if chat else rows[0]["prompt"]
    assert (corpus.chat, corpus.encode(asked)) == (chat, corpus.encode(""))
    assert corpus.decode(corpus.encode(asked)) == (f"<|user|>\n{asked}<|end|>\n<|assistant|>\n" if chat else asked)


def test_a_few_examples_leave_one_to_evaluate_on(folder: Path, tmp_path: Path) -> None:
    corpus = build(folder, path=str(write_lines(tmp_path / "few.jsonl", pairs(3))))
    assert (len(corpus.train), len(corpus.validation)) == (2, 1)
    others = write_lines(tmp_path / "others.jsonl", pairs(7))
    corpus = build(folder, path=str(tmp_path / "few.jsonl"), validation_path=str(others))
    assert (len(corpus.train), len(corpus.validation)) == (3, 7)


def test_the_cache_follows_what_determines_the_tokens(folder: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", pairs(10))
    first = build(folder, path=str(path)).digest
    assert build(folder, path=str(path)).digest == first
    assert build(folder, path=str(path), packing=False).digest != first  # other batches: no run resumes with them
    write_lines(path, [{**line, "id": 1} for line in pairs(9)])
    assert build(folder, path=str(path), ignore=["id"]).digest != first


CHAT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
GOOD = {"prompt": "a", "completion": "b"}
BAD: dict[str, tuple[Any, str]] = {
    "not json": ('{"prompt": ', "is not UTF-8 JSON"),
    "a list": ([1], "is a list, not an object"),
    "both": ({**GOOD, "messages": list(CHAT)}, "has the fields of messages and completion: give data.format=messages"),
    "nothing": ({}, "has the fields none: an example has messages, conversations"),
    "other fields": ({"question": "a"}, "has the fields question: .* data.fields and data.format name others"),
    "missing": ({"prompt": "a"}, r"has no field 'completion' \(found: prompt\)"),
    "a number": ({"prompt": 1, "completion": "b"}, "prompt must be text, got int 1"),
    "null": ({"prompt": "a", "completion": None}, r"has no field 'completion' \(found: prompt\)"),
    "empty completion": ({"prompt": "a", "completion": ""}, "completion is empty, .* remove the line"),
    "messages are text": ({"messages": "hi"}, "messages must be a list of messages, got 'hi'"),
    "no messages": ({"messages": []}, "messages must be a list"),
    "a message is text": ({"messages": ["hi"]}, r"messages\[0\] must be"),
    "a message without role": ({"messages": [{"content": "a"}]}, r"messages\[0\] has no field 'role'"),
    "a message of numbers": ({"messages": [{"role": "user", "content": 1}]}, r"messages\[0\].content must be text"),
    "no assistant": ({"messages": [CHAT[0]]}, "no message has the role assistant"),
    "nothing said": ({"messages": [CHAT[0], {**CHAT[1], "content": ""}]}, r"messages\[1\].content, of the assistant"),
}


@pytest.mark.parametrize(("line", "expected"), BAD.values(), ids=BAD)
def test_a_bad_line_is_named(folder: Path, tmp_path: Path, line: Any, expected: str) -> None:
    """On the third line, which only reading all of them finds."""
    path = tmp_path / "bad.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    path.write_text(f"{json.dumps(GOOD)}\n\n{text}\n{json.dumps(GOOD)}\n")
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}:3:? {expected}"):
        build(folder, path=str(path))
    assert not list((folder / "cache").glob("bad*"))


REFUSED: dict[str, tuple[str, Any, str]] = {
    "no template": ("plain", {"messages": list(CHAT)}, "has no chat template: set its chat_template and save it"),
    "no end": ("endless", GOOD, "has no token that ends a text: set its eos_token"),
    "changing": ("changing", {"messages": TALK}, "renders a message differently when others follow it"),
    "refusing": ("strict", {"messages": list(CHAT)}, "refuses it: roles must alternate"),
}


@pytest.mark.parametrize(("name", "line", "expected"), REFUSED.values(), ids=REFUSED)
def test_a_tokenizer_that_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, name: str, line: Any, expected: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [line])
    data = CompletionData(path=str(path), tokenizer=str(folder / name))
    with pytest.raises(ValueError, match=expected):
        data.check()


def test_arguments_are_checked(folder: Path, tmp_path: Path) -> None:
    path = str(write_lines(tmp_path / "one.jsonl", [GOOD]))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    for arguments, expected in (
        ({}, "data.path is not set"),
        ({"path": path}, "contains one example, which leaves none for validation: give data.validation_path"),
        ({"path": path, "validation_fraction": 1.0}, r"validation_fraction must be a number in \(0, 1\), got 1.0"),
        ({"path": path, "packing": "yes"}, "data.packing must be true or false, got 'yes'"),
        ({"path": str(tmp_path / "empty.jsonl")}, "contains no example"),
        ({"path": str(tmp_path / "none.jsonl")}, "does not exist"),
    ):
        with pytest.raises(ValueError, match=expected):
            build(folder, **arguments)
