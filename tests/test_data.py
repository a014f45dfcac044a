"""Text to tokens to batches: what is read, how it is split and cached, and in which order it is trained on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from distopt.data import sources, token_cache, tokenizers, tokenizing
from distopt.data.text_data import TextData
from distopt.data.token_cache import Corpus

END = "<|end|>"


def documents(opened: Corpus, tokens: np.ndarray, end: str = "\0") -> list[str]:
    """The documents of one split, read back from its tokens."""
    parts = opened.decode(tokens).split(end)
    assert parts.pop() == "", "a split ends with the end of a document"
    return parts


def folder_of(path: Path, count: int) -> list[str]:
    """A folder of `count` small files; their texts."""
    texts = [f"file {number}: naïve café {'x' * number}\n" for number in range(count)]
    for number, content in enumerate(texts):
        file = path / f"part{number % 3}" / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
    return texts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level BPE trained on a little English and saved as the transformers library saves it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(["the cat sat on the mat, and the file was a part of the whole"] * 20, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, model_max_length=8).save_pretrained(folder)
    return str(folder)


# Sources


def test_standard_library_is_the_default(tmp_path: Path) -> None:
    """Every .py of the standard library that is UTF-8 is there once, in one split, byte for byte."""
    opened = TextData(cache_dir=str(tmp_path)).build()
    assert (opened.vocab_size, opened.bytes_per_token, opened.tokenizer) == (256, 1.0, None)
    assert opened.train.dtype == np.uint8 and isinstance(opened.train, np.memmap)
    root = Path(sysconfig.get_paths()["stdlib"])
    package = (root / "json" / "__init__.py").read_bytes()
    assert opened.train.tobytes().count(package) + opened.validation.tobytes().count(package) == 1
    share = len(opened.validation) / (len(opened.train) + len(opened.validation))
    assert 0.002 < share < 0.1  # two per cent of the files, not of the bytes
    assert not [file for file in sources.Source.open(None, "auto", (), "").files if "site-packages" in file.parts]


def test_folder_is_split_by_file(tmp_path: Path) -> None:
    texts = folder_of(tmp_path / "texts", 60)
    (tmp_path / "texts" / "ignored.bin").write_bytes(b"\xff\xfe")
    (tmp_path / "texts" / ".hidden.txt").write_text("hidden")
    opened = TextData(path=str(tmp_path / "texts"), validation_fraction=0.25, cache_dir=str(tmp_path / "c")).build()
    train, validation = documents(opened, opened.train), documents(opened, opened.validation)
    assert sorted(train + validation) == sorted(texts)
    assert 5 <= len(validation) <= 25


def test_split_does_not_depend_on_the_other_files(tmp_path: Path) -> None:
    """A file that is added moves no other file between train and validation."""
    data = TextData(path=str(tmp_path / "texts"), validation_fraction=0.25, cache_dir=str(tmp_path / "c"))
    folder_of(tmp_path / "texts", 40)
    before = data.build()
    folder_of(tmp_path / "texts", 41)
    after = data.build()
    for split in token_cache.SPLITS:
        assert set(documents(before, getattr(before, split))) <= set(documents(after, getattr(after, split)))


def test_one_file_is_split_by_its_tail(tmp_path: Path) -> None:
    """The cut falls between two characters, even where the share of the bytes would fall inside one."""
    content = "a" + "€" * 999  # 2998 bytes, of which 2% is no whole number of characters
    file = tmp_path / "one.text"
    file.write_text(content, encoding="utf-8")
    opened = TextData(path=str(file), cache_dir=str(tmp_path / "c")).build()
    (train,), (validation,) = documents(opened, opened.train), documents(opened, opened.validation)
    assert train + validation == content
    assert len(validation) == 20


def test_few_files_are_split_by_their_tails(tmp_path: Path) -> None:
    """Where the hash leaves no file for validation, every file gives its share."""
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 1000)
    opened = TextData(path=str(tmp_path), cache_dir=str(tmp_path / "c")).build()
    assert documents(opened, opened.train) == ["a" * 980, "b" * 980, "c" * 980]
    assert documents(opened, opened.validation) == ["a" * 20, "b" * 20, "c" * 20]


@pytest.mark.parametrize("name", ["long.txt", "long.jsonl"])
@pytest.mark.parametrize("filling", ["é", "éà\n"], ids=["one line", "many lines"])
@pytest.mark.parametrize("end", ["\0", END], ids=["bytes", "tokenizer"])
def test_long_documents_are_complete(tmp_path: Path, tokenizer: str, name: str, filling: str, end: str) -> None:
    """Documents are read in pieces; a piece never ends inside a character, with or without line breaks."""
    content = "x" + filling * (5 * sources.PIECE // 2 // len(filling.encode()))
    file = tmp_path / name
    file.write_text(json.dumps({"text": content}) if name.endswith("jsonl") else content, encoding="utf-8")
    words = tokenizer if end == END else None
    opened = TextData(path=str(file), tokenizer=words, cache_dir=str(tmp_path / "c")).build()
    (train,), (validation,) = documents(opened, opened.train, end), documents(opened, opened.validation, end)
    assert train + validation == content


def test_jsonl(tmp_path: Path) -> None:
    texts = [f"line {number} of\nsome text" for number in range(50)]
    lines = [json.dumps({"id": 1, "body": content}) for content in texts]
    (tmp_path / "rows.jsonl").write_text("\n\n".join([*lines, json.dumps({"body": ""})]), encoding="utf-8")
    data = TextData(path=str(tmp_path / "rows.jsonl"), field="body", validation_fraction=0.3, cache_dir=str(tmp_path))
    opened = data.build()
    validation = documents(opened, opened.validation)
    assert sorted(documents(opened, opened.train) + validation) == sorted(texts)
    assert 5 <= len(validation) <= 25
    folder = TextData(path=str(tmp_path), format="jsonl", field="body", cache_dir=str(tmp_path / "c")).build()
    assert len(folder.train) + len(folder.validation) == len(opened.train) + len(opened.validation)


def test_datasets_folder(tmp_path: Path) -> None:
    import datasets

    texts = [f"row {number}, naïve" for number in range(50)]
    saved = datasets.Dataset.from_dict({"content": texts, "id": list(range(50))})
    saved.save_to_disk(str(tmp_path / "rows"))
    data = TextData(
        path=str(tmp_path / "rows"), field="content", validation_fraction=0.3, cache_dir=str(tmp_path / "c")
    )
    data.check()
    opened = data.build()
    validation = documents(opened, opened.validation)
    assert sorted(documents(opened, opened.train) + validation) == sorted(texts)
    assert 5 <= len(validation) <= 25
    with pytest.raises(ValueError, match=r"no column 'text'; give field=<one of: content, id>"):
        TextData(path=str(tmp_path / "rows")).check()
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(ValueError, match=r"several datasets \(test, train\)"):
        TextData(path=str(tmp_path / "both")).check()


def test_datasets_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)  # what the import system itself takes for "not there"
    with pytest.raises(ValueError, match=re.escape("pip install distopt[data]")):
        TextData(path=str(tmp_path)).check()


def test_tokenizer(tmp_path: Path, tokenizer: str) -> None:
    """Tokens decode to the documents, and bytes per token are those of the validation text, ends included."""
    texts = folder_of(tmp_path / "texts", 60)
    data = TextData(
        path=str(tmp_path / "texts"), tokenizer=tokenizer, validation_fraction=0.25, cache_dir=str(tmp_path)
    )
    opened = data.build()
    assert (opened.vocab_size, opened.train.dtype, opened.tokenizer) == (280, np.uint16, tokenizer)
    train, validation = documents(opened, opened.train, END), documents(opened, opened.validation, END)
    assert sorted(train + validation) == sorted(texts)
    held_out = sum(len(content.encode()) + 1 for content in validation)
    assert opened.bytes_per_token == held_out / len(opened.validation) != 1
    assert opened.decode(torch.tensor(opened.encode("the cat, naïve"))) == "the cat, naïve"
    assert len(opened.encode("the cat")) < len("the cat")


def test_bytes_decode_anything() -> None:
    opened = Corpus(np.zeros(0), np.zeros(0), 256, 1.0, None, "", "")
    assert opened.encode("é") == [0xC3, 0xA9]
    assert opened.decode(np.array([0x61, 0xC3])) == "a\ufffd"


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    file = tmp_path / "large.txt"
    file.touch()
    os.truncate(file, 64 << 20)  # zero bytes, which are UTF-8 and take no room on the disk
    tracemalloc.start()
    opened = TextData(path=str(file), cache_dir=str(tmp_path)).build()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(opened.train) + len(opened.validation) == (64 << 20) + 2
    assert peak < 24 << 20
    for split in token_cache.SPLITS:
        next(tmp_path.glob(f"*/{split}.bin")).unlink()


# Cache


def test_cache_is_reused_and_rebuilt(tmp_path: Path, tokenizer: str) -> None:
    """The same key opens the same files; a change of anything that determines the tokens gives another key."""
    folder_of(tmp_path / "texts", 20)
    base = {"path": str(tmp_path / "texts"), "validation_fraction": 0.25, "cache_dir": str(tmp_path / "c")}
    first = TextData(**base).build()
    (built,) = (tmp_path / "c").iterdir()
    before = (built / "train.bin").stat().st_mtime_ns
    again = TextData(**base).build()
    assert (built / "train.bin").stat().st_mtime_ns == before and again.digest == first.digest

    digests = {first.digest}
    for change in ({"validation_fraction": 0.5}, {"tokenizer": tokenizer}, {"suffixes": "9.txt"}):
        digests.add(TextData(**{**base, **change}).build().digest)
    file = tmp_path / "texts" / "part0" / "0.txt"
    content = file.read_text(encoding="utf-8")
    stat = file.stat()
    file.write_text(content.upper(), encoding="utf-8")  # as long as before: only the time tells
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    digests.add(TextData(**base).build().digest)
    file.write_text(content + "more", encoding="utf-8")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as old as before: only the size tells
    digests.add(TextData(**base).build().digest)
    file.rename(file.with_name("00.txt"))  # in the same place of the order: only the name tells
    TextData(**base).build()
    assert len(digests) == 6 and len(list((tmp_path / "c").iterdir())) == 7


def test_tokenizer_change_rebuilds(tmp_path: Path, tokenizer: str) -> None:
    """The tokenizer counts by content: a copy elsewhere shares the cache, an edit does not; weights do not count."""
    folder_of(tmp_path / "texts", 20)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in Path(tokenizer).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())

    def entries(folder: str) -> int:
        TextData(path=str(tmp_path / "texts"), tokenizer=folder, cache_dir=str(tmp_path / "c")).build()
        return len(list((tmp_path / "c").iterdir()))

    assert entries(tokenizer) == entries(str(copy)) == 1
    (copy / "model.safetensors").write_bytes(b"weights")
    assert entries(str(copy)) == 1
    saved = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    saved["model"]["merges"].pop()
    (copy / "tokenizer.json").write_text(json.dumps(saved), encoding="utf-8")
    assert entries(str(copy)) == 2


def test_killed_build_leaves_no_corpus(tmp_path: Path) -> None:
    """The kernel kills the first build in the middle of a write; the second one is whole, and tidies up in time."""
    file, cache = tmp_path / "text.txt", tmp_path / "c"
    file.write_text("some words\n" * 600_000)
    program = (
        "import resource, signal, sys\n"
        "from distopt.data.text_data import TextData\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "TextData(path=sys.argv[1], cache_dir=sys.argv[2]).build()\n"
    )
    root = str(Path(token_cache.__file__).parents[2])
    killed = subprocess.run([sys.executable, "-c", program, file, cache], cwd=root, timeout=120)
    assert killed.returncode == -signal.SIGXFSZ
    (aside,) = cache.iterdir()
    assert (aside / "train.bin").stat().st_size == 1 << 20

    opened = TextData(path=str(file), cache_dir=str(cache)).build()
    assert len(opened.train) + len(opened.validation) == 600_000 * 11 + 2
    assert not aside.exists() and len(list(cache.iterdir())) == 1
    aside.mkdir()  # of a text that nobody asks for any more
    for old in (aside, *aside.iterdir()):
        os.utime(old, (0, 0))
    TextData(path=str(file), cache_dir=str(cache), validation_fraction=0.5).build()
    assert not aside.exists() and len(list(cache.iterdir())) == 2


INTERRUPTED = """
import os, signal, sys
from distopt.data import sources, tokenizing
from distopt.data.text_data import TextData
tokenizing._BATCH, tokenizing._KEPT, sources.PIECE = 1 << 12, 4, 1 << 12
keep = tokenizing._keep
def kept(folder, count, files):
    keep(folder, count, files)
    if count == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
