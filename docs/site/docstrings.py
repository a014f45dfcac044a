"""The form of our docstrings as Markdown: what begins with an argument's name and a colon becomes an item of a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ITEM = re.compile(r"(?P<head>[^:.`]+): (?P<text>\S.*)")
_LABEL = re.compile(r"(?P<label>Args|References?):(?P<text>.*)")


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
    """A line `head: text` begins an item where the head is made of these names, or further lines are indented under it."""
    lines: list[str] = []
    depth = 0  # of the items: 4 below a label
    listed = labelled = False
    rows = text.splitlines()
    for row, after in zip(rows, [*rows[1:], ""]):
        body, indent = row.strip(), len(row) - len(row.lstrip())
        label, item = _LABEL.fullmatch(row), _ITEM.fullmatch(body)
        heads = item["head"].split(", ") if item else []
        if label:
            labelled, listed = True, False
            depth = 4
            lines += ["", f"**{label['label']}:**{label['text']}", ""]
        elif not row:
            listed = labelled = False
            depth = 0
            lines.append("")
        elif item and indent == depth and (names.issuperset(heads) or (not labelled and after.startswith("     "[:4]))):
            lines += [] if listed else [""]
            named = ", ".join(f"`{head}`" if head in names else head for head in heads)
            lines.append(f"- {named}: {item['text']}")
            listed = True
        elif listed and indent > depth:
            lines.append(f"    {body}")
        elif labelled and indent == depth:  # references, one after the other
            lines.append(body)
        else:
            lines += [""] if listed else []
            listed = False
            lines.append(row)
    return "\n".join(lines)
