"""SGD, AdamW, SAM and AWP on handwritten digits, clean and attacked, over five seeds: `python examples/robustness.py`.

Needs scikit-learn, for its 8 x 8 digits. Every method trains the same perceptron on the same 600 images for as many
steps: the first three on clean images, the others on images attacked by PGD. The rate or radius in a row is the best
of two or three by clean accuracy on 200 images that no table shows, at a seed of its own. Prints a Markdown table: mean
and standard deviation of the test accuracy in percent.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import distopt
from distopt.robustness import accuracy, fgsm, pgd

EPS, EPS_L2, RANGE = 0.1, 0.5, (0.0, 1.0)  # of pixels in [0, 1]
METHODS: dict[str, tuple[tuple[float, ...], Callable[..., Any]]] = {  # the values that are tried
    "SGD": ((0.03, 0.1, 0.3), lambda params, lr: distopt.SGD(params, lr=lr, momentum=0.9)),
    "AdamW": ((1e-3, 3e-3, 1e-2), lambda params, lr: distopt.AdamW(params, lr=lr)),
    "SAM around AdamW": ((0.05, 0.2, 0.5), lambda params, rho: distopt.SAM(distopt.AdamW(params, lr=3e-3), rho=rho)),
    "PGD training, AdamW": ((3e-3,), lambda params, lr: distopt.AdamW(params, lr=lr)),
    "PGD training, AWP": ((0.005, 0.02), lambda params, rho: distopt.AWP(distopt.AdamW(params, lr=3e-3), rho)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| | clean | FGSM, linf {EPS} | PGD, linf {EPS} | PGD, l2 {EPS_L2} |\n|---|---|---|---|---|")
    for name in options.only:
        values, _ = METHODS[name]
        value = max(values, key=lambda value: validation(name, value, options.steps)) if len(values) > 1 else values[0]
        rows = [tested(train(name, value, options.steps, seed), *digits(seed)["test"]) for seed in range(options.seeds)]
        cells = [f"{statistics.mean(each):.1f} +- {deviation(each):.1f}" for each in zip(*rows)]
        print(f"| {name}, {value:g} | {' | '.join(cells)} |", flush=True)


def deviation(values: tuple[float, ...]) -> float:
    return statistics.stdev(values) if len(values) > 1 else float("nan")


@functools.lru_cache
def digits(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """600 training, 200 validation and 800 test images in the order of a seed, with their classes."""
    found: Any = load_digits()
    images = torch.from_numpy(found.data).float() / 16.0
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:1600]
    parts = zip(("training", "validation", "test"), order.split([600, 200, 800]))
    return {name: (images[part], torch.from_numpy(found.target)[part]) for name, part in parts}


def train(name: str, value: float, steps: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer: Any = METHODS[name][1](distopt.param_groups(model, weight_decay=0.01), value)
    schedule = distopt.warmup_cosine(optimizer, warmup_steps=steps // 10, total_steps=steps)
    images, classes = digits(seed)["training"]
    for batch in batches(len(images), steps, seed):
        x, y = images[batch], classes[batch]
        if name.startswith("PGD"):
            x = pgd(per_sample(model, y), x, EPS, steps=5, clamp=RANGE, seed=seed)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        schedule.step()
    return model


def batches(count: int, steps: int, seed: int, size: int = 50) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randint(count, (size,), generator=generator)


def per_sample(model: nn.Module, classes: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.cross_entropy(model(x), classes, reduction="none")


def validation(name: str, value: float, steps: int) -> float:
    images, classes = digits(1000)["validation"]
    return accuracy(train(name, value, steps, 1000), images, classes)


def tested(model: nn.Module, images: Tensor, classes: Tensor) -> list[float]:
    """Accuracies in percent: clean, and under each attack."""
    loss = per_sample(model, classes)
    attacked = [
        images,
        fgsm(loss, images, EPS, clamp=RANGE),
        pgd(loss, images, EPS, restarts=2, clamp=RANGE),
        pgd(loss, images, EPS_L2, norm="l2", restarts=2, clamp=RANGE),
    ]
    return [100.0 * accuracy(model, x, classes) for x in attacked]


if __name__ == "__main__":
    main()
