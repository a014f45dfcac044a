"""The prompts that a model in training continues, with the answers that it should give: `evaluation.generate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distopt.data.sources import Source
from distopt.models.configuration import positions

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ANSWERS = ("answer", "completion")


class Prompt(NamedTuple):
    """A prompt.

    Attributes:
        text: Its text; of a run that is taught conversations, a message of the user.
        answer: The text that should follow; None if any may.
        tokens: Its tokens; none before `encoded`.
    """

    text: str
    answer: str | None
    tokens: tuple[int, ...] = ()


def read_prompts(given: Any) -> list[Prompt]:
    """Reads the prompts that a configuration names.

    Args:
        given: A list of texts, or of values by name: `prompt`, and `answer` or `completion` if there is an answer. Or
            a file: each line of a .txt file is a prompt, each row of a JSONL, JSON, CSV or Parquet file has these
            fields. None for no prompts.

    Raises:
        ValueError: There is no such file, or none in it, or one has no text; with file and line.
    """
    if given is None:
        return []
    if isinstance(given, str):
        file = Path(given).expanduser()
        if not file.is_file():
            raise ValueError(f"evaluation.generate={given}: no such file")
        if file.suffix == ".txt":
            records = [(f"{file}:{i}", {"prompt": line}) for i, line in enumerate(_lines(file), start=1) if line]
        else:
            rows = Source.open(str(file), "auto", (), "", key="evaluation.generate").rows()
            records = [(row.where, row.record()) for row in rows]
        if not records:
            raise ValueError(f"evaluation.generate={given} has no prompt")
    else:
        named = [entry if isinstance(entry, Mapping) else {"prompt": entry} for entry in given]
        records = [(f"evaluation.generate[{i}]", dict(entry)) for i, entry in enumerate(named)]
        for where, record in records:
            if unknown := record.keys() - {"prompt", *_ANSWERS}:
                raise ValueError(f"{where} has {min(unknown)!r}: a prompt has the fields prompt and answer")
    return [_prompt(where, record) for where, record in records]


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 at byte {error.start}") from None


def _prompt(where: str, record: dict[str, Any]) -> Prompt:
    text, answers = record.get("prompt"), [record[name] for name in _ANSWERS if record.get(name) is not None]
    if not isinstance(text, str) or not text:
        raise ValueError(f"{where} has no text in its field 'prompt'; it has {', '.join(record) or 'none'}")
    if not all(isinstance(answer, (str, int, float)) for answer in answers) or len(answers) > 1:
        raise ValueError(f"{where}: a prompt has one answer, a text in the field 'answer' or 'completion'")
    return Prompt(text, str(answers[0]) if answers else None)


def encoded(
    prompts: Sequence[Prompt], encode: Callable[[str], list[int]], config: PretrainedConfig, length: int
) -> list[Prompt]:
    """Returns prompts with their tokens.

    Args:
        prompts: The prompts.
        encode: Returns the tokens of a prompt.
        config: The configuration of the model.
        length: The largest number of tokens that follow.

    Raises:
        ValueError: If the model has too few positions for one of them and what follows, or one has no tokens.
    """
    most, found = positions(config), []
    for prompt in prompts:
        tokens = tuple(encode(prompt.text))
        if not tokens:
            raise ValueError(f"evaluation.generate: the prompt {prompt.text!r:.40} has no tokens")
        if len(tokens) + length > most:
            raise ValueError(
                f"evaluation.generate_tokens={length} after the {len(tokens)} tokens of {prompt.text!r:.40} are more "
                f"than the model's {most} positions: give fewer, or shorten the prompt"
            )
        found.append(prompt._replace(tokens=tokens))
    return found
