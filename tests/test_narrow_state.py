"""Moments in 16, 8 and 4 bits: the format, its kernels, other forms of it, and what is refused.

That they are the same bits on every layout is in `tests.test_bits`.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

import distopt
from distopt.kernels import blocks, narrow_cpu, rounding
from distopt.kernels.blocks import SIGNED, SQUARES, Form
from distopt.kernels.window import Window
from distopt.layout.bucket import Bucket, Plan
from distopt.layout.bucketed import bucket_layout
from tests.harness import oracles_narrow
from tests.harness.bits import full, way
from tests.harness.cells import some
from tests.harness.distributed import run
from tests.harness.sharded import mesh
from tests.harness.states import Net, make

FORMS = [Form(kind, bits, 64) for kind in (SIGNED, SQUARES) for bits in (8, 4)]
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.kind}-{form.bits}")
MATRICES = [(5, 64), (3, 2, 48), (4, 5), (7,)]  # the last two without blocks


def numbers(*shape: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    """Of both signs, over many orders of magnitude."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=source) * torch.exp(spread * torch.randn(shape, generator=source))


@every_form
def test_a_number_is_rounded_to_one_of_its_neighbours_and_right_in_the_mean(form: Form) -> None:
    """2^14 throws of 64 numbers: five standard deviations of a mean are 0.02 of the distance of its codes."""
    x = numbers(64, spread=0.5).abs() if form.kind == SQUARES else numbers(64, spread=0.5)
    places = torch.arange(64 * 2**14)
    codes, scale = blocks.encode(x.expand(2**14, 64), form, rounding.noise(rounding.key_of(1), places))
    found = blocks.decode(codes, scale, form).view(-1, 64)
    table = oracles_narrow.values(form.kind, form.bits) * float(x.abs().max())
    for column, value in zip(found.double().unbind(1), x.double().tolist()):
        upper = min(int(torch.searchsorted(table, abs(value), right=True)), len(table) - 1)
        low, high = float(table[max(upper - 1, 0)]), float(table[upper])
        assert (column.abs() - low).abs().minimum((column.abs() - high).abs()).max() < 1e-5 * float(table[-1])
        assert abs(float(column.mean()) - value) < 0.02 * (high - low) + 1e-6 or abs(value) < float(table[0])


@every_form
@pytest.mark.parametrize("row", [32, 96, 64, 384, 2048])
def test_kernels_have_the_bits_of_the_reference(form: Form, row: int) -> None:
    """Also where 32 bits of a place overflow, in blocks of zeros, of tiny and of huge numbers, and of inf and nan."""
    x = numbers(13, row)
    x[0], x[1] = 0.0, x[1] * 1e-42
    x[2] = x[2].sign() * torch.linspace(1e38, 3e38, row)
    x[3, 5], x[4, 7], x[5, 0] = torch.inf, torch.nan, -0.0
    x = x.abs() if form.kind == SQUARES else x
    form = form._replace(block=blocks.block_of(x.shape))
    key, window = rounding.key_of(3, 4, 1), Window.run(2**32 - 1000, x.numel())
    expected = blocks.encode(x, form, rounding.noise(key, window.places(x.numel(), x.device)))
    codes, scale = torch.empty_like(expected[0]), torch.empty_like(expected[1])
    assert narrow_cpu.save(x, codes, scale, form, row, key, window)
    assert torch.equal(codes, expected[0]) and torch.equal(scale.view(torch.int32), expected[1].view(torch.int32))
    read, values = narrow_cpu.load(codes, scale, form, row), blocks.decode(*expected, form)
    assert read is not None and torch.equal(read.nan_to_num(nan=7.0), values.nan_to_num(nan=7.0))
    values = values.view(x.shape)
    assert not values[0].any() and not values[1].any()
    assert not values[3, : form.block].isfinite().all() and not values[4, : form.block].isfinite().all()
    assert values[2].isfinite().all() and values[6:].isfinite().all()


