"""Gradient norms over the depth of a 50-layer tanh network at four initialisations: a table, and a picture."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import distopt

INITS: dict[str, Callable[[Tensor], Any]] = {
    "half of Xavier": lambda weight: nn.init.xavier_normal_(weight, gain=0.5),
    "Xavier": nn.init.xavier_normal_,
    "He": nn.init.kaiming_normal_,
    "three times Xavier": lambda weight: nn.init.xavier_normal_(weight, gain=3.0),
}


def add_parser(benchmarks: Any) -> None:
    """Add the options of `python -m benchmarks depth`."""
    parser = benchmarks.add_parser("depth", help="gradients over the depth of a network, at four initialisations")
    parser.add_argument("--layers", type=int, default=50, help="number of layers, at least 6")
    parser.add_argument("--width", type=int, default=64, help="units of a layer")
    parser.add_argument("--picture", type=Path, help="also draw the norms into this PNG file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the factor per layer of each initialisation, by the monitor and by Jacobian probes."""
    if options.layers < 6 or options.width < 1:
        raise SystemExit(f"--layers must be >= 6 and --width >= 1, got {options.layers} and {options.width}")
    print("| initialisation | factor of biases | factor of weights | gain of a layer | product | through | alarm |")
    print("|---|---|---|---|---|---|---|")
    norms = {}
    for name, init in INITS.items():
        monitor, gains = first_step(init, options.layers, options.width)
        trends = {trend.series.name: trend for trend in monitor.trends()}
        bias, weight = trends["*.0.bias"], trends["*.0.weight"]
        mean = gains.product ** (1.0 / options.layers)
        alarms = ", ".join(dict.fromkeys(alarm.kind for alarm in monitor.alarms)) or "none"
        print(
            f"| {name} | {bias.factor:.3f} | {weight.factor:.3f} | {mean:.3f} | {gains.product:.2g} | "
            f"{gains.through:.2g} | {alarms} |"
        )
        assert monitor.last is not None
        norms[name] = {series: monitor.last.gradient[trends[series].series.layers] for series in trends}
    if options.picture:
        _draw(options.picture, norms)


def first_step(init: Callable[[Tensor], Any], layers: int, width: int) -> tuple[distopt.health.Monitor, Any]:
    """Take one step of a network; return the monitor, and the gains of the layers before the step."""
    torch.manual_seed(0)
    linears = [nn.Linear(width, width) for _ in range(layers)]
    for linear in linears:
        init(linear.weight)
        nn.init.zeros_(linear.bias)
    model = nn.Sequential(*(nn.Sequential(linear, nn.Tanh()) for linear in linears))
    x = torch.randn(64, width)
    gains = distopt.health.jacobian_gains(list(model), lambda: model(x), probes=4)
    optimizer = distopt.SGD(model.parameters(), lr=1e-3)
    monitor = distopt.health.Monitor(optimizer, model, on_alarm=lambda alarm: None)
    optimizer.zero_grad()
    (model(x) - x).square().mean().backward()
    distopt.clip_grad_norm_(optimizer)
    optimizer.step()
    monitor.flush()
    return monitor, gains


def _draw(file: Path, norms: dict[str, dict[str, Tensor]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True, sharey=True, layout="constrained")
    for axis, (series, what) in zip(axes, (("*.0.bias", "biases"), ("*.0.weight", "weights"))):
        for name, found in norms.items():
            axis.plot(range(1, len(found[series]) + 1), found[series], label=name)
        axis.set_yscale("log")
        axis.set_xlabel("layer, from input to output")
        axis.set_title(f"gradient norm of the {what}, first step")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("norm (dimensionless)")
    axes[1].legend(fontsize=8)
    figure.savefig(file, dpi=80)
    plt.close(figure)
