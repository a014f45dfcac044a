"""Examples to fine-tune on: found, checked, split into train and validation, tokenized once and cached."""

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

from distopt.data import tokenizers
from distopt.data.chat import Encoder, checked
from distopt.data.order import cache, check_text
from distopt.data.packing import Examples, HeldOut, Packed
from distopt.data.sources import Line, Source
from distopt.data.token_cache import SPLITS, Corpus, atomic_directory, in_validation, mapped

VERSION = 1  # of the cache: raise it when the same lines would give other tokens
_BATCH = 512  # examples tokenized in one call


@dataclass(frozen=True, kw_only=True)
class CompletionData:
    """Conversations, or prompts and completions, to fine-tune a causal language model on: the loss is on completions.

    Args:
        path: a JSONL file, or a folder of them (recursive). Each line is an example: {"messages": [{"role": ...,
            "content": ...}, ...]}, whose targets are the assistant's turns, or {"prompt": ..., "completion": ...}.
        validation_path: the same, to evaluate on; None takes some of the examples of `path`.
        validation_fraction: in (0, 1): the share of the examples that is held out; at least one is.
        tokenizer: the model's own Hugging Face tokenizer folder; None is bytes, 256 tokens, with which distopt.train
            trains without a tokenizer.
        packing: put several examples into a sequence, each of which sees itself alone; a model that cannot keep them
            apart is refused. False gives each example a sequence of its own.
        ignore: fields of the lines that are not looked at; others that do not belong there are refused.
        cache_dir: None is `$XDG_CACHE_HOME/distopt`, or `~/.cache/distopt`; what it holds may be deleted between runs
    """

    path: str | None = None
    validation_path: str | None = None
    validation_fraction: float = 0.05
    tokenizer: str | None = None
    packing: bool = True
    ignore: Sequence[str] = ()
    cache_dir: str | None = None

    def check(self) -> None:
        """Raise `ValueError` on what is wrong and cheap to see: arguments, paths, the first example."""
        self._open()

    def build(self) -> CompletionCorpus:
        """Open the tokens, after making them if the cache has none; `ValueError`, with file and line, for a bad one.

        Safe on several ranks at once, but then each may do the work: let one go first.
        """
        sources, encoder, key = self._open()
        folder = cache(self.cache_dir) / f"{sources[0].root.stem}-{key}"
        if not folder.is_dir():
            with atomic_directory(folder) as aside:
                self._write(aside, sources, encoder)
        corpus = CompletionCorpus.read(folder, encoder)
        # Of the batches, not only of the tokens: a run does not go on with other ones.
        return corpus if self.packing else replace(corpus, digest=f"{corpus.digest} unpacked")

    def sequences(self, corpus: CompletionCorpus, *, sequence_length: int, batch_size: int, seed: int = 0) -> Packed:
        """What is trained on."""
        return Packed(
            corpus.train, sequence_length=sequence_length, batch_size=batch_size, seed=seed, packing=self.packing
        )

    def held_out(
        self, corpus: CompletionCorpus, *, sequence_length: int, batch_size: int, max_sequences: int | None = None
    ) -> HeldOut:
        """What is evaluated on."""
        return HeldOut(
            corpus.validation,
            sequence_length=sequence_length,
            batch_size=batch_size,
            max_sequences=max_sequences,
            packing=self.packing,
        )

    def _open(self) -> tuple[list[Source], Encoder, str]:
        """The checked sources, how to encode them, and a key that hashes all that determines the tokens."""
        if not isinstance(self.validation_fraction, float) or not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in (0, 1), got {self.validation_fraction!r}; 0.05 is usual")
        if not isinstance(self.packing, bool):
            raise ValueError(f"data.packing must be true or false, got {self.packing!r}")
        if self.path is None:
            raise ValueError("data.path is not set: give data.path=<a JSONL file, or a folder of them>")
        check_text("tokenizer", self.tokenizer, null=True)
        check_text("cache_dir", self.cache_dir, null=True)
        listed = isinstance(self.ignore, Sequence) and not isinstance(self.ignore, str)
        if not listed or not all(isinstance(name, str) for name in self.ignore):
            raise ValueError(f"data.ignore must be names of fields, as [id, source], got {self.ignore!r}")
        tokenizer = self.tokenizer and os.path.abspath(Path(self.tokenizer).expanduser())
        digest = tokenizers.digest(tokenizer)
        encoder = Encoder(tokenizer)
        paths = [self.path] if self.validation_path is None else [self.path, self.validation_path]
        sources = [Source.open(path, "jsonl", (), "") for path in paths]
        for source in sources:
            first = next(source.lines(), None)
            if first is None:
                raise ValueError(f"{source} holds no example; give another path")
            self._encoded(encoder, [first])
        prints = " ".join(source.fingerprint() for source in sources)
        key = f"completions {VERSION} {prints} {digest} {self.validation_fraction!r} {sorted(self.ignore)}"
        return sources, encoder, hashlib.blake2b(key.encode(), digest_size=10).hexdigest()

    def _encoded(self, encoder: Encoder, lines: Sequence[Line]) -> list[Any]:
        wheres = [line.where for line in lines]
        return encoder.encode([checked(line.content, line.where, self.ignore) for line in lines], wheres)

    def _write(self, folder: Path, sources: Sequence[Source], encoder: Encoder) -> None:
        from tqdm import tqdm

        sides = _sides(sources, self.validation_fraction)
        dtype = np.min_scalar_type(encoder.size - 1)
        meta: dict[str, Any] = {"source": str(sources[0]), "vocab_size": encoder.size, "dtype": dtype.name}
        bar = tqdm(desc=f"tokenizing {sources[0].root}", total=sum(map(len, sides)), unit="example", delay=2)
        for split, source, side in zip(SPLITS, [sources[0], sources[-1]], sides):
            starts, digest = [0], hashlib.blake2b(digest_size=16)
            size = 0
            with open(folder / f"{split}.bin", "wb") as tokens, open(folder / f"{split}.targets", "wb") as targets:
                for lines in _batches(line for line in source.lines() if line.key in side):
                    for example in self._encoded(encoder, lines):
                        data = example.tokens.astype(dtype).tobytes(), example.targets.tobytes()
                        for file, part in zip((tokens, targets), data):
                            file.write(part)
                            digest.update(part)
                        starts.append(starts[-1] + len(example.tokens))
                        if split == "validation":
                            taught = example.tokens[example.targets > 0]
                            size += len(str(encoder.tokenizer.decode(taught, skip_special_tokens=True)).encode())
                            size += int(np.isin(taught, encoder.tokenizer.all_special_ids).sum())
                    bar.update(len(lines))
            np.save(folder / f"{split}.starts.npy", np.asarray(starts, dtype=np.int64))
            meta[split] = {"tokens": starts[-1], "bytes": size, "digest": digest.hexdigest()}
        bar.close()
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _batches(lines: Iterator[Line]) -> Iterator[list[Line]]:
    batch: list[Line] = []
    for line in lines:
        batch.append(line)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _sides(sources: Sequence[Source], fraction: float) -> tuple[set[str], set[str]]:
    """The keys of the examples of train and of validation.

    An example goes to validation when the hash of its key falls under `fraction`; where that leaves one side empty, the
    last ones do instead. Raises ValueError if there are not enough.
    """
    keys = [line.key for line in sources[0].lines()]
    if len(sources) == 2:
        return set(keys), {line.key for line in sources[1].lines()}
    if len(keys) < 2:
        raise ValueError(f"{sources[0]} holds one example, of which none can be held out: give data.validation_path")
    held = {key for key in keys if in_validation(key, fraction)}
    if len(held) in (0, len(keys)):
        held = set(keys[-min(max(1, round(len(keys) * fraction)), len(keys) - 1) :])
    return set(keys) - held, held


@dataclass(frozen=True, eq=False)
class CompletionCorpus(Corpus):
    """The examples of the two splits, memory-mapped, and what is needed to read them.

    `bytes_per_token` is of the targets of the validation examples, where a special token counts as one byte.
    """

    train: Any  # Examples
    validation: Any
    encoder: Encoder = field(kw_only=True)

    @classmethod
    def read(cls, folder: Path, encoder: Encoder) -> CompletionCorpus:
        """Map the files of a folder that was written whole."""
        meta = json.loads((folder / "meta.json").read_text())
        train, validation = (
            Examples(
                mapped(folder / f"{split}.bin", meta["dtype"], meta[split]["tokens"]),
                mapped(folder / f"{split}.targets", "uint8", meta[split]["tokens"]),
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
        """Tokens of `prompt`, as a user's message if there is a chat template; if empty, of the first one held out."""
        if not prompt:
            held = self.validation
            return held.tokens[: int(np.flatnonzero(held.targets)[0])].tolist()
        return self.encoder.prompt(prompt)

    def decode(self, tokens: Sequence[int] | np.ndarray | torch.Tensor) -> str:
        """Text of `tokens`."""
        return str(self.encoder.tokenizer.decode(np.asarray(tokens).tolist()))