def test_a_second_moment_is_never_lost() -> None:
    """Next to one that is 10^12 times as large: 0 in the denominator would be a step of m / eps."""
    squares = torch.ones(1, 32)
    squares[0, 1:] = 1e-12
    for form in FORMS[2:]:
        form = form._replace(block=32)
        assert (blocks.decode(*blocks.encode(squares, form), form) > 0.0).all()
    weight = nn.Parameter(torch.zeros(1, 32))
    optimizer = distopt.AdamW([weight], lr=1.0, weight_decay=0.0, state_bits=4)
    for _ in range(20):
        weight.grad = 1e-6 * squares.sqrt() * squares.sqrt().sign()
        before = weight.detach().clone()
        optimizer.step()
        assert (weight - before).abs().max() < 1.5


@pytest.mark.parametrize(("bits", "block"), [(8, 32), (4, 64)])
@pytest.mark.parametrize(
    ("dtype", "by"), [(torch.float64, "rules"), (torch.float32, "kernels"), (torch.float32, "rules")]
)
def test_every_step_is_that_of_the_oracle(bits: int, block: int, dtype: torch.dtype, by: str) -> None:
    """float32 rounds a number that is within 1e-7 of a throw the other way: none of these is."""
    shapes, steps = [(3, block), (2, 3, block)], 4
    params = [nn.Parameter(numbers(*shape, spread=0.5).to(dtype)) for shape in shapes]
    grads = [[numbers(*s, seed=9 + step, spread=1.0).to(dtype) for s in shapes] for step in range(steps)]
    options = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "lr": 0.01}
    expected = oracles_narrow.adamw(params, grads, bits, block, **options)
    optimizer = distopt.AdamW(params, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, state_bits=bits)
    with way(by):
        for step in range(steps):
            for p, grad in zip(params, grads[step]):
                p.grad = grad
            optimizer.step()
    for p, x in zip(params, expected):
        assert (p.detach() - x).norm() < 1e-6 * x.norm()


def test_what_is_stored() -> None:
    """16 + 1 and 8 + 1 bytes for 16 elements of two moments; rows that no block divides, and vectors, in float32."""
    for bits, size in ((32, 8.0), (16, 4.0), (8, 2 + 8 / 64), (4, 1 + 8 / 64)):
        params = [nn.Parameter(torch.zeros(s)) for s in ((5, 64), (4, 5), (64,), ())]
        optimizer = distopt.AdamW(params, lr=0.1, state_bits=bits)
        optimizer.init_state()
        found = [{k: t for k, t in optimizer.state[p].items() if k != "step"} for p in params]
        assert sum(t.nbytes for t in found[0].values()) == size * params[0].numel()
        assert all(
            t.dtype is torch.float32 and t.shape == p.shape for p, s in zip(params[1:], found[1:]) for t in s.values()
        )
        if bits < 16:
            shapes = {name: tuple(t.shape) for name, t in found[0].items()}
            assert shapes == {
                name + part: shape
                for name in ("exp_avg", "exp_avg_sq")
                for part, shape in (("_codes", (5, 8 * bits)), ("_scale", (5, 1)))
            }


def step(model: nn.Module, optimizer: distopt.ShardedOptimizer, first: int, last: int) -> None:
    for at in range(first, last):
        for i, p in enumerate(model.all):
            grad = numbers(*p.shape, seed=10 * at + i)
            placed = hasattr(p, "placements")
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None) if placed else grad
        optimizer.step()


def run_of(kind: str, bits: int, folder: Any, saves: bool) -> list[Tensor]:
    model, optimizer = make(kind, cls=partial(distopt.LAMB, state_bits=bits), shapes=MATRICES)
    if saves:
        step(model, optimizer, 0, 3)
        distopt.save_checkpoint(folder, model, optimizer)
    else:
        distopt.load_checkpoint(folder, model, optimizer)
    step(model, optimizer, 3, 6)
    distopt.prove(optimizer, model, state=True)
    marks = distopt.fingerprint(model, optimizer)
    numbers_of = [
        int(mark, 16) - 2**63 for of in (marks.params, *marks.state.values()) for mark in of.values() if len(mark) > 9
    ]
    assert len(numbers_of) > 2 * len(MATRICES)
    state = [full(t) for p in model.all for t in (p, *optimizer.state[p].values())]
    return [*state, torch.tensor(numbers_of)]


