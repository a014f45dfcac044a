"""The chunked cross-entropy: its loss and its gradients are those of the full logits, on every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import distopt
from distopt.data import cross_entropy
from distopt.data.batch import Batch, next_token_loss
from distopt.data.cross_entropy import IGNORED, chunked_cross_entropy
from distopt.engine.train_step import backward, update
from distopt.models.language_model import LanguageModel
from tests.harness.distributed import run
from tests.harness.engines import CONFIGS, ENGINES, VOCABULARY, batch, full, made, mean
from tests.test_plan import plan_of


def of_layer(dtype: torch.dtype, chunk: int | None, bias: bool) -> tuple[Tensor, list[Tensor]]:
    """The loss of 40 tokens over 301 words, a fifth of them without a target, and its gradients."""
    numbers = torch.Generator().manual_seed(0)
    hidden, weight, offset = (torch.randn(*shape, generator=numbers) for shape in ((40, 16), (301, 16), (301,)))
    labels = torch.randint(0, 301, (40,), generator=numbers)
    labels[::5] = IGNORED
    given = [t.to(dtype).requires_grad_() for t in (hidden, weight, offset)[: 2 + bias]]
    h, w, b = given[0], given[1], given[2] if bias else None
    if chunk is None:
        loss = 0.3 * F.cross_entropy(
            F.linear(h, w, b).float() if dtype.itemsize < 4 else F.linear(h, w, b), labels, reduction="sum"
        )
    else:
        loss = chunked_cross_entropy(h, w, b, labels, 0.3, chunk)
    (2.0 * loss).backward()
    return loss.detach(), [t.grad for t in given]  # type: ignore[misc]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 7 * 301, 301 * 40])
def test_gradients_are_those_of_the_full_logits(chunk: int, bias: bool) -> None:
    """To float32's rounding of sums in another order, in the norm."""
    loss, grads = of_layer(torch.float32, chunk, bias)
    true_loss, true_grads = of_layer(torch.float64, None, bias)
    assert loss.item() == pytest.approx(true_loss.item(), rel=1e-6)
    for grad, true in zip(grads, true_grads):
        assert (grad - true).norm() <= 1e-6 * true.norm()
        assert not grad[0].any() or grad.shape[0] != 40  # the first token has no target


def test_bfloat16_is_as_close_as_the_full_logits() -> None:
    """dW is rounded once for each of six chunks: at most twice the error of one product of rounded inputs."""
    (_, full_grads), (_, grads), (_, true) = (
        of_layer(torch.bfloat16, None, False),
        of_layer(torch.bfloat16, 7 * 301, False),
        of_layer(torch.float64, None, False),
    )
    for ours, theirs, exact in zip(grads, full_grads, true):
        error, other = ((g.double() - exact).norm() / exact.norm() for g in (ours, theirs))
        assert error < 2.0 * other


def test_what_is_not_finite_shows_and_what_has_no_target_does_not() -> None:
    h, w = torch.randn(4, 8), torch.randn(9, 8)
    h[0] = torch.inf
    h.requires_grad_()
    loss = chunked_cross_entropy(h, w, None, torch.tensor([IGNORED, 1, 2, 3]), chunk=9)
    loss.backward()
    assert loss.isfinite() and h.grad is not None and h.grad.isfinite().all()
    assert chunked_cross_entropy(h, w, None, torch.tensor([1, 1, 2, 3])).isnan()
    with torch.no_grad():
        assert chunked_cross_entropy(h[1:], w, None, torch.tensor([1, 2, 3])).grad_fn is None


