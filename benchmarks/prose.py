"""Prose that every machine has: paragraphs of the READMEs of the installed Python packages."""

from __future__ import annotations

import json
import re
from importlib.metadata import Distribution, distributions
from pathlib import Path

_LEAST = 80  # characters of a paragraph
_SHARE = 0.85  # of small letters and spaces: less is code, a table, a list of links or of names


def write_readmes(file: Path) -> None:
    """Write the prose of all installed packages as JSONL: one document, `{"text": ...}`, for each package that has any.

    A paragraph is kept where it first occurs, since many READMEs repeat those of others.

    Args:
        file: The file to write; it is complete or not there.

    Raises:
        ValueError: If there is no README with prose.
    """
    packages = {str(found.metadata["Name"]).lower(): found for found in distributions()}
    seen: set[str] = set()
    texts = ["\n\n".join(_new(paragraphs(readme(packages[name])), seen)) for name in sorted(packages)]
    rows = [json.dumps({"text": text}) for text in texts if text]
    if not rows:
        raise ValueError("no installed package has a README with prose: give --path a text")
    part = file.with_suffix(".part")
    part.write_text("\n".join(rows) + "\n")
    part.replace(file)


def readme(package: Distribution) -> str:
    """Return the long description of a package: the body of its metadata, or a field of it in old ones."""
    body = package.metadata.get_payload()  # type: ignore[attr-defined]  # an email.message.Message
    return str(body or package.metadata.get("Description", ""))  # type: ignore[attr-defined]


def paragraphs(text: str) -> list[str]:
    """Return the paragraphs of a text that are prose."""
    found = [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text)]
    return [p for p in found if len(p) >= _LEAST and len(re.findall("[a-z ]", p)) >= _SHARE * len(p)]


def _new(found: list[str], seen: set[str]) -> list[str]:
    new = [paragraph for paragraph in dict.fromkeys(found) if paragraph not in seen]
    seen.update(new)
    return new
