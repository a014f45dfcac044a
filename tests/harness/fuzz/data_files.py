"""Random data: files with one bad line or byte, and folders of models with a damaged file."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tests.harness.fuzz.case import EITHER, REFUSED, RUNS, Case

TEXT = [json.dumps({"text": f"the cat sat on mat {i} and sang a song of green hills"}).encode() for i in range(60)]
CHAT = [
    json.dumps({"prompt": f"Say {i}:", "completion": f" it is {i} and no more than {i}"}).encode() for i in range(60)
]
NO_OBJECT = (b"[1]", b"null", b"3", b'"text"', b"{", b'{"text": ', b"\xff\xfe", b"nope", b"[" * 99_999, b'{"a": 1}')
BAD = {
    "jsonl": (*NO_OBJECT, b'{"text": 1}', b'{"text": null}', b'{"text": ["a"]}', b'{"body": "a"}'),
    "chat": (
        *NO_OBJECT,
        *(b'{"messages": []}', b'{"messages": 1}', b'{"messages": [{"role": "user", "content": "a"}]}'),
        *(b'{"messages": [{"role": 1, "content": "a"}]}', b'{"prompt": "a"}', b'{"prompt": 1, "completion": "a"}'),
        b'{"prompt": "a", "completion": null}',
        b'{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "a"}]}',
    ),
}
ODD = (
    b'{"prompt": "a", "completion": "b", "score": 1}',
    b'{"text": "\\ud800", "prompt": "\\ud800"}',
    b'{"text": "", "text": "a"}',
    b'{"text": "a", "x": NaN}',
    b"\xef\xbb\xbf{}",
)
MODEL = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


def draw(rng: random.Random, model: Path) -> Case:
    """A random case; `model` is a folder that transformers has written, as the fuzzer's `model`."""
    return rng.choices((lines, bytes_of_text, lambda r: folder(r, model)), (4, 2, 3))[0](rng)


def lines(rng: random.Random) -> Case:
    """JSON lines, all of them good, or one of them not."""
    kind = rng.choice(("jsonl", "chat"))
    good = list(TEXT if kind == "jsonl" else CHAT)
    rng.shuffle(good)
    which, verdict = rng.choice((((), RUNS), (BAD[kind], REFUSED), (BAD[kind], REFUSED), (ODD, EITHER)))
    if which:
        good.insert(rng.randrange(len(good)), rng.choice(which))
    content = rng.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(good) + rng.choice((b"", b"\n"))
    return Case((f"data={kind}", "data.path=lines.jsonl"), ("lines.jsonl",), verdict, {"lines.jsonl": content})


def bytes_of_text(rng: random.Random) -> Case:
    """Text with some other bytes."""
    content = bytearray(" ".join(f"the cat {i} sat" for i in range(2000)).encode())
    verdict = RUNS
    if rng.random() < 0.7:
        place = rng.randrange(len(content))
        content[place : place + 1] = rng.choice((b"\xff", b"\x80", b"\xc3", b"\xed\xa0\x80"))
        verdict = REFUSED
    name = rng.choice(("text.txt", "ü text.txt", "text"))
    return Case((f"data.path='{name}'",), (name,), verdict, {name: bytes(content)})


def folder(rng: random.Random, model: Path) -> Case:
    """A pretrained model of which a file is damaged. Bits of weights are anything, so that it may run."""
    name = rng.choice(MODEL)
    content: bytes | None = (model / name).read_bytes() if (model / name).is_file() else b""
    damage = rng.choice(("flip", "truncate", "missing", "other", "field"))
    if content and damage == "flip":
        place = rng.randrange(min(len(content), 4000))
        content = content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
    elif content and damage == "truncate":
        content = content[: rng.randrange(len(content))]
    elif damage == "field" and content and name.endswith("config.json"):
        values = json.loads(content)
        values[rng.choice(list(values))] = rng.choice((None, "two", -1, 0, [], {}, 1.5, True, 10**20))
        content = json.dumps(values).encode()
    else:
        content = None if damage == "missing" else rng.choice((b"", b"{}", b"[]", b"\0" * 100, b"null", b"<html>"))
    named = (name, "model.path", "tokenizer", "model.config", "model:", "model ", "the run has diverged", "not finite")
    words = ("model.path=model", "data=chat", "data.path=chat.jsonl", "train.sequence_length=32")
    files = {f"model/{name}": content, "chat.jsonl": b"\n".join(CHAT)}
    return Case(words, named, EITHER, files, copied="model")
