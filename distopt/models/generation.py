"""Text from a trained model: which tokens end it, and a checkpoint's model and tokenizer to write it with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from distopt.checkpoint.folder import open_checkpoint, small_files
from distopt.models import pretrained
from distopt.models.export import fitting_tokenizer, read_model

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase


class Writer(NamedTuple):
    """A checkpoint's model with its tokenizer.

    Attributes:
        model: The model, in eval mode.
        tokenizer: The tokenizer, with its chat template if there is one.
        ends: The tokens that end a text or an answer.
        chat: Whether the run was taught conversations.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    ends: list[int]
    chat: bool


def open_writer(checkpoint: Path, dtype: torch.dtype, device: torch.device) -> Writer:
    """Returns the model and the tokenizer of a checkpoint of `distopt.train`, an adapter merged.

    Args:
        checkpoint: The folder of a complete checkpoint.
        dtype: The dtype of the weights.
        device: Where the model computes.

    Raises:
        ValueError: The checkpoint cannot be read.
    """
    import transformers

    content, files = open_checkpoint(checkpoint), small_files(checkpoint)
    if pretrained.CONFIG not in files:
        raise ValueError(f"{checkpoint} contains no {pretrained.CONFIG}: it was not written by distopt.train")
    model = read_model(checkpoint, content, files, dtype)
    initialize_buffers(model)
    with pretrained.written(files) as folder:
        kind: Any = getattr(transformers, fitting_tokenizer(folder))
        tokenizer = kind.from_pretrained(folder, local_files_only=True)
    chat = content["extra"].get("chat", False)
    return Writer(model.to(device).eval(), tokenizer, end_tokens(tokenizer, model.config), chat)


@torch.no_grad()
def initialize_buffers(model: Any) -> None:
    """Computes the buffers that a checkpoint does not contain, such as the frequencies of rotary embeddings."""
    for module in model.modules():
        if module._non_persistent_buffers_set:
            own = dict(module.named_parameters(recurse=False))
            values = {name: p.clone() for name, p in own.items()}
            model._init_weights(module)
            for name, p in own.items():
                p.copy_(values[name])


def end_tokens(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> list[int]:
    """Returns the tokens that end a text: those of the tokenizer and the model, and that of an answer in a chat."""
    known = config.eos_token_id
    ends = [tokenizer.eos_token_id, tokenizer.sep_token_id if tokenizer.eos_token_id is None else None]
    ends += known if isinstance(known, list) else [known]
    if tokenizer.chat_template:
        ends += _after_an_answer(tokenizer)
    size = getattr(config.get_text_config(), "vocab_size", len(tokenizer))
    return sorted({end for end in ends if end is not None and end < size})


def _after_an_answer(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special token that the chat template writes after an answer."""
    question = {"role": "user", "content": "Why?"}
    try:
        asked: Any = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
        answered: Any = tokenizer.apply_chat_template(
            [question, {"role": "assistant", "content": "Because."}], tokenize=False
        )
    except Exception:  # of any class, by what the template refuses
        return []
    tail = answered.removeprefix(asked).partition("Because.")[2]
    special = set(tokenizer.all_special_ids)
    return [token for token in tokenizer.encode(tail, add_special_tokens=False) if token in special][:1]


class Streamed:
    """A streamer of `generate` that passes on text as soon as its characters are complete.

    Args:
        tokenizer: Decodes the tokens.
        ends: The tokens that are not part of the text.
        show: Called with each new piece of text.

    Attributes:
        tokens: The tokens after the prompt so far.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Iterable[int], show: Callable[[str], Any]) -> None:
        self._tokenizer, self._ends, self._show = tokenizer, set(ends), show
        self._prompt, self._shown = True, ""
        self.tokens: list[int] = []

    @property
    def ended(self) -> bool:
        """Whether the model has ended the text."""
        return bool(self.tokens) and self.tokens[-1] in self._ends

    @property
    def text(self) -> str:
        """The text after the prompt so far."""
        return str(self._tokenizer.decode(self.tokens[: len(self.tokens) - self.ended]))

    def put(self, value: Tensor) -> None:
        """Takes the prompt, then one token at a time."""
        if self._prompt:
            self._prompt = False
            return
        self.tokens += value.flatten().tolist()
        if not (text := self.text).endswith("\ufffd"):  # in the middle of a character
            self._pass_on(text)

    def end(self) -> None:
        """Passes on what is left."""
        self._pass_on(self.text)

    def _pass_on(self, text: str) -> None:
        self._show(text[len(self._shown) :])
        self._shown = text


def sampling(tokens: int, ends: Sequence[int], temperature: float = 0.8, top_k: int = 50) -> GenerationConfig:
    """Returns how `generate` draws tokens, until one of `ends` or after so many; its arguments are those of `write`."""
    from transformers import GenerationConfig

    options: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_k": top_k}
    return GenerationConfig(max_new_tokens=tokens, eos_token_id=list(ends) or None, pad_token_id=0, **options)


def write(
    writer: Writer, prompt: Sequence[int], show: Callable[[str], Any], tokens: int, temperature: float, top_k: int
) -> Streamed:
    """Continues a prompt until the model ends it, or after some tokens; draws from torch's random numbers.

    Args:
        writer: The model.
        prompt: The tokens of the prompt, at least one.
        show: Called with each new piece of text.
        tokens: The largest number of tokens.
        temperature: The temperature of the sampling; 0 takes the most likely token.
        top_k: The number of tokens to sample from; 0 for all.
    """
    config = sampling(tokens, writer.ends, temperature, top_k)
    streamed = Streamed(writer.tokenizer, writer.ends, show)
    given = torch.tensor([list(prompt)], device=next(writer.model.parameters()).device)
    mask = torch.ones_like(given)
    writer.model.generate(given, attention_mask=mask, generation_config=config, streamer=streamed)
    return streamed
