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
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from distopt.data import sources, token_cache, tokenizers, tokenizing
from distopt.data.order import Order, Sequences, ValidationSequences
from distopt.data.permutation import Permutation
from distopt.data.text_data import TextData
from distopt.data.token_cache import Corpus

CONF = Path(__file__).parent.parent / "conf" / "data"
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
def test_long_documents_come_through_whole(tmp_path: Path, tokenizer: str, name: str, filling: str, end: str) -> None:
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


@pytest.mark.parametrize("processes", [1, 2])
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


# Order

TOKENS = np.arange(4 * 37 + 3, dtype=np.uint16)  # 37 sequences of length 4, and two tokens over


def order(seed: int = 0, batch_size: int = 8) -> Sequences:
    return Sequences(TOKENS, sequence_length=4, batch_size=batch_size, seed=seed)


def test_targets_are_the_inputs_shifted_by_one() -> None:
    batch = order().batch(0)
    assert batch.dtype == torch.int64 and batch.shape == (8, 5)
    assert torch.equal(batch, torch.from_numpy(order().rows(0) * 4)[:, None] + torch.arange(5))


def test_a_sequence_needs_its_last_target() -> None:
    counts = [Sequences(TOKENS[:size], sequence_length=4, batch_size=1).count for size in (5, 8, 9)]
    assert counts == [1, 1, 2]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("step", [0, 4, 100])
