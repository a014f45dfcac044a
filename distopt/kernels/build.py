"""Compiles the C kernels, once per machine, with the C compiler that is installed."""

from __future__ import annotations

import ctypes
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
from pathlib import Path

import torch

_log = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("cpu.c")
# No contraction: the compiler would fuse a multiply-add in a vector loop and not in its remainder, so that the bits of
# an element would depend on where its shard ends.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-ffp-contract=off", "-fopenmp", "-fPIC")


@functools.cache
def library() -> ctypes.CDLL | None:
    """Returns the compiled kernels; None where there is no C compiler, or DISTOPT_KERNELS=off.

    They are kept in ~/.cache/distopt (or $XDG_CACHE_HOME/distopt), under a hash of source, compiler, processor and C
    library, since machines may share a home. Where that cannot be written, each process compiles its own.
    """
    if os.environ.get("DISTOPT_KERNELS") == "off" or sys.platform != "linux":
        return None
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if shutil.which(compiler[0]) is None:
        _log.warning(
            "no C compiler (%s): optimizers on the CPU use the unfused fallback; install one, or set CC", compiler[0]
        )
        return None
    try:
        return _load(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("%s does not compile, so optimizers on the CPU use the unfused fallback: %s", compiler[0], error)
        return None


def _load(compiler: list[str]) -> ctypes.CDLL:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distopt"
    identity = [_source(), compiler, torch.__version__, torch.__file__, *_FLAGS, *_machine()]
    target = cache / f"cpu-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.so"
    if not target.is_file():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(dir=cache)
        except OSError:  # a home that is read-only
            with tempfile.TemporaryDirectory() as own:
                return ctypes.CDLL(str(_compiled(compiler, Path(own))))
        with folder:
            os.replace(_compiled(compiler, Path(folder.name)), target)  # atomic: others may compile it now
    return ctypes.CDLL(str(target))


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
    """Returns cpu.c, after an enum of the indices of its scalars and scales."""
    source = _SOURCE.read_text()
    families = sorted(set(re.findall(r"\b[hs]\[(\w+?)__", source)))
    indices = [f"{rule}__{name} = {i}" for rule in families for column in names(rule) for i, name in enumerate(column)]
    return f'enum {{ {", ".join(indices)} }};\n#line 1 "{_SOURCE.name}"\n{source}'


def _machine() -> list[str]:
    """Returns what compiled code depends on: this machine's processor and C library."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    keys = ("flags", "Features", "model name", "CPU part", "isa")  # of x86, of ARM, of RISC-V
    return [platform.machine(), *platform.libc_ver(), *sorted({line for line in lines if line.startswith(keys)})]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=120)
