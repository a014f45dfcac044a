"""The rules in Triton are the rules: by Triton's interpreter on the CPU, in a process of its own, and as compiled."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import distopt
from distopt.kernels import dispatch, exact, triton
from distopt.kernels.shards import Shards
from tests.harness.cells import some
from tests.harness.jobs import ROOT
from tests.harness.optimizers import COMPILED, Row, compiled_rules, distance, every_compiled_row, initial, named, pull

# Two pieces and a rest, one piece to the element, shorter ones, one element, none.
SHAPES = ((97, 89), (4096,), (3, 5), (1,), (0, 4))
STEPS = 2
# float32: other orders of the same few operations and of sums; bias corrections are rounded before and not after.
TOLERANCE = 2e-6


def train(row: Row, params: list[Tensor], steps: int = STEPS, **options: Any) -> list[Tensor]:
    params = [p.requires_grad_() for p in params]
    opt = row.make(row.groups(params), **options)
    for step in range(steps):
        opt.zero_grad()
        pull(params, step).backward()
        opt.step()
    return outcome(opt, params)


def outcome(opt: torch.optim.Optimizer, params: list[Tensor]) -> list[Tensor]:
    return [p.detach() for p in params] + [opt.state[p][name] for p in params for name in opt.state[p]]


# What the interpreter does: each case is done twice, by the kernels and by the rules.


def plain(row: Row, **options: Any) -> list[Tensor]:
    return train(row, initial(*SHAPES, dtype=torch.float32), **options)


def clipped(row: Row) -> list[Tensor]:
    """By a factor in the step."""
    params = [p.requires_grad_() for p in initial(*SHAPES, dtype=torch.float32)]
    opt = row.make(row.groups(params))
    for step in range(STEPS):
        opt.zero_grad()
        pull(params, step).backward()
        opt.step(clip=distopt.Clip(opt, 1.0))
    return outcome(opt, params)


def short_gradients(row: Row) -> list[Tensor]:
    """Gradients of 16 bits for weights of 32, as masters have them."""
    params = [p.requires_grad_() for p in initial(*SHAPES, dtype=torch.float32)]
    opt = row.make(row.groups(params))
    for step in range(STEPS):
        for i, p in enumerate(params):
            p.grad_dtype = torch.bfloat16  # type: ignore[attr-defined]
            p.grad = (p.detach() - 2.0 - torch.sin(torch.arange(p.numel()).view(p.shape) + i + 3.0 * step)).bfloat16()
        opt.step()
    return outcome(opt, params)


def capturable(row: Row) -> list[Tensor]:
    """Steps counted on the weights' device, and lr a tensor there, which a schedule changes."""
    params = [p.requires_grad_() for p in initial(*SHAPES, dtype=torch.float32)]
    on = bool(triton.DEVICES)
    groups = row.groups(params)
    for group in groups:
        lr = group.get("lr", row.kwargs["lr"])
        group["lr"] = torch.tensor(lr) if on else lr
    opt = row.make(groups, capturable=on)
    schedule = distopt.warmup_constant(opt, warmup_steps=2)
    for step in range(STEPS):
        opt.zero_grad()
        pull(params, step).backward()
        opt.step()
        schedule.step()
    return outcome(opt, params)


def unaligned(row: Row) -> list[Tensor]:
    """Views that begin anywhere, as shards do, and one that does not."""
    flat = initial((9000,), dtype=torch.float32)[0]
    return train(row, [flat[1:4400].view(53, 83), flat[4401:8800], *initial((8, 8), dtype=torch.float32)])


def different_counts(row: Row) -> list[Tensor]:
    params = [p.requires_grad_() for p in initial((9, 5), (5000,), (7, 3), dtype=torch.float32)]
    opt = row.make(row.groups(params))
    for step in range(4):
        opt.zero_grad()
        pull(params, step).backward()
        for p in params[step % 3 :]:
            p.grad = None
        opt.step()
    return outcome(opt, params)


def others_beside(row: Row) -> list[Tensor]:
    """Tensors that are not contiguous, or of another dtype, use the fallback in the same step."""
    turned = initial((6, 4), dtype=torch.float32)[0].t()
    return train(row, [*initial((5, 7), (11,), dtype=torch.float32), turned, *initial((4, 4), (3,))])