def test_a_second_pass_over_its_gradients_is_refused() -> None:
    h = torch.randn(4, 8, requires_grad=True)
    loss = chunked_cross_entropy(h, torch.randn(9, 8), None, torch.tensor([1, 1, 2, 3]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated already"):
        loss.backward()


def masked(step: int) -> Batch:
    """Packed examples whose prompts have no loss: this rank's part."""
    tokens = batch(step)
    labels = tokens[:, 1:].clone()
    labels[:, :5] = IGNORED
    return Batch(tokens[:, :-1], labels, torch.arange(16).repeat(len(tokens), 1), targets=11.0)


def trained(
    kind: str, family: str, chunked: bool, sam: bool, precision: str = "fp32"
) -> tuple[list[float], dict[str, Tensor]]:
    cross_entropy.CHUNK = 7 * VOCABULARY
    engine = ENGINES[kind](precision=precision)
    source = LanguageModel(family, CONFIGS[family] | {"tie_word_embeddings": family == "gpt2"}, chunked_loss=chunked)
    model = made(source, engine)
    optimizer = distopt.SGD(distopt.param_groups(engine.unwrap(model)), lr=0.3, momentum=0.9)
    model = engine.attach(model, optimizer, 2, 1.0)
    stepper = distopt.SAM(optimizer, rho=0.05) if sam else optimizer
    batches = [batch(0).chunk(2), [*masked(1).split(len(batch(1)) // 2)]]
    losses = [mean(update(engine, model, stepper, parts, 1.0).loss) for parts in batches]
    return losses, full(model)


@pytest.mark.parametrize(
    ("kind", "family", "sam"),
    [
        ("ddp", "gpt2", False),
        ("fsdp2", "llama", True),
        ("deepspeed_zero3", "llama", False),
        *[
            pytest.param(kind, family, sam, marks=pytest.mark.matrix)
            for kind, family, sam in [("fsdp2", "gpt2", False), ("zero1", "llama", True), ("zero2", "llama", False)]
        ],
        *[pytest.param(f"deepspeed_zero{i}", "gpt2", True, marks=pytest.mark.matrix) for i in (1, 2, 3)],
    ],
)
def test_engines_train_as_with_full_logits(kind: str, family: str, sam: bool) -> None:
    (losses, params), (full_losses, full_params) = (
        run(2, trained, kind, family, chunked, sam)[0] for chunked in (True, False)
    )
    assert losses == pytest.approx(full_losses, rel=1e-6)
    for name, p in params.items():
        assert ((p - full_params[name]).norm() / full_params[name].norm()).item() < 1e-6, name


def gathers(chunked: bool) -> dict[str, int]:
    from benchmarks.collectives import Collectives

    cross_entropy.CHUNK = VOCABULARY
    engine = ENGINES["fsdp2"]()
    model = made(LanguageModel("llama", CONFIGS["llama"], chunked_loss=chunked), engine)
    with Collectives() as mode:
        backward(engine, model, [batch(0)])
    return {name: sum(name in operation for operation in mode.seen) for name in ("gather", "scatter")}


def test_the_head_is_gathered_once_and_not_for_each_chunk() -> None:
    assert run(2, gathers, True) == run(2, gathers, False)


def model_of(family: str, **options: Any) -> Any:
    source = LanguageModel(family, CONFIGS["llama"] | options, chunked_loss=True)
    model = source.empty(source.describe(VOCABULARY)).to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.fill_(1.0)  # memory that nothing has written may be nan, which equals nan
    distopt.initialize(model, "gpt2")
    return model


def test_heads_whose_logits_change_are_refused_or_left_alone() -> None:
    tokens = torch.zeros(2, 9, dtype=torch.int64)
    capped = model_of("gemma2", head_dim=16, final_logit_softcapping=3.0)
    with pytest.raises(ValueError, match="the output layer of Gemma2ForCausalLM is no plain linear"):
        next_token_loss(capped, tokens)
    capped.chunked_loss = None
    next_token_loss(capped, tokens)
    llama = model_of("llama")
    # What no configuration says.
    llama.register_forward_hook(lambda module, args, output: setattr(output, "logits", 2.0 * output.logits))
    with pytest.raises(ValueError, match="changes the logits of its output layer"):
        next_token_loss(llama, tokens)
    with pytest.raises(ValueError, match="this loss needs the logits"):
        next_token_loss(llama, tokens, lambda logits, loss: loss(logits))


def test_the_rule_is_a_gibibyte_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    model.chunked_loss = None
    wide = cross_entropy.LARGE // VOCABULARY
    assert [cross_entropy.use_chunks(model, tokens) for tokens in (wide, wide + 1)] == [False, True]
    assert not cross_entropy.use_chunks(model, wide + 1, needs_logits=True)
    assert not cross_entropy.use_chunks(nn.Linear(2, 2), 2**40)
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    assert cross_entropy.head_of(layer) is None


@pytest.mark.matrix
def test_a_vocabulary_of_128k_takes_two_gibibytes_of_activations() -> None:
    """8,192 tokens, two layers of Llama 7B's width, with activation checkpointing; full logits take 12.1 GiB."""
    words = ["model=llama_7b", "model.config.num_hidden_layers=2", "model.config.max_position_embeddings=8192"]
    words += ["engine=fsdp2", "engine.activation_checkpointing=true", "vocabulary=128256", "sequence_length=8192"]
    chunked, whole = (plan_of(*words, f"model.chunked_loss={value}") for value in ("null", "false"))
    assert chunked.rehearsal.activations <= 2.2 * 2**30 < 10 * 2**30 < whole.rehearsal.activations
    assert sum(chunked.rehearsal.flops) == pytest.approx(sum(whole.rehearsal.flops), rel=1e-6)  # the same products
