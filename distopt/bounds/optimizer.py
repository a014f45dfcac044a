"""The bounds of the options of a param group, and of what surrounds an optimizer: SAM's radius, averages of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distopt.bounds import Bound, choice, integer, is_number, number, or_null, pair, switch

_DECAY = number(0.0, 1.0, below=True)  # 1 would keep the first value for ever
# The bound of every option of a param group that is checked.
BOUNDS: dict[str, Bound] = {
    "lr": number(0.0),
    "betas": pair("two numbers in [0, 1)", lambda beta1, beta2: 0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0),
    "eps": number(0.0),
    "weight_decay": number(0.0),
    "momentum": _DECAY,
    "alpha": _DECAY,
    "beta3": _DECAY,
    "slow_weight": number(0.0),
    "slow_warmup": or_null(integer(1)),
    "clip_exponent": or_null(number(0.0)),
    "dampening": number(0.0, 1.0),
    "lr_decay": number(0.0),
    "initial_accumulator_value": number(0.0),
    "trust_coefficient": number(0.0),
    "d0": number(0.0, above=True),
    "d_coef": number(0.0, above=True),
    "r": number(0.0),
    "weight_lr_power": number(0.0),
    "trust_clip": or_null(pair("two numbers 0 <= low <= high", lambda low, high: 0.0 <= low <= high, infinite=True)),
    "master_weights": choice("float32", "remainder", "none"),
    "state_bits": choice(32, 16, 8, 4),
    **{
        name: switch()
        for name in (
            *("nesterov", "centered", "maximize", "trust_ratio", "capturable", "cautious", "cautious_decay"),
            "train_mode",
        )
    },
}
# Those of Adafactor, where they are others.
FACTORED: dict[str, Bound] = {
    "eps": Bound("two numbers >= 0, or null and a number >= 0", lambda eps: _are_two_epsilons(eps)),
    "beta2_decay": Bound("a number <= 0", lambda power: is_number(power) and power <= 0.0),  # type: ignore[operator]
    "d": number(1.0),
}
# Those of Muon, besides the others.
MATRICES: dict[str, Bound] = {
    "ns_coefficients": Bound("three numbers", lambda values: _are_numbers(values, 3)),
    "ns_steps": Bound("an integer from 1 to 99", lambda steps: integer(1).accepts(steps) and steps < 100),  # type: ignore[operator]
    "adjust_lr_fn": or_null(choice("original", "match_rms_adamw")),
    "ns_dtype": choice("bfloat16", "float32"),
    "exchange_mib": integer(1),
}
# Those of averages of the weights.
AVERAGE = {"decay": _DECAY, "window": integer(1), "every": integer(1)}
# Factors of SAM's radius.
RHO_FACTORS = or_null(Bound("factors >= 0 by step, such as {0: 0.0, 1000: 1.0},", lambda value: _are_factors(value)))


def _are_two_epsilons(value: object) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        return False
    return or_null(number(0.0)).accepts(value[0]) and number(0.0).accepts(value[1])


def _are_numbers(values: object, count: int) -> bool:
    return isinstance(values, Sequence) and len(values) == count and all(map(is_number, values))


def _are_factors(value: object) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    return all(integer(0).accepts(step) and is_number(factor) and factor >= 0 for step, factor in value.items())
