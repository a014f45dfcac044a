"""Tokenization of chat and completion examples: their tokens, and which of them are targets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from distopt.data import tokenizers
from distopt.data.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Segment(NamedTuple):
    """A segment of an example's text, and whether its tokens are targets."""

    text: str
    target: bool


class EncodedExample(NamedTuple):
    """A tokenized example.

    Attributes:
        tokens: The tokens, uint32.
        targets: 1 for targets, 0 for context; uint8, same shape.
    """

    tokens: np.ndarray
    targets: np.ndarray


class Encoder:
    """Tokenizes examples as in generation, where the context is tokenized without the completion.

    `prompt` and `completion` are concatenated without a separator, preceded by the tokenizer's beginning-of-sequence
    token, if it has one, and followed by its end-of-sequence token, which is a target. `messages` are rendered by the
    chat template of the tokenizer. Their targets are the spans that the template marks by `{% generation %}`, or else
    the text by which the rendered conversation grows, after the generation prompt, when a message of the assistant is
    appended: the message and the tokens that end it.

    Args:
        folder: A Hugging Face tokenizer folder; None for bytes.

    Attributes:
        folder: The argument.
        size: The vocabulary size.
        begin: The tokens before a prompt.
        end: The tokens after a completion.
        tokenizer: The tokenizer of transformers.

    Raises:
        ValueError: The tokenizer cannot be loaded, or has no end-of-sequence token.
    """

    def __init__(self, folder: str | None) -> None:
        vocabulary = tokenizers.load(folder)
        self.folder, self.size = folder, vocabulary.size
        self._name = folder or "of bytes"
        self.end = list(vocabulary.separator)
        if not self.end:
            raise ValueError(f"tokenizer {folder} has no token that ends a text: set its eos_token and save it")
        self.tokenizer: PreTrainedTokenizerBase = vocabulary.pretrained()
        tokenizer = self.tokenizer
        begin = tokenizer("a", verbose=False)["input_ids"][:1]
        self.begin: list[int] = begin if begin and begin[0] in tokenizer.all_special_ids else []
        template = tokenizer.chat_template
        templates = template.values() if isinstance(template, dict) else [template or ""]
        self._renders = {name: any(name in text for text in templates) for name in ("tools", "tool_calls")}
        self._marks_targets = any(re.search(r"\{%-?\s*generation\s*-?%\}", text) for text in templates)

    def encode(self, examples: Sequence[Example], wheres: Sequence[str]) -> list[EncodedExample]:
        """Tokenize examples; the texts of all of them are tokenized together, in parallel.

        Args:
            examples: Examples as `ExampleReader` returns them.
            wheres: The file and line number of each, for error messages.

        Raises:
            ValueError: An example cannot be rendered or has no targets.
        """
        for example, where in zip(examples, wheres):
            self._check_tools(example, where)
        marked = [self._marks_targets and "messages" in example for example in examples]
        segments = [[] if m else self._segments(e, w) for e, w, m in zip(examples, wheres, marked)]
        prefixes = iter(self._tokens([text for each in segments for text in _prefixes(each)]))
        encoded = []
        for example, where, own, by_template in zip(examples, wheres, segments, marked):
            if by_template:
                tokens, targets = self._encode_by_template(example, where)
            else:
                tokens, targets = self._join(own, [next(prefixes) for _ in own])
            if "messages" not in example:
                tokens = [*self.begin, *tokens, *self.end]
                targets = [*[0] * len(self.begin), *targets, *[1] * len(self.end)]
            flags = np.asarray(targets, dtype=np.uint8)
            flags[:1] = 0  # the first token has no context from which it could be predicted
            if not flags.any():
                raise ValueError(f"{where} has no token that could be learnt: remove the line")
            encoded.append(EncodedExample(np.asarray(tokens, dtype=np.uint32), flags))
        return encoded

    def prompt(self, text: str, chat: bool) -> list[int]:
        """Return the tokens of a prompt: of a user's message in a chat, or else of the text itself."""
        if chat:
            message = {"role": "user", "content": text}
            return self._tokens([self._render([message], "the prompt", add_generation_prompt=True)])[0]
        return [*self.begin, *self._tokens([text])[0]]

    def _segments(self, example: Example, where: str) -> list[Segment]:
        """Split the text of an example into context and targets."""
        if "messages" not in example:
            return [Segment(example["prompt"], False), Segment(example["completion"], True)]
        messages, tools, segments, done = example["messages"], example.get("tools"), [], ""
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                for text, target in (
                    (self._render(messages[:i], where, tools, add_generation_prompt=True), False),
                    (self._render(messages[: i + 1], where, tools), True),
                ):
                    if not text.startswith(done) or (target and len(text) == len(done)):
                        raise ValueError(
                            f"{where}: the chat template of {self._name} renders a message differently when others "
                            "follow it, so that targets cannot be located: mark them in the template by "
                            "{% generation %}"
                        )
                    segments.append(Segment(text[len(done) :], target))
                    done = text
        return segments

    def _check_tools(self, example: Example, where: str) -> None:
        """Raise `ValueError` if the chat template would leave out what an example has of tools."""
        called = any("tool_calls" in message for message in example.get("messages", ()))
        for name, there in (("tools", "tools" in example), ("tool_calls", called)):
            if there and self.tokenizer.chat_template and not self._renders[name]:
                raise ValueError(
                    f"{where} has {name}, which the chat template of {self._name} does not render: take another "
                    "template, or remove them" + ", or give data.ignore=[tools]" * (name == "tools")
                )

    def _render(
        self,
        messages: Sequence[dict[str, Any]],
        where: str,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Render a conversation by the chat template."""
        from jinja2.exceptions import TemplateError

        if not self.tokenizer.chat_template:
            raise ValueError(
                f"{where} has messages, and tokenizer {self._name} has no chat template: set its chat_template and "
                "save it, take the tokenizer of an instruct model, or give prompt and completion"
            )
        if not messages:  # many templates read the first message
            return ""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(tools or []) or None,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
        except (TemplateError, TypeError) as error:  # the latter of a template that adds what a message lacks
            raise ValueError(f"{where}: the chat template of {self._name} refuses it: {error}") from None

    def _encode_by_template(self, example: Example, where: str) -> tuple[list[int], list[int]]:
        """Return the tokens and targets of a conversation by the marks of its chat template."""
        tools = example.get("tools")
        self._render(example["messages"], where, tools)
        out: Any = self.tokenizer.apply_chat_template(
            example["messages"], tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return out["input_ids"], out["assistant_masks"]

    def _join(self, segments: list[Segment], prefixes: list[list[int]]) -> tuple[list[int], list[int]]:
        """Return the tokens and targets of segments.

        The text is tokenized as one if every boundary of segments is a boundary of tokens, else segment by segment.

        Args:
            segments: The segments.
            prefixes: The tokens of the text up to the end of each segment.
        """
        tokens = prefixes[-1]
        if any(tokens[: len(prefix)] != prefix for prefix in prefixes):
            parts = self._tokens([segment.text for segment in segments])
        else:
            ends = [len(prefix) for prefix in prefixes]
            parts = [tokens[start:end] for start, end in zip([0, *ends], ends)]
        targets = [int(segment.target) for segment, part in zip(segments, parts) for _ in part]
        return [token for part in parts for token in part], targets

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize texts without added special tokens."""
        if not texts:
            return []
        # JSON may escape a lone surrogate, which no tokenizer accepts: it becomes a question mark.
        texts = [text.encode(errors="replace").decode() for text in texts]
        rows: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return rows


def _prefixes(segments: Sequence[Segment]) -> list[str]:
    """Return the text up to the end of each segment."""
    texts, text = [], ""
    for segment in segments:
        text += segment.text
        texts.append(text)
    return texts