@pytest.mark.parametrize(
    ("kind", "world"),
    some(
        [("buckets", 3), ("plain", 1)], [(k, w) for k in ("buckets", "zero1", "fsdp2") for w in (1, 3)] + [("plain", 1)]
    ),
)
@pytest.mark.parametrize("bits", some([4], [16, 8, 4]))
def test_a_run_that_was_saved_at_2_continues_elsewhere(bits: int, kind: str, world: int, tmp_path: Any) -> None:
    (whole, _) = run(2, run_of, "fsdp2", bits, tmp_path / "saved", True)
    found = run(world, run_of, kind, bits, tmp_path / "saved", False)[0]
    assert all(map(torch.equal, found, whole))


def test_each_form_is_loaded_into_another(tmp_path: Any) -> None:
    """From a checkpoint and from a state dict, by name; what is read is within a code of what was saved."""
    saved: dict[int, Any] = {}
    for bits in (32, 16, 8, 4):
        model, optimizer = make("plain", cls=partial(distopt.AdamW, state_bits=bits), shapes=MATRICES)
        step(model, optimizer, 0, 3)
        distopt.save_checkpoint(tmp_path / str(bits), model, optimizer)
        saved[bits] = copy.deepcopy(optimizer.state_dict())
    tops = {8: (127, 256), 4: (7, 16)}
    for before, now in ((32, 8), (8, 32), (16, 4), (4, 16), (8, 4), (4, 8)):
        loaded = []
        for way_in in ("checkpoint", "state dict"):
            model, optimizer = make("plain", cls=partial(distopt.AdamW, state_bits=now), shapes=MATRICES)
            if way_in == "checkpoint":
                distopt.load_checkpoint(tmp_path / str(before), model, optimizer)
            else:
                optimizer.load_state_dict(saved[before])
            optimizer.init_state()
            assert all(group["state_bits"] == now for group in optimizer.param_groups)
            loaded.append(
                [{name: wide(s, name, p) for name in ("exp_avg", "exp_avg_sq")} for p, s in optimizer.state.items()]
            )
        model, optimizer = make("plain", cls=partial(distopt.AdamW, state_bits=before), shapes=MATRICES)
        optimizer.load_state_dict(saved[before])
        optimizer.init_state()
        for from_checkpoint, from_dict, (p, state) in zip(*loaded, optimizer.state.items()):
            for name, top in zip(("exp_avg", "exp_avg_sq"), tops.get(now, (256, 256))):
                assert torch.equal(from_checkpoint[name], from_dict[name])
                expected = wide(state, name, p)
                apart = (from_dict[name] - expected).abs() / expected.abs().amax()
                assert apart.max() <= 2.0 / top if blocks.block_of(p.shape) and now < 32 else not apart.any()


def loaded_elsewhere(kind: str, folder: Any) -> list[Tensor]:
    """The moments, in 4 bits, of runs that were saved in 8 bits and in float32."""
    found = []
    for name in ("8", "32"):
        model, optimizer = make(kind, cls=partial(distopt.AdamW, state_bits=4), shapes=MATRICES)
        distopt.load_checkpoint(folder / name, model, optimizer)
        optimizer.init_state()
        found += [full(t) for p in model.all for t in optimizer.state[p].values()]
    return found


def test_another_form_is_loaded_on_any_layout(tmp_path: Any) -> None:
    for bits in (8, 32):
        model, optimizer = make("plain", cls=partial(distopt.AdamW, state_bits=bits), shapes=MATRICES)
        step(model, optimizer, 0, 2)
        distopt.save_checkpoint(tmp_path / str(bits), model, optimizer)
    expected = loaded_elsewhere("plain", tmp_path)
    for kind in ("buckets", "fsdp2"):
        for found in run(2, loaded_elsewhere, kind, tmp_path):
            assert all(map(torch.equal, found, expected))


