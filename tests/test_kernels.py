"""The C kernels compute their rules: the same update, whatever the sizes, dtypes and threads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import distopt
from distopt.kernels import build, dispatch
from distopt.kernels.cpu import products
from distopt.kernels.exact import LOWEST, WIDTH
from distopt.kernels.shards import Shards
from tests.harness import jobs
from tests.harness.optimizers import ROWS, Row, distance, every_compiled_row, initial, pull

# Longer than a piece of the kernels and no multiple of it, shorter, of one element, empty.
SHAPES = ((97, 89), (20011,), (3, 5), (1,), (0, 4))
STEPS = 5
# float32: a fused multiply-add rounds once where two operations round twice, and a sum has another order.
TOLERANCE = 2e-6


def train(row: Row, dtype: torch.dtype = torch.float32, shapes: Any = SHAPES, **options: Any) -> list[Tensor]:
    params = [p.requires_grad_() for p in initial(*shapes, dtype=dtype)]
    opt = row.make(row.groups(params), **options)
    for step in range(STEPS):
        opt.zero_grad()
        pull(params, step).backward()
        opt.step()
    return [p.detach() for p in params] + [s for p in params for s in opt.state[p].values() if s.ndim]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the names of the kernels that were chosen."""
    seen: list[str] = []
    original = dispatch.compiled_update

    def watched(shards: Any) -> Any:
        seen.append(shards.rule.kernel)
        return original(shards)

    monkeypatch.setattr(dispatch, "compiled_update", watched)
    return seen


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@every_compiled_row
def test_a_kernel_computes_its_rule(row: Row, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = train(row)
    assert calls
    monkeypatch.setattr(dispatch, "fits", lambda shards: [])
    calls.clear()
    assert distance(ours, train(row)) < TOLERANCE
    assert not calls


VARIANTS: list[tuple[type[distopt.ShardedOptimizer], dict[str, Any]]] = [
    (distopt.RMSprop, dict(centered=True)),
    (distopt.RMSprop, dict(momentum=0.9)),
    (distopt.RMSprop, dict(centered=True, momentum=0.9, trust_ratio=True)),
    (distopt.RMSprop, dict(centered=True, trust_ratio=True)),
    (distopt.SGD, dict(momentum=0.9, dampening=0.9)),
    (distopt.LARS, dict(nesterov=True, weight_decay=0.1)),
]


@pytest.mark.parametrize(("cls", "options"), VARIANTS, ids=str)
def test_variants(
    cls: type[distopt.ShardedOptimizer], options: dict[str, Any], calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained() -> list[Tensor]:
        params = [p.requires_grad_() for p in initial(*SHAPES, dtype=torch.float32)]
        opt = cls(params, lr=0.01, **options)  # type: ignore[call-arg]
        for step in range(STEPS):
            opt.zero_grad()
            pull(params, step).backward()
            opt.step()
        return [p.detach() for p in params] + [s for p in params for s in opt.state[p].values() if s.ndim]

    ours = trained()
    assert calls
    monkeypatch.setattr(dispatch, "fits", lambda shards: [])
    assert distance(ours, trained()) < TOLERANCE


def test_gradients_of_16_bits_need_no_conversion() -> None:
    """Those of a bfloat16 parameter with a float32 master. bfloat16 is exact in float32, so there is no tolerance."""
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        params = initial(*SHAPES, dtype=torch.float32)
        grads = [p.cos().bfloat16().to(dtype) for p in params]
        buffers = {k: [torch.zeros_like(p) for p in params] for k in ("exp_avg", "exp_avg_sq")}
        group = distopt.AdamW([torch.zeros(1)]).param_groups[0]
        rule = distopt.AdamW([torch.zeros(1)]).rule(group)
        shards = Shards(group, rule, list(range(len(params))), params, grads, buffers, [1.0] * len(params))
        assert len(dispatch.fits(shards)) == len(params)
        update = dispatch.compiled_update(shards)
        results.append([*update.squared_norms(), *dispatch.gradient_norms(shards)])
        update.step()
        results[-1] += params
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_loaded_step_count_is_a_copy() -> None:
    """The counts of a group are one tensor, which the optimizer they were loaded from must not change."""
    first, second = (torch.ones(3, requires_grad=True) for _ in range(2))
    first.grad = second.grad = torch.ones(3)
    one, other = distopt.AdamW([first]), distopt.AdamW([second])
    one.step()
    one.step()
    other.load_state_dict(one.state_dict())
    one.step()
    assert [float(one.state[first]["step"]), float(other.state[second]["step"])] == [3.0, 2.0]


@pytest.mark.parametrize("options", [{"maximize": True}, {"trust_ratio": True}], ids=str)
@pytest.mark.parametrize("row", [row for row in ROWS if row.name in ("adamw", "nesterov", "adagrad", "rmsprop")])
def test_with_other_options(row: Row, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = train(row, **options)
    assert distance(ours, train(row)) > 100 * TOLERANCE
    monkeypatch.setattr(dispatch, "fits", lambda shards: [])
    assert distance(ours, train(row, **options)) < TOLERANCE


@every_compiled_row
def test_threads_change_nothing(row: Row, threads: None) -> None:
    """Not by a bit: sums are taken in one order, or a resumed run could not be the same."""
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(train(row, shapes=((301, 233), (20011,), (7,))))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes_use_the_fallback(dtype: torch.dtype, calls: list[str]) -> None:
    train(ROWS[0], dtype)
    assert not calls


def test_masters_of_bfloat16_and_float32_weights_in_one_group_have_kernels(calls: list[str]) -> None:
    """A group of both used the fallback for the float32 weights, whose gradients have another dtype."""
    low, full = (torch.ones(3, 4, dtype=dtype, requires_grad=True) for dtype in (torch.bfloat16, torch.float32))
    opt = distopt.AdamW([low, full], lr=1.0)
    low.grad, full.grad = torch.ones_like(low), torch.ones_like(full)
    opt.step()
    assert calls == ["adam", "adam"]
    assert torch.equal(opt.state[low]["master"], full.detach())


def test_non_contiguous_tensors_use_the_fallback(calls: list[str]) -> None:
    flat, other = (p.requires_grad_() for p in initial((6, 4), (4, 6), dtype=torch.float32))
    turned = other.detach().t().requires_grad_()
    opt = distopt.AdamW([flat, turned], lr=0.1)
    flat.grad, turned.grad = torch.ones(6, 4), torch.ones(6, 4)
    before = [flat.detach().clone(), turned.detach().clone()]
    opt.step()
    assert calls == ["adam"]
    moved = [p.detach() - old for p, old in zip((flat, turned), before)]
    assert all(((m > -0.11) & (m < -0.09)).all() for m in moved)


def test_a_subclass_with_other_directions_has_no_kernel(calls: list[str]) -> None:
    """Its own directions are used, although its parent has a kernel."""

    class Signs(distopt.AdamW):
        def directions(self, shards: Any) -> list[Tensor]:
            return [g.sign() for g in shards.grads]

    (p,) = initial((5, 5), dtype=torch.float32)
    expected = p - 0.5
    p.requires_grad_()
    p.grad = torch.ones(5, 5)
    Signs([p], lr=0.5).step()
    assert torch.equal(p.detach(), expected) and not calls


@pytest.mark.parametrize("how", ["off", "no compiler", "a compiler that fails"])
def test_without_a_compiler_the_fallback_runs(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    match how:
        case "off":
            monkeypatch.setenv("DISTOPT_KERNELS", "off")
        case "no compiler":
            monkeypatch.setenv("CC", "no-such-compiler")
        case _:
            monkeypatch.setenv("CC", "false")
    build.library.cache_clear()
    try:
        train(ROWS[0])
    finally:
        build.library.cache_clear()
    assert not calls
    assert not list(tmp_path.rglob("*.so"))


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    """As with a read-only home: each process compiles its own."""
    (tmp_path / "distopt").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    try:
        train(ROWS[0])
    finally:
        build.library.cache_clear()
    assert calls


def test_the_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    try:
        assert build.library() is not None
        (file,) = tmp_path.rglob("*.so")
        made = file.stat().st_mtime_ns
        build.library.cache_clear()
        assert build.library() is not None
        assert [f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.suffix == ".so"] == [made]
    finally:
        build.library.cache_clear()
    assert [f.name for f in (tmp_path / "distopt" / "kernels").iterdir()] == [file.name]  # nothing half made is left


@pytest.mark.parametrize("planted", ["folder", "library"])
def test_a_library_that_another_user_could_have_put_there_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    try:
        build.library()
        (file,) = tmp_path.rglob("*.so")
        (file if planted == "library" else file.parent).chmod(0o777)
        loaded = []
        monkeypatch.setattr(build.ctypes, "CDLL", lambda path: loaded.append(path))
        build.library.cache_clear()
        build.library()
        assert len(loaded) == 1 and not loaded[0].startswith(("/proc/self/fd", str(tmp_path)))
    finally:
        monkeypatch.undo()
        build.library.cache_clear()


BROKEN = """
import os, sys
from pathlib import Path
from distopt.kernels import build
os.environ["XDG_CACHE_HOME"] = sys.argv[1]
load, build.ctypes.CDLL = build.ctypes.CDLL, lambda path: None  # what is loaded once stays loaded in a process
build.library()
build.ctypes.CDLL = load
(file,) = Path(sys.argv[1]).rglob("*.so")
assert file.parent.stat().st_mode & 0o777 == 0o700
file.write_bytes(sys.argv[2].encode())
build.library.cache_clear()
assert build.library() is not None and file.stat().st_size > 1000
"""


@pytest.mark.parametrize("content", ["", "ELF broken"])
def test_a_broken_library_is_built_again(tmp_path: Path, content: str) -> None:
    """As a crash of the machine leaves it."""
    ended = jobs.python("-c", BROKEN, tmp_path, content)
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("compiler", [" ", "'cc"])
def test_a_compiler_that_is_no_command_is_the_fallback(monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    monkeypatch.setenv("CC", compiler)
    build.library.cache_clear()
    try:
        assert (build.library() is None) == (compiler == "'cc")
    finally:
        build.library.cache_clear()


def test_sums_of_single_elements_are_exact() -> None:
    """Rows of one element, as of a vector, whose shards may end anywhere: every product counts with all of its bits."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3000, generator=draw) * 2.0 ** torch.randint(-148, 63, (3000,), generator=draw) for _ in "ab")
    (digits,), done = products([a], [b], [1])
    expected = sum(Fraction(x) * Fraction(y) for x, y in zip(a.tolist(), b.tolist()))
    assert done == [0] and sum(int(d) * Fraction(2) ** (WIDTH * i + LOWEST) for i, d in enumerate(digits)) == expected
    for wrong in (torch.inf, -torch.inf, torch.nan):
        a[7], b[7] = wrong, 1.0
        (digits,), _ = products([a], [b], [1])
        total = digits.sum().item()
        assert math.isnan(total) if math.isnan(wrong) else total == wrong
