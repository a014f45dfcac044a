"""Initialisations: Xavier, He, GPT-2, orthogonal, truncated normal and muP, on any shard of any parameter."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distopt import counter
from distopt.bounds import number
from distopt.bounds.init import BOUNDS
from distopt.init.places import part_of
from distopt.init.quantiles import standardized
from distopt.init.roles import Named, residual_factors, roles
from distopt.init.scheme import RESIDUAL, SCHEMES, Scheme
from distopt.init.width import Shapes, Width, widths
from distopt.layout import full_shape
from distopt.layout.places import global_indices

_LARGEST = 2**24  # elements of an orthogonal matrix


class Initialization:
    """The arguments of `initialize`, checked; `distopt.train` makes one of `init=`.

    Args:
        scheme: As for `initialize`, like the others but the last.
        base_width: The width of the base model of muP, from which the job makes its shapes.

    Raises:
        ValueError: As `initialize`.
    """

    def __init__(
        self,
        scheme: str,
        seed: int = 0,
        fan: str | None = None,
        gain: float | None = None,
        std: float | None = None,
        embedding_std: float = 0.02,
        residual: str | None = None,
        stds: Mapping[str, float] | None = None,
        base_width: int | None = None,
    ) -> None:
        for name, value in locals().copy().items():
            if name in BOUNDS:
                BOUNDS[name].check(name, value)
        known = SCHEMES[scheme]
        for name, given, own in (("fan", fan, known.fan), ("gain", gain, known.gain), ("std", std, known.std)):
            if given is not None and own is None:
                usable = ", ".join(key for key, one in SCHEMES.items() if getattr(one, name) is not None)
                raise ValueError(f"{name}={given}: the scheme {scheme} has none; leave it out, or use one of {usable}")
        if residual is not None and not known.residual:
            raise ValueError(f"residual={residual}: only the scheme gpt2 scales residual projections; leave it out")
        for pattern, value in (stds or {}).items():
            _compiled("stds", pattern)
            number(0).check(f"stds.{pattern}", value)
        _compiled("residual", residual or RESIDUAL)
        self.name, self.seed, self.embedding_std, self.base_width = scheme, seed, embedding_std, base_width
        self.scheme = Scheme(known.distribution, fan or known.fan, gain or known.gain, std or known.std, known.residual)
        self.residual, self.stds = residual or RESIDUAL, dict(stds or {})

    def check_mup(self, given: bool) -> None:
        """Raises ValueError where muP lacks its base model, or has one that the scheme cannot use."""
        if self.name == "mup" and not given:
            raise ValueError(
                "init=mup needs the base model, whose learning rate is known: give mup= (in a job init.base_width)"
            )
        if given and self.name == "orthogonal":
            raise ValueError(
                "muP scales standard deviations, and orthogonal has none: use mup, gpt2 or a normal scheme"
            )

    @torch.no_grad()
    def fill(
        self, model: nn.Module, only: Collection[Tensor] | None = None, mup: Mapping[str, Width] | None = None
    ) -> None:
        """Fills the parameters of a model.

        Args:
            model: The model, whose names decide on the values.
            only: The parameters to fill; None for all.
            mup: The widths, as `widths` returns them.
        """
        self.check_mup(mup is not None)
        found, ids = roles(model), None if only is None else {id(p) for p in only}
        factors = residual_factors([n.name for n in found], self.residual) if self.scheme.residual else {}
        self._check_patterns(found)
        found = [named for named in found if ids is None or id(named.param) in ids]
        for named in found:  # before any value changes
            if self._std(named) is None and named.role.kind == "matrix":
                _check_orthogonal(named)
            part_of(named.name, named.param)
        for named in found:
            width = (mup or {}).get(named.name, Width())
            self._fill(named, factors.get(named.name, 1.0) * width.std, width)

    def _check_patterns(self, found: Iterable[Named]) -> None:
        names = [named.name for named in found]
        for pattern in self.stds:
            if not any(re.search(pattern, name) for name in names):
                raise ValueError(f"no parameter matches stds.{pattern}: the first names are {', '.join(names[:5])}")

    def _std(self, named: Named, width: Width | None = None) -> float | None:
        """Returns the standard deviation in the base model; None for an orthogonal matrix and for a constant."""
        for pattern, value in self.stds.items():
            if re.search(pattern, named.name):
                return float(value)
        role, scheme = named.role, self.scheme
        if role.kind == "embedding":
            return scheme.std or self.embedding_std
        if role.kind == "constant" or (role.kind == "matrix" and scheme.distribution == "orthogonal"):
            return None
        if role.kind != "matrix":
            raise ValueError(
                f"{named.name} of shape {list(full_shape(named.param))} belongs to {role.module}, whose fan is "
                f"unknown: give its standard deviation, stds={{{re.escape(named.name)!r}: 0.02}}"
            )
        width = width or Width()
        fan_in, fan_out = role.fan_in / width.fan_in, role.fan_out / width.fan_out
        fan = {"in": fan_in, "out": fan_out, "avg": (fan_in + fan_out) / 2.0}.get(scheme.fan or "", 1.0)
        return scheme.std if scheme.std is not None else (scheme.gain or 1.0) / math.sqrt(max(fan, 1.0))

    def _fill(self, named: Named, factor: float, width: Width) -> None:
        shape, (part, place) = tuple(full_shape(named.param)), part_of(named.name, named.param)
        std = self._std(named, width)
        if std is None and named.role.kind == "constant":
            part.fill_(named.role.value)
            return
        if not part.numel():
            return
        start = counter.key(f"{self.seed}/{named.name}")
        target = part.view(-1) if part.is_contiguous() else torch.empty(part.numel(), dtype=part.dtype).to(part.device)
        matrix = _orthogonal(start, shape, self.scheme.gain or 1.0) if std is None else None
        for first, index in global_indices(place, shape, part.device):
            if matrix is not None:
                values = matrix[index.cpu()].to(part.device)
            else:
                name = self.scheme.distribution if self.scheme.distribution != "orthogonal" else "normal"
                values = standardized(name, counter.uniforms(start, index)).mul_((std or 0.0) * factor)
                if named.role.padding is not None:
                    values[index // shape[1] == named.role.padding] = 0.0
            target[first : first + len(index)] = values.float() if part.element_size() < 8 else values
        if not part.is_contiguous():
            part.copy_(target.view(part.shape))


def _orthogonal(start: int, shape: tuple[int, ...], gain: float) -> Tensor:
    """Returns a matrix with orthonormal rows or columns, whichever are fewer, times a gain; flat, float64, on the CPU.

    The Q of the QR decomposition of a normal matrix, with the signs that make R's diagonal positive: then Q is uniform
    over the orthogonal matrices. One thread, since LAPACK's bits depend on the number of threads.
    """
    rows, numel = shape[0], math.prod(shape)
    index, threads = torch.arange(numel), torch.get_num_threads()
    normal = standardized("normal", counter.uniforms(start, index)).view(rows, -1)
    wide = normal.shape[0] < normal.shape[1]
    try:
        torch.set_num_threads(1)
        q, r = torch.linalg.qr(normal.T if wide else normal)
    finally:
        torch.set_num_threads(threads)
    q *= r.diagonal().sign()
    return (q.T if wide else q).mul(gain).reshape(-1)


def _check_orthogonal(named: Named) -> None:
    if (numel := math.prod(full_shape(named.param))) > _LARGEST:
        raise ValueError(
            f"{named.name} has {numel} elements, and every rank decomposes an orthogonal matrix in full: at most 2^24 "
            "(4096 x 4096); use he_normal, or stds for this one"
        )


def _compiled(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: {pattern!r} is not a regular expression ({error})") from error


def initialize(
    model: nn.Module, scheme: str = "he_normal", *, seed: int = 0, mup: nn.Module | Shapes | None = None, **options: Any
) -> None:
    """Gives the parameters of a model their first values, on every shard those of the full tensor.

        w(i) = std * q(u(seed, name, i))           q: the quantile function of the scheme's distribution
        std = gain / sqrt(fan), or a number        fan: fan_in, fan_out or their mean

    `u` counts instead of drawing (`distopt.counter`), so that the same seed gives the same weights bit for bit at
    every number of ranks and on every kind of sharding; each rank computes its own shard and communicates nothing. The
    schemes are in `distopt.init.scheme`, what counts as a fan in `distopt.init.roles`. Gains of norms become 1 (0 where
    the norm multiplies by 1 + weight), biases 0, embeddings normal with `embedding_std` and with zeros in their padding
    row. Tied weights are filled once, as an embedding. Frozen parameters are filled too, buffers are not: a model that
    comes from the meta device needs its own (BatchNorm's statistics, rotary tables) from elsewhere.

    Values are computed in float64 and rounded to float32, then to 16 bits if the parameter has 16. Another
    kind of device may round a few of them otherwise. A matrix of `orthogonal` is decomposed in full
    by every rank, one at a time, which takes some 40 bytes for each of its elements.

    Call it before the optimizer is made (its float32 masters would keep the old values) and before
    `deepspeed.initialize`; a model of `deepspeed.zero.Init` is filled partition by partition.

    Args:
        model: A model in memory: plain, wrapped by DDP, or of DTensors (FSDP2, tensor parallelism), for example after
            `to_empty`.
        scheme: xavier_uniform, xavier_normal, he_uniform, he_normal, truncated_normal, orthogonal, gpt2 or mup.
        seed: An integer >= 0.
        mup: The base model, or its shapes (`distopt.base_shapes`): standard deviations are then those of the scheme in
            the base model, times the factor of `distopt.init.width`. The scheme `mup` needs it.
        **options: `fan`: in, out or avg. `gain`, `std`: numbers > 0, each in schemes that have one.
            `embedding_std`: 0.02; schemes with `std` use that. `residual`: a regular expression for the names of the
            projections that gpt2 scales. `stds`: standard deviations >= 0 by a regular expression for names, before all
            rules; for parameters without a known fan.

    Raises:
        ValueError: For an option that is out of bounds or that the scheme does not have; for a parameter whose module
            has no known fan; for parameters on the meta device, of FSDP1 or of an engine of DeepSpeed; and as
            `distopt.init.widths`. Nothing has changed then.
    """
    if hasattr(model, "zero_optimization_stage"):
        raise ValueError(
            "the model is an engine of DeepSpeed, whose masters are made: call it before deepspeed.initialize"
        )
    if unknown := options.keys() - {"fan", "gain", "std", "embedding_std", "residual", "stds"}:
        raise TypeError(f"initialize() got an unexpected keyword argument {min(unknown)!r}")
    made = Initialization(scheme, seed, **options)
    made.check_mup(mup is not None)
    made.fill(model, mup=None if mup is None else widths(model, mup))
