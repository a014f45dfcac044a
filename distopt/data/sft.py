"""A fine-tuning dataset: configuration, checks, and the cached corpus of its tokenized examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from distopt.bounds import VALIDATION_FRACTION, switch
from distopt.data import hub
from distopt.data.added_tokens import extended
from distopt.data.chat import Encoder
from distopt.data.completion_corpus import CompletionCorpus
from distopt.data.examples import ExampleReader
from distopt.data.packing import PackedSequences, PackedValidationSequences
from distopt.data.rows import Row
from distopt.data.sources import Source
from distopt.data.token_cache import SPLITS, atomic_directory, cache_folder, in_validation

VERSION = 3  # of the cache: increment it when the same lines would give different tokens or files
_BATCH = 512  # examples tokenized in one call


@dataclass(frozen=True, kw_only=True)
class CompletionData:
    """Conversations, or prompts and completions, to fine-tune a causal language model on, with the loss on completions.

    Args:
        path: A file of rows (JSONL, JSON, CSV or Parquet, by its ending), a folder of them (searched recursively) or of
            `Dataset.save_to_disk`, or the name of a dataset on the hub. Each row is an example, such as {"messages":
            [{"role": ..., "content": ...}, ...]}, whose targets are the turns of the assistant, or {"prompt": ...,
            "completion": ...}.
        format: `messages`, `sharegpt`, `completion` or `alpaca` (`ExampleReader`); `auto` for the one whose fields a
            row has.
        fields: Other names of the fields, such as {"messages": "dialog"}.
        roles: The roles of messages by their names in the rows, such as {"bot": "assistant"}.
        files: A pattern of the paths of the files to read, within a folder, such as "*train*"; None for all.
        validation_path: Validation examples, alike; None to use a fraction of the examples of `path`.
        validation_fraction: The fraction of the examples used for validation, in (0, 1); at least one example is.
        tokenizer: The Hugging Face tokenizer folder of the model, or its name on the hub; None for bytes, 256 tokens,
            as in training without a tokenizer.
        add_tokens: Special tokens that the tokenizer gets in addition.
        packing: Pack several examples into a sequence without attention between them; models that cannot separate them
            are refused. False gives every example a sequence of its own.
        ignore: Fields of the rows that are not read; other fields that are not either are told.
        cache_dir: The folder of the token cache, which may be deleted between runs; None for `$XDG_CACHE_HOME/distopt`,
            or `~/.cache/distopt`.
    """

    path: str | None = None
    format: str = "auto"
    fields: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    files: str | None = None
    validation_path: str | None = None
    validation_fraction: float = 0.05
    tokenizer: str | None = None
    add_tokens: Sequence[str] = ()
    packing: bool = True
    ignore: Sequence[str] = ()
    cache_dir: str | None = None

    def check(self) -> None:
        """Check the arguments, the paths and the first example, which is cheap.

        Raises:
            ValueError: One of them is invalid.
        """
        self._open()

    def build(self, processes: int = 1) -> CompletionCorpus:
        """Open the corpus, tokenizing the examples first if they are not in the cache.

        Several ranks may call this at once, but each of them may then tokenize the examples: let one rank finish first.

        Args:
            processes: Not used: tokenizers encode a batch of examples on all cores.

        Raises:
            ValueError: An argument or an example is invalid; names the file and line of the latter.
        """
        sources, encoder, reader, key = self._open()
        folder = cache_folder(self.cache_dir) / f"{Path(hub.origin(sources[0].root)).stem}-{key}"
        if not folder.is_dir():
            with atomic_directory(folder) as building:
                self._write(building, sources, encoder, reader)
        corpus = CompletionCorpus.read(folder, encoder)
        # The digest identifies the batches, since a run must not resume with others.
        return corpus if self.packing else replace(corpus, digest=f"{corpus.digest} unpacked")

    def sequences(
        self, corpus: CompletionCorpus, *, sequence_length: int, batch_size: int, seed: int = 0
    ) -> PackedSequences:
        """Return the training sequences of a corpus."""
        sequences = PackedSequences(
            corpus.train, sequence_length=sequence_length, batch_size=batch_size, seed=seed, packing=self.packing
        )
        sequences.notes[:0] = corpus.notes
        return sequences

    def validation_sequences(
        self, corpus: CompletionCorpus, *, sequence_length: int, batch_size: int, max_sequences: int | None = None
    ) -> PackedValidationSequences:
        """Return the validation sequences of a corpus."""
        return PackedValidationSequences(
            corpus.validation,
            sequence_length=sequence_length,
            batch_size=batch_size,
            max_sequences=max_sequences,
            packing=self.packing,
        )

    def _open(self) -> tuple[list[Source], Encoder, ExampleReader, str]:
        """Return the checked sources, what reads and encodes them, and a hash of all that determines the tokens."""
        VALIDATION_FRACTION.check("data.validation_fraction", self.validation_fraction, "0.05 is usual")
        switch().check("data.packing", self.packing)
        if self.path is None:
            raise ValueError("data.path is not set: give data.path=<a file of examples, or a folder of them>")
        options = self.format, self.fields, self.roles, self.ignore
        ExampleReader(*options)
        tokenizer, digest = extended(self.tokenizer, self.add_tokens, self.cache_dir)
        encoder = Encoder(tokenizer)
        reader = ExampleReader(*options, chat=bool(encoder.tokenizer.chat_template))
        sources = [Source.open(self.path, "auto", (), "", pattern=self.files)]
        if self.validation_path is not None:
            sources.append(Source.open(self.validation_path, "auto", (), "", key="data.validation_path"))
        for source in sources:
            first = next(source.rows(), None)
            if first is None:
                raise ValueError(f"{source} contains no example; give another path")
            encoder.encode([reader.read(first)], [first.where])
        prints = " ".join(source.fingerprint() for source in sources)
        given = [self.format, sorted(self.fields.items()), sorted(self.roles.items()), sorted(self.ignore)]
        key = f"completions {VERSION} {prints} {digest} {self.validation_fraction!r} {given}"
        return sources, encoder, reader, hashlib.blake2b(key.encode(), digest_size=10).hexdigest()

    def _write(self, folder: Path, sources: Sequence[Source], encoder: Encoder, reader: ExampleReader) -> None:
        """Write the files of both splits and meta.json into `folder`."""
        from tqdm import tqdm

        split_keys = _split_keys(sources, self.validation_fraction)
        dtype = np.min_scalar_type(encoder.size - 1)
        meta: dict[str, Any] = {
            "source": str(sources[0]),
            "vocab_size": encoder.size,
            "dtype": dtype.name,
            "chat": False,
        }
        bar = tqdm(desc=f"tokenizing {sources[0].root}", total=sum(map(len, split_keys)), unit="example", delay=2)
        for split, source, keys in zip(SPLITS, [sources[0], sources[-1]], split_keys):
            starts, digest = [0], hashlib.blake2b(digest_size=16)
            size = 0
            with open(folder / f"{split}.bin", "wb") as tokens, open(folder / f"{split}.targets", "wb") as targets:
                for rows in _batches(row for row in source.rows() if row.key in keys):
                    examples = [reader.read(row) for row in rows]
                    meta["chat"] |= any("messages" in example for example in examples)
                    for example in encoder.encode(examples, [row.where for row in rows]):
                        data = example.tokens.astype(dtype).tobytes(), example.targets.tobytes()
                        for file, part in zip((tokens, targets), data):
                            file.write(part)
                            digest.update(part)
                        starts.append(starts[-1] + len(example.tokens))
                        if split == "validation":
                            target_tokens = example.tokens[example.targets > 0]
                            text = str(encoder.tokenizer.decode(target_tokens, skip_special_tokens=True))
                            size += len(text.encode())
                            size += int(np.isin(target_tokens, encoder.tokenizer.all_special_ids).sum())
                    bar.update(len(rows))
            np.save(folder / f"{split}.starts.npy", np.asarray(starts, dtype=np.int64))
            meta[split] = {"tokens": starts[-1], "bytes": size, "digest": digest.hexdigest()}
        bar.close()
        meta["notes"] = reader.notes
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Group rows into batches of `_BATCH`."""
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _split_keys(sources: Sequence[Source], fraction: float) -> tuple[set[str], set[str]]:
    """Return the keys of the train and the validation examples.

    An example belongs to validation if the hash of its key is below `fraction`. If a split is empty by this rule, the
    last examples become the validation set instead.

    Raises:
        ValueError: There are too few examples for two splits.
    """
    keys = [row.key for row in sources[0].rows()]
    if len(sources) == 2:
        return set(keys), {row.key for row in sources[1].rows()}
    if len(keys) < 2:
        raise ValueError(
            f"{sources[0]} contains one example, which leaves none for validation: give data.validation_path"
        )
    validation = {key for key in keys if in_validation(key, fraction)}
    if len(validation) in (0, len(keys)):
        validation = set(keys[-min(max(1, round(len(keys) * fraction)), len(keys) - 1) :])
    return set(keys) - validation, validation
