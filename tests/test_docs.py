"""Every block of code in the README and in docs/ runs or states why not; the site builds without a warning."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import distopt
from distopt.command.main import ENTRIES
from distopt.command.start import taken
from distopt.job.cli import model_words
from distopt.job.config import CONF
from distopt.optim import schedules
from tests.harness import jobs, pages
from tests.harness.cells import some

PAGES = [jobs.ROOT / "README.md", *sorted((jobs.ROOT / "docs").rglob("*.md"))]
SECONDS = 900.0
# A command by its first word: the lines of an indented block that are one.
COMMAND = re.compile(r"(?:\.venv/bin/)?(?:python|accelerate|make|torchrun|distopt)\b(?! {5})")


def name(page: Path) -> str:
    return str(page.relative_to(jobs.ROOT))


def code_pages() -> list[object]:
    """Pages with code that runs; those that start programs take seconds for each, and are marked `matrix`."""
    marks = {True: [pytest.mark.matrix, pytest.mark.timeout(SECONDS)], False: []}
    kinds = {page: {block.kind for block in pages.blocks(page) if block.runs} for page in PAGES}
    return [pytest.param(page, id=name(page), marks=marks["bash" in kinds[page]]) for page in PAGES if kinds[page]]


def run_page(page: Path, cwd: Path, log: Path) -> None:
    """Run a page in a process of its own."""
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    os.chdir(cwd)
    os.environ["PATH"] = f"{jobs.BIN}:{os.environ['PATH']}"
    os.environ["PYTHONPATH"] = f"{jobs.ROOT}:{jobs.ROOT / 'distopt' / 'plugin'}"  # like an installed package
    try:
        pages.run(page)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)  # also ends a process group that the page has left open


@pytest.mark.parametrize("page", code_pages())
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    cwd, log = tmp_path / "here", tmp_path / "log"
    cwd.mkdir()
    process = jobs.fork(run_page, page, cwd, log)
    try:
        process.join(SECONDS)
    finally:
        jobs.kill_all(process.pid)
    assert process.exitcode == 0, log.read_text()[-8000:]


def test_a_block_that_does_not_run_states_its_reason() -> None:
    """The list of reasons is short, and complete here."""
    left_out = [(name(page), block.reason) for page in PAGES for block in pages.blocks(page) if block.reason]
    elsewhere = "tests/test_own_parts.py runs it, on two processes"
    reasons = {
        elsewhere,
        "needs SLURM",
        "needs 8 GPUs",
        "tests/test_experts.py runs it, on four processes",
        "what to change in the command above",
        "needs a pretrained model",
        "needs axolotl",
        "needs lm-evaluation-harness",
    }
    assert {reason for _, reason in left_out} <= reasons, left_out
    for page in PAGES:
        found = pages.blocks(page)
        assert page.read_text().count("\n```") == 2 * len(found), f"{page}: a fence"
        for i, block in enumerate(found):  # a file that is shown is used
            later = "".join(
                other.code for other in found[i + 1 :] if other.runs or other.title or other.reason == elsewhere
            )
            assert not block.title or Path(block.title).stem in later, f"{page}: {block.title} is not used"


@pytest.fixture
def hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def commands(page: Path) -> list[str]:
    """Commands of a page that no other test runs: in indented blocks, and in blocks that do not run."""
    shown = "".join(block.code for block in pages.blocks(page) if block.kind == "bash" and block.reason)
    fenced = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    indented = "".join(line[4:] for line in fenced.splitlines(keepends=True) if line.startswith("    "))
    lines = re.sub(r"\\\n\s*", " ", shown + indented).splitlines()
    return [re.sub(r"\$\(\w+\)", "there", line) for line in lines if COMMAND.match(line)]  # for a command substitution


def test_commands_that_do_not_run_exist(hydra: None) -> None:
    """Commands that take hours or a cluster: their modules, targets of make and configuration exist."""
    targets = re.findall(r"^(\w+):", (jobs.ROOT / "Makefile").read_text(), re.MULTILINE)
    seen = 0
    for page in PAGES:
        for command in commands(page):
            words = shlex.split(re.sub(r"\$\(\w+\)", "word", command), comments=True)
            seen += 1
            if words[0] == "make":
                assert {word for word in words[1:] if "=" not in word} <= set(targets), f"{name(page)}: {command}"
            if words[0] == "distopt":
                assert words[1:2] == [] or words[1] in ENTRIES, f"{name(page)}: {command}"
                module, rest = "distopt", words[2:]
                if words[1:2] in (["train"], ["finetune"], ["sweep"], ["prepare"]):
                    implied = {"finetune": ["experiment=finetune"], "sweep": ["-m", "hydra/launcher=accelerate"]}
                    module, rest = "distopt.train", [*implied.get(words[1], []), *taken(rest)[1]]
                elif words[1:2] == ["plan"]:
                    module = "distopt.plan"
            elif "-m" not in words:
                continue
            else:
                module, *rest = words[words.index("-m") + 1 :]
            assert importlib.util.find_spec(module), f"{name(page)}: {command}"
            if module == "benchmarks":
                assert importlib.util.find_spec(f"{module}.{rest[0]}"), f"{name(page)}: {command}"
            if module == "distopt.train" and not {"...", "--help", "--cfg", "--config-dir"} & set(rest):
                if "-m" in rest:  # a sweep, by the first value of each key
                    rest = [re.sub(r"^([\w./]+=[^,\[(]+),.*", r"\1", word) for word in rest if word != "-m"]
                compose("train", model_words(rest), return_hydra_config=True)
            if module == "distopt.plan" and "..." not in rest:
                compose("plan", rest)
    assert seen > 10


@pytest.mark.parametrize("target", some(["matrix"], ["matrix", "gpu"]))
def test_make_calls_pytest_with_options_that_it_knows(target: str) -> None:
    """`make matrix` failed: pytest took the file after `--table` for tests, and did not read the conftest."""
    recipe = subprocess.run(["make", "-n", target], cwd=jobs.ROOT, capture_output=True, text=True, check=True).stdout
    (command,) = (line for line in recipe.splitlines() if "-m pytest" in line)
    done = subprocess.run(f"{command} --markers", shell=True, cwd=jobs.ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_site_builds(tmp_path: Path) -> None:
    """Strictly: broken links and anchors, and names of the reference that do not exist, fail."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/site/mkdocs.yml", "-d", tmp_path]
    # Not `-q`, which hides warnings from `--strict` too. Material 9.8 has an opinion about MkDocs 2 unless told not to.
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=jobs.ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    index = (jobs.ROOT / "docs" / "index.md").read_text()
    for page in PAGES[1:]:
        assert page.name == "index.md" or f"({page.relative_to(jobs.ROOT / 'docs')})" in index, f"{page}: not there"
        assert (tmp_path / page.relative_to(jobs.ROOT / "docs").with_suffix(".html")).is_file()
    pages_of_reference = (jobs.ROOT / "docs" / "reference").glob("*.md")
    listed = re.findall(r"^::: (?:\w+\.)+(\w+)$", "".join(map(Path.read_text, pages_of_reference)), re.MULTILINE)
    modules = {"layout", "health", *(name for name in distopt.__all__ if hasattr(schedules, name))}  # listed whole
    assert {*distopt.__all__} - modules <= {*listed}
    html = (tmp_path / "reference" / "optimizers.html").read_text()
    assert "ratio = |p| / |direction|" in html
    assert re.search(r"<code>momentum</code>.{0,300}In \[0, 1\)", html, re.DOTALL)
    assert not re.findall(r'src="https?://|href="https?://[^"]*\.(?:css|js|woff2?)"', html)  # nothing is fetched
    assert (
        "iframe-worker.js" in html and (tmp_path / "search" / "search_index.js").is_file()
    )  # search, from the disk too
    assert "prefers-color-scheme: dark" in html and "md-footer__link--next" in html