def test_global_batch_is_the_same_at_any_world_size(world: int, step: int) -> None:
    blocks = [order().batch(step, rank, world) for rank in range(world)]
    assert all(block.shape == (8 // world, 5) for block in blocks)
    assert torch.equal(torch.cat(blocks), order().batch(step))


@pytest.mark.parametrize("batch_size", [1, 8, 37, 100], ids="batch {}".format)
def test_each_sequence_is_seen_once_an_epoch(batch_size: int) -> None:
    """Also where a batch straddles two epochs, or holds several."""
    sequences = order(batch_size=batch_size)
    assert sequences.count == 37
    seen = np.concatenate([sequences.rows(step) for step in range(-(-3 * 37 // batch_size))])[: 3 * 37].reshape(3, 37)
    assert (np.sort(seen, axis=1) == np.arange(37)).all()
    assert len({tuple(epoch) for epoch in seen}) == 3, "every epoch has its own order"


def test_order_is_a_pure_function_of_seed_and_step() -> None:
    """Whatever was asked for before: a resumed run trains on what the first would have trained on."""
    walked = order(seed=3)
    rows = [walked.rows(step) for step in range(12)]
    for step in (11, 0, 4, 4, 9):
        assert (order(seed=3).rows(step) == rows[step]).all() and (walked.rows(step) == rows[step]).all()
    assert (order(seed=4).rows(0) != rows[0]).any()


@pytest.mark.parametrize("count", [1, 2, 3, 37, 4096, 5000])
def test_a_keyed_permutation_has_every_entry_once(count: int) -> None:
    orders = [Permutation(count, 3, epoch)[np.arange(count)] for epoch in range(4)]
    for each in orders:
        assert (np.sort(each) == np.arange(count)).all()
    if count > 30:
        assert len({tuple(each) for each in orders}) == 4
        # Of a random permutation: one fixed point and half of the neighbours in ascending order, on average.
        assert sum(int((each == np.arange(count)).sum()) for each in orders) < 20
        assert 0.3 < float(np.mean([np.mean(np.diff(each) > 0) for each in orders])) < 0.7


def test_the_order_of_a_large_corpus_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """2^40 sequences, whose permutation would be 8 TB; and what it is, once and for all."""
    large = Order(2**40, 4, seed=5)
    assert large.identity == {"order": "keyed, above 1048576 sequences"} and order().identity == {}
    tracemalloc.start()
    rows = np.concatenate([large.rows(step) for step in (0, 10**9, 2**38)])
    assert tracemalloc.get_traced_memory()[1] < 1e5
    tracemalloc.stop()
    assert len(set(rows.tolist())) == 12 and (rows >= 0).all() and (rows < 2**40).all()
    assert large.rows(0).tolist() == [315228011164, 124318978421, 960567710364, 335417010178]
    monkeypatch.setattr(Order, "LARGE", 20)
    seen = np.concatenate([order().rows(step) for step in range(14)])[:111].reshape(3, 37)
    assert (np.sort(seen, axis=1) == np.arange(37)).all() and len({tuple(epoch) for epoch in seen}) == 3


def test_validation_set_is_the_same_at_any_world_size() -> None:
    validation = ValidationSequences(TOKENS, sequence_length=4, batch_size=8, max_sequences=30)
    assert (validation.sequences, len(validation)) == (24, 3)
    whole = torch.cat(list(validation.batches()))
    for world in (2, 4):
        shards = [list(validation.batches(rank, world)) for rank in range(world)]
        assert torch.equal(torch.cat([torch.cat(blocks) for blocks in zip(*shards)]), whole)
    starts = whole[:, 0]
    assert torch.equal(whole, starts[:, None] + torch.arange(5))
    assert starts[0] == 0 and starts[-1] == len(TOKENS) - 5
    gaps = starts.diff()
    assert gaps.min() >= 4 and gaps.max() - gaps.min() <= 1, "even, and no target twice"


def test_validation_takes_all_by_default_and_one_batch_at_least() -> None:
    assert ValidationSequences(TOKENS, sequence_length=4, batch_size=1).sequences == 37
    few = ValidationSequences(TOKENS[:7], sequence_length=4, batch_size=8, max_sequences=2)
    (batch,) = few.batches()
    assert batch.shape == (8, 5) and batch[0, 0] == 0 and batch[-1, -1] == 6


# Errors


def _not_utf8(path: Path) -> Path:
    path.with_suffix(".txt").write_bytes(b"abc\xe9")
    return path.with_suffix(".txt")


def _jsonl(content: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.with_suffix(".jsonl").write_text(content, encoding="utf-8")
        return path.with_suffix(".jsonl")

    return make


def _file(content: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.write_text(content, encoding="utf-8")
        return path

    return make


def _folder(path: Path) -> Path:
    path.mkdir()
    (path / "image.png").write_bytes(b"\x89PNG")
    return path


def _dataset_without_rows(path: Path) -> Path:
    """What `save_to_disk` leaves of a dataset of no rows."""
    path.mkdir()
    (path / "state.json").write_text(json.dumps({"_data_files": [], "_fingerprint": "0"}))
    (path / "dataset_info.json").write_text("{}")
    return path


def _dataset_without_state(path: Path) -> Path:
    _dataset_without_rows(path)
    (path / "state.json").write_text("{}")
    (path / "data-00000-of-00001.arrow").write_bytes(b"ARROW1")
    return path


BAD_INPUT = [
    ("nowhere", lambda path: path, {}, r"does not exist; give path="),
    ("empty file", _file(""), {}, r"contains no non-empty text file; give another path"),
    ("folder without text", _folder, {}, r"contains no non-empty text file ending in \('\.txt', .*; give another path"),
    ("not UTF-8", _not_utf8, {}, r"source\.txt is not UTF-8 at byte 3; convert it"),
    ("not JSON", _jsonl('{"text": "a"}\n{"text": '), {}, r"source\.jsonl:2 is not UTF-8 JSON \("),
    ("no field", _jsonl('{"body": "a"}'), {}, r"source\.jsonl:1 has no text under 'text' \(found: body\); give field="),
    ("not text", _jsonl('{"text": 1}'), {}, r"source\.jsonl:1 has no text under 'text'"),
    ("nested", _jsonl("[" * 99999), {}, r"source\.jsonl:1 is not UTF-8 JSON \(it is nested too deeply\)"),
    ("no rows", _dataset_without_rows, {}, r"source is a dataset without rows; give another path"),
    ("not a state", _dataset_without_state, {}, r"source is not a folder that datasets' save_to_disk wrote \(KeyError"),
    ("no object", _jsonl("[1]"), {}, r"source\.jsonl:1 has no text under 'text' \(found: list\)"),
    ("only empty text", _jsonl('{"text": ""}'), {}, r"contains no text; give another path"),
    ("no dataset", _folder, {"format": "datasets"}, r"is not a folder that datasets' save_to_disk wrote"),
    ("no tokenizer", _file("words"), {"tokenizer": "/no/such"}, r"tokenizer /no/such is not a folder with tokenizer"),
    ("other folder", _file("words"), {"tokenizer": str(CONF)}, r"data.tokenizer: .*conf/data has no tokenizer"),
    (
        "fraction 0",
        _file("words"),
        {"validation_fraction": 0},
        r"validation_fraction must be a number in \(0, 1\), got 0; ",
    ),
    (
        "fraction 1",
        _file("words"),
        {"validation_fraction": 1.0},
        r"validation_fraction must be a number in \(0, 1\), got 1.0",
    ),
    ("format", _file("words"), {"format": "csv"}, r"format must be one of auto, text, jsonl, datasets, got 'csv'"),
    ("too short", _file("a"), {}, r"validation_fraction=0\.02 leaves no text for validation in .*; give more text"),
]


@pytest.mark.parametrize(
    ("make", "arguments", "message"), [row[1:] for row in BAD_INPUT], ids=[row[0] for row in BAD_INPUT]
)
def test_bad_input(tmp_path: Path, make: Callable[[Path], Path], arguments: dict[str, str], message: str) -> None:
    path = str(make(tmp_path / "source"))
    with pytest.raises(ValueError, match=message) as caught:
        TextData(**{"path": path, "cache_dir": str(tmp_path / "c"), **arguments}).build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"sequence_length": 151},
            r"train has 151 tokens, one sequence needs sequence_length \+ 1 = 152; give more text",
        ),
        ({"sequence_length": 0}, r"sequence_length must be an integer >= 1, got 0"),
        ({"batch_size": 0}, r"batch_size must be an integer >= 1, got 0"),
        ({"seed": -1}, r"seed must be an integer >= 0, got -1"),
    ],
)
def test_bad_sequences(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sequences(TOKENS, **{"sequence_length": 4, "batch_size": 8, "seed": 0, **arguments})


def test_bad_validation_sequences() -> None:
    with pytest.raises(ValueError, match=r"validation has 4 tokens, one sequence needs"):
        ValidationSequences(TOKENS[:4], sequence_length=4, batch_size=1)
    with pytest.raises(ValueError, match=r"max_sequences must be an integer >= 1 or null, got 0"):
        ValidationSequences(TOKENS, sequence_length=4, batch_size=1, max_sequences=0)


# Configuration


def choice(name: str) -> TextData:
    """The choice of the configuration, for a model that has no tokenizer of its own."""
    return instantiate(OmegaConf.create({"model": {"path": None}, "data": OmegaConf.load(CONF / f"{name}.yaml")}).data)


@pytest.mark.parametrize("name", ["text", "jsonl", "datasets"])
def test_config_says_that_it_needs_a_path(name: str) -> None:
    data = choice(name)
    with pytest.raises(ValueError, match=rf"format '{name}' needs a path, got None; give path="):
        data.check()


def test_configs_hold_the_defaults() -> None:
    assert choice("stdlib") == TextData()
    other = choice("text")
    assert {**vars(other), "suffixes": tuple(other.suffixes), "format": "auto"} == vars(TextData())


def test_import_is_cheap() -> None:
    """The job imports this before it knows which source it reads."""
    heavy = {"transformers", "datasets", "accelerate", "hydra"}
    program = f"import sys, distopt.data.text_data; print(sorted({heavy} & set(sys.modules)))"
    root = str(Path(token_cache.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
