"""The command `distopt`: it finds the program of a subcommand, and becomes it."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import click
from click.shell_completion import CompletionItem, get_completion_class

from distopt.command import start
from distopt.command.words import completed
from distopt.version import __version__

_TRY = """\
distopt trains language models with sharded optimizers. What to do next:

  distopt train experiment=quickstart                      a small model
  distopt train data=text data.path=book.txt name=book     a text of your own
  distopt finetune model.path=MODEL data.path=CHATS.jsonl  a pretrained model
  distopt sweep optimizer=adamw,lamb name=grid             compare optimizers
  distopt report runs/grid                                 and see how
"""


class Entry(NamedTuple):
    """A subcommand.

    Attributes:
        help: What it does, in a line.
        start: Starts its program with the words of the command line, and does not return.
        configured: Whether its words are Hydra's, such as `optimizer=lamb`.
    """

    help: str
    start: Callable[[list[str]], None]
    configured: bool = False


def _program(module: str) -> Callable[[list[str]], NoReturn]:
    return lambda words: start.become(["-m", module, *words])


ENTRIES = {
    "train": Entry("Train a model, on all GPUs of this machine.", start.train, True),
    "finetune": Entry("Fine-tune a pretrained model on examples.", start.finetune, True),
    "sweep": Entry("Train once for each combination of values.", start.sweep, True),
    "report": Entry("Write a page about a run, a sweep, or a folder of runs.", _program("distopt.report")),
    "plan": Entry("Plan memory, communication and time, without a GPU.", _program("distopt.plan"), True),
    "prepare": Entry("Tokenize the text of a run before it starts.", _program("distopt.prepare"), True),
    "sample": Entry("Continue a prompt, or chat, with a checkpoint of a run.", _program("distopt.sample")),
    "export": Entry("Export a checkpoint for transformers.", _program("distopt.export")),
    "verify": Entry("Check a checkpoint for damage.", _program("distopt.verify")),
    "launch": Entry("Train by `accelerate launch` with its options.", start.launch, True),
}


class Program(click.Command):
    """A subcommand whose words go to its program as they are, `--help` included.

    Args:
        name: Its name.
        entry: What it does.
    """

    def __init__(self, name: str, entry: Entry) -> None:
        super().__init__(name, callback=entry.start, short_help=entry.help, add_help_option=False)
        self.entry = entry

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Takes all words."""
        ctx.params["words"] = list(args)
        return []

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Completes groups, their choices, keys, runs and files."""
        return completed(self.name or "", self.entry.configured, ctx.params.get("words", []), incomplete)


class Commands(click.Group):
    """The subcommands, in the order in which they are listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns their names."""
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Finds a subcommand by its name.

        Raises:
            click.UsageError: There is none; in one line, with the nearest name.
        """
        if (name := args[0]) not in self.commands:
            near = difflib.get_close_matches(name, self.commands, n=1, cutoff=0.5)
            meant = f": did you mean {near[0]}?" if near else "."
            raise click.UsageError(f"there is no command {name}{meant} There are {', '.join(self.commands)}")
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, invoke_without_command=True, add_help_option=True)
@click.version_option(__version__, message="distopt %(version)s")
@click.pass_context
def distopt(ctx: click.Context) -> None:
    """Train language models with sharded optimizers whose update is exactly the unsharded one.

    GROUP=CHOICE and KEY=VALUE configure train, finetune, sweep, plan and prepare; `distopt train --help` lists them.
    """
    if ctx.invoked_subcommand is None:
        click.echo(_TRY + _newest_run() + "\n  distopt --help                                           all commands")


for _name, _entry in ENTRIES.items():
    distopt.add_command(Program(_name, _entry))


@distopt.command(short_help="Print the completion script of bash, zsh or fish.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    bash and zsh: add `eval "$(distopt completion bash)"` to ~/.bashrc, or with zsh to ~/.zshrc.
    fish: `distopt completion fish > ~/.config/fish/completions/distopt.fish`.
    """
    kind = get_completion_class(shell)
    assert kind is not None, f"click has no completion for {shell}"
    script = kind(distopt, {}, "distopt", "_DISTOPT_COMPLETE")
    text = script.source_template % script.source_vars()  # `source()` starts bash, to check its version
    # click 8.5 lets bash write a space after `optimizer=`.
    click.echo(text.replace("    return 0", "    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace\n    return 0", 1))


def _newest_run() -> str:
    """What to do with the newest run of the current folder."""
    runs = [file.parent for file in Path("runs").glob("*/config.yaml")]
    if not runs:
        return ""
    newest = max(runs, key=lambda run: run.stat().st_mtime)
    return f'  distopt sample {newest} "Once"{" " * max(1, 35 - len(str(newest)))}what it writes\n'


def main() -> None:
    """Runs the command line, and ends the process."""
    try:
        code = distopt.main(prog_name="distopt", standalone_mode=False)
    except click.ClickException as error:
        click.echo(f"distopt: error: {' '.join(error.format_message().split())}", err=True)
        code = 2
    except ValueError as error:
        click.echo(f"distopt: error: {error}", err=True)
        code = 1
    sys.exit(code)
