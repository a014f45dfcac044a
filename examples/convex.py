"""The rates of convex optimization, measured: `python examples/convex.py` writes docs/convex.png.

Full-batch gradient descent, heavy ball and Nesterov by `distopt.SGD`, on losses with one minimum:

    logistic        mean log(1 + exp(-y x.w)) + decay / 2 |w|^2
    squared hinge   mean max(0, 1 - y x.w)^2  + decay / 2 |w|^2        a linear SVM, smooth
    hinge           mean max(0, 1 - y x.w)    + decay / 2 |w|^2        a linear SVM, not smooth

Theory promises, for a loss with curvatures between m and L, so of condition number L / m:

    m = 0           f - f* falls as 1 / k by gradient descent, 1 / k^2 by Nesterov
    m > 0           the steps to a given accuracy grow as L / m by gradient descent, as its root by the other two
    not smooth      a constant rate ends above the minimum; with rates of 1 / (decay k), f - f* falls as 1 / k
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

import distopt

Loss = Callable[[Tensor], Tensor]
ACCURACY = 1e-8  # of f - f*, relative to f(0) - f*
DECAYS = (0.03, 0.01, 0.003, 0.001)  # the condition number grows from 8 to 200


def points(margin: float, count: int = 200, features: int = 10) -> Tensor:
    """Returns y * x of two classes; with a margin > 0 a plane separates them."""
    numbers = torch.Generator().manual_seed(0)
    x = torch.randn(count, features, generator=numbers, dtype=torch.float64)
    y = torch.where(x[:, 0] > 0, 1.0, -1.0)
    if margin > 0:
        x[:, 0] += margin * y
    else:
        y = y * torch.where(torch.rand(count, generator=numbers, dtype=torch.float64) < 0.2, -1.0, 1.0)
    return y[:, None] * x


def logistic(data: Tensor, decay: float, w: Tensor) -> Tensor:
    return torch.nn.functional.softplus(-(data @ w)).mean() + 0.5 * decay * w.square().sum()


def squared_hinge(data: Tensor, decay: float, w: Tensor) -> Tensor:
    return (1.0 - data @ w).clamp(min=0.0).square().mean() + 0.5 * decay * w.square().sum()


def hinge(data: Tensor, decay: float, w: Tensor) -> Tensor:
    return (1.0 - data @ w).clamp(min=0.0).mean() + 0.5 * decay * w.square().sum()


def descend(loss: Loss, features: int, steps: int, until: float = -torch.inf, average: bool = False, **options: object):
    """Yields the loss before each step of `distopt.SGD` from w = 0; options that are functions are of the step.

    Args:
        loss: The loss of the weights.
        features: The number of weights.
        steps: The most steps.
        until: The loss at which it ends.
        average: Yield the loss of the average of the weights, w_k with the weight k.
        options: Those of SGD.
    """
    w = torch.zeros(features, dtype=torch.float64, requires_grad=True)
    mean = torch.zeros_like(w)
    optimizer = distopt.SGD([w], **{name: value(1) if callable(value) else value for name, value in options.items()})
    for step in range(1, steps + 1):
        for name, value in options.items():
            optimizer.param_groups[0][name] = value(step) if callable(value) else value
        optimizer.zero_grad()
        value = loss(w)
        mean = mean.lerp(w.detach(), 2.0 / (step + 1))
        yield loss(mean).item() if average else value.item()
        if value.item() <= until:
            return
        value.backward()
        optimizer.step()


def minimum(loss: Loss, features: int) -> Tensor:
    """Returns where a smooth loss is least, by Newton's method with halved steps."""
    w = torch.zeros(features, dtype=torch.float64)
    for _ in range(50):
        gradient, curvature = jacobian(loss, w), hessian(loss, w)
        step = torch.linalg.solve(curvature, gradient)
        while loss(w - step) > loss(w) and step.norm() > 1e-14 * w.norm():
            step = 0.5 * step
        w = w - step
        if step.norm() < 1e-12 * w.norm():
            break
    return w


