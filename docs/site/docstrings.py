"""The form of our docstrings as Markdown: what begins with an argument's name and a colon becomes an item of a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ITEM = re.compile(r"(?P<head>[^:.`]+): (?P<text>\S.*)")
_LABEL = re.compile(r"(?P<label>Args|Attributes|Returns|Raises|References?):(?P<text>.*)")


class Docstrings(griffe.Extension):
    """Rewrites every docstring of a package; formulas, which are indented blocks, are Markdown already."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        _rewrite(pkg)


def _rewrite(obj: griffe.Object) -> None:
    if obj.docstring:
        obj.docstring.value = as_markdown(obj.docstring.value, _names(obj))
    for member in obj.members.values():
        if not member.is_alias:
            _rewrite(member)


def _names(obj: griffe.Object) -> set[str]:
    made = obj.members.get("__init__") if obj.is_class else obj
    return {*obj.members, *(p.name for p in getattr(made, "parameters", ()))}


def as_markdown(text: str, names: set[str]) -> str:
    """Markdown, where `head: text` begins an item if the head is of these names, or if lines are indented under it."""
    lines: list[str] = []
    depth, listed = 0, False  # how far items are indented: under a label; whether the line before belongs to one
    rows = text.splitlines()
    for row, after in zip(rows, [*rows[1:], ""]):
        body, indent = row.strip(), len(row) - len(row.lstrip())
        item = _ITEM.fullmatch(body) if indent == depth else None
        heads = item["head"].split(", ") if item else []
        if label := _LABEL.fullmatch(row):
            depth, listed = 4, False
            lines += ["", f"**{label['label']}:**{label['text']}"]
        elif not row:
            depth, listed = 0, False
            lines.append("")
        elif item and (names.issuperset(heads) or (depth == 0 and after.startswith("    "))):
            named = ", ".join(f"`{head}`" if head in names else head for head in heads)
            lines += [f"- {named}: {item['text']}"] if listed else ["", f"- {named}: {item['text']}"]
            listed = True
        elif listed and indent > depth:
            lines.append(f"    {body}")
        else:
            lines += ["", row] if listed else [row[depth:] if indent >= depth else row]
            listed = False
    return "\n".join(lines)
