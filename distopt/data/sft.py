"""A fine-tuning dataset: configuration, checks, and the cached corpus of its tokenized examples."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distopt.bounds import IGNORE, PATH, VALIDATION_FRACTION, or_null, switch
from distopt.data import tokenizers
from distopt.data.chat import EncodedExample, Encoder
from distopt.data.examples import parse_example
from distopt.data.packing import Examples, PackedSequences, PackedValidationSequences
from distopt.data.sources import Line, Source
from distopt.data.text_data import cache_folder
from distopt.data.token_cache import SPLITS, Corpus, atomic_directory, in_validation, map_file

VERSION = 1  # of the cache: increment it when the same lines would give different tokens
_BATCH = 512  # examples tokenized in one call


@dataclass(frozen=True, kw_only=True)
class CompletionData:
    """Conversations, or prompts and completions, to fine-tune a causal language model on, with the loss on completions.

    Args:
        path: A JSONL file, or a folder of them (searched recursively). Each line is an example: {"messages": [{"role":
            ..., "content": ...}, ...]}, whose targets are the turns of the assistant, or {"prompt": ..., "completion":
            ...}.
        validation_path: Validation examples, alike; None to use a fraction of the examples of `path`.
        validation_fraction: The fraction of the examples used for validation, in (0, 1); at least one example is.
        tokenizer: The Hugging Face tokenizer folder of the model; None for bytes, 256 tokens, as in training without a
            tokenizer.
        packing: Pack several examples into a sequence without attention between them; models that cannot separate them
            are refused. False gives every example a sequence of its own.
        ignore: Fields of the lines to ignore; other unknown fields are refused.
        cache_dir: The folder of the token cache, which may be deleted between runs; None for `$XDG_CACHE_HOME/distopt`,
            or `~/.cache/distopt`.
    """

    path: str | None = None
    validation_path: str | None = None
    validation_fraction: float = 0.05
    tokenizer: str | None = None
    packing: bool = True
    ignore: Sequence[str] = ()
    cache_dir: str | None = None

    def check(self) -> None:
        """Check the arguments, the paths and the first example, which is cheap.

        Raises:
            ValueError: One of them is invalid.
        """
        self._open()

    def build(self) -> CompletionCorpus:
        """Open the corpus, tokenizing the examples first if they are not in the cache.

        Several ranks may call this at once, but each of them may then tokenize the examples: let one rank finish first.

        Raises:
            ValueError: An argument or an example is invalid; names the file and line of the latter.
        """
        sources, encoder, key = self._open()
        folder = cache_folder(self.cache_dir) / f"{sources[0].root.stem}-{key}"
        if not folder.is_dir():
            with atomic_directory(folder) as building:
                self._write(building, sources, encoder)
        corpus = CompletionCorpus.read(folder, encoder)
        # The digest identifies the batches, since a run must not resume with others.
        return corpus if self.packing else replace(corpus, digest=f"{corpus.digest} unpacked")

    def sequences(
        self, corpus: CompletionCorpus, *, sequence_length: int, batch_size: int, seed: int = 0
    ) -> PackedSequences:
        """Return the training sequences of a corpus."""
        return PackedSequences(
            corpus.train, sequence_length=sequence_length, batch_size=batch_size, seed=seed, packing=self.packing
        )

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

    def _open(self) -> tuple[list[Source], Encoder, str]:
        """Return the checked sources, their encoder, and a hash of everything that determines the tokens."""
        VALIDATION_FRACTION.check("data.validation_fraction", self.validation_fraction, "0.05 is usual")
        switch().check("data.packing", self.packing)
        if self.path is None:
            raise ValueError("data.path is not set: give data.path=<a JSONL file, or a folder of them>")
        or_null(PATH).check("data.tokenizer", self.tokenizer)
        or_null(PATH).check("data.cache_dir", self.cache_dir)
        IGNORE.check("data.ignore", self.ignore)
        tokenizer = self.tokenizer and os.path.abspath(Path(self.tokenizer).expanduser())
        digest = tokenizers.digest(tokenizer)
        encoder = Encoder(tokenizer)
        paths = [self.path] if self.validation_path is None else [self.path, self.validation_path]
        sources = [Source.open(path, "jsonl", (), "") for path in paths]
        for source in sources:
            first = next(source.lines(), None)
            if first is None:
                raise ValueError(f"{source} contains no example; give another path")
            self._encode(encoder, [first])
        prints = " ".join(source.fingerprint() for source in sources)
        key = f"completions {VERSION} {prints} {digest} {self.validation_fraction!r} {sorted(self.ignore)}"
        return sources, encoder, hashlib.blake2b(key.encode(), digest_size=10).hexdigest()

    def _encode(self, encoder: Encoder, lines: Sequence[Line]) -> list[EncodedExample]:
        wheres = [line.where for line in lines]
        return encoder.encode([parse_example(line.content, line.where, self.ignore) for line in lines], wheres)

    def _write(self, folder: Path, sources: Sequence[Source], encoder: Encoder) -> None:
        """Write the files of both splits and meta.json into `folder`."""
        from tqdm import tqdm

        split_keys = _split_keys(sources, self.validation_fraction)
        dtype = np.min_scalar_type(encoder.size - 1)
        meta: dict[str, Any] = {"source": str(sources[0]), "vocab_size": encoder.size, "dtype": dtype.name}
        bar = tqdm(desc=f"tokenizing {sources[0].root}", total=sum(map(len, split_keys)), unit="example", delay=2)
        for split, source, keys in zip(SPLITS, [sources[0], sources[-1]], split_keys):
            starts, digest = [0], hashlib.blake2b(digest_size=16)
            size = 0
            with open(folder / f"{split}.bin", "wb") as tokens, open(folder / f"{split}.targets", "wb") as targets:
                for lines in _batches(line for line in source.lines() if line.key in keys):
                    for example in self._encode(encoder, lines):
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
                    bar.update(len(lines))
            np.save(folder / f"{split}.starts.npy", np.asarray(starts, dtype=np.int64))
            meta[split] = {"tokens": starts[-1], "bytes": size, "digest": digest.hexdigest()}
        bar.close()
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _batches(lines: Iterator[Line]) -> Iterator[list[Line]]:
    """Group lines into batches of `_BATCH`."""
    batch: list[Line] = []
    for line in lines:
        batch.append(line)
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
    keys = [line.key for line in sources[0].lines()]
    if len(sources) == 2:
        return set(keys), {line.key for line in sources[1].lines()}
    if len(keys) < 2:
        raise ValueError(
            f"{sources[0]} contains one example, which leaves none for validation: give data.validation_path"
        )
    validation = {key for key in keys if in_validation(key, fraction)}
    if len(validation) in (0, len(keys)):
        validation = set(keys[-min(max(1, round(len(keys) * fraction)), len(keys) - 1) :])
    return set(keys) - validation, validation


@dataclass(frozen=True, eq=False)
class CompletionCorpus(Corpus):
    """The memory-mapped examples of both splits, with their encoder.

    Attributes:
        train: The training examples.
        validation: The validation examples.
        bytes_per_token: The mean size of a target of the validation examples, where a special token counts as one byte.
        encoder: The tokenizer and chat template of the examples.
    """

    train: Examples  # type: ignore[assignment]  # in place of the base class's stream of tokens
    validation: Examples  # type: ignore[assignment]

    @property
    def sizes(self) -> dict[str, int]:
        return {"train": len(self.train.tokens), "validation": len(self.validation.tokens)}

    encoder: Encoder = field(kw_only=True)

    @classmethod
    def read(cls, folder: Path, encoder: Encoder) -> CompletionCorpus:
        """Map the files of a folder that `CompletionData.build` wrote."""
        meta = json.loads((folder / "meta.json").read_text())
        train, validation = (
            Examples(
                map_file(folder / f"{split}.bin", meta["dtype"], meta[split]["tokens"]),
                map_file(folder / f"{split}.targets", "uint8", meta[split]["tokens"]),
                np.load(folder / f"{split}.starts.npy"),
            )
            for split in SPLITS
        )
        ratio = meta["validation"]["bytes"] / max(1, int(validation.targets.sum()))
        digest = "".join(meta[split]["digest"] for split in SPLITS)
        return cls(
            train, validation, meta["vocab_size"], ratio, encoder.folder, meta["source"], digest, encoder=encoder
        )

    def encode(self, prompt: str) -> list[int]:
        """Tokenize a prompt (a user's message, if there is a chat template); "" is the first validation prompt."""
        if not prompt:
            first_target = int(np.flatnonzero(self.validation.targets)[0])
            return self.validation.tokens[:first_target].tolist()
        return self.encoder.prompt(prompt)

    def decode(self, tokens: Sequence[int] | np.ndarray | torch.Tensor) -> str:
        """Return the text of some tokens."""
        return str(self.encoder.tokenizer.decode(np.asarray(tokens).tolist()))
