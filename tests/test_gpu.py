"""On a GPU: the kernels are the rules, no step waits for the device, a CUDA graph may hold one, memory sets the pace.

`python -m pytest -m gpu`; without a GPU these are not selected.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import distopt
from benchmarks.step import SHAPES as MODELS
from distopt.kernels import triton
from tests.harness.optimizers import Row, distance, every_compiled_row, initial, named

pytestmark = pytest.mark.gpu

# Pieces of the kernels and a rest, one piece to the element, shorter ones, one element, none.
SHAPES = ((911, 997), (4096,), (3, 5), (1,), (0, 4))
# float32: other orders of the same few operations and of sums; bias corrections are rounded before and not after.
TOLERANCE = 2e-6


def weights(dtype: torch.dtype = torch.float32, device: str = "cuda") -> list[Tensor]:
    return [p.to(device).requires_grad_() for p in initial(*SHAPES, dtype=dtype)]


def gradient(p: Tensor, i: int, step: int) -> Tensor:
    """Far from zero, and another at each step."""
    index = torch.arange(p.numel(), dtype=torch.float64, device=p.device).view(p.shape)
    return p.detach() - (2.0 + torch.sin(index + i + 3.0 * step)).to(p.dtype)


def walk(opt: torch.optim.Optimizer, params: list[Tensor], steps: range) -> None:
    for step in steps:
        for i, p in enumerate(params):
            p.grad = gradient(p, i, step)
        opt.step()


def outcome(opt: torch.optim.Optimizer, params: list[Tensor]) -> list[Tensor]:
    return [t.detach().cpu() for p in params for t in (p, *opt.state[p].values())]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The modes of the kernels that were launched."""
    seen: list[int] = []
    launch = triton.TritonUpdate._launch

    def watched(self: Any, mode: int, *args: Any) -> None:
        seen.append(mode)
        launch(self, mode, *args)

    monkeypatch.setattr(triton.TritonUpdate, "_launch", watched)
    return seen


@every_compiled_row
@pytest.mark.parametrize("by", ["kernels", "rules"])
def test_a_step_is_that_of_the_cpu_in_float64(
    row: Row, by: str, launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "rules":
        monkeypatch.setattr(triton, "DEVICES", ())
    ours, exact = weights(), weights(torch.float64, "cpu")
    opt, reference = row.make(row.groups(ours)), row.make(row.groups(exact))
    walk(opt, ours, range(5))
    walk(reference, exact, range(5))
    assert distance(outcome(opt, ours), outcome(reference, exact)) < TOLERANCE
    assert bool(launches) == (by == "kernels" and row.compiled)


@every_compiled_row
def test_gradients_of_16_bits(row: Row, launches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels read them as they are; the rules get them in float32."""
    results = []
    for devices in (("cuda",), ()):
        monkeypatch.setattr(triton, "DEVICES", devices)
        params = weights()
        opt = row.make(row.groups(params))
        for step in range(3):
            for i, p in enumerate(params):
                p.grad_dtype = torch.bfloat16
                p.grad = gradient(weights()[i], i, step).bfloat16()
            opt.step()
        results.append(outcome(opt, params))
    assert distance(*results) < TOLERANCE
    assert launches


@pytest.fixture
def strict() -> Iterator[Callable[[], None]]:
    """Call it, and whatever waits for the device from then on is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@every_compiled_row
@pytest.mark.parametrize("by", ["kernels", "rules"])
def test_no_step_waits_for_the_device(
    row: Row, by: str, strict: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "rules":
        monkeypatch.setattr(triton, "DEVICES", ())
    params = weights()
    opt = row.make(row.groups(params))
    sam = distopt.SAM(opt)
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = gradient(p, i, step)  # at another address each time, as after zero_grad()
        if step == 2:
            strict()
        sam.perturb()  # the first measures how rounding turns it, and reads that
        sam.restore()
        distopt.clip_grad_norm_(opt, 1.0)
        sam.step()
    with pytest.raises(RuntimeError, match="synchroniz"):
        params[0].sum().item()


@every_compiled_row
@pytest.mark.parametrize("inside", [False, True], ids=["step", "backward_and_step"])
def test_a_captured_step_is_a_step(row: Row, inside: bool) -> None:
    """Replayed, it counts, and follows lr: as the same optimizer without a graph."""
    ours, eager = weights(), weights()
    groups = row.groups(ours)
    for group in groups:
        group["lr"] = torch.tensor(group.get("lr", row.kwargs["lr"]), device="cuda")
    opt, reference = row.make(groups, capturable=True), row.make(row.groups(eager))
    targets = [torch.zeros_like(p) for p in ours]

    def backward(params: list[Tensor]) -> None:
        for p in params:
            p.grad = None
        sum(0.5 * (p - t).square().sum() for p, t in zip(params, targets)).backward()

    def aim(step: int) -> None:
        for i, (p, t) in enumerate(zip(ours, targets)):
            t.copy_(p.detach() - gradient(p, i, step))

    aim(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles the kernels, makes the state
            backward(ours)
            opt.step()
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(2):
        backward(eager)
        reference.step()
    graph = torch.cuda.CUDAGraph()
    if not inside:
        backward(ours)
        static = [p.grad for p in ours]
    with torch.cuda.graph(graph):
        if inside:
            backward(ours)
        opt.step()
    for step in range(1, 4):
        aim(step)
        for group, other in zip(opt.param_groups, reference.param_groups):
            group["lr"].mul_(0.5)
            other["lr"] *= 0.5
        if not inside:
            torch._foreach_copy_(static, [p.detach() - t for p, t in zip(ours, targets)])
        backward(eager)
        graph.replay()
        reference.step()
    assert distance(outcome(opt, ours), outcome(reference, eager)) < TOLERANCE
    assert all(opt.state[p]["step"].item() == 5.0 for p in ours)


def test_what_counts_on_the_host_is_not_captured() -> None:
    params = weights()
    opt = named("adamw").make(params)
    walk(opt, params, range(2))
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.ones(1, device="cuda")  # torch warns of graphs that hold nothing
        with pytest.raises(RuntimeError, match="capturable=True"):
            opt.step()


# The least share of the time that its bytes take at the bandwidth of a copy.
PACE = {"adamw": (28, 0.85), "lamb": (40, 0.80)}


@pytest.mark.parametrize("name", PACE)
def test_memory_sets_the_pace(name: str) -> None:
    """On GPT-2's shapes; `python -m benchmarks step` is the whole comparison. `pytest -s` shows the numbers."""
    params = [torch.randn(shape, device="cuda").mul_(0.02).requires_grad_() for shape in MODELS["gpt2_124m"]]
    for p in params:
        p.grad = torch.randn_like(p)
    source = torch.cat([p.detach().view(-1) for p in params])
    target = torch.empty_like(source)
    opt = named(name).make(params)
    moved, least = PACE[name]
    bandwidth = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    share = moved * source.numel() / bandwidth / seconds(opt.step)
    print(f"\n{torch.cuda.get_device_name()}: {name} {share:.3f} of a copy's {bandwidth / 1e9:,.0f} GB/s")
    assert share >= least


def seconds(run: Callable[[], Any], rounds: int = 30) -> float:
    """The median of some runs, after some more; the host is ahead of the device, as in training."""
    times, ahead = [], torch.randn(8192, 8192, device="cuda")
    for _ in range(rounds + 5):
        ahead @ ahead
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1e-3 * start.elapsed_time(end))
    return statistics.median(times[5:])
