"""The keys of the configuration on the update rule."""

from __future__ import annotations

from distopt import bounds
from distopt.bounds import either
from distopt.bounds.optimizer import BOUNDS, FACTORED, MATRICES
from distopt.job.key import Key

OPTIMIZER_KEYS: dict[str, Key] = {
    "optimizer.lr": Key(BOUNDS["lr"], "the learning rate, before the schedule"),
    "optimizer.betas": Key(
        BOUNDS["betas"],
        "decay rates of the averages of the gradient and of its square",
    ),
    "optimizer.eps": Key(
        either(BOUNDS["eps"], FACTORED["eps"]),
        "added to the denominator; MeZO's distance of the two points, > 0; Adafactor's two: the least divisor, and the "
        "least RMS of the weights in its rate",
    ),
    "optimizer.beta2_decay": Key(FACTORED["beta2_decay"], "1 - beta2 is the step to this power"),
    "optimizer.d": Key(FACTORED["d"], "RMS above which Adafactor clips the update of a parameter"),
    "optimizer.weight_decay": Key(BOUNDS["weight_decay"], "weight decay of the parameters that decay"),
    "optimizer.momentum": Key(BOUNDS["momentum"], "decay rate of the momentum"),
    "optimizer.dampening": Key(BOUNDS["dampening"], "1 - the factor of the gradient in the momentum"),
    "optimizer.nesterov": Key(BOUNDS["nesterov"], "Nesterov's momentum"),
    "optimizer.alpha": Key(BOUNDS["alpha"], "decay rate of the average of the squared gradient"),
    "optimizer.beta3": Key(BOUNDS["beta3"], "decay rate of AdEMAMix's slow average of the gradient"),
    "optimizer.slow_weight": Key(BOUNDS["slow_weight"], "weight of AdEMAMix's slow average (the paper's alpha)"),
    "optimizer.slow_warmup": Key(
        BOUNDS["slow_warmup"], "steps over which AdEMAMix raises both; null: none, the end values from the first step"
    ),
    "optimizer.clip_exponent": Key(
        BOUNDS["clip_exponent"], "ADOPT bounds a scaled gradient by step to this power; null: no bound"
    ),
    "optimizer.ns_coefficients": Key(MATRICES["ns_coefficients"], "Muon's polynomial of the singular values"),
    "optimizer.ns_steps": Key(MATRICES["ns_steps"], "Muon's Newton-Schulz iterations"),
    "optimizer.adjust_lr_fn": Key(
        MATRICES["adjust_lr_fn"], "Muon's factor of the step of a matrix; null: sqrt(max(1, rows / columns))"
    ),
    "optimizer.ns_dtype": Key(MATRICES["ns_dtype"], "the dtype of Muon's Newton-Schulz iterations"),
    "optimizer.exchange_mib": Key(
        MATRICES["exchange_mib"], "MiB of full matrices that Muon sends to a process at once; two are under way"
    ),
    "optimizer.centered": Key(BOUNDS["centered"], "subtract the squared average of the gradient"),
    "optimizer.lr_decay": Key(BOUNDS["lr_decay"], "lr / (1 + (step - 1) lr_decay)"),
    "optimizer.initial_accumulator_value": Key(
        BOUNDS["initial_accumulator_value"], "first value of the sum of squares"
    ),
    "optimizer.trust_coefficient": Key(BOUNDS["trust_coefficient"], "factor of the trust ratio"),
    "optimizer.trust_ratio": Key(BOUNDS["trust_ratio"], "scale the update of each parameter by |parameter| / |update|"),
    "optimizer.trust_clip": Key(
        BOUNDS["trust_clip"],
        "bounds of the trust ratio; [0.01, 10.0] is DeepSpeed's",
    ),
    "optimizer.seed": Key(bounds.SEED, "seed of MeZO's noise"),
    "optimizer.d0": Key(BOUNDS["d0"], "first estimate of the step size d"),
    "optimizer.d_coef": Key(BOUNDS["d_coef"], "factor of the estimate of d"),
    "optimizer.r": Key(BOUNDS["r"], "power of the step in the weights of schedule-free averages"),
    "optimizer.weight_lr_power": Key(BOUNDS["weight_lr_power"], "power of lr in the weights of schedule-free averages"),
    "optimizer.capturable": Key(BOUNDS["capturable"], "for CUDA graphs, which distopt.train does not capture"),
    "optimizer.cautious": Key(
        BOUNDS["cautious"], "drop the elements of the update whose sign is not the gradient's, and scale up the others"
    ),
    "optimizer.cautious_decay": Key(
        BOUNDS["cautious_decay"], "decay only the weights that the update does not move away from 0"
    ),
    "optimizer.master_weights": Key(
        BOUNDS["master_weights"],
        "beside bfloat16 weights: float32 masters; remainder, the 16 bits that they lack; none, to round at random",
    ),
    "optimizer.state_bits": Key(
        BOUNDS["state_bits"],
        "bits of each moment of a matrix: 32, or 16, 8 or 4, rounded at random in blocks of its rows",
    ),
    "optimizer.maximize": Key(BOUNDS["maximize"], "ascend instead of descend"),
}
