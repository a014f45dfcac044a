"""What a checkpoint writes to the terminal: an answer, the continuation of a text, or a conversation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from distopt.checkpoint import checkpoint_path
from distopt.checkpoint.folder import newest_checkpoint
from distopt.job.run_folder import printable
from distopt.models.configuration import positions
from distopt.models.generation import Writer, open_writer, write


def reply(options: Any) -> None:
    """Writes what follows a prompt, or answers one line after the other.

    Args:
        options: Those of `distopt sample`.

    Raises:
        ValueError: There is no such checkpoint, it cannot be read, or the prompt does not fit.
    """
    checkpoint = _checkpoint(Path(options.run).expanduser(), options.step)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if sys.stderr.isatty():
        print(f"{checkpoint} on {device}", file=sys.stderr)
    writer = open_writer(checkpoint, getattr(torch, options.dtype), device)
    torch.manual_seed(options.seed)
    if options.chat:
        _chat(writer, options)
    else:
        _continue(writer, options)


def _checkpoint(run: Path, step: int | None) -> Path:
    """The checkpoint of a run at a step, or its newest one.

    Raises:
        ValueError: There is none; with those that there are.
    """
    if step is None:
        return newest_checkpoint(run)
    found = checkpoint_path(run / "checkpoints", step)
    if not found.is_dir():
        steps = sorted(int(path.name.rpartition("_")[2]) for path in found.parent.glob("step_*[0-9]"))
        raise ValueError(f"{run} has no checkpoint of step {step}; it has {', '.join(map(str, steps)) or 'none'}")
    return found


def _continue(writer: Writer, options: Any) -> None:
    """Writes an answer if the run was taught conversations, or else the continuation of a text."""
    if writer.chat and not options.raw:
        _answer(writer, _rendered(writer, [{"role": "user", "content": options.prompt}]), options)
        return
    prompt = writer.tokenizer.encode(options.prompt) or writer.ends[:1] or [0]
    print(printable(options.prompt), end="")
    _answer(writer, prompt, options)


def _chat(writer: Writer, options: Any) -> None:
    """Answers the prompt and the lines of the input, all of them one conversation."""
    if not writer.tokenizer.chat_template:
        raise ValueError("the tokenizer of this run has no chat template: leave out --chat, and give a prompt")
    messages: list[dict[str, str]] = []
    line = options.prompt
    while line is None or line.strip():
        if line is None:
            try:
                line = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                return
            continue
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": _answer(writer, _rendered(writer, messages), options)})
        line = None


def _rendered(writer: Writer, messages: list[dict[str, str]]) -> list[int]:
    try:
        text: Any = writer.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # of any class, by what the template refuses
        raise ValueError(f"the chat template refuses the conversation: {error}") from error
    return writer.tokenizer.encode(text, add_special_tokens=False)


def _answer(writer: Writer, prompt: list[int], options: Any) -> str:
    """Writes what follows a prompt, piece by piece, and says if it was cut off; returns it."""
    most = positions(writer.model.config)
    room = most - len(prompt)
    if room < 1:
        raise ValueError(f"the {len(prompt)} tokens of the prompt fill the model's {most} positions: shorten it")
    tokens = min(options.tokens, room)

    def show(piece: str) -> None:
        print(printable(piece), end="", flush=True)

    written = write(writer, prompt, show, tokens, options.temperature, options.top_k)
    print()
    if not written.ended:
        print(f"[after {tokens} tokens]", file=sys.stderr)
    return written.text
