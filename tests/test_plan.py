"""A plan equals the run: bytes measured on real ranks, and counted on process groups that send nothing."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

import distopt
from distopt.engine import DDP, FSDP2, Engine
from distopt.engine.train_step import update
from distopt.job.config import CONF
from distopt.models.language_model import LanguageModel, blocks
from distopt.plan.allocations import Allocations
from distopt.plan.cost import Cluster
from distopt.plan.footprint import Collective
from distopt.plan.memory import footprint
from distopt.plan.plan import Plan, make_plan, smaller, smallest, verdict
from distopt.plan.rehearsal import Rehearsal, rehearse
from tests.harness.cells import some
from tests.harness.distributed import run
from tests.harness.engines import CPU, DEEPSPEED, ENGINES
from tests.harness.jobs import fork, one_after_another, python

NATIVE = [kind for kind in ENGINES if kind not in DEEPSPEED]
# Rows that do not divide, tied and untied heads; wide enough that single scalars do not matter.
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": dict(
        n_layer=3, n_head=2, n_embd=64, n_positions=64, n_inner=250, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "llama": dict(
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=64,
        intermediate_size=172,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    ),
}
# Each engine with one family, in turn, at 2 or 4 ranks.
PLANNED = list(zip(NATIVE, itertools.cycle(MODELS), (2, 4, 2, 4, 4)))
VOCABULARY, SEQUENCES, LENGTH = 1001, 4, 64


def measured(kind: str, family: str, precision: str = "fp32", accumulation: int = 1) -> dict[str, int]:
    """The local bytes after a step, and the peak of a step."""
    language_model, engine = LanguageModel(family, MODELS[family]), ENGINES[kind](precision=precision)
    model = language_model.empty(language_model.describe(VOCABULARY))
    model = engine.build(model, blocks(model), lambda unit, device: language_model.fill(model, unit, device), CPU)
    optimizer = distopt.AdamW(distopt.param_groups(engine.unwrap(model)), lr=1e-3)
    model = engine.attach(model, optimizer, accumulation, 1.0)
    batches = [torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH + 1))] * accumulation
    for _ in range(2):  # the first creates the state; DDP rebuilds its buckets in the second
        update(engine, model, optimizer, batches, 1.0)
    params = list(engine.unwrap(model).parameters())
    local = list(optimizer.layout.segments)
    held = {
        "parameters": size([getattr(p, "ds_tensor", p) for p in params], local),
        "state": size(t for state in optimizer.state.values() for t in state.values() if t.ndim),
        "gradients": size(p.grad for p in params if p.grad is not None),
    }
    if kind not in DEEPSPEED:
        state = [t for of in optimizer.state.values() for t in of.values()]
        buckets = [p.grad for p in params] if kind in ("ddp", "zero1") else []  # DDP's buckets, which outlive a step
        engine.zero_grad(model, optimizer)
        with Allocations([*params, *state, *buckets]) as allocations:
            update(engine, model, optimizer, batches, 1.0)
        held["peak"] = allocations.peak() + size(buckets) + held["parameters"] + held["state"]
    return held


def size(*tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of some tensors, each counted once."""
    local = [t.to_local() if hasattr(t, "to_local") else t for some in tensors for t in some]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())


@functools.cache
def rehearsed(family: str, engine: type[Engine] = DDP, precision: str = "fp32") -> Rehearsal:
    sizes = VOCABULARY, SEQUENCES, LENGTH
    return rehearse(
        engine(precision), LanguageModel(family, MODELS[family]), distopt.param_groups, distopt.AdamW, *sizes
    )


def planned(kind: str, family: str, world: int, precision: str = "fp32", accumulation: int = 1) -> dict[str, int]:
    rehearsal = rehearsed(family, DDP if kind in ("ddp", "zero1") else FSDP2, precision)  # autocast, or weights cast
    held = footprint(ENGINES[kind](precision=precision), rehearsal.units, world)
    beside, early = (0, held.early) if accumulation == 1 else (held.accumulated, True)
    return {**vars(held), "peak": held.parameters + held.state + beside + rehearsal.peak(held, early)}


