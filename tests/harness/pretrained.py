"""A small pretrained model for the tests: a Llama and its tokenizer with a chat template, in one folder."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}{% else %}{{ message['content'] }}<|end|>"
    "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
WORDS = ("cat", "dog", "sun", "tree")


def write_tokenizer(folder: Path, template: str | None = TEMPLATE, end: str | None = "<|end|>") -> Any:
    """A byte-level BPE of 400 tokens, trained on some of the standard library's sources."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from distopt.data.sources import Source

    documents = itertools.islice(Source.open(None, "auto", (), "").documents(), 20)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((b"".join(document.pieces).decode() for document in documents), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=end, additional_special_tokens=special, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_model(folder: Path) -> Path:
    """The tokenizer and a Llama of 70,000 parameters that knows nothing yet."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = write_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_lines(file: Path, lines: list[Any]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def chats(count: int = 120) -> list[dict[str, Any]]:
    """Questions that are answered by a word, once or more."""
    draw = random.Random(0)
    asked = [(draw.choice(WORDS), draw.randint(1, 3)) for _ in range(count)]
    return [
        {
            "messages": [
                {"role": "user", "content": f"Say {word} {times} times"},
                {"role": "assistant", "content": " ".join([word] * times)},
            ]
        }
        for word, times in asked
    ]


def pairs(count: int = 120) -> list[dict[str, Any]]:
    """The same as prompts and completions."""
    return [
        {"prompt": f"{user['content']}:", "completion": f" {answer['content']}"}
        for user, answer in (example["messages"] for example in chats(count))
    ]
