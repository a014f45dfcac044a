"""The tasks of `python -m benchmarks sharpness`: handwritten digits, and a language model that gets other text."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import distopt
from distopt.models.language_model import LanguageModel, blocks

Examples = tuple[Tensor, Tensor]  # inputs and the classes to tell
_WIDTH, _HEADS, _LAYERS, _LENGTH, _PRETRAINING = 64, 4, 4, 64, 300


@dataclass(frozen=True)
class Task:
    """What is trained on what.

    model: a new one of that seed. logits: of a model for inputs. draw: training and validation examples of a seed, none
    of which is in `test`. score: what counts, lower is better. curvature_examples: how many of the training examples
    the Hessian is of. noise: on the weights, relative to the norm of each tensor.
    """

    name: str
    score_name: str
    model: Callable[[int], nn.Module]
    logits: Callable[[nn.Module, Tensor], Tensor]
    draw: Callable[[int], tuple[Examples, Examples]]
    test: Examples
    score: Callable[[Tensor, Tensor], Tensor]
    steps: int
    batch_size: int
    curvature_examples: int
    noise: float
    methods: tuple[str, ...]


def cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """Mean, in nats."""
    return F.cross_entropy(logits.flatten(0, -2), classes.flatten())


def digits(steps: int | None = None) -> Task:
    """8 x 8 images of handwritten digits, of which a perceptron sees 200; raises ValueError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("the digits ship with scikit-learn: pip install 'distopt[bench]'") from error
    images, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16.0, torch.tensor(classes)[order]

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def draw(seed: int) -> tuple[Examples, Examples]:
        pool = 800 + torch.randperm(len(x) - 800, generator=torch.Generator().manual_seed(seed))
        return (x[pool[:200]], y[pool[:200]]), (x[pool[200:600]], y[pool[200:600]])

    return Task(
        name="digits",
        score_name="test error, %",
        model=model,
        logits=lambda model, inputs: model(inputs),
        draw=draw,
        test=(x[:800], y[:800]),
        score=lambda logits, y: 100.0 * (logits.argmax(-1) != y).float().mean(),
        steps=steps or 1000,
        batch_size=50,
        curvature_examples=200,
        noise=0.3,
        methods=("AdamW", "MomentumSAM", "LookSAM", "SAM", "ASAM"),
    )


def language(steps: int | None = None) -> Task:
    """A small GPT-2 that has read the code of Python's standard library goes on with 48 pieces of its documentation."""
    code, prose = _standard_library()
    pretrained = _pretrain(code)
    pieces = prose[: len(prose) // (_LENGTH + 1) * (_LENGTH + 1)].view(-1, _LENGTH + 1)
    third = (
        len(pieces) // 3
    )  # in the order of the modules' names: training, validation and test are of different modules

    def model(seed: int) -> nn.Module:
        made = _gpt2()
        made.load_state_dict(pretrained)
        return made

    def some(of: Tensor, count: int, seed: int) -> Examples:
        chosen = of[torch.randperm(len(of), generator=torch.Generator().manual_seed(seed))[:count]]
        return chosen[:, :-1], chosen[:, 1:]

    return Task(
        name="language model",
        score_name="test loss, nats a byte",
        model=model,
        logits=lambda model, inputs: model(input_ids=inputs).logits,
        draw=lambda seed: (some(pieces[:third], 48, seed), some(pieces[third : 2 * third], 96, 0)),
        test=some(pieces[2 * third :], 256, 0),
        score=cross_entropy,
        steps=steps or 60,
        batch_size=8,
        curvature_examples=16,
        noise=0.2,
        methods=("AdamW", "MomentumSAM", "LookSAM", "SAM", "ASAM", "PreconditionedSAM", "FunctionalSAM"),
    )


def _standard_library() -> tuple[Tensor, Tensor]:
    """The bytes of its modules without documentation and comments, and those of the documentation."""
    code, prose = [], []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8", errors="ignore"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text:
                    prose.append(text)
                    node.body = node.body[1:] or [ast.Pass()]
        code.append(ast.unparse(tree))
    joined = ("\n\n".join(texts).encode() for texts in (code, prose))
    first, second = (torch.frombuffer(bytearray(text), dtype=torch.uint8).long() for text in joined)
    return first, second


def _gpt2() -> nn.Module:
    sizes = {"n_layer": _LAYERS, "n_head": _HEADS, "n_embd": _WIDTH, "n_positions": _LENGTH}
    language_model = LanguageModel("gpt2", {**sizes, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
    model = language_model.empty(language_model.describe(256))
    for unit in (*blocks(model), model):
        language_model.fill(model, unit, torch.device("cpu"))
    model.set_attn_implementation("eager")  # the fused attention has no second derivative
    return model


def _pretrain(text: Tensor) -> dict[str, Tensor]:
    model, numbers = _gpt2(), torch.Generator().manual_seed(0)
    optimizer = distopt.AdamW(distopt.param_groups(model, 0.01), lr=2e-3)
    schedule = distopt.warmup_cosine(optimizer, warmup_steps=30, total_steps=_PRETRAINING)
    for _ in tqdm(range(_PRETRAINING), desc="pre-training", leave=False):
        starts = torch.randint(len(text) - _LENGTH, (16, 1), generator=numbers)
        rows = text[starts + torch.arange(_LENGTH + 1)]
        optimizer.zero_grad()
        cross_entropy(model(input_ids=rows[:, :-1]).logits, rows[:, 1:]).backward()
        distopt.clip_grad_norm_(optimizer, 1.0)
        optimizer.step()
        schedule.step()
    return model.state_dict()
