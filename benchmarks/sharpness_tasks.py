"""The tasks of `python -m benchmarks sharpness`: handwritten digits, and fine-tuning of a small language model."""

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

Examples = tuple[Tensor, Tensor]  # inputs and their classes
_WIDTH, _HEADS, _LAYERS, _LENGTH, _PRETRAINING = 64, 4, 4, 64, 300


@dataclass(frozen=True)
class Task:
    """A model with its data.

    Attributes:
        name: The name of the task.
        score_name: The name of the score, for the header of a table.
        model: Makes a new model for a seed.
        logits: Computes the logits of a model for inputs.
        draw: Draws training and validation examples for a seed, none of them in `test`.
        test: The test examples.
        score: The score of logits for classes; lower is better.
        steps: The number of steps of a run.
        batch_size: The number of examples of a step.
        curvature_examples: The number of training examples of the Hessian.
        noise: The noise on the weights, relative to the norm of each tensor.
        methods: The names of the methods that the task compares.
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
    """Return the mean cross-entropy, in nats."""
    return F.cross_entropy(logits.flatten(0, -2), classes.flatten())


def digits(steps: int | None = None) -> Task:
    """Make the task of classifying 8 x 8 images of handwritten digits by a perceptron, with 200 training examples.

    Args:
        steps: The number of steps of a run; 1000 by default.

    Raises:
        ValueError: If scikit-learn, which ships the images, is not installed.
    """
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
    """Make the task of fine-tuning a small GPT-2.

    It is pretrained on the code of Python's standard library, and fine-tuned on 48 pieces of its documentation.

    Args:
        steps: The number of steps of a run; 60 by default.
    """
    code, prose = _standard_library()
    pretrained = _pretrain(code)
    pieces = prose[: len(prose) // (_LENGTH + 1) * (_LENGTH + 1)].view(-1, _LENGTH + 1)
    third = len(pieces) // 3  # in the order of modules: training, validation and test text is of different modules

    def model(seed: int) -> nn.Module:
        made = _gpt2()
        made.load_state_dict(pretrained)
        return made

    def sample(of: Tensor, count: int, seed: int) -> Examples:
        chosen = of[torch.randperm(len(of), generator=torch.Generator().manual_seed(seed))[:count]]
        return chosen[:, :-1], chosen[:, 1:]

    return Task(
        name="language model",
        score_name="test loss, nats per byte",
        model=model,
        logits=lambda model, inputs: model(input_ids=inputs).logits,
        draw=lambda seed: (sample(pieces[:third], 48, seed), sample(pieces[third : 2 * third], 96, 0)),
        test=sample(pieces[2 * third :], 256, 0),
        score=cross_entropy,
        steps=steps or 60,
        batch_size=8,
        curvature_examples=16,
        noise=0.2,
        methods=("AdamW", "MomentumSAM", "LookSAM", "SAM", "ASAM", "PreconditionedSAM", "FunctionalSAM"),
    )


def _standard_library() -> tuple[Tensor, Tensor]:
    """Return the bytes of the standard library's modules without docstrings and comments, and of the docstrings."""
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
    model, generator = _gpt2(), torch.Generator().manual_seed(0)
    optimizer = distopt.AdamW(distopt.param_groups(model, 0.01), lr=2e-3)
    schedule = distopt.warmup_cosine(optimizer, warmup_steps=30, total_steps=_PRETRAINING)
    for _ in tqdm(range(_PRETRAINING), desc="pre-training", leave=False):
        starts = torch.randint(len(text) - _LENGTH, (16, 1), generator=generator)
        rows = text[starts + torch.arange(_LENGTH + 1)]
        optimizer.zero_grad()
        cross_entropy(model(input_ids=rows[:, :-1]).logits, rows[:, 1:]).backward()
        distopt.clip_grad_norm_(optimizer, 1.0)
        optimizer.step()
        schedule.step()
    return model.state_dict()
