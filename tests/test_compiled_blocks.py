"""engine.compile: the losses of compiled blocks, and what is refused."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch

from distopt.engine import DDP, DeepSpeed
from tests.harness.distributed import run
from tests.harness.language_models import Settings, train

TRACED: dict[str, Any] = {"fsdp2": {"activation_checkpointing": True, "unit_mib": None}, "zero1": {}, "ddp": {}}


def compiled(kind: str, backend: str, precision: str, options: dict[str, Any]) -> tuple[list[float], list[float], int]:
    """Losses and norms of a training, and the graphs that it was compiled to."""
    compile, graphs = torch.compile, 0

    def counting(function: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return compile(function, backend=backend)

    torch._dynamo.reset()
    torch.compile = counting
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dynamo hides its own, which as errors would end it
            result = train(
                kind, "llama", Settings(precision=precision, validates=True, micro_batches=2, engine=options)
            )
    finally:
        torch.compile = compile
        torch._dynamo.reset()
    return result.losses, result.norms, graphs


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("fsdp2", "aot_eager"),  # traced and differentiated, with operators in place of compiled code
        *[pytest.param(kind, "inductor", marks=pytest.mark.matrix) for kind in TRACED],
    ],
)
def test_compiled_blocks_train_alike(kind: str, backend: str) -> None:
    """To 1e-5 over four steps, with activation checkpointing under FSDP2; validation and samples are not compiled."""
    options = TRACED[kind]
    losses, norms, graphs = run(2, compiled, kind, backend, "fp32", options | {"compile": True})[0]
    eager_losses, eager_norms, none = run(2, compiled, kind, backend, "fp32", options)[0]
    assert (graphs, none) == (2, 0)
    assert losses == pytest.approx(eager_losses, rel=1e-5)
    assert norms == pytest.approx(eager_norms, rel=1e-4)


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"engine\.compile=true needs a C\+\+ compiler, and there is none of"):
        DDP(compile=True)
    DDP()


def test_deepspeed_has_no_such_option() -> None:
    """Its hooks partition and gather inside of the blocks; the key is unknown there, which is refused in one line."""
    with pytest.raises(TypeError, match="compile"):
        functools.partial(DeepSpeed, 3)(compile=True)
