"""Compiles the C kernels, once per machine, with the C compiler that is installed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

_log = logging.getLogger(__name__)
_FORMATS, _SOURCE = (Path(__file__).with_name(name) for name in ("formats.c", "cpu.c"))
# No contraction: the compiler would fuse a multiply-add in a vector loop and not in its remainder, so that the bits of
# an element would depend on where its shard ends. With trapping math, loops with comparisons would not be vectorized.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fopenmp", "-fPIC")


@functools.cache
def library() -> ctypes.CDLL | None:
    """Returns the compiled kernels; None where there is no C compiler, elsewhere than on Linux, or with
    DISTOPT_KERNELS=off.

    They are kept in ~/.cache/distopt/kernels (or $XDG_CACHE_HOME/distopt/kernels), a folder that only this user can
    write, under a hash of source, compiler, processor and C library, since machines may share a home. Where that cannot
    be, each process compiles its own.
    """
    if os.environ.get("DISTOPT_KERNELS") == "off":
        return None
    if sys.platform != "linux":
        _log.warning("the C kernels are for Linux: optimizers on the CPU use the unfused fallback")
        return None
    name = os.environ.get("CC", "").strip() or "cc"
    try:
        compiler = shlex.split(name)
    except ValueError:  # an unclosed quote
        compiler = []
    if not compiler or shutil.which(compiler[0]) is None:
        _log.warning("no C compiler (%s): optimizers on the CPU use the unfused fallback; install one, or set CC", name)
        return None
    try:
        return _load(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("%s does not compile, so optimizers on the CPU use the unfused fallback: %s", compiler[0], error)
        return None


def _load(compiler: list[str]) -> ctypes.CDLL:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distopt" / "kernels"
    identity = [_source(), compiler, torch.__version__, torch.__file__, *_FLAGS, *_machine()]
    name = f"cpu-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.so"
    try:
        with _private(cache) as folder:
            if not (folder / name).is_file():
                _build(compiler, cache, name)
            try:
                return ctypes.CDLL(str(folder / name))
            except OSError:  # the machine failed while it was written
                _build(compiler, cache, name)
                return ctypes.CDLL(str(folder / name))
    except (_NotPrivate, PermissionError, FileExistsError, NotADirectoryError) as error:
        _log.warning("%s: the kernels of the CPU are compiled by each process", error)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.ENOSPC, errno.EDQUOT):
            raise
    with tempfile.TemporaryDirectory() as own:
        return ctypes.CDLL(str(_compiled(compiler, Path(own))))


class _NotPrivate(Exception):
    """A folder into which another user could have put a library."""


@contextlib.contextmanager
def _private(cache: Path) -> Iterator[Path]:
    """Creates a folder that this user alone can write; yields a path to it by which nobody can exchange it.

    Raises:
        _NotPrivate: If there is a folder, or a library in it, that another user owns or can write.
    """
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(cache, os.O_RDONLY | os.O_DIRECTORY)
    try:
        libraries = (entry for entry in os.scandir(descriptor) if entry.name.endswith(".so"))
        for status in (os.fstat(descriptor), *(entry.stat(follow_symlinks=False) for entry in libraries)):
            if status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o022:
                raise _NotPrivate(f"another user could write {cache}: remove it")
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _build(compiler: list[str], cache: Path, name: str) -> None:
    """Compiles the library into the cache."""
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        linked = _compiled(compiler, Path(folder))
        linked.chmod(0o700)
        with open(linked, "rb") as file:
            os.fsync(file.fileno())
        os.replace(linked, cache / name)  # atomic: others may compile it now


def _compiled(compiler: list[str], folder: Path) -> Path:
    source, compiled, linked = folder / "cpu.c", folder / "cpu.o", folder / "cpu.so"
    source.write_text(_source())
    _run(*compiler, *_FLAGS, "-c", str(source), "-o", str(compiled))
    # torch's own OpenMP, if it ships one: with two, twice the threads would wait for each other.
    own = [str(file) for file in Path(torch.__file__).parent.glob("lib/libgomp*.so*")]
    _run(*compiler, "-shared", str(compiled), *(own or ["-fopenmp"]), "-lm", "-o", str(linked))
    return linked


@functools.cache
def names(kernel: str) -> tuple[list[str], list[str]]:
    """Returns the names of the scalars and of the scales that a kernel reads, in the order in which it takes them.

    cpu.c refers to both by name, as `h[<rule>__<name>]` and `s[<rule>__<name>]`, where kernels of one family
    (`rmsprop_momentum`) share a prefix (`rmsprop`). The order is that of their first use.
    """
    family, source = kernel.split("_")[0], _SOURCE.read_text()
    scalars, scales = (re.findall(rf"\b{array}\[{family}__(\w+)\]", source) for array in "hs")
    return list(dict.fromkeys(scalars)), list(dict.fromkeys(scales))


def _source() -> str:
    """Returns formats.c and cpu.c, after an enum of the indices of its scalars and scales."""
    source = _SOURCE.read_text()
    families = sorted(set(re.findall(r"\b[hs]\[(\w+?)__", source)))
    indices = [f"{rule}__{name} = {i}" for rule in families for column in names(rule) for i, name in enumerate(column)]
    files = ((_FORMATS.name, _FORMATS.read_text()), (_SOURCE.name, source))
    return "\n".join([f"enum {{ {', '.join(indices)} }};", *(f'#line 1 "{name}"\n{text}' for name, text in files)])


def _machine() -> list[str]:
    """Returns what compiled code depends on: this machine's processor and C library."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    keys = ("flags", "Features", "model name", "CPU part", "isa")  # of x86, of ARM, of RISC-V
    return [platform.machine(), *platform.libc_ver(), *sorted({line for line in lines if line.startswith(keys)})]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=120)