@pytest.mark.parametrize(("kind", "family", "world"), some(PLANNED, itertools.product(NATIVE, MODELS, (1, 2, 4))))
def test_the_memory_of_ranks_is_the_planned_one(kind: str, family: str, world: int) -> None:
    if kind == "hsdp" and world == 1:
        return
    plan = planned(kind, family, world)
    found = max(run(world, measured, kind, family), key=lambda held: held["parameters"])
    for name in ("parameters", "gradients", "state"):
        assert plan[name] == pytest.approx(found[name], rel=0.03), name
    assert plan["peak"] == pytest.approx(found["peak"], rel=0.002)  # the plan leaves out norms


def measured_without_gradients(kind: str, family: str) -> tuple[int, int, int]:
    """The bytes of the weights and of gradients and state after a step of MeZO, and the peak of a step."""
    language_model, engine = LanguageModel(family, MODELS[family]), ENGINES[kind](precision="fp32")
    model = language_model.empty(language_model.describe(VOCABULARY))
    model = engine.build(model, blocks(model), lambda unit, device: language_model.fill(model, unit, device), CPU)
    inner = engine.unwrap(model)
    optimizer = distopt.MeZO(distopt.param_groups(inner), model=inner)
    model = engine.attach(model, optimizer, 1, float("inf"))
    batches = [torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH + 1))]
    update(engine, model, optimizer, batches)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    with Allocations(params) as allocations:
        update(engine, model, optimizer, batches)
    others = [*(p.grad for p in params if p.grad is not None), *optimizer.state.values()]
    return size(params), len(others), allocations.peak() + size(params)


@pytest.mark.parametrize(("kind", "world"), [("ddp", 1), ("fsdp2", 4)])
def test_the_memory_of_mezo_is_the_planned_one(kind: str, world: int) -> None:
    """The weights, and the larger of two: a forward pass, of which no activations are kept, and the noise."""
    rehearsal = rehearse(
        ENGINES[kind](), LanguageModel("gpt2", MODELS["gpt2"]), distopt.param_groups, distopt.MeZO, VOCABULARY,
        SEQUENCES, LENGTH,
    )  # fmt: skip
    held = footprint(ENGINES[kind](), rehearsal.units, world)
    weights, others, peak = max(run(world, measured_without_gradients, kind, "gpt2"))
    assert (held.gradients, held.state, others) == (0, 0, 0)
    assert held.parameters == pytest.approx(weights, rel=0.03)
    assert held.parameters + rehearsal.peak(held, early=False) == pytest.approx(peak, rel=0.005)
    assert rehearsal.flops[1] == 0 and rehearsal.peak(held, early=False) < 0.7 * rehearsed("gpt2").activations


@pytest.mark.parametrize(
    ("kind", "precision", "accumulation"),
    some(
        [("zero1", "fp32", 2), ("zero1", "bf16", 2), ("fsdp2", "bf16", 2)],
        [(kind, *step) for kind in ENGINES for step in (("fp32", 2), ("bf16", 1), ("bf16", 2))],
    ),
)
def test_steps_of_bfloat16_and_of_several_passes(kind: str, precision: str, accumulation: int) -> None:
    """To the byte, but for DeepSpeed's padding and, in the peak, the norms."""
    plan = planned(kind, "gpt2", 2, precision, accumulation)
    found = max(run(2, measured, kind, "gpt2", precision, accumulation), key=lambda held: held["parameters"])
    for name in ("parameters", "state"):
        assert plan[name] == pytest.approx(found[name], rel=1e-4 if kind in DEEPSPEED else 0.0), name
    if kind in NATIVE:
        assert plan["gradients"] == found["gradients"]
        assert plan["peak"] == pytest.approx(found["peak"], rel=0.002)


@pytest.mark.parametrize("world", some([2], [1, 2, 4]))
@pytest.mark.parametrize("kind", some(["deepspeed_zero1", "deepspeed_zero3"], DEEPSPEED))
def test_the_memory_of_deepspeed_is_the_planned_one(kind: str, world: int) -> None:
    plan = planned(kind, "gpt2", world)
    found = max(run(world, measured, kind, "gpt2"), key=lambda held: held["parameters"])
    for name in ("parameters", "state"):
        assert plan[name] == pytest.approx(found[name], rel=0.03), name


@pytest.mark.parametrize(
    ("world", "kind"), some([(512, "hsdp"), (4096, "fsdp2")], [(64, "zero2"), (512, "hsdp"), (4096, "fsdp2")])
)
def test_the_memory_of_thousands_of_ranks_is_the_planned_one(tmp_path: Path, world: int, kind: str) -> None:
    """With torch's fake process group: the bytes of FSDP2's first rank."""
    from tests.harness.fake_ranks import measure  # imports this module

    process = fork(measure, world, kind, tmp_path / "bytes.json")
    process.join(60.0)
    assert process.exitcode == 0
    plan = planned(kind, "llama", world)
    assert json.loads((tmp_path / "bytes.json").read_text()) == {name: plan[name] for name in ("parameters", "state")}


