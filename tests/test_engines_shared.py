"""An engine is configuration: one engine object serves several models, each with the state of its own run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import distopt
from distopt.engine import Engine
from distopt.engine.train_step import update
from distopt.models.language_model import LanguageModel
from tests.harness.distributed import run
from tests.harness.engines import CONFIGS, ENGINES, batch, full, made

KINDS = {"ddp": {}, "zero1": {"overlap_gather": True}, "fsdp2": {}}


def two_models(kind: str, shared: bool) -> list[dict[str, Tensor]]:
    """The weights of two models that take turns, by one engine or by one each; both are built before both are attached.

    With overlap_gather the remote rows of a model are nan until `unwrap` has waited for its own layout.
    """
    engines: list[Engine] = [ENGINES[kind](**KINDS[kind]) for _ in range(2)]
    if shared:
        engines = engines[:1] * 2
    models = [made(LanguageModel("gpt2", CONFIGS["gpt2"], seed=i), engine) for i, engine in enumerate(engines)]
    optimizers = [distopt.LAMB(model.parameters(), lr=0.1) for model in models]
    models = [e.attach(model, optimizer, 1, 1.0) for e, model, optimizer in zip(engines, models, optimizers)]
    for step in range(2):
        for engine, model, optimizer in zip(engines, models, optimizers):
            update(engine, model, optimizer, [batch(step)], max_grad_norm=1.0)
    for engine, model in zip(engines, models):
        engine.unwrap(model)
    return [full(model) for model in models]


@pytest.mark.parametrize("kind", KINDS)
def test_one_engine_serves_two_models(kind: str) -> None:
    """The engine of ZeRO-1 kept the units and the layout of the last model, and waited for that one's rows only."""
    for alone, together in zip(run(2, two_models, kind, False), run(2, two_models, kind, True)):
        for expected, params in zip(alone, together):
            assert params.keys() == expected.keys()
            for name, p in params.items():
                assert torch.equal(p, expected[name]), name
