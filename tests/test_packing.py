"""Examples in sequences: the order, the packing, and the mean over all targets on every engine."""

from __future__ import annotations

import itertools
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import distopt
from distopt.checkpoint import load_checkpoint, save_checkpoint
from distopt.data.packing import IGNORED, Batch, Examples, PackedSequences, PackedValidationSequences, best_fit
from distopt.engine import DDP, Engine
from distopt.engine.train_step import update
from distopt.job.contamination import check_no_cross_contamination
from distopt.job.evaluate import validation_loss
from distopt.models.language_model import LanguageModel, blocks
from distopt.models.lora import LoRA
from tests.harness.distributed import run
from tests.harness.engines import CONFIGS, CPU, ENGINES, VOCABULARY, full, made

LENGTH, SEQUENCES, STEPS = 24, 8, 3
# float32 sums over a batch in another order, which each step passes on.
TOLERANCE = 2e-5


def examples(count: int = 60, seed: int = 0) -> Examples:
    """From 3 to 30 tokens each, of which the last are targets: from one to nearly all; of the first, beyond 24."""
    draw = np.random.default_rng(seed)
    sizes = np.concatenate([[30], draw.integers(3, 31, count - 1)])
    last = [1, *(draw.integers(1, n) for n in sizes[1:])]
    taught = np.concatenate([np.arange(n) >= n - k for n, k in zip(sizes, last)]).astype(np.uint8)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return Examples(draw.integers(0, VOCABULARY, starts[-1]).astype(np.uint8), taught, starts)


def packed(packing: bool = True, seed: int = 0, batch_size: int = SEQUENCES) -> PackedSequences:
    return PackedSequences(examples(), sequence_length=LENGTH, batch_size=batch_size, seed=seed, packing=packing)


# Packing and order


@pytest.mark.parametrize("capacity", [1, 7, 40])
def test_best_fit_puts_each_item_into_one_bin_that_holds_it(capacity: int) -> None:
    lengths = np.random.default_rng(1).integers(1, capacity + 1, 500)
    bins = best_fit(lengths, capacity)
    assert sorted(i for items in bins for i in items) == list(range(500))
    assert max(lengths[items].sum() for items in bins) <= capacity
    assert len(bins) <= 1.25 * lengths.sum() / capacity + 1  # its bound is 11/9 of the best


