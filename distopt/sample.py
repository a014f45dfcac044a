"""Continue a prompt, or chat, with a checkpoint of a run: `distopt sample RUN "PROMPT"`, or `RUN --chat`."""

from __future__ import annotations

import argparse
import io
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from distopt.bounds import integer, number
from distopt.checkpoint import checkpoint_path
from distopt.job.errors import one_line_errors
from distopt.job.run_folder import printable
from distopt.models.configuration import positions
from distopt.models.export import DTYPES, find
from distopt.models.generation import Writer, open_writer, write


def main() -> None:
    """Runs the command line."""
    options = _parser().parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a model may write what the terminal has no character for
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.disable(logging.CRITICAL)
    with one_line_errors():
        _check(options)
        checkpoint = _checkpoint(Path(options.run).expanduser(), options.step)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if sys.stderr.isatty():
            print(f"{checkpoint} on {device}", file=sys.stderr)
        writer = open_writer(checkpoint, DTYPES[options.dtype], device)
        torch.manual_seed(options.seed)
        if options.chat:
            _chat(writer, options)
        else:
            _continue(writer, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="distopt sample", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run, whose newest checkpoint writes, or a checkpoint")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the prompt (default: standard input)")
    parser.add_argument("--chat", action="store_true", help="ask, and go on asking, until the end of the input")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as text, without the chat template")
    parser.add_argument("--step", type=int, help="the step of the run's checkpoint (default: the newest)")
    parser.add_argument("--tokens", type=int, default=200, help="the largest number of tokens (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="how many tokens to sample from; 0: all (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the sampling (default: 0)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights (default: float32)")
    return parser


def _check(options: Any) -> None:
    integer(1).check("--tokens", options.tokens)
    number(0).check("--temperature", options.temperature)
    integer(0).check("--top-k", options.top_k)
    integer(0).check("--seed", options.seed)
    if options.chat and options.raw:
        raise ValueError("--chat uses the chat template, and --raw does not: leave out one of them")
    if options.prompt is None and not options.chat:
        if sys.stdin.isatty():
            raise ValueError('there is no prompt: give one, as distopt sample runs/book "Once", or --chat')
        options.prompt = sys.stdin.read().rstrip("\n")


def _checkpoint(run: Path, step: int | None) -> Path:
    """The checkpoint of a run at a step, or its newest one.

    Raises:
        ValueError: There is none; with those that there are.
    """
    if step is None:
        if not run.is_dir():
            raise ValueError(f"{run}: no such folder; give a run, as runs/book, or a checkpoint in one")
        return find(run)
    found = checkpoint_path(run / "checkpoints", step)
    if not found.is_dir():
        steps = sorted(int(path.name.rpartition("_")[2]) for path in found.parent.glob("step_*[0-9]"))
        raise ValueError(f"{run} has no checkpoint of step {step}; it has {', '.join(map(str, steps)) or 'none'}")
    return found


def _continue(writer: Writer, options: Any) -> None:
    """Writes an answer if there is a chat template, or else the continuation of a text."""
    if writer.tokenizer.chat_template and not options.raw:
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


if __name__ == "__main__":
    main()
