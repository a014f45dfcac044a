"""The code of a page of documentation, run from top to bottom as its reader would.

```python                   runs, in one namespace for the page
```python title="x.py"      is saved as x.py, which a later block imports or starts
```yaml title="x.yaml"      is a file too, for what a test of its own runs
```bash                     runs
<!-- setup: name -->        before a block: what `tests.harness.setups` says that the reader has already
<!-- not run: reason -->    before a block: it does not run here
other fences, indented      are not code to run: output, formulas, commands that take long
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

from tests.harness import jobs, setups

_BLOCK = re.compile(
    r"^(?:<!-- setup: (?P<setup>\w+) -->\n)?"
    r"(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?"
    r'```(?P<kind>\w*)(?: title="(?P<title>[^"\n]+)")?\n(?P<code>.*?)^```$',
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """A fenced block, and what stands before it. line: of the page, at which the code begins, from 0."""

    kind: str
    code: str
    line: int
    title: str | None
    setup: str | None
    reason: str | None

    @property
    def runs(self) -> bool:
        return self.kind in ("python", "bash") and self.reason is None


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(line=text.count("\n", 0, found.start("code")), **found.groupdict()) for found in _BLOCK.finditer(text)
    ]


def run(page: Path) -> None:
    """Runs a page in the current folder, which is empty but for `launch/`."""
    Path("launch").symlink_to(jobs.ROOT / "launch")
    sys.path.insert(0, os.getcwd())
    module = types.ModuleType(page.stem.replace("-", "_"))
    sys.modules[module.__name__] = module  # for what looks up where a class was defined
    for block in blocks(page):
        if not block.runs:
            continue
        if block.setup:
            module.__dict__.update(getattr(setups, block.setup)())
        if block.title:
            Path(block.title).write_text(block.code)
        elif block.kind == "python":
            # With the lines before it, so that a traceback names the page's own.
            exec(compile("\n" * block.line + block.code, str(page), "exec"), module.__dict__)
        else:
            print(f"{page}:{block.line}", flush=True)
            subprocess.run(["bash", "-euc", block.code], check=True)