def in_buckets(offload: bool) -> list[Tensor]:
    model = Net(torch.float32, MATRICES)
    optimizer = distopt.AdamW(model.parameters(), lr=0.1, state_bits=8)
    ranks = mesh((dist.get_world_size(),), ("shard",))
    optimizer.bind(bucket_layout([*model.all], ranks, offload=offload))
    step(model, optimizer, 0, 3)
    return [full(t) for p in model.all for t in (p, *optimizer.state[p].values())]


def test_state_on_the_host_has_the_same_bits() -> None:
    for offloaded, expected in zip(run(2, in_buckets, True), run(2, in_buckets, False)):
        assert all(map(torch.equal, offloaded, expected))


def test_bits_may_change_in_mid_run() -> None:
    """From float32 to bfloat16 the names stay, so that a step that looked at names alone went on as before."""
    model, optimizer = make("plain", cls=distopt.AdamW, shapes=MATRICES)
    for at, bits in enumerate((32, 16, 8, 4, 32)):
        optimizer.param_groups[0]["state_bits"] = bits
        step(model, optimizer, at, at + 1)
        names = {name for name in optimizer.state[model.all[0]] if name.startswith("exp_avg_sq")}
        assert names == ({"exp_avg_sq_codes", "exp_avg_sq_scale"} if bits < 16 else {"exp_avg_sq"})
        dtypes = {32: torch.float32, 16: torch.bfloat16}
        assert bits < 16 or optimizer.state[model.all[0]]["exp_avg_sq"].dtype is dtypes[bits]
        assert optimizer.state[model.all[2]]["exp_avg_sq"].dtype is torch.float32


def wide(state: dict[str, Tensor], name: str, param: Tensor) -> Tensor:
    """The float32 values of a moment."""
    if name in state:
        return state[name].float()
    codes, scale = state[f"{name}_codes"], state[f"{name}_scale"]
    form = Form(
        SQUARES if name == "exp_avg_sq" else SIGNED, 8 * codes.numel() // param.numel(), blocks.block_of(param.shape)
    )
    return blocks.decode(codes, scale, form).view(param.shape)


def test_an_embedding_that_is_transposed_has_the_codes_of_its_copy() -> None:
    moved = nn.Parameter(numbers(32, 6).t())
    plain = nn.Parameter(moved.detach().contiguous())
    optimizers = [distopt.AdamW([p], lr=0.1, state_bits=8) for p in (moved, plain)]
    for at in range(3):
        for p, optimizer in zip((moved, plain), optimizers):
            p.grad = numbers(6, 32, seed=at)
            with way("rules"):
                optimizer.step()
    assert torch.equal(moved, plain)
    assert all(
        torch.equal(a, b) for a, b in zip(optimizers[0].state[moved].values(), optimizers[1].state[plain].values())
    )


def drifted() -> list[str]:
    """The moment of one rank is not that of the other: a bit of its codes, or of a scale."""
    said = []
    for part in ("codes", "scale"):
        model = nn.Linear(32, 4)
        with torch.no_grad():
            model.weight.fill_(1.0)
            model.bias.fill_(1.0)
        optimizer = distopt.AdamW(model.parameters(), lr=0.1, state_bits=8)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        distopt.prove(optimizer, model, state=True)
        distopt.fingerprint(model, optimizer)
        if dist.get_rank():
            optimizer.state[model.weight][f"exp_avg_{part}"][2, 0] += 1
        try:
            distopt.prove(optimizer, model, state=True)
        except ValueError as error:
            said.append(str(error))
    return said


def test_a_proof_looks_at_codes_and_scales() -> None:
    for said in run(2, drifted):
        assert ["exp_avg_codes" in said[0], "exp_avg_scale" in said[1]] == [True, True]


