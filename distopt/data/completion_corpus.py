"""The tokenized examples of fine-tuning, which every rank maps from the token cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from distopt.data.chat import Encoder
from distopt.data.packing import Examples
from distopt.data.token_cache import SPLITS, Corpus, map_file


@dataclass(frozen=True, eq=False)
class CompletionCorpus(Corpus):
    """The memory-mapped examples of both splits, with their encoder.

    Attributes:
        train: The training examples.
        validation: The validation examples.
        bytes_per_token: The mean size of a target of the validation examples, where a special token counts as one byte.
        encoder: The tokenizer and chat template of the examples.
        notes: What of the rows was not read, one line each.
    """

    train: Examples  # type: ignore[assignment]  # in place of the base class's stream of tokens
    validation: Examples  # type: ignore[assignment]

    @property
    def sizes(self) -> dict[str, int]:
        return {"train": len(self.train.tokens), "validation": len(self.validation.tokens)}

    encoder: Encoder = field(kw_only=True)
    notes: list[str] = field(kw_only=True)

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
        shared = meta["vocab_size"], ratio, encoder.folder, meta["source"], digest
        return cls(train, validation, *shared, encoder=encoder, chat=meta["chat"], notes=meta["notes"])

    def encode(self, prompt: str) -> list[int]:
        """Tokenize a prompt as those of the examples (`chat`); "" is the first validation prompt."""
        if not prompt:
            first_target = int(np.flatnonzero(self.validation.targets)[0])
            return self.validation.tokens[:first_target].tolist()
        return self.encoder.prompt(prompt, self.chat)

    def decode(self, tokens: Sequence[int] | np.ndarray | torch.Tensor) -> str:
        """Return the text of some tokens."""
        return str(self.encoder.tokenizer.decode(np.asarray(tokens).tolist()))
