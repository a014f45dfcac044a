"""Compiles the kernels of the CPU, once for a machine, with the C compiler that is there."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from distopt.kernels.rules import indices

_log = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("cpu.c")
# No contraction: the compiler would fuse a multiply-add in a vector loop and not in the rest of it, so that the bits of
# an element would depend on where its shard ends.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-ffp-contract=off", "-fopenmp", "-fPIC")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there is no C compiler, or DISTOPT_KERNELS=off.

    They lie in ~/.cache/distopt (or $XDG_CACHE_HOME/distopt), under a name that tells source, compiler, processor and
    C library, since machines may share a home. Where that cannot be written, each process compiles its own.
    """
    if os.environ.get("DISTOPT_KERNELS") == "off" or sys.platform != "linux":
        return None
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if shutil.which(compiler[0]) is None:
        _log.warning(
            "no C compiler (%s): optimizers on the CPU take their slow way; install one, or set CC", compiler[0]
        )
        return None
    try:
        return _load(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("%s does not compile, so optimizers on the CPU take their slow way: %s", compiler[0], error)
        return None


def _load(compiler: list[str]) -> ctypes.CDLL:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distopt"
    told = [_source(), compiler, torch.__version__, torch.__file__, *_FLAGS, *_machine()]
    target = cache / f"cpu-{hashlib.sha256(repr(told).encode()).hexdigest()[:16]}.so"
    if not target.is_file():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(dir=cache)
        except OSError:  # a home that is read-only
            with tempfile.TemporaryDirectory() as own:
                return ctypes.CDLL(str(_compiled(compiler, Path(own))))
        with folder:
            os.replace(_compiled(compiler, Path(folder.name)), target)  # whole, whoever else compiles it now
    return ctypes.CDLL(str(target))


def _compiled(compiler: list[str], folder: Path) -> Path:
    source, compiled, linked = folder / "cpu.c", folder / "cpu.o", folder / "cpu.so"
    source.write_text(_source())
    _run(*compiler, *_FLAGS, "-c", str(source), "-o", str(compiled))
    # torch's own OpenMP, where it brings one: two of them would have twice the threads wait for each other.
    own = [str(file) for file in Path(torch.__file__).parent.glob("lib/libgomp*.so*")]
    _run(*compiler, "-shared", str(compiled), *(own or ["-fopenmp"]), "-lm", "-o", str(linked))
    return linked


def _source() -> str:
    """cpu.c, after the places of its scalars and scales."""
    places = ", ".join(f"{name} = {place}" for name, place in indices().items())
    return f'enum {{ {places} }};\n#line 1 "{_SOURCE.name}"\n{_SOURCE.read_text()}'


def _machine() -> list[str]:
    """What code for this machine's processor and C library depends on."""
    said = Path("/proc/cpuinfo").read_text().splitlines()
    told = ("flags", "Features", "model name", "CPU part", "isa")  # of x86, of ARM, of RISC-V
    return [platform.machine(), *platform.libc_ver(), *sorted({line for line in said if line.startswith(told)})]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=120)
