"""Conversations of a row: messages with roles, contents, tools and tool calls, in the form that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Message = dict[str, Any]
LAST = "what follows the last message of the assistant"
# What a chat template may read of a message beside role and content.
_MORE = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")


def conversation(
    record: Mapping[str, Any],
    names: Mapping[str, str],
    roles: Mapping[str, str] | None,
    where: str,
    tell: Callable[[str], None],
) -> Message:
    """Return the messages of a row up to the last one of the assistant, and its tools.

    Args:
        record: The row.
        names: The fields of the row and of its messages that are `messages`, `role`, `content`, `system` and `tools`.
        roles: What the roles of the row are called by chat templates; None if they are called so already.
        where: The file and line number, for error messages.
        tell: Called with the name of each field of a message that is not read.

    Returns:
        {"messages": [...]}, and "tools": [...] if there are any.

    Raises:
        ValueError: The row has no such conversation, or the assistant says nothing in it.
    """
    given = record[names["messages"]]
    if not isinstance(given, list) or not given:
        raise ValueError(f"{where}: {names['messages']} must be a list of messages, got {given!r:.60}")
    at = f"{where}: {names['messages']}"
    messages = [_message(each, names, roles, f"{at}[{i}]", tell) for i, each in enumerate(given)]
    if system := record.get(names["system"]):
        check_text(system, f"{where}: {names['system']}")
        if messages[0]["role"] == "system":
            raise ValueError(f"{where} has a system message and a field {names['system']!r}: remove one of them")
        messages.insert(0, {"role": "system", "content": system})
    said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not said:
        raise ValueError(f"{where}: no message has the role assistant, so there is nothing to learn")
    if said[-1] < len(messages) - 1:
        tell(LAST)
    tools = _tools(record.get(names["tools"]), names["tools"], where)
    return {"messages": messages[: said[-1] + 1], **({"tools": tools} if tools else {})}


def _message(
    given: Any, names: Mapping[str, str], roles: Mapping[str, str] | None, where: str, tell: Callable[[str], None]
) -> Message:
    role_name, content_name = names["role"], names["content"]
    if not isinstance(given, dict):
        raise ValueError(f'{where} must be {{"{role_name}": ..., "{content_name}": ...}}, got {given!r:.60}')
    calls = given.get("tool_calls")
    for name in (role_name, content_name):
        if name not in given and not (name == content_name and calls):
            raise ValueError(f"{where} has no field {name!r} (found: {', '.join(given) or 'none'})")
    role, content = given[role_name], given.get(content_name)
    check_text(role, f"{where}.{role_name}")
    if roles is not None and role not in roles:
        raise ValueError(
            f"{where}: {role_name} is {role!r}, not one of {', '.join(roles)}: data.roles={{{role}: user}}"
        )
    if content is None and calls:
        content = ""
    check_text(content, f"{where}.{content_name}")
    message: Message = {"role": role if roles is None else roles[role], "content": content}
    if message["role"] == "function_call":  # of ShareGPT: the call is the content
        message, calls = {"role": "assistant", "content": ""}, [_parsed(content, f"{where}.{content_name}")]
    if calls:
        message["tool_calls"] = _calls(calls, where)
    for name, value in given.items():
        if name not in (role_name, content_name, *_MORE):
            tell(f"{name} of messages")
        elif name in _MORE and name != "tool_calls" and value is not None:
            message[name] = value
    if message["role"] == "assistant" and not content and not calls:
        raise ValueError(f"{where}.{content_name}, of the assistant, is empty, so there is nothing to learn")
    return message


def _calls(calls: Any, where: str) -> list[Message]:
    """Return tool calls as {"type": "function", "function": {"name": ..., "arguments": {...}}}."""
    if not isinstance(calls, list):
        raise ValueError(f"{where}.tool_calls must be a list, got {calls!r:.60}")
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where}.tool_calls must be functions with a name, got {call!r:.60}")
        arguments = _parsed(function.get("arguments") or {}, f"{where}.tool_calls.arguments")
        more = {name: call[name] for name in ("id",) if name in call}
        found.append({**more, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return found


def _tools(tools: Any, name: str, where: str) -> Sequence[Any]:
    """Return the tools of a row: a list of descriptions, or such a list as JSON text."""
    if tools is None or tools == "":
        return []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            tools = None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{where}: {name} must be a list of JSON descriptions of functions")
    return tools


def _parsed(value: Any, where: str) -> dict[str, Any]:
    """Return an object that is given as itself or as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object, or one as text")
    return value


def check_text(value: Any, where: str) -> None:
    """Raise `ValueError` unless a value is text."""
    if not isinstance(value, str):
        raise ValueError(f"{where} must be text, got {type(value).__name__} {value!r:.40}")
