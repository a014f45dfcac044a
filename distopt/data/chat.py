"""An example of fine-tuning: from a line of JSON to tokens, and which of them the model is to learn."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from distopt.data import tokenizers
from distopt.data.sources import parsed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIELDS = "an example has either messages, or prompt and completion"


class Segment(NamedTuple):
    """A piece of an example's text, and whether the model is to learn to write it."""

    text: str
    target: bool


class Encoded(NamedTuple):
    """An example as tokens, and which of them are targets (1) or given (0)."""

    tokens: np.ndarray
    targets: np.ndarray


def checked(line: bytes, where: str, ignore: Collection[str] = ()) -> dict[str, Any]:
    """The fields of an example; `ValueError`, with file and line, for any but those that it should have.

    Either `prompt` and `completion`, which are text, or `messages`: a list of {"role": ..., "content": ...}, of which
    one at least has the role assistant. Nothing that is to be learnt may be empty.
    """
    record = parsed(line, where)
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a {type(record).__name__}, not an object: {_FIELDS}")
    record = {name: value for name, value in record.items() if name not in ignore}
    wanted = ("messages",) if "messages" in record else ("prompt", "completion")
    _check_fields(record, wanted, where, _FIELDS + "; name others in data.ignore")
    if "messages" not in record:
        for name in wanted:
            _check_text(record[name], name, where)
        if not record["completion"]:
            raise ValueError(f"{where}: completion is empty, so there is nothing to learn: leave the line out")
        return record
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: messages must be a list of messages, got {messages!r:.60}")
    for number, message in enumerate(messages):
        name = f"messages[{number}]"
        if not isinstance(message, dict):
            raise ValueError(f'{where}: {name} must be {{"role": ..., "content": ...}}, got {message!r:.60}')
        _check_fields(message, ("role", "content"), f"{where}: {name}", "a message has role and content")
        for key in ("role", "content"):
            _check_text(message[key], f"{name}.{key}", where)
        if message["role"] == "assistant" and not message["content"]:
            raise ValueError(f"{where}: {name}.content, of the assistant, is empty, so there is nothing to learn")
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError(f"{where}: no message has the role assistant, so there is nothing to learn")
    return record


def _check_fields(record: dict[str, Any], wanted: Sequence[str], where: str, rule: str) -> None:
    if unknown := [name for name in record if name not in wanted]:
        raise ValueError(f"{where} has an unknown field {unknown[0]!r}: {rule}")
    if missing := [name for name in wanted if name not in record]:
        found = ", ".join(record) or "none"
        raise ValueError(f"{where} has no field {missing[0]!r} (found: {found}): {rule}")