def pieces(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """The examples of a batch, told apart by their positions: inputs and labels."""
    found = []
    assert batch.positions is not None
    for inputs, labels, positions in zip(batch.inputs, batch.labels, batch.positions):
        cuts = [*torch.nonzero(positions == 0).flatten().tolist(), len(inputs)]
        for start, end in itertools.pairwise(cuts):
            assert positions[start:end].tolist() == list(range(end - start))
            if (labels[start:end] != IGNORED).any():
                found.append((inputs[start:end].tolist(), labels[start:end].tolist()))
    return found


def cut(given: Examples) -> list[tuple[list[int], list[int]]]:
    """What the examples come to, without any code of ours: inputs, and the next token where it is a target."""
    found = []
    for start, end in zip(given.starts, given.starts[1:]):
        tokens, taught = given.tokens[start:end].tolist(), given.targets[start:end].tolist()
        labels = [token if flag else IGNORED for token, flag in zip(tokens[1:], taught[1:])][:LENGTH]
        if any(label != IGNORED for label in labels):
            found.append((tokens[:-1][:LENGTH], labels))
    return found


def test_an_epoch_has_each_example_once_with_the_next_tokens_as_labels() -> None:
    sequences = packed(batch_size=1)
    seen = [piece for step in range(sequences.count) for piece in pieces(sequences.batch(step))]
    assert sorted(seen) == sorted(cut(examples()))
    assert all(sequences.batch(step).inputs.shape[1] <= LENGTH for step in range(sequences.count))
    assert len(sequences.notes) == 2
    assert "of 60 train examples to 24 tokens, and dropped 1 of them" in sequences.notes[0]


def test_without_packing_a_sequence_is_one_example() -> None:
    sequences = packed(packing=False)
    assert sequences.count == len(cut(examples()))
    batch = sequences.batch(0)
    assert batch.positions is None
    lengths = [len(inputs) for inputs, _ in cut(examples())]
    assert batch.inputs.shape[1] <= max(lengths)


@pytest.mark.parametrize("packing", [True, False])
def test_the_batches_are_the_same_at_any_world_size(packing: bool) -> None:
    whole = packed(packing).batch(5)
    for world in (2, 4):
        blocks = [packed(packing).batch(5, rank, world) for rank in range(world)]
        assert {block.targets for block in blocks} == {whole.targets}
        for k, part in enumerate(part for block in blocks for part in block.split(1)):
            length = part.inputs.shape[1]  # of the longest of the block
            assert torch.equal(part.inputs[0], whole.inputs[k, :length])
            assert torch.equal(part.labels[0], whole.labels[k, :length])
            assert (whole.labels[k, length:] == IGNORED).all()
    labels = (whole.labels != IGNORED).sum(1).float()
    assert whole.targets == labels.mean().item() and len(labels.unique()) > 2


def test_the_order_is_a_pure_function_of_seed_and_step() -> None:
    walked = packed(seed=3)
    batches = [walked.batch(step).inputs for step in range(6)]
    assert all(torch.equal(packed(seed=3).batch(step).inputs, batches[step]) for step in (5, 0, 3))
    assert not torch.equal(packed(seed=4).batch(0).inputs, batches[0])


def test_a_completion_beyond_every_sequence_is_refused() -> None:
    starts = np.arange(0, 121, 30)
    given = Examples(np.zeros(120, np.uint8), (np.arange(120) % 30 == 29).astype(np.uint8), starts)
    with pytest.raises(ValueError, match=r"every completion of train starts beyond 24 tokens: .*sequence_length"):
        PackedSequences(given, sequence_length=24, batch_size=2)


# The mean over all targets


def fresh(kind: str, lora: bool, base: Path | None, **options: Any) -> tuple[Engine, Any]:
    engine = ENGINES[kind](**options)
    if not lora:
        return engine, made(LanguageModel("llama", CONFIGS["llama"], seed=1), engine)
    language_model = LanguageModel(path=str(base), seed=1)
    model = language_model.empty(language_model.describe(VOCABULARY))
    LoRA(r=2, alpha=8).add(model, language_model.path)
    return engine, engine.build(
        model, blocks(model), lambda unit, device: language_model.fill(model, unit, device), CPU
    )


def train(
    kind: str,
    micro_batches: int,
    lora: bool = False,
    base: Path | None = None,
    sam: bool = False,
    start: int = 0,
    stop: int = STEPS,
    source: Path | None = None,
    to: Path | None = None,
    **options: Any,
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms and weights of steps on packed examples."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    engine, model = fresh(kind, lora, base, **options)
    optimizer = distopt.LAMB(distopt.param_groups(engine.unwrap(model), weight_decay=0.1), lr=0.03)
    stepper: Any = distopt.SAM(optimizer, rho=0.1) if sam else optimizer
    model = engine.attach(model, optimizer, micro_batches, 1.0)
    check_no_cross_contamination(engine, model, CPU, VOCABULARY)
    if source is not None:
        assert load_checkpoint(source, engine.unwrap(model), stepper) == {"step": start}
    sequences, losses, norms = packed(), [], []
    for step in range(start, stop):
        batch = sequences.batch(step, rank, world)
        done = update(engine, model, stepper, batch.split(SEQUENCES // world // micro_batches), max_grad_norm=1.0)
        loss = done.loss.clone()
        dist.all_reduce(loss)
        losses.append(loss.item() / world)
        norms.append(done.grad_norm)
    weights = full(model)
    if to is not None:
        save_checkpoint(to, engine.unwrap(model), stepper, extra={"step": stop})
    return losses, norms, weights


def written_out(model: Any) -> tuple[list[float], dict[str, Tensor]]:
    """One process, no accumulation, no packing: each example by itself, and the mean over all of their targets."""
    optimizer = distopt.LAMB(distopt.param_groups(model, weight_decay=0.1), lr=0.03)
    losses, sequences = [], packed()
    for step in range(STEPS):
        optimizer.zero_grad()
        total, count = torch.zeros(()), 0
        for inputs, labels in pieces(sequences.batch(step)):
            logits = model(input_ids=torch.tensor([inputs])).logits[0]
            total = total + F.cross_entropy(logits, torch.tensor(labels), ignore_index=IGNORED, reduction="sum")
            count += sum(label != IGNORED for label in labels)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append((total / count).item())
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def base() -> Any:
    with TemporaryDirectory() as folder:
        torch.manual_seed(5)
        language_model = LanguageModel("llama", CONFIGS["llama"], seed=7)
        model = language_model.empty(language_model.describe(VOCABULARY))
        for unit in (*blocks(model), model):
            language_model.fill(model, unit, CPU)
        model.save_pretrained(folder)
        yield Path(folder)


@lru_cache
def expected(lora: bool, base: Path | None) -> tuple[list[float], dict[str, Tensor]]:
    return run(1, by_itself, lora, base)[0]


def by_itself(lora: bool, base: Path | None) -> tuple[list[float], dict[str, Tensor]]:
    _, model = fresh("ddp", lora, base)
    return written_out(model.module)


def same(result: tuple[list[float], list[float], dict[str, Tensor]], wanted: tuple[list[float], Any]) -> None:
    losses, _, weights = result
    assert losses == pytest.approx(wanted[0], rel=TOLERANCE)
    assert weights.keys() == wanted[1].keys()
    for name, p in weights.items():
        assert ((p - wanted[1][name]).norm() / wanted[1][name].norm().clamp(min=1e-12)).item() < TOLERANCE, name


CASES = [
    pytest.param(kind, world, lora, marks=() if quick else pytest.mark.matrix)
    for kind in ENGINES
    for world in (1, 2, 4)
    for lora in (False, True)
    if not (kind == "hsdp" and world == 1)
    for quick in [
        (kind, world, lora)
        in [("ddp", 2, False), ("fsdp2", 4, False), ("fsdp2", 2, True), ("deepspeed_zero3", 2, True)]
    ]
]


@pytest.mark.parametrize(("kind", "world", "lora"), CASES)
def test_ranks_and_micro_batches_train_on_the_mean_over_all_targets(
    base: Path, kind: str, world: int, lora: bool
) -> None:
    """The mean of the micro-batches' means, which is what frameworks took for years, is another step."""
    wanted = expected(lora, base)
    for result in run(world, train, kind, 2, lora, base):
        same(result, wanted)


def mean_of_means(model: Any, batch: Batch, pass_loss: Any = None) -> Tensor:
    logits = model(input_ids=batch.inputs, position_ids=batch.positions).logits
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)


def naive() -> dict[str, Tensor]:
    engine, model = fresh("ddp", False, None)
    optimizer = distopt.LAMB(distopt.param_groups(engine.unwrap(model), weight_decay=0.1), lr=0.03)
    for step in range(STEPS):
        parts = packed().batch(step).split(1)
        update(engine, model, optimizer, parts, max_grad_norm=1.0, loss=mean_of_means)
    return full(model)


def test_the_mean_of_means_would_be_seen(base: Path) -> None:
    weights = expected(False, base)[1]
    assert any((p - weights[name]).norm() / p.norm() > 100 * TOLERANCE for name, p in run(1, naive)[0].items())


@pytest.mark.parametrize("lora", [False, True])
def test_sam_and_recomputed_activations(base: Path, lora: bool) -> None:
    options = {"activation_checkpointing": True}
    (one,) = run(1, with_options, "ddp", 1, lora, base, True, {})
    for result in run(2, with_options, "fsdp2", 2, lora, base, True, options):
        same(result, (one[0], one[2]))
    assert one[0] != expected(lora, base)[0]


def with_options(
    kind: str, micro_batches: int, lora: bool, base: Path, sam: bool, options: dict[str, Any]
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    return train(kind, micro_batches, lora, base, sam, **options)


def frozen_and_trained(kind: str, base: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    before = full(fresh(kind, True, base)[1])
    return before, train(kind, 1, True, base)[2]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_an_adapter_starts_from_the_file_and_leaves_it_as_it_is(base: Path, kind: str) -> None:
    from safetensors.torch import load_file

    file = load_file(base / "model.safetensors")
    for before, after in run(2, frozen_and_trained, kind, base):
        names = {name for name in before if ".lora_" in name}
        assert len(names) == 2 * 2 * 7  # A and B in two blocks' seven linear layers
        for name in before:
            if name not in names:
                assert torch.equal(before[name], file[name.replace(".base_layer", "")])
                assert torch.equal(after[name], before[name])
            elif ".lora_B." in name:
                assert not before[name].any() and after[name].any()
            else:
                assert before[name].std() > 0.05 and not torch.equal(after[name], before[name])


def resumed(kind: str, base: Path, folder: Path, lora: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    whole = train(kind, 2, lora, base)[2]
    train(kind, 2, lora, base, stop=1, to=folder)
    return whole, train(kind, 2, lora, base, start=1, source=folder)[2]


@pytest.mark.parametrize("kind", ["zero1", "fsdp2", pytest.param("deepspeed_zero3", marks=pytest.mark.matrix)])
def test_an_adapter_resumes_from_a_checkpoint_bit_for_bit(tmp_path: Path, base: Path, kind: str) -> None:
    for whole, again in run(2, resumed, kind, base, tmp_path / kind, True):
        assert all(torch.equal(p, whole[name]) for name, p in again.items())


# Evaluation


def evaluated(batch_size: int, max_sequences: int | None, packing: bool) -> float:
    engine, model = fresh("ddp", False, None)
    held = PackedValidationSequences(
        examples(), sequence_length=LENGTH, batch_size=batch_size, max_sequences=max_sequences, packing=packing
    )
    loss = validation_loss(engine, model, held.batches(dist.get_rank(), dist.get_world_size()), CPU)
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


def mean_of_all() -> float:
    _, model = fresh("ddp", False, None)
    total, count = 0.0, 0
    for inputs, labels in cut(examples()):
        logits = model.module.eval()(input_ids=torch.tensor([inputs])).logits[0]
        total += F.cross_entropy(logits, torch.tensor(labels), ignore_index=IGNORED, reduction="sum").item()
        count += sum(label != IGNORED for label in labels)
    return total / count


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_is_the_mean_over_all_targets_at_any_world_and_batch_size(packing: bool) -> None:
    (wanted,) = run(1, mean_of_all)
    for world, batch_size in ((1, 8), (2, 100), (4, 4)):
        assert run(world, evaluated, batch_size, None, packing) == pytest.approx([wanted] * world, rel=TOLERANCE)
    assert run(2, evaluated, 4, 5, packing)[0] != pytest.approx(wanted, rel=1e-4)


# What keeps examples apart


class Recurrent(torch.nn.Module):
    """A model whose state runs through the whole sequence, whatever the positions."""

    def __init__(self, positions: bool) -> None:
        super().__init__()
        self.embed, self.rnn = torch.nn.Embedding(VOCABULARY, 16), torch.nn.GRU(16, VOCABULARY, batch_first=True)
        self.positions = positions

    def forward(self, input_ids: Tensor, **inputs: Tensor) -> Any:
        if inputs and not self.positions:
            raise TypeError("forward() got an unexpected keyword argument 'position_ids'")
        return type("Output", (), {"logits": self.rnn(self.embed(input_ids))[0]})


@pytest.mark.parametrize("positions", [True, False])
def test_a_model_that_mixes_examples_is_refused(positions: bool) -> None:
    engine = DDP()
    with pytest.raises(ValueError, match=r"data\.packing=true: .* set data\.packing=false"):
        check_no_cross_contamination(engine, Recurrent(positions), CPU, VOCABULARY)


def one_forward(family: str) -> bool:
    engine = DDP()
    model = made(LanguageModel(family, CONFIGS[family]), engine)
    check_no_cross_contamination(engine, model, CPU, VOCABULARY)
    return model.training


@pytest.mark.parametrize("family", CONFIGS)
def test_models_of_transformers_keep_examples_apart(family: str) -> None:
    assert run(1, one_forward, family) == [True]
