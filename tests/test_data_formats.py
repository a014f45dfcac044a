"""Data as people have it: files of rows by their endings, chats of several formats, and what is wrong in which row."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from distopt.data.examples import ExampleReader
from distopt.data.rows import Row
from distopt.data.sft import CompletionData
from distopt.data.text_data import TextData
from tests.harness.pretrained import TEMPLATE, write_lines, write_tokenizer

RECORDS = [{"body": f"row {i}, naïve\n'it' \"is\" {'x' * i}", "id": str(i)} for i in range(30)]


def write_csv(path: Path, records: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, records[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(records)
    return path


def write_parquet(path: Path, records: list[dict[str, Any]]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def write_json(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    ".jsonl": write_lines,
    ".json": write_json,
    ".csv": write_csv,
    ".tsv": write_csv,
    ".parquet": write_parquet,
}


@pytest.mark.parametrize("ending", WRITERS)
def test_the_ending_says_how_a_file_is_read(tmp_path: Path, ending: str) -> None:
    """A file, and a folder of such files with a README: the same documents from each format."""
    (tmp_path / "rows").mkdir()
    path = WRITERS[ending](tmp_path / "rows" / f"a{ending}", RECORDS)
    (tmp_path / "rows" / "README.md").write_text("About the rows.")
    for source in (path, path.parent):
        opened = TextData(path=str(source), field="body", validation_fraction=0.3, cache_dir=str(tmp_path)).build()
        texts = b"".join(part.tobytes() for part in (opened.train, opened.validation)).decode().split("\0")
        assert sorted(texts) == sorted(["", *(record["body"] for record in RECORDS)])


BAD: dict[str, tuple[str, bytes | list[dict[str, Any]], str]] = {
    "empty": ("a.csv", b"", "contains no non-empty csv file; give another path"),
    "header only": ("a.csv", b"text,id\n", "csv: .* contains no text; give another path"),
    "another column": ("a.csv", b"txt,id\na,b\n", r"a.csv has no column 'text'; give field=<one of: txt, id>"),
    "one column twice": ("a.csv", b"text,text\na,b\n", "a.csv has two columns 'text': rename one"),
    "a short row": ("a.csv", b'text,id\n"a\nb",1\nc\n', "a.csv:4 has 1 values, and the first line 2"),
    "an open quote": ("a.csv", b'text,id\na,1\n"b,2\n', r"a.csv:3 is not CSV \(unexpected end of data\)"),
    "Latin-1": ("a.csv", "text\né\n".encode("latin-1"), r"a.csv:. is not UTF-8 \("),
    "a torn line": ("a.jsonl", b'{"text": "a"}\n{"text": "b', r"a.jsonl:2 is not UTF-8 JSON \(Unterminated"),
    "torn JSON": ("a.json", b'[{"text": "a"}, {"te', "a.json is not UTF-8 JSON .*; lines of JSON belong into a .jsonl"),
    "no list": ("a.json", b'{"text": "a"}', "a.json is a dict, not a list of objects"),
    "no object": ("a.json", b'[{"text": "a"}, 3]', "a.json row 1 is a int, not an object"),
    "a null": (
        "a.parquet",
        [{"text": "a"}, {"text": None}],
        r"a.parquet row 1 has no text under 'text' \(found: none\)",
    ),
    "no column": ("a.parquet", [{"txt": "a"}], "a.parquet has no column 'text'; give field=<one of: txt>"),
    "no Parquet": ("a.parquet", b"PAR1 and then nothing", r"a.parquet cannot be read as Parquet \("),
}


@pytest.mark.parametrize(("name", "content", "line"), BAD.values(), ids=BAD)
def test_bad_files_are_named_with_the_row(tmp_path: Path, name: str, content: Any, line: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_parquet(path, content)
    with pytest.raises(ValueError, match=line) as caught:
        TextData(path=str(path), cache_dir=str(tmp_path / "c")).build()
    assert "\n" not in str(caught.value) and not list((tmp_path / "c").glob("*"))


def test_a_folder_of_several_formats_asks_for_one(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "lines " * 50}])
    write_csv(tmp_path / "b.csv", [{"text": "table " * 50}])
    with pytest.raises(ValueError, match=r"has files of jsonl and csv; give data.files, such as \*.jsonl"):
        TextData(path=str(tmp_path)).check()
    opened = TextData(path=str(tmp_path), files="*.csv", cache_dir=str(tmp_path / "c")).build()
    assert opened.source.startswith("csv: ") and b"table" in opened.train.tobytes()
    (tmp_path / "c.txt").write_text("text " * 50)
    assert TextData(path=str(tmp_path), cache_dir=str(tmp_path / "c")).build().source.startswith("text: ")


# Formats of examples

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TALK = {"messages": [USER, ANSWER]}


def read(record: dict[str, Any], **options: Any) -> tuple[dict[str, Any], list[str]]:
    """The example of a record, and what was told."""
    reader = ExampleReader(**options)
    return reader.read(Row("a:1", "a:1", record)), reader.notes


FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "messages": (TALK, {}, TALK),
    "ShareGPT": (
        {
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}],
            "system": "Brief.",
        },
        {},
        {"messages": [{"role": "system", "content": "Brief."}, USER, ANSWER]},
    ),
    "ShareGPT with a tool": (
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "Hello!"},
            ],
            "tools": json.dumps([TOOL]),
        },
        {"format": "sharegpt"},
        {
            "messages": [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [{k: v for k, v in CALL.items() if k != "id"}]},
                {"role": "tool", "content": "2"},
                ANSWER,
            ],
            "tools": [TOOL],
        },
    ),
    "Alpaca": (
        {"instruction": "Greet", "input": "me", "output": "Hello!"},
        {},
        {"messages": [{"role": "user", "content": "Greet\n\nme"}, ANSWER]},
    ),
    "Alpaca without a chat template": (
        {"instruction": "Greet", "input": "", "output": "Hello!"},
        {"chat": False, "format": "alpaca"},
        {
            "prompt": "Below is an instruction that describes a task. Write a response that appropriately completes "
            "the request.\n\n### Instruction:\nGreet\n\n### Response:\n",
            "completion": "Hello!",
        },
    ),
    "other names": (
        {"dialog": [{"who": "me", "says": "Hi"}, {"who": "bot", "says": "Hello!"}]},
        {
            "fields": {"messages": "dialog", "role": "who", "content": "says"},
            "roles": {"me": "user", "bot": "assistant"},
        },
        TALK,
    ),
    "other names of a pair": (
        {"question": "Hi", "answer": "Hello!"},
        {"fields": {"prompt": "question", "completion": "answer"}},
        {"prompt": "Hi", "completion": "Hello!"},
    ),
    "tool calls": (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{**CALL, "function": {"name": "add", "arguments": '{"a": 1}'}}],
                },
                {"role": "tool", "content": "2", "tool_call_id": "1"},
                ANSWER,
            ],
            "tools": [TOOL],
        },
        {},
        {
            "messages": [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "2", "tool_call_id": "1"},
                ANSWER,
            ],
            "tools": [TOOL],
        },
    ),
    "a chat that ends with the user": ({"messages": [USER, ANSWER, USER]}, {}, TALK),
    "a prompt beside messages": ({**TALK, "prompt": "Hi"}, {}, TALK),
}


@pytest.mark.parametrize(("record", "options", "example"), FORMATS.values(), ids=FORMATS)
def test_formats_of_examples(record: dict[str, Any], options: dict[str, Any], example: dict[str, Any]) -> None:
    assert read(record, **options)[0] == example


def test_what_is_not_read_is_told_once() -> None:
    reader = ExampleReader(ignore=["source"])
    more = {"id": 1, "source": "web", "messages": [{**USER, "weight": 0}, ANSWER, USER]}
    for number in (1, 2):
        assert reader.read(Row("a", f"a:{number}", more)) == TALK
    assert reader.notes == [
        "not read: id (a:1)",
        "not read: weight of messages (a:1)",
        "not read: what follows the last message of the assistant (a:1)",
    ]


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no such fields": ({"q": "a"}, {}, "^a:1 has the fields q: an example has messages, conversations"),
    "missing": (TALK, {"format": "sharegpt"}, r"^a:1 has no field 'conversations' \(found: messages\)"),
    "only the user": ({"messages": [USER]}, {}, "^a:1: no message has the role assistant"),
    "an unknown speaker": (
        {"conversations": [{"from": "bot", "value": "Hi"}]},
        {},
        r"^a:1: conversations\[0\]: from is 'bot', not one of human, .*: data.roles=\{bot: user\}",
    ),
    "two systems": (
        {"system": "a", "messages": [{"role": "system", "content": "b"}, ANSWER]},
        {},
        "^a:1 has a system message and a field 'system': remove one",
    ),
    "arguments": (
        {"messages": [{**ANSWER, "tool_calls": [{"function": {"name": "add", "arguments": "{"}}]}]},
        {},
        r"^a:1: messages\[0\].tool_calls.arguments must be a JSON object",
    ),
    "a call without a name": ({"messages": [{**ANSWER, "tool_calls": [{}]}]}, {}, "must be functions with a name"),
    "tools": ({**TALK, "tools": "none"}, {}, "^a:1: tools must be a list of JSON descriptions of functions"),
    "an unknown field": (TALK, {"fields": {"question": "q"}}, "^data.fields.question: data.format=auto has no such"),
    "a format": (TALK, {"format": "chatml"}, "^data.format must be one of auto, messages, .*, got 'chatml'"),
}


@pytest.mark.parametrize(("record", "options", "line"), REFUSED.values(), ids=REFUSED)
def test_what_is_missing_is_refused(record: dict[str, Any], options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        read(record, **options)


WITH_TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}" + TEMPLATE.replace(
    "<|end|>", "{% for call in message['tool_calls'] or [] %}{{ call.function | tojson }}{% endfor %}<|end|>"
)


def test_tools_reach_the_template_from_every_file(tmp_path: Path) -> None:
    """From JSONL and from Parquet, whose structs have the fields of all rows; a template without them is refused."""
    write_tokenizer(tmp_path / "tools", WITH_TOOLS)
    write_tokenizer(tmp_path / "chat")
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    other = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{**CALL, "function": {"name": "neg", "arguments": {"b": 2}}}],
    }
    records = [{"messages": [USER, message], "tools": [TOOL]} for message in (called, other)]
    texts = []
    for path in (write_lines(tmp_path / "a.jsonl", records), write_parquet(tmp_path / "a.parquet", records)):
        data = CompletionData(path=str(path), tokenizer=str(tmp_path / "tools"), cache_dir=str(tmp_path / "c"))
        corpus = data.build()
        texts.append([corpus.decode(part.tokens) for part in (corpus.train, corpus.validation)])
        assert corpus.decode(corpus.train.tokens[corpus.train.targets > 0]).startswith('{"name": "add", "arguments"')
        with pytest.raises(ValueError, match=r"has tools, which the chat template .* does not render"):
            CompletionData(path=str(path), tokenizer=str(tmp_path / "chat")).check()
    assert texts[0] == texts[1] and '"parameters": {"type": "object"}' in texts[0][0] and '{"b": 2}' in texts[0][1]


def test_notes_are_kept_with_the_tokens(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "chat")
    path = write_lines(tmp_path / "a.jsonl", [{**TALK, "id": i} for i in range(6)])
    data = CompletionData(path=str(path), tokenizer=str(tmp_path / "chat"), cache_dir=str(tmp_path / "c"))
    for _ in range(2):  # written, then read
        notes = data.sequences(data.build(), sequence_length=64, batch_size=2).notes
        assert notes[0] == f"not read: id ({path}:1)" and "packed 5 train examples" in notes[1]