def _check_text(value: Any, name: str, where: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be text, got {type(value).__name__} {value!r:.40}")


class Encoder:
    """Tokens of examples, as they are when the model writes: what it is given is tokenized without what follows.

    `prompt` and `completion` stand side by side as they are, after the token that the tokenizer begins with, if it has
    one, and before the one that ends a text, which is a target too. `messages` are rendered by the tokenizer's chat
    template; targets are what the template marks by `{% generation %}`, or else what it adds to the conversation so
    far, prompted for an answer, when the assistant's message is appended: the message and what ends it.

    folder: of a Hugging Face tokenizer; None is bytes.
    Raises ValueError for a tokenizer without a token that ends a text.
    """

    def __init__(self, folder: str | None) -> None:
        words = tokenizers.load(folder)
        self.folder, self.name, self.size = folder, folder or "of bytes", words.size
        self.end = list(words.separator)
        if not self.end:
            raise ValueError(f"tokenizer {folder} has no token that ends a text: set its eos_token and save it")
        self.tokenizer: PreTrainedTokenizerBase = words.pretrained()
        tokenizer = self.tokenizer
        begin = tokenizer("a", verbose=False)["input_ids"][:1]
        self.begin: list[int] = begin if begin and begin[0] in tokenizer.all_special_ids else []
        template = tokenizer.chat_template
        texts = template.values() if isinstance(template, dict) else [template or ""]
        self._marked = any(re.search(r"\{%-?\s*generation\s*-?%\}", text) for text in texts)

    def encode(self, records: Sequence[dict[str, Any]], wheres: Sequence[str]) -> list[Encoded]:
        """Each example's tokens; the texts of all of them are tokenized together, in parallel."""
        marked = [self._marked and "messages" in record for record in records]
        segments = [[] if m else self.segments(r, w) for r, w, m in zip(records, wheres, marked)]
        texts = [text for example in segments for text in _prefixes(example)]
        prefixes = iter(self._tokens(texts))
        encoded = []
        for record, where, pieces, by_template in zip(records, wheres, segments, marked):
            if by_template:
                tokens, targets = self._by_template(record, where)
            else:
                tokens, targets = self._joined(pieces, [next(prefixes) for _ in pieces])
            if "messages" not in record:
                tokens = [*self.begin, *tokens, *self.end]
                targets = [*[0] * len(self.begin), *targets, *[1] * len(self.end)]
            flags = np.asarray(targets, dtype=np.uint8)
            flags[:1] = 0  # nothing comes before the first token, of which it could be predicted
            if not flags.any():
                raise ValueError(f"{where} has no token that could be learnt: leave it out")
            encoded.append(Encoded(np.asarray(tokens, dtype=np.uint32), flags))
        return encoded

    def segments(self, record: dict[str, Any], where: str) -> list[Segment]:
        """The pieces of an example's text."""
        if "messages" not in record:
            return [Segment(record["prompt"], False), Segment(record["completion"], True)]
        messages, pieces, done = record["messages"], [], ""
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                for text, target in (
                    (self.rendered(messages[:i], where, prompted=True), False),
                    (self.rendered(messages[: i + 1], where), True),
                ):
                    if not text.startswith(done) or (target and len(text) == len(done)):
                        raise ValueError(
                            f"{where}: the chat template of {self.name} renders a message otherwise when others "
                            "follow it, so that targets cannot be told: mark them in the template by {% generation %}"
                        )
                    pieces.append(Segment(text[len(done) :], target))
                    done = text
        return pieces

    def prompt(self, text: str) -> list[int]:
        """Tokens that the model is given to answer `text`: as a user's message, if there is a chat template."""
        if self.tokenizer.chat_template:
            message = {"role": "user", "content": text}
            return self._tokens([self.rendered([message], "the prompt", prompted=True)])[0]
        return [*self.begin, *self._tokens([text])[0]]

    def rendered(self, messages: Sequence[dict[str, str]], where: str, prompted: bool = False) -> str:
        """A conversation as text; prompted: up to where the assistant goes on."""
        from jinja2.exceptions import TemplateError

        if not self.tokenizer.chat_template:
            raise ValueError(
                f"{where} has messages, and tokenizer {self.name} has no chat template: set its chat_template and "
                "save it, take the tokenizer of an instruct model, or give prompt and completion"
            )
        if not messages:  # many templates look at the first one
            return ""
        try:
            return str(
                self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompted)
            )
        except TemplateError as error:
            raise ValueError(f"{where}: the chat template of {self.name} refuses it: {error}") from None

    def _by_template(self, record: dict[str, Any], where: str) -> tuple[list[int], list[int]]:
        self.rendered(record["messages"], where)
        out: Any = self.tokenizer.apply_chat_template(
            record["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return out["input_ids"], out["assistant_masks"]

    def _joined(self, pieces: list[Segment], prefixes: list[list[int]]) -> tuple[list[int], list[int]]:
        """Tokens of the pieces together, if cutting the text between two pieces cuts no token; else of each alone."""
        whole = prefixes[-1]
        if any(whole[: len(tokens)] != tokens for tokens in prefixes):
            parts = self._tokens([piece.text for piece in pieces])
        else:
            ends = [len(tokens) for tokens in prefixes]
            parts = [whole[start:end] for start, end in zip([0, *ends], ends)]
        targets = [int(piece.target) for piece, part in zip(pieces, parts) for _ in part]
        return [token for part in parts for token in part], targets

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        # JSON can escape half a surrogate pair, which no tokenizer takes: it becomes a question mark.
        texts = [text.encode(errors="replace").decode() for text in texts]
        rows: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return rows


def _prefixes(pieces: Sequence[Segment]) -> list[str]:
    """The text up to the end of each piece."""
    texts, text = [], ""
    for piece in pieces:
        text += piece.text
        texts.append(text)
    return texts