tokenizing._keep = kept
TextData(path=sys.argv[1], cache_dir=sys.argv[2], tokenizer=sys.argv[3] or None).build(processes=int(sys.argv[5]))
"""


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.matrix)])
def test_an_interrupted_build_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str, processes: int
) -> None:
    """Killed twice, it ends with the tokens of one that was not, and tokenizes none of them again."""
    file, cache = tmp_path / "text.txt", tmp_path / "c"
    file.write_text("".join(f"the cat {i} sat on the mat\n" for i in range(6000)))
    monkeypatch.setattr(sources, "PIECE", 1 << 12)
    monkeypatch.setattr(tokenizing, "_BATCH", 1 << 12)
    monkeypatch.setattr(tokenizing, "_KEPT", 4)
    whole = TextData(path=str(file), cache_dir=str(tmp_path / "whole"), tokenizer=tokenizer).build()
    root = str(Path(token_cache.__file__).parents[2])
    for kill in ("4", "12"):
        words = [sys.executable, "-c", INTERRUPTED, str(file), str(cache), tokenizer, kill, str(processes)]
        killed = subprocess.run(words, cwd=root, timeout=600, check=False, capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        (building,) = cache.iterdir()
        assert json.loads((building / "progress.json").read_text())["batches"] == int(kill)
    tokenized: list[int] = []
    encode = tokenizers.Tokenizer.encode
    monkeypatch.setattr(tokenizers.Tokenizer, "encode", lambda *args: tokenized.append(1) or encode(*args))
    opened = TextData(path=str(file), cache_dir=str(cache), tokenizer=tokenizer).build()
    assert len(tokenized) < file.stat().st_size / sources.PIECE - 10
    assert opened.digest == whole.digest and (opened.train == whole.train).all()
    assert not list(cache.glob("*/progress*")) and not list(cache.glob("*/lock"))


def test_second_of_two_builders_gives_way(tmp_path: Path) -> None:
    """Whoever renames last finds the folder taken, keeps what is there and leaves nothing behind."""
    folder_of(tmp_path / "texts", 20)
    source = sources.Source.open(str(tmp_path / "texts"), "text", ".txt", "text")
    folder = tmp_path / "c" / "corpus"
    tokenizing.write(folder, source, None, 0.25)
    first = Corpus.open(folder, None)
    inode = folder.stat().st_ino
    tokenizing.write(folder, source, None, 0.25)
    assert folder.stat().st_ino == inode and list(folder.parent.iterdir()) == [folder]
    assert Corpus.open(folder, None).digest == first.digest


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("good")
    (tmp_path / "texts" / "b.txt").write_bytes(b"x" * 300_000 + b"\n" * 300_000 + "é".encode("latin-1"))
    data = TextData(path=str(tmp_path / "texts"), cache_dir=str(tmp_path / "c"))
    data.check()  # which reads no more than the first file
    with pytest.raises(ValueError, match=r"b\.txt is not UTF-8 at byte 600000; "):
        data.build()
    assert list((tmp_path / "c").iterdir()) == []


def test_damaged_cache_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path / "texts", 20)
    data = TextData(path=str(tmp_path / "texts"), cache_dir=str(tmp_path / "c"))
    data.build()
    (file,) = (tmp_path / "c").glob("*/train.bin")
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"train\.bin does not have the \d+ bytes that were written; delete"):
        data.build()


def test_default_cache_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.txt").write_text("words " * 100)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    TextData(path=str(tmp_path / "one.txt")).build()
    assert len(list((tmp_path / "home" / ".cache" / "distopt").iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    TextData(path=str(tmp_path / "one.txt")).build()
    assert len(list((tmp_path / "xdg" / "distopt").iterdir())) == 1