CASES: dict[str, Callable[[], list[Tensor]]] = {
    **{f"{row.name}-{case.__name__}": lambda row=row, case=case: case(row) for row in COMPILED for case in (plain,)},
    **{
        f"{name}-{case.__name__}": lambda name=name, case=case: case(named(name))
        for case in (clipped, short_gradients, capturable, unaligned, different_counts, others_beside)
        for name in ("sgd", "nesterov", "adagrad", "rmsprop_centered_momentum", "adamw", "lamb", "lars")
    },
    **{
        f"{name}-{options}": lambda name=name, options=options: plain(named(name), **options)
        for name in ("adamw", "momentum", "nesterov", "adagrad", "rmsprop", "rmsprop_centered_momentum")
        for options in ({"maximize": True}, {"trust_ratio": True})
    },
    "rmsprop-{'momentum': 0.5}": lambda: plain(named("rmsprop"), momentum=0.5),
    "rmsprop-{'centered': True}": lambda: plain(named("rmsprop"), centered=True),
}


def interpreted() -> None:
    """Prints, for each case among the arguments, the distance of the kernels' results from the rules', and who ran."""
    torch.set_num_threads(1)
    seen: set[str] = set()
    watch(seen, "kernel", triton.TritonUpdate, "_launch")
    watch(seen, "rule", dispatch.ForeachUpdate, "step")
    watch(seen, "rule", dispatch.ForeachUpdate, "squared_norms")
    dispatch.fits = lambda shards: []  # type: ignore
    found = {}
    for name in sys.argv[1:]:
        results, chosen = [], []
        for devices in (("cpu",), ()):
            triton.DEVICES = devices  # type: ignore
            seen.clear()
            results.append(CASES[name]())
            chosen.append(sorted(seen))
        found[name] = [distance(*results), *chosen]
    triton.DEVICES = ("cpu",)  # type: ignore
    found["same bits"] = [same_bits(row, cut) for row in (16, 48, 768) for cut in (1, 7, 30)]
    print(json.dumps(found))


def same_bits(row: int, cut: int) -> bool:
    """Returns whether the sums of a layer of 31 rows are those of two shards of it, added."""
    numbers = torch.Generator().manual_seed(0)
    whole = [torch.randn(31, row, generator=numbers) * torch.randn(31, row, generator=numbers).exp() for _ in range(2)]
    optimizer = distopt.SGD([torch.zeros(1)])
    (group,) = optimizer.param_groups

    def squares(*shards: slice) -> list[Tensor]:
        params, grads = ([tensor[shard].clone() for shard in shards] for tensor in whole)
        found = Shards(group, optimizer.rule(group), [0] * len(shards), params, grads, {}, [1.0] * len(shards))
        (update,), _ = triton.triton_updates(found)
        return [exact.value(sums.sum(0)) for sums in update.squared_norms()]

    together, apart = squares(slice(None)), squares(slice(cut), slice(cut, None))
    near = torch.stack([t.double().square().sum() for t in whole])
    return all(map(torch.equal, together, apart)) and bool(((torch.stack(together) - near).abs() < 1e-6 * near).all())


def watch(seen: set[str], name: str, cls: type, method: str) -> None:
    """Adds the name when the method is called, unless on nothing."""
    original = getattr(cls, method)

    def watched(self: Any, *args: Any) -> Any:
        seen.update([name] if name == "kernel" or self._shards.params else [])
        return original(self, *args)

    setattr(cls, method, watched)


# A kernel of each rule, and each way of calling one with two rules: its cells of `make test`.
QUICK = [
    *(f"{row.name}-plain" for row in COMPILED),
    *(
        f"{name}-{case}"
        for name in ("rmsprop_centered_momentum", "lamb")
        for case in ("capturable", "different_counts")
    ),
    *(f"{name}-{case}" for name in ("nesterov", "adamw") for case in ("short_gradients", "unaligned", "others_beside")),
    *(f"{name}-{{'maximize': True}}" for name in ("momentum", "adagrad")),
    *(f"{name}-{{'trust_ratio': True}}" for name in ("adamw", "rmsprop")),
    "rmsprop-{'momentum': 0.5}",
    "rmsprop-{'centered': True}",
]


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    selected = {item.callspec.params.get("case") for item in here}
    command = [sys.executable, "-c", "from tests.test_triton import interpreted; interpreted()", *(selected & {*CASES})]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", some(QUICK, CASES))
