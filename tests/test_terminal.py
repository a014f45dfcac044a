"""What a run shows on terminals of 80 and of 200 columns, and in a log file."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import time

import pytest

from distopt.job.progress import Progress, duration
from distopt.job.terminal import Terminal
from tests.harness.jobs import ENVIRONMENT

ROW = {
    "loss": "2.0999",
    "skipped": "3",
    "MFU": "41%",
    "memory": "70.2 GiB",
    "lr": "1.88e-03",
    "|g|": "1.02",
    "data": "0.3 ms",
}
PROGRAM = f"""
import time
from distopt.job.progress import Progress
from distopt.job.terminal import Terminal
with Terminal() as terminal:
    terminal.phase("reading the data")
    terminal.block({{"model": "gpt2", "data": "words " * 30}})
    progress = Progress(terminal, 0, 400)
    for step in range(1, 301):
        progress._shown = 0.0
        progress.update(step, 0.1, 2048, {ROW!r})
        if step == 100:
            terminal.phase("step 100: evaluating")
            terminal.say("step 100: validation loss [2.2]")
    progress.close()
"""


def screen(data: str, columns: int) -> tuple[list[str], list[str]]:
    """The lines that are left on a terminal, and those that were there at some time."""
    lines, seen, at = [""], [], 0
    for part in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", data):
        if lines[-1] and (part in "\r\n" or part.endswith("K")):
            seen.append(lines[-1])
        if part == "\n":
            lines.append("")
            at = 0
        elif part == "\r":
            at = 0
        elif part.endswith("K"):
            lines[-1] = ""
        elif part[0] != "\x1b":
            lines[-1] = lines[-1][:at] + part + lines[-1][at + len(part) :]
            at += len(part)
            assert len(lines[-1]) <= columns
    return lines, seen


@pytest.mark.parametrize("columns", [80, 200])
def test_a_terminal(columns: int) -> None:
    """The bar has loss, tokens per second and the time left at 80 columns, and everything at 200."""
    pid, terminal = pty.fork()
    if pid == 0:
        environment = {**os.environ, **ENVIRONMENT, "TERM": "xterm", "COLUMNS": str(columns)}
        os.execve(sys.executable, [sys.executable, "-c", PROGRAM], environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    written = b""
    try:
        while data := os.read(terminal, 65536):
            written += data
    except OSError:  # the program has ended
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, written.decode()
    left, seen = screen(written.decode(), columns)
    bars = [line for line in seen if line.startswith("step 300/400 ") and "━" in line]
    assert bars and all(re.search(r"━{10,} loss 2\.0999  20,480 tok/s  \d+:\d\d left", bar) for bar in bars)
    assert ("|g| 1.02" in bars[-1] and "MFU 41%" in bars[-1]) == (columns == 200)
    assert any(line.startswith("reading the data ...") for line in seen)
    shown = [line.rstrip() for line in left if line.strip()]
    assert shown[0] == "model       gpt2"
    assert "step 100: validation loss [2.2]" in shown
    assert shown[-1].startswith("step 300/400  loss 2.0999  20,480 tok/s") and not re.search(
        "evaluating|━", "".join(shown)
    )
    assert "\x1b[?25l" not in written.decode()  # what kills the run would leave no cursor


def test_a_log_file_has_lines_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One at most every ten seconds, and the last step, with everything."""
    terminal, now = Terminal(main=True), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(terminal, 100, 400)
    terminal.phase("reading the data")
    terminal.block({"data": "words " * 60})
    for step in range(101, 131):
        now[0] += 0.5
        progress.update(step, 0.5, 2048, ROW)
    terminal.say("step 130: validation loss [bold]2.2")
    progress.close()
    progress.close()
    out, err = capsys.readouterr()
    numbers = "loss 2.0999  4,096 tok/s  {}  skipped 3  MFU 41%  memory 70.2 GiB  lr 1.88e-03  |g| 1.02  data 0.3 ms"
    assert out.splitlines() == [
        "data        " + " ".join(["words"] * 60),
        f"step 120/400  {numbers.format('2:20 left')}",
        "step 130: validation loss [bold]2.2",
        f"step 130/400  {numbers.format('2:15 left')}",
    ]
    assert err == ""


def test_other_processes_show_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with Terminal() as terminal:
        terminal.phase("reading")
        terminal.say("a line")
        terminal.block({"model": "gpt2"})
    assert capsys.readouterr() == ("", "")


def test_a_run_of_no_step_has_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A finished run that is resumed."""
    Progress(Terminal(main=True), 8, 8).close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (7.4, "0:07"), (725, "12:05"), (11045, "3:04:05"), (183845, "2 d 3:04:05")]
)
def test_times(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
