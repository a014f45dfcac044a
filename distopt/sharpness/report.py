"""All probes of a checkpoint: their values as a dictionary, and as a table of at most 80 columns."""

from __future__ import annotations

import argparse
from typing import Any

from tqdm import tqdm

from distopt.sharpness.ball import worst_loss
from distopt.sharpness.directions import filter_normalised, gaussian
from distopt.sharpness.hessian import eigenvalues, trace
from distopt.sharpness.landscape import line, plane
from distopt.sharpness.noise import noisy_loss
from distopt.sharpness.objective import Objective


def measure(objective: Objective, options: argparse.Namespace, shows: bool) -> dict[str, Any]:
    """Runs every probe with a progress bar; every rank has to call it.

    Args:
        objective: The loss of the checkpoint.
        options: Those of the command line.
        shows: Whether this rank shows the bar.

    Returns:
        The values, of types that JSON has.
    """
    with tqdm(desc="sharpness", unit=" passes", leave=False, disable=not shows) as bar:
        objective.progress = lambda: bar.update() and None
        bar.set_description("worst loss in a ball")
        ball = worst_loss(objective, options.rho, options.steps, options.seed)
        bar.set_description("eigenvalues")
        top = eigenvalues(objective, options.eigenvalues, options.iterations, seed=options.seed)
        bar.set_description("trace")
        diagonal = trace(objective, options.draws, options.seed)
        bar.set_description("loss under noise")
        noisy = noisy_loss(objective, options.noise, options.draws, options.seed)
        bar.set_description("landscape")
        first, second = (
            filter_normalised(objective, gaussian(objective, seed)) for seed in (options.seed, options.seed + 1)
        )
        factors = _around_zero(options.points, options.width)
        # As long as the random direction: so that both lines reach as far.
        length = objective.norm(first)
        lines = {
            "random direction": line(objective, first, factors),
            "top eigenvector": line(objective, [v * length for v in top.vector], factors),
        }
        steps = _around_zero(options.plane, options.width) if options.plane else []
        grid = plane(objective, first, second, steps) if steps else []
    return {
        "weights": objective.numel,
        "loss": ball.loss,
        "rho": options.rho,
        "worst_loss": ball.worst,
        "worst_loss_path": ball.path,
        "eigenvalues": top.values,
        "eigenvalue_errors": top.errors,
        "hessian_vector_products": top.products,
        "trace": diagonal.value,
        "trace_standard_error": diagonal.error,
        "noise": options.noise,
        "noisy_loss": noisy.value,
        "noisy_loss_standard_error": noisy.error,
        "line": {"factors": factors, "losses": lines},
        "plane": {"factors": steps, "losses": grid} if steps else None,
    }


def table(found: dict[str, Any]) -> str:
    """Returns the values as a text of at most 80 columns."""
    rows = [
        ("loss", f"{found['loss']:.4f} nats per token"),
        (f"worst loss, rho {found['rho']:g}", f"{found['worst_loss']:.4f}, {len(found['worst_loss_path'])} steps"),
        (f"loss, noise {found['noise']:g}", _plus_minus(found["noisy_loss"], found["noisy_loss_standard_error"])),
        ("trace of the Hessian", _plus_minus(found["trace"], found["trace_standard_error"])),
    ]
    for i, (value, error) in enumerate(zip(found["eigenvalues"], found["eigenvalue_errors"]), 1):
        rows.append((f"eigenvalue {i}", f"{value:.4g}, residual {error:.1g}"))
    return "\n".join(f"{name:24} {value}" for name, value in rows)


def _plus_minus(value: float, error: float) -> str:
    return f"{value:.4f} +- {error:.2g}" if abs(value) < 100 else f"{value:.1f} +- {error:.2g}"


def _around_zero(points: int, width: float) -> list[float]:
    """Evenly spaced values in [-width, width]; 0 is one of them, as `points` is odd."""
    half = points // 2
    return [width * i / half for i in range(-half, half + 1)]