def test_a_kernel_computes_its_rule(case: str, found: dict[str, Any]) -> None:
    error, with_kernels, without = found[case]
    assert error < TOLERANCE
    assert with_kernels == (["kernel", "rule"] if case.endswith("others_beside") else ["kernel"])
    assert without == ["rule"]


def test_sums_are_the_same_bits_however_a_layer_is_sharded(found: dict[str, Any]) -> None:
    assert all(found["same bits"])


# What a GPU would run, compiled for it without one.

BYTES = {  # that a step has to read and write for each float32 parameter: by kernel, with the state buffers it has
    ("sgd", 0): (12,),
    ("momentum", 1): (20,),
    ("nesterov", 1): (20,),
    ("adagrad", 1): (20,),
    ("rmsprop", 1): (20,),
    ("rmsprop_centered", 2): (28,),
    ("rmsprop_momentum", 2): (28,),
    ("rmsprop_centered_momentum", 3): (36,),
    ("adam", 2): (28, 24, 16),  # step; measure and apply, as for LAMB
}


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Compiles a kernel for a GPU, given the types of its arguments and its constants."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def compiled(kernel: Any, signature: dict[str, Any], constants: dict[str, Any]) -> str:
        source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
        options = {"num_warps": 8, "enable_fp_fusion": True}
        return triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]

    return compiled


@pytest.mark.parametrize(
    ("name", "buffers"), some([("nesterov", 1), ("rmsprop_centered_momentum", 3), ("adam", 2)], BYTES)
)
def test_compiled_for_a_gpu_no_byte_is_moved_twice(name: str, buffers: int, compiled: Callable[..., str]) -> None:
    """Counted in the machine code of a whole piece: its loads and stores are those of 16 bytes."""
    from distopt.kernels import triton_kernels as rules

    scalars = len(compiled_rules()[name].scalars)
    for mode, expected in zip((rules.STEP, rules.MEASURE, rules.APPLY), BYTES[name, buffers]):
        constants = {"RULE": rules.RULES[name], "MODE": mode, "BUFFERS": buffers, "GRAD": rules.tl.float32}
        constants |= {"ALIGNMENT": triton._ALIGNMENT, "SIZE": rules.PIECE, "GROUP": 256}
        squares = "*fp64" if mode == rules.MEASURE else "*fp32"
        signature = {"table": "*i64", "scales": "*fp32", "squares": squares, "tensors": "i32", "h": ("fp32",) * scalars}
        code = compiled(rules.walk, signature, constants)
        wide = len(re.findall(r"(?:ld|st)\.global\.v4\.b32", code))
        assert wide * 16 * 32 * rules.WARPS / rules.PIECE == expected


@pytest.mark.parametrize("group", some([max(triton._GROUPS)], triton._GROUPS))
def test_sums_compile_for_a_gpu(group: int, compiled: Callable[..., str]) -> None:
    """In registers: spilled values would go through memory."""
    from distopt.kernels import triton_kernels as rules

    constants = {"RULE": rules.RULES["adam"], "MODE": rules.MEASURE, "BUFFERS": 2, "GRAD": rules.tl.float32}
    constants |= {"ALIGNMENT": triton._ALIGNMENT, "SIZE": rules.PIECE, "GROUP": group}
    signature = {"table": "*i64", "scales": "*fp32", "squares": "*fp64", "tensors": "i32", "h": ("fp32",) * 7}
    assert ".local" not in compiled(rules.walk, signature, constants)
    signature = {"table": "*i64", "squares": "*fp64", "totals": "*fp64"}
    assert ".local" not in compiled(rules.add_up, signature, {"SIZE": rules.PIECE, "BLOCK": min(512, 4 * group)})


# No step waits for its device. The meta device stands for a GPU: whoever reads its numbers gets an error.