def plan_of(*overrides: str) -> Plan:
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        small = ["model=gpt2_tiny", "sequence_length=64", "vocabulary=256"]
        return make_plan(compose("plan", overrides=[*small, *overrides]))


def test_the_bytes_and_seconds_of_a_ring() -> None:
    """4 ranks, 400 bytes: every rank sends three quarters of a tensor to gather or scatter it, twice that for both."""
    gather = Collective("all_gather", 400, 4, 2, "forward")
    assert gather.sent == 2 * 300
    assert gather._replace(kind="all_reduce").sent == 2 * 600
    assert gather._replace(ranks=1).sent == 0
    one = Cluster(nodes=1, gpus_per_node=4, near_gbps=3e-7, far_gbps=1e-7, latency_us=1e6)  # 300 and 100 bytes a second
    assert one.seconds(gather) == pytest.approx(2 + 2 * 3)
    two = Cluster(nodes=2, gpus_per_node=2, near_gbps=3e-7, far_gbps=1e-7, latency_us=1e6)
    assert two.seconds(gather) == pytest.approx(3 + 2 * 3)  # two ports together send 200 a second
    assert two.seconds(gather._replace(ranks=2)) == pytest.approx(400 / 300 + 2)  # on one machine
    assert two.seconds(gather._replace(ranks=2, across=True)) == pytest.approx(400 / 100 + 2)


def test_a_step_computes_six_operations_a_parameter_and_token() -> None:
    """The rule of thumb, which leaves out attention; and the recomputation by activation checkpointing."""
    plan = plan_of("sequence_length=8")
    units = plan.rehearsal.units
    in_blocks = sum(layer.numel for unit in units[:-1] for layer in unit if len(layer.shape) == 2)
    multiplied = in_blocks + 256 * 128  # the head, which is the embedding
    forward, backward = plan.rehearsal.flops
    assert forward == pytest.approx(2 * multiplied * 8, rel=0.03)
    assert backward == pytest.approx(2 * forward, rel=0.03)
    recomputed = plan_of("sequence_length=8", "engine.activation_checkpointing=true").rehearsal
    # torch stops recomputing once the backward pass has its inputs: before the last product, a third of a block.
    assert recomputed.flops[1] - backward == pytest.approx(2 * in_blocks * 8 * 2 / 3, rel=0.03)
    assert recomputed.activations < plan.rehearsal.activations


def test_sam_takes_a_copy_and_a_second_pass() -> None:
    plain, sam, looksam = plan_of(), plan_of("sam=on"), plan_of("sam=looksam")
    assert (plain.extra, sam.extra, looksam.extra) == tuple(n * plain.footprint.parameters for n in (0, 1, 3))
    assert (sam.passes, looksam.passes) == (2.0, 1.2)
    assert sam.stages[1].compute == pytest.approx(2 * plain.stages[1].compute)
    assert sam.wire[0].sent == 2 * plain.wire[0].sent
    with pytest.raises(ValueError, match="local needs full weights"):
        plan_of("sam=on", "sam.scope=local")


def test_a_pass_for_the_norms_is_counted_for_every_trust_ratio() -> None:
    """LARS, whose ratio is that of the gradient, was counted as if it had none."""
    assert plan_of("optimizer=lars").trusts
    assert plan_of("optimizer=lamb").trusts
    assert not plan_of("optimizer=adamw").trusts


def test_a_trust_ratio_in_any_param_group_reads_weights_once_more() -> None:
    """The first group alone was asked: an override with a ratio cost nothing."""
    plain, ratio = plan_of(), plan_of("param_groups.overrides={wte:{trust_ratio:true}}")
    assert (plain.trusts, ratio.trusts, plan_of("optimizer=lamb").trusts) == (False, True, True)
    assert ratio.stages[2].compute > plain.stages[2].compute


