"""Fine-tuning examples: the formats of a row, which one a row has, and the example that it becomes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from distopt.bounds import EXAMPLE_FORMAT, FIELDS, IGNORE
from distopt.data.conversations import check_text, conversation
from distopt.data.rows import Row

# {"prompt": str, "completion": str}, or {"messages": [{"role": str, "content": str, ...}, ...], "tools": [...]}
Example = dict[str, Any]

# The fields of each format, by what they are, and which of them a row needs to have.
_FIELDS = {
    "messages": {
        "messages": "messages",
        "role": "role",
        "content": "content",
        "system": "system",
        "tools": "tools",
    },
    "sharegpt": {
        "messages": "conversations",
        "role": "from",
        "content": "value",
        "system": "system",
        "tools": "tools",
    },
    "completion": {"prompt": "prompt", "completion": "completion"},
    "alpaca": {"instruction": "instruction", "input": "input", "output": "output", "system": "system"},
}
_NEEDED = {
    "messages": ("messages",),
    "sharegpt": ("messages",),
    "completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
_IN_MESSAGES = ("role", "content")
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_call": "function_call",
}
_RULE = "an example has messages, conversations (ShareGPT), prompt and completion, or instruction and output (Alpaca)"
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


class ExampleReader:
    """Turns rows into examples.

    Args:
        format: `messages`, `sharegpt`, `completion` or `alpaca`; `auto` for the one whose fields a row has.
        fields: Other names of the fields of the format, such as {"messages": "dialog", "role": "speaker"}.
        roles: The roles of messages by their names in the rows, such as {"bot": "assistant"}.
        ignore: Fields that are not read.
        chat: Whether the tokenizer has a chat template: an instruction is a message of the user then, else it has the
            words with which Alpaca was trained.

    Attributes:
        passed_over: The fields that were not read, and are not to be ignored, with where they were first seen.

    Raises:
        ValueError: An argument is invalid.
    """

    def __init__(
        self,
        format: str = "auto",
        fields: Mapping[str, str] | None = None,
        roles: Mapping[str, str] | None = None,
        ignore: Collection[str] = (),
        chat: bool = True,
    ) -> None:
        EXAMPLE_FORMAT.check("data.format", format)
        FIELDS.check("data.fields", fields or {})
        FIELDS.check("data.roles", roles or {})
        IGNORE.check("data.ignore", ignore)
        self._fields, self._roles, self._ignore, self._chat = dict(fields or {}), dict(roles or {}), ignore, chat
        if format == "auto" and self._fields:
            format = next((name for name, own in _FIELDS.items() if {*self._fields} <= {*own}), "auto")
        self._format = format
        known = _FIELDS.get(format, {})
        if unknown := [name for name in self._fields if name not in known]:
            formats = "; ".join(f"{name}: {', '.join(own)}" for name, own in _FIELDS.items())
            raise ValueError(f"data.fields.{unknown[0]}: data.format={format} has no such field; there are {formats}")
        self.passed_over: dict[str, str] = {}

    @property
    def notes(self) -> list[str]:
        """What of the rows was not read, one line each."""
        return [f"not read: {name} ({where})" for name, where in self.passed_over.items()]

    def read(self, row: Row) -> Example:
        """Return the example of a row.

        Raises:
            ValueError: The row has no such fields, or nothing to learn; with file and line.
        """
        record, where = row.record(), row.where
        record = {name: value for name, value in record.items() if name not in self._ignore and value is not None}
        format = _format_of(record, where) if self._format == "auto" else self._format
        names = _FIELDS[format] | self._fields
        for need in _NEEDED[format]:
            if names[need] not in record:
                found = ", ".join(record) or "none"
                raise ValueError(f"{where} has no field {names[need]!r} (found: {found}): {_RULE}; or give data.fields")
        for name in record:
            if name not in [names[own] for own in names if own not in _IN_MESSAGES]:
                self._tell(name, where)
        if format in ("messages", "sharegpt"):
            roles = _ROLES | self._roles if format == "sharegpt" else self._roles or None
            return conversation(record, names, roles, where, lambda name: self._tell(name, where))
        return self._completed(record, names, where) if format == "completion" else self._alpaca(record, names, where)

    def _tell(self, name: str, where: str) -> None:
        self.passed_over.setdefault(name, where)

    def _completed(self, record: Mapping[str, Any], names: Mapping[str, str], where: str) -> Example:
        prompt, completion = (record[names[name]] for name in ("prompt", "completion"))
        check_text(prompt, f"{where}: {names['prompt']}")
        _check_target(completion, f"{where}: {names['completion']}")
        return {"prompt": prompt, "completion": completion}

    def _alpaca(self, record: Mapping[str, Any], names: Mapping[str, str], where: str) -> Example:
        instruction, output = record[names["instruction"]], record[names["output"]]
        more, system = record.get(names["input"], ""), record.get(names["system"], "")
        for name, value in (("instruction", instruction), ("input", more), ("system", system)):
            check_text(value, f"{where}: {names[name]}")
        _check_target(output, f"{where}: {names['output']}")
        if self._chat:
            asked = f"{instruction}\n\n{more}" if more else instruction
            said = [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
            return {"messages": [{"role": "system", "content": system}] * bool(system) + said}
        paired = ", paired with an input that provides further context" if more else ""
        prompt = _ALPACA.format(paired=paired, instruction=instruction, input=f"### Input:\n{more}\n\n" if more else "")
        return {"prompt": f"{system}\n\n{prompt}" if system else prompt, "completion": output}


def _format_of(record: Mapping[str, Any], where: str) -> str:
    """Return the format whose fields a row has; raise `ValueError` if it is none or several."""
    wanted = {format: [_FIELDS[format][name] for name in needed] for format, needed in _NEEDED.items()}
    found = [format for format, names in wanted.items() if all(name in record for name in names)]
    if len(found) > 1:
        raise ValueError(f"{where} has the fields of {' and '.join(found)}: give data.format={found[0]}, for example")
    if found:
        return found[0]
    begun = [(names, name) for names in wanted.values() for name in names if name not in record and len(names) > 1]
    missing = next((name for names, name in begun if any(other in record for other in names)), None)
    has = ", ".join(record) or "none"
    what = f"no field {missing!r} (found: {has})" if missing else f"the fields {has}"
    raise ValueError(f"{where} has {what}: {_RULE}; data.fields and data.format name others")


def _check_target(value: Any, where: str) -> None:
    check_text(value, where)
    if not value:
        raise ValueError(f"{where} is empty, so there is nothing to learn: remove the line")
