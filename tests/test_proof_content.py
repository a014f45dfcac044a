"""The hash of a layer's content is the same for any sharding, and another one for any change; so is the checksum."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import distopt
from benchmarks import memory
from distopt.layout.places import Box, Place, Run, full_place
from distopt.proof.content import balanced, content, cover, signed
from tests.harness.distributed import run
from tests.harness.proof_cases import fingerprints

# Vectors and matrices beyond the first block of weights, a scalar, and more dimensions.
SHAPES = [(7, 5), (300, 1000), (3, 70000), (70000, 3), (131,), (200000,), (), (5, 6, 7), (3, 4, 5, 6)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool]


def cuts(shape: tuple[int, ...]) -> dict[str, list[tuple[Place, Callable[[Tensor], Tensor]]]]:
    """Ways to cut a layer up: each a list of places, and what takes the part out of the full layer."""
    numel = math.prod(shape)
    ends = sorted({0, numel, *torch.randint(0, numel + 1, (3,)).tolist()})
    runs = [(Run(a, b - a), lambda t, a=a, b=b: t.reshape(-1)[a:b]) for a, b in itertools.pairwise(ends)]
    ways = {"runs": runs}
    for dim, length in enumerate(shape):
        half, full = length // 2, [range(n) for n in shape]
        for name, indices in {
            "box": (range(half), range(half, length)),
            "strided": (torch.arange(0, length, 2), torch.arange(1, length, 2)),
        }.items():
            ways[f"{name} {dim}"] = [
                (
                    Box((*full[:dim], index, *full[dim + 1 :])),
                    lambda t, d=dim, index=index: t.index_select(d, indices_of(index)),
                )
                for index in indices
            ]
    return ways


def indices_of(index: range | Tensor) -> Tensor:
    return torch.arange(index.start, index.stop) if isinstance(index, range) else index


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_add_up_to_the_full_layer(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    covered = cover(shape, full_place(shape))
    assert covered == int(content(torch.ones(shape, dtype=torch.int8), shape, full_place(shape)))
    for dtype in DTYPES if math.prod(shape) < 10**5 else [torch.bfloat16]:
        layer = torch.randn(shape).to(dtype)
        expected = int(content(layer, shape, full_place(shape)))
        for way, places in cuts(shape).items():
            total = sum(int(content(take(layer), shape, place)) for place, take in places)
            assert signed(total) == expected, (way, dtype)
            assert signed(sum(cover(shape, place) for place, _ in places)) == covered, way


def test_a_part_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="has 5 elements where its layout says 6"):
        content(torch.ones(5), (6,), Run(0, 6))


def changes() -> dict[str, Callable[[Tensor], None]]:
    g = torch.Generator().manual_seed(0)

    def two(n: int) -> list[int]:
        return torch.randperm(n, generator=g)[:2].tolist()

    def bits(t: Tensor) -> Tensor:
        return t.view(torch.int32 if t.dtype == torch.float32 else torch.int64)

    def flip(t: Tensor) -> None:
        width = 8 * t.element_size()
        bit = int(torch.randint(0, width, (1,), generator=g))
        bits(t)[two(96)[0], two(80)[0]] ^= 1 << bit if bit < width - 1 else -(1 << bit)

    def signs_in_a_row(t: Tensor) -> None:
        t[two(96)[0], two(80)] *= -1

    def signs(t: Tensor) -> None:
        t[two(96), two(80)] *= -1

    def rectangle(t: Tensor) -> None:
        (a, b), (c, d) = two(96), two(80)
        bits(t)[[a, b, a, b], [c, d, d, c]] += torch.tensor([8, 8, -8, -8], dtype=bits(t).dtype)

    def rows(t: Tensor) -> None:
        a, b = two(96)
        t[[a, b]] = t[[b, a]].clone()

    def columns(t: Tensor) -> None:
        a, b = two(80)
        t[:, [a, b]] = t[:, [b, a]].clone()

    def elements(t: Tensor) -> None:
        (a, b), (c, d) = two(96), two(80)
        t[[a, b], [c, d]] = t[[b, a], [d, c]].clone()

    return {f.__name__: f for f in (flip, signs_in_a_row, signs, rectangle, rows, columns, elements)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_change_is_seen(dtype: torch.dtype) -> None:
    """In float64 two signs in a row would cancel if the highest bit weighed alike everywhere."""
    torch.manual_seed(0)
    layer = torch.randn(96, 80, dtype=dtype)
    before = int(content(layer, layer.shape, full_place(layer.shape)))
    for name, change in changes().items():
        for _ in range(100):
            other = layer.clone()
            change(other)
            assert int(content(other, layer.shape, full_place(layer.shape))) != before, name


def test_what_is_balanced_adds_up_to_nothing() -> None:
    for count in (1, 2, 3, 64):
        assert signed(sum(balanced(i, count) for i in range(count))) == 0
    # A rank that has the mean of all does not hide the others: 1, 2, 3.
    assert signed(sum((i + 1) * balanced(i, 3) for i in range(3))) != 0


def test_hashing_takes_little_memory() -> None:
    """No copy of a layer as int64, which would be twice its size: tiles."""
    layer = torch.ones(4096, 4096)  # much larger than the tiles, and than what else moves in the process
    place = full_place(layer.shape)
    peaks = []
    for _ in range(5):  # to watch takes memory itself, the first time, and so may the rest of the process at any time
        with memory.watched(torch.device("cpu")) as peak:
            content(layer, layer.shape, place)
        peaks.append(peak[0])
    assert min(peaks) < layer.nbytes / 8


@pytest.mark.parametrize(("dtype", "world"), [("fp32", 2), ("fp32", 4), ("bf16", 2)])
def test_the_fingerprint_is_the_same_on_every_engine(dtype: str, world: int) -> None:
    """Of weights and state: that of the plain model on one process."""
    answers = run(world, fingerprints, dtype)
    expected = answers[0]["plain"]
    assert len(expected.params) == 7 and len(set(expected.params.values())) == 7
    masters = {"master"} if dtype == "bf16" else set()
    assert expected.state["0.weight"].keys() == {"step", "exp_avg", "exp_avg_sq"} | masters
    for found in answers:
        for kind, fingerprint in found.items():
            assert fingerprint.params == expected.params, kind
            if "deepspeed" in kind:  # whose partitions are the masters
                assert _without_masters(fingerprint) == _without_masters(expected), kind
            else:
                assert fingerprint.state == expected.state, kind
    assert len({found["plain"].total for found in answers}) == 1


def _without_masters(fingerprint: distopt.Fingerprint) -> dict[str, dict[str, str]]:
    return {p: {k: v for k, v in b.items() if k != "master"} for p, b in fingerprint.state.items()}


def test_a_fingerprint_tells_what_differs() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    before = distopt.fingerprint(model, optimizer)
    assert before.state == {}
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    after = distopt.fingerprint(model, optimizer)
    assert before != after and before.total != after.total
    compiled = torch.nn.Module()
    compiled._orig_mod = model  # as torch.compile names it
    assert after == distopt.fingerprint(compiled, optimizer)
    assert after.state["bias"]["step"] == "1.0"
    with torch.no_grad():
        model.bias[1] = -model.bias[1]
    flipped = distopt.fingerprint(model, optimizer)
    assert {n for n in after.params if after.params[n] != flipped.params[n]} == {"bias"}
