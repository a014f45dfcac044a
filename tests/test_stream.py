"""Streams: the batches of one process at every world size, from files that are read once, and again from a bookmark."""

from __future__ import annotations

import gzip
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from omegaconf import OmegaConf

from distopt.data import lane, stream_rows
from distopt.data.batch_sizes import BatchSizes
from distopt.data.mixture import Mixture
from distopt.data.stream import StreamData
from distopt.data.streamed_sequences import Bookmark, StreamedSequences, lanes_of
from distopt.job.downloads import hub_names
from tests.harness.hub import COMMIT, served
from tests.harness.pretrained import write_tokenizer

LENGTH = 8
OPTIONS: dict[str, Any] = {"validation_documents": 2, "shuffle_buffer": 64}
SIZES: dict[str, int] = {"sequence_length": LENGTH, "batch_size": 8}


def texts(first: int, count: int) -> list[str]:
    """Documents of 1 to 30 characters that say which they are."""
    return [f"{number:04} " * (number * 7 % 6 + 1) for number in range(first, first + count)]


def jsonl(file: Path, lines: list[str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps({"id": 1, "text": line}) + "\n" for line in lines).encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


def parquet(file: Path, lines: list[str], rows: int = 16) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": [1] * len(lines), "text": lines}), file, row_group_size=rows)
    return file


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of the same documents in several formats, of 11 files of unlike lengths, or in one file."""
    root = tmp_path_factory.mktemp("rows")
    writers: dict[str, Callable[[Path, list[str]], Path]] = {"jsonl": jsonl, "jsonl.gz": jsonl, "parquet": parquet}
    for ending, write in writers.items():
        (root / ending).mkdir()
        for number in range(11):
            write(root / ending / f"{number:02}.{ending}", texts(100 * number, 40 + number))
    jsonl(root / "one.jsonl", texts(0, 300))
    return {name.name: str(name) for name in root.iterdir()}


def sequences(path: str, **options: Any) -> StreamedSequences:
    data = StreamData(path=path, **{**OPTIONS, **options})
    data.check()
    found = data.sequences(data.build(), **SIZES, seed=3)
    assert isinstance(found, StreamedSequences)
    return found


def batches(of: Any, first: int, last: int, world: int = 1) -> list[torch.Tensor]:
    return [torch.cat([of.batch(step, rank, world) for rank in range(world)]) for step in range(first, last)]


# The batches.


@pytest.mark.parametrize("name", ["jsonl", "jsonl.gz", "parquet", "one.jsonl"])
def test_batches_are_those_of_one_process_at_every_world_size(folders: dict[str, str], name: str) -> None:
    expected = batches(sequences(folders[name]), 0, 30)
    assert all(batch.shape == (8, LENGTH + 1) and batch.dtype == torch.int64 for batch in expected)
    for world in (2, 4, 8):
        ranks = [sequences(folders[name]) for _ in range(world)]  # each with files of its own
        for step, batch in enumerate(expected):
            assert torch.equal(torch.cat([ranks[rank].batch(step, rank, world) for rank in range(world)]), batch)


def test_formats_have_the_same_batches(folders: dict[str, str]) -> None:
    first, *others = (batches(sequences(folders[name]), 0, 10) for name in ("jsonl", "jsonl.gz", "parquet"))
    for other in others:
        assert torch.equal(torch.stack(first), torch.stack(other))


def test_every_document_is_read_once_in_a_pass(folders: dict[str, str]) -> None:
    """Lane by lane, the documents of 11 files are dealt out to 8 lanes: 8 whole files, and the rows of three."""
    found = sequences(folders["jsonl"])
    held_out = [0, 1]
    seen: Counter[int] = Counter()
    for part in range(8):
        reader = lane.Lane(found._stream, part, 8, LENGTH, 3)
        for mark, text in reader._read_documents(lane.Mark()):
            if mark.epoch:
                break
            seen[int(text[:4])] += 1
    whole = [100 * number + i for number in range(11) for i in range(40 + number)]
    assert sorted(seen) == sorted(set(whole) - set(held_out)) and set(seen.values()) == {1}


def test_documents_are_packed_as_those_of_a_prepared_text(folders: dict[str, str]) -> None:
    """In the order of the file, in one lane: its text with the end of each document, pass after pass."""
    data = StreamData(path=folders["one.jsonl"], validation_documents=2, shuffle_buffer=1)
    found = data.sequences(data.build(), sequence_length=LENGTH, batch_size=1)
    one = "".join(text + "\0" for text in texts(2, 298)).encode()
    tokens = torch.tensor(list(one * 2))
    for step in range((len(one) + 100) // LENGTH):
        assert torch.equal(found.batch(step)[0], tokens[step * LENGTH : (step + 1) * LENGTH + 1])


def test_a_block_has_its_sequences_in_another_order(folders: dict[str, str]) -> None:
    """64 sequences of the buffer over 8 lanes: blocks of 8 of each, which no sequence leaves."""
    shuffled = sequences(folders["one.jsonl"])
    reader = lane.Lane(shuffled._stream, 5, 8, LENGTH, 3)
    stretch = np.concatenate([reader.sequence(number)[:-1] for number in range(8)])
    reader._go_to(0)
    in_order = reader._tokens[: 8 * LENGTH]
    assert not np.array_equal(stretch, in_order)
    assert sorted(stretch.reshape(8, -1).tolist()) == sorted(in_order.reshape(8, -1).tolist())
    other = StreamData(path=folders["one.jsonl"], **OPTIONS)
    assert not torch.equal(other.sequences(other.build(), **SIZES, seed=4).batch(0), shuffled.batch(0))


def test_lanes_divide_every_batch() -> None:
    assert [lanes_of(BatchSizes(size)) for size in (1, 7, 8, 24, 34, 512)] == [1, 7, 8, 12, 2, 16]
    assert lanes_of(BatchSizes(32, {10: 48, 20: 72})) == 8


def test_more_ranks_than_lanes_share_them(folders: dict[str, str]) -> None:
    data = StreamData(path=folders["jsonl"], **OPTIONS)
    found = [data.sequences(data.build(), sequence_length=LENGTH, batch_size=34) for _ in range(2)]
    for step in range(3):
        whole = torch.cat([found[1].batch(step, rank, 17) for rank in range(17)])
        assert torch.equal(whole, found[0].batch(step)) and whole.shape == (34, LENGTH + 1)


def test_batches_that_grow_are_the_same_at_every_world_size(folders: dict[str, str]) -> None:
    found = [sequences(folders["jsonl"]) for _ in range(2)]
    for each in found:
        each.sizes = BatchSizes(8, {3: 16})
    expected = batches(found[0], 0, 9)
    assert [len(batch) for batch in expected] == [8] * 3 + [16] * 6
    for step, batch in enumerate(expected):
        assert torch.equal(torch.cat([found[1].batch(step, rank, 4) for rank in range(4)]), batch)


# Bookmarks.


def saved(*ranks: StreamedSequences, step: int) -> list[Bookmark]:
    """What a checkpoint keeps, through JSON."""
    every = [bookmark for rank in ranks for bookmark in rank.bookmarks(step)]
    return [Bookmark(*each) for each in json.loads(json.dumps(every))]


@pytest.mark.parametrize("name", ["jsonl", "jsonl.gz", "parquet", "one.jsonl"])
def test_a_run_of_one_rank_is_resumed_by_two(folders: dict[str, str], name: str) -> None:
    """In the middle of files, blocks and documents; and by one again."""
    unbroken, expected = sequences(folders[name]), dict[int, torch.Tensor]()
    for step in range(0, 150, 29):
        expected |= {step + i: batch for i, batch in enumerate(batches(unbroken, step, step + 9))}
        kept = saved(unbroken, step=step)
        ranks = [sequences(folders[name]) for _ in range(2)]
        for rank in ranks:
            rank.resume(kept)
        for after in (step, step + 1, step + 8):
            resumed = torch.cat([ranks[rank].batch(after, rank, 2) for rank in range(2)])
            assert torch.equal(resumed, expected[after]), (step, after)
        again = sequences(folders[name])
        again.resume(saved(*ranks, step=step + 8))
        assert torch.equal(again.batch(step + 8), expected[step + 8])
    assert max(bookmark.epoch for bookmark in kept) >= 1


def test_documents_longer_than_blocks_are_resumed_within(tmp_path: Path) -> None:
    """Of a document that began several blocks ago, a block's mark has the tokens of all of them."""
    path = str(jsonl(tmp_path / "a.jsonl", [" ".join(texts(1000 * number, 100)) for number in range(10)]))
    unbroken = sequences(path)
    expected = batches(unbroken, 0, 60)
    for step in range(9, 60, 10):
        resumed = sequences(path)
        resumed.resume(saved(unbroken, step=step))
        again = sequences(path)
        assert torch.equal(resumed.batch(step), expected[step])
        resumed.batch(min(step + 30, 59))
        again.resume(saved(resumed, step=min(step + 30, 59)))
        assert torch.equal(again.batch(min(step + 30, 59)), expected[min(step + 30, 59)])


def test_resuming_reads_no_more_than_two_blocks(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "_BATCH", 1)
    read = list[int]()
    documents = lane.documents

    def counted(*arguments: Any) -> Any:
        for position, text in documents(*arguments):
            read.append(len(text) + 1)
            yield position, text

    unbroken = sequences(folders["one.jsonl"])
    expected = batches(unbroken, 0, 1000)[-1]
    resumed = sequences(folders["one.jsonl"])
    resumed.resume(saved(unbroken, step=999))
    monkeypatch.setattr(lane, "documents", counted)
    assert torch.equal(resumed.batch(999), expected)
    longest = 30 + 1
    assert sum(read) <= 8 * (2 * 8 * LENGTH + 1 + 2 * longest)  # lanes times two blocks, and documents cut by them


def test_earlier_batches_are_read_again(folders: dict[str, str]) -> None:
    """As a learning-rate range test does; beyond the marks that are kept, from the start."""
    found = sequences(folders["jsonl"])
    expected = batches(found, 0, 90)
    for step in (89, 40, 41, 0, 64):
        assert torch.equal(found.batch(step), expected[step])
    found = sequences(folders["jsonl"])
    found._lane(0)._KEPT = 2  # type: ignore[misc]
    batches(found, 0, 90)
    assert sorted(found._lane(0).marks) == [0, 10, 11]
    assert torch.equal(found.batch(40), expected[40])


# Networks.


class Lossy(MemoryFileSystem):
    """A file system whose reads in the middle of a file fail as often as they are told to."""

    protocol = "lossy"
    failures = 0
    cachable = False
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = super()._open(path, mode, **options)
        if mode != "rb":
            return file
        file.seek(0)
        data = file.read()

        class Reader(type(file)):  # type: ignore[misc]
            def read(self, *size: int) -> bytes:
                if Lossy.failures and len(data) // 3 < self.tell() < len(data) * 3 // 4:
                    Lossy.failures -= 1
                    raise ConnectionError("the connection is gone")
                return super().read(*size)

        return Reader(self, path, data)


@pytest.fixture
def lossy(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a file system with one.jsonl and the folder parquet."""
    fsspec.register_implementation("lossy", Lossy, clobber=True)
    monkeypatch.setattr(Lossy, "store", {})
    monkeypatch.setattr(stream_rows, "_CHUNK", 64)
    monkeypatch.setattr(stream_rows, "PAUSE", 0.0)
    root = Path(folders["one.jsonl"]).parent
    for local in (root / "one.jsonl", *(root / "parquet").iterdir()):
        with fsspec.open(f"lossy://{local.relative_to(root)}", "wb") as file:
            file.write(local.read_bytes())
    return "lossy://"


@pytest.mark.parametrize("name", ["one.jsonl", "parquet"])
def test_what_a_network_loses_is_read_again(folders: dict[str, str], lossy: str, name: str) -> None:
    expected = batches(sequences(folders[name]), 0, 100)
    found = sequences(lossy + name)
    for step, batch in enumerate(expected):
        Lossy.failures = stream_rows.TRIES - 1
        assert torch.equal(found.batch(step), batch)
        assert step or Lossy.failures == 0


def test_a_network_that_is_gone_is_one_line(lossy: str) -> None:
    found = sequences(f"{lossy}one.jsonl")
    Lossy.failures = 1000
    with pytest.raises(ValueError) as failed:
        found.batch(0)
    Lossy.failures = 0
    said = str(failed.value)
    assert said.startswith("lossy://one.jsonl could not be read on from row") and "\n" not in said
    assert "6 times in a row (ConnectionError: the connection is gone): resume with train.resume=auto" in said


def test_a_dataset_on_the_hub_is_read_there(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the files whose path fits, at the commit of the start, and nothing is downloaded into the hub's cache."""
    from huggingface_hub import constants

    shutil.copytree(folders["jsonl"], tmp_path / "rows" / "train")
    jsonl(tmp_path / "rows" / "test" / "a.jsonl", texts(0, 3))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    cfg = OmegaConf.create({"data": {"_target_": "distopt.data.stream.StreamData", "path": "me/rows"}})
    assert hub_names(cfg) == []
    with served({"datasets/me/rows": tmp_path / "rows"}) as (address, requests):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        with pytest.raises(ValueError, match=r"data\.path=me/rows has files of train, test: give data\.files"):
            StreamData(path="me/rows").check()
        with pytest.raises(ValueError, match=r"data\.path=me/other: no such path here, and the hub has no dataset of"):
            StreamData(path="me/other").check()
        found = sequences("me/rows", files="train/*")
        expected = batches(sequences(folders["jsonl"]), 0, 10)
        assert torch.equal(torch.stack(batches(found, 0, 10)), torch.stack(expected))
        read = {request.rpartition("/resolve/")[2] for request in requests if "/resolve/" in request}
    assert len(read) == 11 and all(name.startswith(f"{COMMIT}/train/") for name in read)
    assert not (tmp_path / "cache").exists()


# Evaluation.


def test_the_first_documents_are_held_out(folders: dict[str, str]) -> None:
    data = StreamData(path=folders["jsonl"], validation_documents=50, shuffle_buffer=64)
    corpus = data.build()
    held = [*texts(0, 40), *texts(100, 10)]
    assert bytes(corpus.validation.tolist()) == "".join(text + "\0" for text in held).encode()
    assert corpus.train.held_out == (40, 10, *[0] * 9) and corpus.bytes_per_token == 1.0
    assert corpus.sizes == {"validation": len(corpus.validation)}
    validation: Any = data.validation_sequences(corpus, **SIZES, max_sequences=16)
    whole = torch.cat(list(validation.batches()))
    halves = [torch.cat(list(validation.batches(rank, 2))) for rank in range(2)]
    assert whole.shape == (16, LENGTH + 1) and torch.equal(torch.cat([halves[0][:4], halves[1][:4]]), whole[:8])


def test_rows_of_another_path_are_evaluated_on(folders: dict[str, str], tmp_path: Path) -> None:
    other = jsonl(tmp_path / "held.jsonl", texts(5000, 7))
    corpus = StreamData(path=folders["jsonl"], validation_path=str(other)).build()
    assert bytes(corpus.validation.tolist()) == "".join(text + "\0" for text in texts(5000, 7)).encode()
    assert set(corpus.train.held_out) == {0}


def test_a_tokenizer_makes_the_tokens(folders: dict[str, str], tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    data = StreamData(path=folders["one.jsonl"], tokenizer=str(tmp_path / "tokenizer"), separate=True, **OPTIONS)
    corpus = data.build()
    found: Any = data.sequences(corpus, **SIZES)
    batch = found.batch(0)
    halves = [found.batch(0, rank, 2) for rank in range(2)]
    assert corpus.vocab_size > 256 and (batch.labels == -100).any()
    assert torch.equal(torch.cat([half.inputs for half in halves]), batch.inputs)
    assert {half.targets for half in halves} == {batch.targets}
    assert {bookmark.lane for bookmark in found.bookmarks(0)} == set(range(8))


def test_links_are_files(folders: dict[str, str], tmp_path: Path) -> None:
    """As in the hub's cache, and below a name that is a pattern elsewhere."""
    (folder := tmp_path / "[a]*$b").mkdir()
    for file in Path(folders["jsonl"]).iterdir():
        (folder / file.name).symlink_to(file)
    assert torch.equal(sequences(str(folder)).batch(7), sequences(folders["jsonl"]).batch(7))


def test_other_files_are_other_data(folders: dict[str, str], tmp_path: Path) -> None:
    def digest(**options: Any) -> str:
        return StreamData(**{"path": str(tmp_path / "a.jsonl"), **OPTIONS, **options}).build().digest

    jsonl(tmp_path / "a.jsonl", texts(0, 40))
    first = digest()
    assert first == digest() and len(first) == 32
    different = [digest(shuffle_buffer=1), digest(separate=True), digest(validation_documents=3)]
    jsonl(tmp_path / "a.jsonl", texts(0, 41))
    assert len({first, *different, digest()}) == 5


# Mixtures.


def mixture(folders: dict[str, str], cache: Path, **change: Any) -> Any:
    prepared = {"path": folders["one.jsonl"], "weight": 1}
    streamed = {"path": folders["parquet"], "stream": True, "weight": 3, **OPTIONS, **change}
    data = Mixture(sources={"prepared": prepared, "streamed": streamed}, cache_dir=str(cache))
    data.check()
    corpus = data.build()
    assert corpus.source.startswith("prepared 25.0% of ") and set(corpus.sizes) == {"validation"}
    return data.sequences(corpus, **SIZES, seed=3)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_a_mixture_of_both_is_the_same_at_every_world_size(folders: dict[str, str], cache: Path) -> None:
    expected = batches(mixture(folders, cache), 0, 20)
    for world in (2, 8):
        ranks = [mixture(folders, cache) for _ in range(world)]
        for step, batch in enumerate(expected):
            assert torch.equal(torch.cat([ranks[rank].batch(step, rank, world) for rank in range(world)]), batch)
        lanes = [{bookmark.lane for bookmark in rank.bookmarks(20)} for rank in ranks]
        assert sorted(lane for own in lanes for lane in own) == list(range(8))  # none is read twice


def test_a_mixture_of_both_has_its_shares(folders: dict[str, str], cache: Path) -> None:
    """In each cycle of each lane: the prepared source in epochs of its own, the stream in its own order."""
    found = mixture(folders, cache)
    assert found.count is None
    prepared, streamed = Counter[int](), list[int]()
    for step in range(4096):  # 8 lanes, one sequence of each in a step
        for source, index in found.members(step):
            if source == 0:
                prepared[index] += 1
            else:
                streamed.append(index)
    assert prepared.total() == 8 * 1024 and max(prepared.values()) - min(prepared.values()) <= 1
    assert sorted(streamed) == list(range(8 * 3072))
    for part in range(8):
        assert (own := [index for index in streamed if index % 8 == part]) == sorted(own)


def test_a_mixture_of_both_is_resumed_by_two(folders: dict[str, str], cache: Path) -> None:
    """Within a cycle and in the next one."""
    for step in (37, 4100):
        unbroken = mixture(folders, cache)
        batches(unbroken, step - 2, step)
        expected = batches(unbroken, step, step + 4)
        ranks = [mixture(folders, cache) for _ in range(2)]
        for rank in ranks:
            rank.resume(saved(unbroken, step=step))
        for i, batch in enumerate(expected):
            assert torch.equal(torch.cat([ranks[rank].batch(step + i, rank, 2) for rank in range(2)]), batch)
        assert max(bookmark.block for bookmark in ranks[0].bookmarks(step + 4)) >= step * 3 // 4 // 8 - 1


# What cannot be streamed.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": None}, r"data\.path must be a path, got None"),
        ({"path": "/nowhere/rows"}, r"data\.path=/nowhere/rows does not exist"),
        ({"path": "/nowhere/rows.jsonl"}, r"data\.path=/nowhere/rows.jsonl does not exist"),
        ({"path": "texts"}, r"data\.path=texts has no file of rows to stream, .* \(\.csv, \.txt there\): data=text"),
        ({"path": "texts/a.txt"}, r"has no file of rows to stream"),
        ({"path": "empty"}, r"data\.path=empty has no file of rows to stream"),
        ({"path": "both"}, r"has files of lines and of Parquet; give data\.files"),
        ({"path": "both", "files": "*.csv"}, r"no file of rows to stream whose path fits data\.files=\*\.csv"),
        ({"path": "rows.jsonl", "field": "body"}, r"rows\.jsonl:1 has no text under 'body' \(found: id, text\)"),
        (
            {"path": "rows.parquet", "field": "body"},
            r"rows\.parquet has no column 'body'; give field=<one of: id, text>",
        ),
        ({"path": "list.json"}, r"list\.json:1 is not UTF-8 JSON .* one JSON object per line is needed"),
        ({"path": "torn.parquet"}, r"torn\.parquet cannot be read as Parquet"),
        ({"path": "no://where"}, r"data\.path=no://where cannot be listed \(Protocol not known: no"),
        ({"path": "rows.jsonl", "shuffle_buffer": 0}, r"data\.shuffle_buffer must be an integer >= 1, got 0"),
        ({"path": "rows.jsonl", "validation_documents": 0}, r"data\.validation_documents must be an integer >= 1"),
        ({"path": "rows.jsonl", "validation_path": "empty"}, r"data\.validation_path=empty has no file of rows"),
        ({"path": "rows.jsonl", "validation_documents": 9}, r"data\.validation_documents=9 holds out all 9 documents"),
        ({"path": "blank.jsonl"}, r"blank\.jsonl contains no text"),
        ({"path": "rows.jsonl", "tokenizer": "texts"}, r"data\.tokenizer: .*texts has no tokenizer: give the folder"),
        ({"path": "rows.jsonl", "cache_dir": 3}, r"data\.cache_dir must be a path or null, got 3"),
    ],
)
def test_what_cannot_be_streamed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("texts/a.txt", "texts/b.csv", "empty/.hidden/c.jsonl", "empty/README.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    (tmp_path / "empty" / "none.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text('\n{"text": ""}\n\n')
    (tmp_path / "list.json").write_text('[\n{"text": "a"}\n]')
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    for folder in (tmp_path, tmp_path / "both"):
        folder.mkdir(exist_ok=True)
        jsonl(folder / "rows.jsonl", texts(0, 9))
        parquet(folder / "rows.parquet", texts(0, 9))
    data = StreamData(**options)
    with pytest.raises(ValueError, match=message) as failed:
        data.check()
        data.build()
    assert "\n" not in str(failed.value)


def test_too_few_rows_for_all_lanes_are_one_line(tmp_path: Path) -> None:
    found = sequences(str(jsonl(tmp_path / "a.jsonl", texts(0, 5))), validation_documents=1)
    with pytest.raises(ValueError, match=r"a\.jsonl and the other files .* too few rows .* 8 lanes: prepare them"):
        found.batch(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"format": "jsonl"},
            r"data\.sources\.streamed: 'format' is no option of a source that is streamed; it has path",
        ),
        ({"stream": "yes"}, r"data\.sources\.streamed: stream must be true or false, got 'yes'"),
        ({"stream": False}, r"data\.sources\.streamed: 'validation_documents' is no option of a source; it has path"),
        ({"shuffle_buffer": -1}, r"data\.sources\.streamed: data\.shuffle_buffer must be"),
    ],
)
def test_a_wrong_stream_of_a_mixture_is_refused_by_name(
    folders: dict[str, str], cache: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mixture(folders, cache, **change)
