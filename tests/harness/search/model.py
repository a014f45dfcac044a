"""The model of a case, and its loss: pure functions, for the ranks and for the reference alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.harness.search.case import Param

SAMPLES = 12  # divides by 1 to 4 ranks, so that the mean of their means is the mean


def feature(p: Tensor, samples: Tensor) -> Tensor:
    """What one parameter adds to the outputs of each sample: [samples, elements], nonlinear in the parameter."""
    flat = p.reshape(-1)
    return (flat + 0.1 * flat.square()) * (1.0 + 0.1 * torch.sin(samples))[:, None]


def joined(features: Sequence[Tensor]) -> Tensor:
    """The outputs; each depends on all parameters."""
    outputs = torch.cat(list(features), dim=1)
    return outputs + 0.3 * outputs.sum(1, keepdim=True) / max(1, outputs.shape[1])


def criterion(outputs: Tensor, params: Sequence[Param], used: Sequence[int], step: int) -> Tensor:
    """Half the mean squared distance to targets of size 1 to 3 with alternating signs, which move with the step.

    So gradients start far from zero: Adam's first direction is their sign, which rounding must not turn.
    """
    targets = [_target(i, torch.Size(params[i].shape).numel(), step) for i in used]
    target = torch.cat([t for i, t in zip(used, targets) for _ in range(1 + params[i].tied)])
    return 0.5 * (outputs - target.to(outputs.dtype)).square().sum(1).mean()


def _target(i: int, numel: int, step: int) -> Tensor:
    index = torch.arange(numel, dtype=torch.float64)
    return (1.0 - 2.0 * (index % 2)) * (2.0 + torch.sin(index + 2.0 * i + 3.0 * step))


def batch(step: int) -> Tensor:
    return torch.rand(SAMPLES, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def initial(params: Sequence[Param]) -> list[Tensor]:
    """Numbers between -0.5 and 0.5 that float32 has too."""
    numbers = torch.Generator().manual_seed(0)
    drawn = [torch.rand(p.shape, generator=numbers, dtype=torch.float64).sub_(0.5).float().double() for p in params]
    return [torch.zeros_like(value) if p.zero else value for p, value in zip(params, drawn)]


class Unit(nn.Module):
    """Some of a case's parameters, by their index; those that are tied under two names."""

    def __init__(self, params: dict[int, nn.Parameter], tied: Sequence[int] = ()) -> None:
        super().__init__()
        for i, p in params.items():
            self.register_parameter(f"p{i}", p)
        for i in tied:
            self.register_parameter(f"tied{i}", params[i])

    def features(self, samples: Tensor, used: Sequence[int]) -> dict[str, Tensor]:
        """By name, in the order of `used`."""
        names = [name for i in used for name in (f"p{i}", f"tied{i}") if name in self._parameters]
        return {name: feature(_full(getattr(self, name)), samples) for name in names}

    def forward(self, samples: Tensor, used: Sequence[int]) -> dict[str, Tensor]:
        return self.features(samples, used)


class Model(Unit):
    """All of a case's parameters, some of them in the submodule `unit`; returns the outputs."""

    def __init__(self, params: Sequence[Param], dtype: torch.dtype) -> None:
        values = [nn.Parameter(value.to(dtype)) for value in initial(params)]
        inside = {i: values[i] for i, p in enumerate(params) if p.unit}
        outside = {i: values[i] for i, p in enumerate(params) if not p.unit}
        super().__init__(outside, [i for i in outside if params[i].tied])
        self.unit = Unit(inside, [i for i in inside if params[i].tied])
        self.case_params = params

    def forward(self, samples: Tensor, used: Sequence[int]) -> Tensor:
        features = self.features(samples, used) | self.unit(samples, used)
        names = [name for i in used for name in (f"p{i}", f"tied{i}")]
        return joined([features[name] for name in names if name in features])

    def by_index(self) -> list[Tensor]:
        """The parameters as they are registered now, which FSDP2 replaces."""
        return [getattr(self.unit if p.unit else self, f"p{i}") for i, p in enumerate(self.case_params)]


def _full(p: Tensor) -> Tensor:
    return p.full_tensor() if hasattr(p, "full_tensor") else p  # type: ignore[operator]