def test_what_is_refused_is_one_line(tmp_path: Path) -> None:
    """Hydra's own refusals were up to 25 lines."""
    words = ["optimizer=adamax", "noodes=2", "nodes", "~engine", "optimizer=null", "nodes=0"]
    commands = [[word] for word in words]
    for word, ended in zip(words, one_after_another(tmp_path, commands, "distopt.plan.__main__.planned"), strict=True):
        (line,) = ended.err.splitlines()
        assert ended.code == 1 and line.startswith("distopt: error: ") and word.strip("~").partition("=")[0] in line


def test_the_smallest_cluster_is_the_first_that_fits() -> None:
    plan = plan_of("nodes=4", "gpus_per_node=2")
    assert verdict(plan) == "it fits; the smallest that fits has 1 GPU (1 x 1)"
    tight = replace(plan, cluster=replace(plan.cluster, memory_gib=(plan.peak + 1) / 2**30))
    least = smallest(tight)
    assert least is not None and least.cluster.gpus == 8
    lacking = replace(plan, cluster=replace(plan.cluster, memory_gib=1e-3))
    with pytest.raises(
        ValueError, match=r"it does not fit: each GPU lacks 0\.\d+ GiB; nor does any cluster of up to 65,536 GPUs"
    ):
        verdict(lacking)


@pytest.mark.parametrize(("nodes", "gpus_per_node"), [(2, 6), (1, 6), (3, 8), (1, 1), (5, 3)])
def test_the_given_cluster_is_tried_too(nodes: int, gpus_per_node: int) -> None:
    """Machines without 2, 4 or 8 GPUs, and numbers of machines that are no power of two."""
    plan = plan_of(f"nodes={nodes}", f"gpus_per_node={gpus_per_node}")
    tight = replace(plan, cluster=replace(plan.cluster, memory_gib=(plan.peak + 1) / 2**30))
    gpus = f"{nodes * gpus_per_node} GPU{'s' * (nodes * gpus_per_node > 1)} ({nodes} x {gpus_per_node})"
    assert verdict(tight) == f"it fits; the smallest that fits has {gpus}"


def test_clusters_are_tried_in_order() -> None:
    tried = [other.cluster for other in smaller(plan_of("nodes=3", "gpus_per_node=6"))]
    assert [(c.nodes, c.gpus_per_node) for c in tried[:8]] == [
        (1, 1),
        (1, 2),
        (1, 4),
        *((n, 6) for n in (1, 2, 3, 4, 8)),
    ]
    assert 2**15 < tried[-1].gpus <= 2**16 and sorted(c.gpus for c in tried) == [c.gpus for c in tried]


def test_hsdp_plans_only_clusters_that_its_replicas_divide() -> None:
    least = smallest(plan_of("engine=hsdp", "engine.replicas=4"))
    assert least is not None and least.cluster.gpus == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nodes=0", "nodes must be an integer >= 1, got 0"),
        ("gpus_per_node=two", "gpus_per_node must be an integer >= 1, got 'two'"),
        ("cluster.efficiency=1.5", r"cluster.efficiency must be a number in (0, 1], got 1.5"),
        ("+cluster.nodes=3", "nothing reads cluster.nodes"),
        ("+foo=3", "nothing reads foo"),
        ("sequence_length=2000", "sequence_length=2000 is longer than the model's 1024 positions"),
        ("model.config=", "model.config must be options by name, such as {n_layer: 4}, got ''"),
        ("cluster.far_gbps=0", "far_gbps must be a number > 0, got 0"),
        ("engine=hsdp engine.replicas=3", "engine.replicas=3 does not divide the 8 processes"),
    ],
)
def test_bad_input(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_of(*override.split())


def test_the_command_prints_a_plan_and_fails_where_none_fits(tmp_path: Path) -> None:
    small = ["model=gpt2_tiny", "sequence_length=64", "vocabulary=256"]
    done = python("-m", "distopt.plan", *small, "engine=zero1", "nodes=2")
    assert done.code == 0, done.err
    assert done.out.startswith("957,184 parameters in 52 tensors on 16 GPUs (2 x 8)")
    assert done.out.endswith("it fits; the smallest that fits has 1 GPU (1 x 1)\n")
    for row in ("parameters", "optimizer state", "peak", "reduce_scatter (backward)", "all_gather (step)", "tokens/s"):
        assert f"\n{row} " in done.out
    command = [*small, "cluster.memory_gib=1e-3"]
    (failed,) = one_after_another(tmp_path, [command], "distopt.plan.__main__.planned")
    assert failed.code == 1 and failed.err.startswith("distopt: error: it does not fit: each GPU lacks 0.")