def in_columns(width: int) -> list[Tensor] | str:
    """Weights and state, of a parameter that is sharded along dimension 1, or why it is refused."""
    ranks = mesh((dist.get_world_size(),), ("shard",)) if dist.is_initialized() else None
    full_weight = numbers(5, 2 * width, 3)
    weight = full_weight if ranks is None else distribute_tensor(full_weight, ranks, [Shard(1)])
    param = nn.Parameter(weight)
    optimizer = distopt.AdamW([param], lr=0.1, state_bits=8)
    for at in range(3):
        grad = numbers(*full_weight.shape, seed=at)
        param.grad = grad if ranks is None else distribute_tensor(grad, ranks, [Shard(1)], src_data_rank=None)
        try:
            optimizer.step()
        except ValueError as error:
            return str(error)
    distopt.prove(optimizer, state=True) if ranks is not None else None
    return [full(t) for t in (param, *optimizer.state[param].values())]


def test_columns_of_whole_blocks_have_the_same_bits_and_others_are_refused() -> None:
    """FSDP2 shards stacked experts so, where they are fewer than the ranks."""
    for found in run(2, in_columns, 128):
        assert all(map(torch.equal, found, in_columns(128)))
    for said in run(2, in_columns, 16):
        assert "state_bits=8: a parameter of shape (5, 32, 3)" in said and "within blocks of 32 elements" in said


def test_a_bucket_knows_whether_a_range_of_any_rank_ends_within_a_block() -> None:
    for share, expected in ((96, False), (80, True)):
        weights = [nn.Parameter(torch.zeros(2, 96))]
        found = [Bucket(Plan([0], [0], share), weights, 3, rank).cuts(weights[0], 32) for rank in range(3)]
        assert found == [expected] * 3


@pytest.mark.parametrize(
    ("optimizer", "options", "said"),
    [
        (distopt.AdamW, {"state_bits": 12}, "one of 32, 16, 8, 4"),
        (distopt.AdamW, {"state_bits": "8"}, "one of 32, 16, 8, 4"),
        (distopt.AdamW, {"state_bits": 8, "cautious": True}, "cautious=True"),
        (distopt.AdamW, {"state_bits": 8, "capturable": True}, "capturable=True"),
        (distopt.SGD, {"state_bits": 8}, "SGD with these options keeps no moments"),
        (partial(distopt.RMSprop, centered=True), {"state_bits": 8}, "RMSprop with these options keeps no moments"),
        (distopt.Adafactor, {"state_bits": 8}, "Adafactor"),
        (distopt.Prodigy, {"state_bits": 8}, "Prodigy"),
    ],
)
def test_what_cannot_be_is_refused(optimizer: Any, options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        optimizer([nn.Parameter(torch.zeros(2, 64))], lr=0.1, **options)


def test_codes_of_another_shape_are_refused() -> None:
    params = [nn.Parameter(torch.zeros(2, 64))]
    optimizer = distopt.AdamW(params, lr=0.1, state_bits=8)
    optimizer.init_state()
    state = optimizer.state_dict()
    state["state"][0]["exp_avg_codes"] = torch.zeros(2, 48, dtype=torch.uint8)
    with pytest.raises(ValueError, match="exp_avg_codes of parameter 0 of param group 0 has shape \\(2, 48\\)"):
        optimizer.load_state_dict(state)
    del state["state"][0]["exp_avg_codes"]
    with pytest.raises(ValueError, match="lacks exp_avg"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("kind", [distopt.MomentumSAM, distopt.PreconditionedSAM])
def test_a_sam_that_reads_moments_does_not_take_codes(kind: Any) -> None:
    params = [nn.Parameter(torch.zeros(2, 64))]
    with pytest.raises(ValueError, match="state_bits=8: this SAM reads the moments"):
        kind(distopt.AdamW(params, lr=0.1, state_bits=8))
    kind(distopt.AdamW(params, lr=0.1, state_bits=16))