def slope(x: list[float], y: list[float]) -> float:
    """Returns the exponent b of the least-squares fit y = a x^b."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (x, y))
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


def over_steps(steps: int = 500) -> dict[str, list[float]]:
    """f - f* of the logistic loss on separable data, whose infimum is 0, at every step."""
    data = points(margin=1.0)
    loss = partial(logistic, data, 0.0)
    lr = 4.0 * len(data) / torch.linalg.matrix_norm(data, 2).item() ** 2  # 1 / L; the logistic curves by 1 / 4 at most
    ways: dict[str, dict[str, object]] = {
        "gradient descent": {},
        # Nesterov's (k - 1) / (k + 2), one step ahead: in torch's form the look-ahead of the next step is in this one.
        "Nesterov": {"nesterov": True, "momentum": lambda step: step / (step + 3)},
    }
    return {name: [*descend(loss, data.shape[1], steps, lr=lr, **options)] for name, options in ways.items()}


def over_conditions(kind: Callable[[Tensor, float, Tensor], Tensor]) -> tuple[list[float], dict[str, list[float]]]:
    """L / m by DECAYS, L the largest curvature, m the least at the minimum; and the steps to it, or inf."""
    data = points(margin=0.0)
    features = data.shape[1]
    scales = torch.logspace(0.0, -1.5, features, dtype=torch.float64)  # so that the data alone is ill-conditioned
    data = data * scales
    square = torch.linalg.matrix_norm(data, 2).item() ** 2 / len(data)
    most = 0.25 * square if kind is logistic else 2.0 * square
    found: dict[str, list[float]] = {"gradient descent": [], "heavy ball": [], "Nesterov": []}
    conditions = []
    for decay in DECAYS:
        loss = partial(kind, data, decay)
        least = minimum(loss, features)
        curvatures = torch.linalg.eigvalsh(hessian(loss, least))
        # The largest curvature anywhere, not that at the minimum, with which heavy ball ends in a cycle on both losses.
        m, L = curvatures[0].item(), most + decay
        conditions.append(L / m)
        root = (L / m) ** 0.5
        ways: dict[str, dict[str, object]] = {
            "gradient descent": {"lr": 2.0 / (L + m)},
            "heavy ball": {"lr": 4.0 / (L**0.5 + m**0.5) ** 2, "momentum": ((root - 1.0) / (root + 1.0)) ** 2},
            "Nesterov": {"lr": 1.0 / L, "momentum": (root - 1.0) / (root + 1.0), "nesterov": True},
        }
        start, end = loss(torch.zeros(features, dtype=torch.float64)).item(), loss(least).item()
        for name, options in ways.items():
            most_steps, goal = 6 * int(L / m), end + ACCURACY * (start - end)
            losses = [*descend(loss, features, most_steps, goal, **options)]
            found[name].append(len(losses) - 1.0 if losses[-1] <= goal else torch.inf)
    return conditions, found


def least_hinge(data: Tensor, decay: float) -> float:
    """Returns the minimum of the hinge loss, by coordinate ascent on its dual problem, to 1e-9.

    Reference: Hsieh et al., A Dual Coordinate Descent Method for Large-scale Linear SVM, ICML 2008.
    """
    x = data.numpy()
    most, alpha, w = 1.0 / (decay * len(x)), [0.0] * len(x), 0.0 * x[0]
    squares = (x * x).sum(1)
    for _ in range(300):
        for i in range(len(x)):
            new = min(max(alpha[i] - (x[i] @ w - 1.0) / squares[i], 0.0), most)
            w = w + (new - alpha[i]) * x[i]
            alpha[i] = new
    return hinge(data, decay, torch.from_numpy(w)).item()


def not_smooth(steps: int = 600, decay: float = 0.05) -> dict[str, list[float]]:
    """f - f* of the hinge loss at every step, by subgradients."""
    data = points(margin=0.0, count=100)
    loss, least = partial(hinge, data, decay), least_hinge(data, decay)
    ways: dict[str, dict[str, object]] = {
        "constant lr of 0.3": {"lr": 0.3},
        "constant lr of 0.03": {"lr": 0.03},
        "lr of 1 / (decay k), average": {"lr": lambda step: 1.0 / (decay * step), "average": True},
    }
    return {name: [value - least for value in descend(loss, 10, steps, **way)] for name, way in ways.items()}


def exponents(curves: dict[str, dict[str, tuple[list[float], list[float]]]]) -> dict[str, float]:
    """Returns the measured exponents, of k (over the last nine tenths of the steps) or of L / m."""
    found = {}
    for title, panel in curves.items():
        for name, (x, y) in panel.items():
            first = len(x) // 10 if len(x) > len(DECAYS) else 0
            if "constant" not in name and torch.inf not in y:
                found[f"{title}: {name}"] = slope(x[first:], y[first:])
    return found


def measure() -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """Runs everything; returns x and y of each curve of each panel of the picture."""
    panels = {"logistic, m = 0, over k": by_step(over_steps())}
    for kind in (logistic, squared_hinge):
        conditions, steps = over_conditions(kind)
        title = f"{kind.__name__.replace('_', ' ')}, over L / m"
        panels[title] = {name: (conditions, counts) for name, counts in steps.items()}
    return panels | {"hinge, over k": by_step(not_smooth())}


def by_step(curves: dict[str, list[float]]) -> dict[str, tuple[list[float], list[float]]]:
    return {name: ([*map(float, range(1, len(y) + 1))], y) for name, y in curves.items()}


def draw(panels: dict[str, dict[str, tuple[list[float], list[float]]]], file: Path) -> None:
    """Draws the panels, each curve with its exponent."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from PIL import Image

    found = exponents(panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(14, 3.6), layout="constrained")
    for axis, (title, curves) in zip(axes, panels.items()):
        for name, (x, y) in curves.items():
            exponent = found.get(f"{title}: {name}")
            axis.loglog(x, y, "o-" if len(x) == len(DECAYS) else "-", markersize=3)
            failed = f"{name}: not always" if torch.inf in y else name
            axis.lines[-1].set_label(failed if exponent is None else f"{name}: exponent {exponent:.2f}")
        over_k = title.endswith("k")
        axis.set(title=title.rsplit(",", 1)[0], xlabel="step k" if over_k else "condition number L / m")
        axis.set_ylabel("f - f*" if over_k else f"steps to {ACCURACY:g} of f(0) - f*")
        axis.legend(fontsize=7)
    figure.savefig(file, dpi=70)
    Image.open(file).quantize(64).save(file, optimize=True)  # a palette: a third of the bytes
    print(f"picture: {file}")


def main() -> None:
    """Prints the exponents and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, default=Path(__file__).parents[1] / "docs" / "convex.png")
    picture = parser.parse_args().picture
    panels = measure()
    for name, exponent in exponents(panels).items():
        print(f"{exponent:6.2f}  {name}")
    draw(panels, picture)


if __name__ == "__main__":
    main()