class NoWaiting(TorchDispatchMode):
    """Refuses what would wait for a device to have come so far: copies from the host that do not say `non_blocking`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
            target = torch.device(kwargs.get("device") or "cpu")
            assert target.type == "cpu" or kwargs.get("non_blocking"), f"a copy from the host to {target} waits"
        if func is torch.ops.aten.copy_.default and args[0].device.type != "cpu" and args[1].device.type == "cpu":
            assert args[1].ndim == 0 or (len(args) > 2 and args[2]), "a copy from the host waits"
        return func(*args, **kwargs)


@every_compiled_row
@pytest.mark.parametrize("by", ["kernels", "rules", "capturable"])
def test_no_step_waits_for_the_device(row: Row, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "DEVICES", () if by == "rules" else ("meta",))
    monkeypatch.setattr(triton.TritonUpdate, "_launch", lambda *_: None)
    monkeypatch.setattr(triton.TritonUpdate, "_add_up", lambda *_: None)
    params = [p.to("meta").requires_grad_() for p in initial((97, 89), (5, 3), (7,), dtype=torch.float32)]
    idle = torch.ones(3, device="meta", requires_grad=True)
    opt = row.make([*row.groups(params), {"params": [idle]}], capturable=by == "capturable")
    for p in params:
        p.grad = torch.empty_like(p)
    if by == "capturable" and not row.compiled:
        with pytest.raises(ValueError, match="capturable=True needs Triton's kernels"):
            opt.step()
        return
    opt.step()  # makes the state, and what is kept on the device
    distopt.clip_grad_norm_(opt, 1.0)
    with NoWaiting():
        distopt.clip_grad_norm_(opt, 1.0)
        opt.step()
        opt.step(clip=distopt.Clip(opt, 1.0), consumes_grads=True)
        opt.zero_grad()
    with pytest.raises(RuntimeError), NoWaiting():
        params[0].sum().item()
    with pytest.raises(AssertionError), NoWaiting():
        torch.ones(3).to("meta")


# What capturable=True is, and where it is refused.


def test_capturable_is_refused_where_nothing_reads_the_count_on_the_device() -> None:
    (p,) = initial((3, 2), dtype=torch.float32)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"capturable=True needs Triton's kernels.*float32 on cpu.*capturable=False"):
        distopt.AdamW([p], capturable=True).step()


def test_a_tensor_on_a_device_is_a_learning_rate_only_where_it_may_be_captured() -> None:
    """A step would read it back, and wait for the device."""
    params = initial((3, 2), dtype=torch.float32)
    lr = torch.tensor(0.5)
    assert distopt.LAMB(params, lr=lr, capturable=True).param_groups[0]["lr"] is lr
    for bad, capturable, message in (
        (torch.tensor(0.5, device="meta"), False, r"lr is a tensor on meta, .*: give capturable=True, or a number"),
        (torch.tensor(-1.0), True, r"lr must be a number >= 0, got -1.0"),
        (
            torch.ones(2),
            True,
            r"lr must be .* a floating-point tensor of one, got torch.float32 of shape \[2\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            distopt.AdamW(params, lr=bad, capturable=capturable)


def test_a_state_dict_does_not_say_how_steps_are_counted() -> None:
    """One of a captured run resumes where nothing can be captured, with the learning rate that it had."""
    p, q = (t.to(to).requires_grad_() for t, to in zip(initial((3, 2), (3, 2), dtype=torch.float32), ("meta", "cpu")))
    captured, other = distopt.AdamW([p], lr=torch.tensor(0.25), capturable=True), distopt.AdamW([q])
    captured.init_state()
    assert captured.state[p]["step"].device.type == "meta"
    saved = captured.state_dict()
    for values in saved["state"].values():
        values.update({name: torch.ones(t.shape) for name, t in values.items()})
    other.load_state_dict(saved)
    assert (other.param_groups[0]["lr"], other.param_groups[0]["capturable"]) == (0.25, False)
    assert other.state[q]["step"].device.type == "cpu"
    q.grad = torch.ones_like(q)
    other.step()
    captured.load_state_dict(other.state_dict())
    assert captured.param_groups[0]["capturable"] is True
    assert captured.state[p]["step"].device.type == "meta"


def test_without_triton_the_fallback_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "DEVICES", ("meta",))
    for how in ("off", "missing"):
        with monkeypatch.context() as patched:
            if how == "off":
                patched.setenv("DISTOPT_KERNELS", "off")
            else:
                patched.setattr("importlib.util.find_spec", lambda name: None)
            triton.kernels.cache_clear()
            p = torch.ones(3, device="meta", requires_grad=True)
            p.grad = torch.ones_like(p)
            try:
                distopt.AdamW([p]).step()  # a launch would fail: Triton has no driver for this device
                assert triton.kernels() is None
            finally:
                triton.kernels.cache_clear()
