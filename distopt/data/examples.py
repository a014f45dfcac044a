"""Fine-tuning examples: the schema of a JSONL line, and its validation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from distopt.data.sources import parse_json

Example = dict[str, Any]  # {"prompt": str, "completion": str}, or {"messages": [{"role": str, "content": str}, ...]}

_FIELDS = "an example has either messages, or prompt and completion"


def parse_example(line: bytes, where: str, ignore: Collection[str] = ()) -> Example:
    """Parse and validate one example.

    Args:
        line: A JSON object with either `prompt` and `completion`, which are text, or `messages`: a list of
            {"role": ..., "content": ...}, at least one with the role assistant. No target may be empty.
        where: The file and line number, for error messages.
        ignore: Fields to drop; other unknown fields are refused.

    Returns:
        The fields of the example.

    Raises:
        ValueError: The line is not such an object.
    """
    record = parse_json(line, where)
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a {type(record).__name__}, not an object: {_FIELDS}")
    record = {name: value for name, value in record.items() if name not in ignore}
    if "messages" in record:
        _check_fields(record, ("messages",), where, _FIELDS + "; name others in data.ignore")
        _check_messages(record["messages"], where)
        return record
    fields = ("prompt", "completion")
    _check_fields(record, fields, where, _FIELDS + "; name others in data.ignore")
    for name in fields:
        _check_text(record[name], name, where)
    if not record["completion"]:
        raise ValueError(f"{where}: completion is empty, so there is nothing to learn: remove the line")
    return record


def _check_messages(messages: Any, where: str) -> None:
    """Raise `ValueError` unless these are messages, at least one of them by the assistant and none of those empty."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: messages must be a list of messages, got {messages!r:.60}")
    for i, message in enumerate(messages):
        name = f"messages[{i}]"
        if not isinstance(message, dict):
            raise ValueError(f'{where}: {name} must be {{"role": ..., "content": ...}}, got {message!r:.60}')
        _check_fields(message, ("role", "content"), f"{where}: {name}", "a message has role and content")
        for key in ("role", "content"):
            _check_text(message[key], f"{name}.{key}", where)
        if message["role"] == "assistant" and not message["content"]:
            raise ValueError(f"{where}: {name}.content, of the assistant, is empty, so there is nothing to learn")
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError(f"{where}: no message has the role assistant, so there is nothing to learn")


def _check_fields(record: Example, fields: Sequence[str], where: str, rule: str) -> None:
    """Raise `ValueError` unless the record has exactly these fields."""
    if unknown := [name for name in record if name not in fields]:
        raise ValueError(f"{where} has an unknown field {unknown[0]!r}: {rule}")
    if missing := [name for name in fields if name not in record]:
        found = ", ".join(record) or "none"
        raise ValueError(f"{where} has no field {missing[0]!r} (found: {found}): {rule}")


def _check_text(value: Any, name: str, where: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be text, got {type(value).__name__} {value!r:.40}")
