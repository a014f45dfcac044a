"""What torch's own tests of its optimizers check (TestOptimRenewed in its test/test_optim.py), of ours.

The configurations are torch's. Of its tests these have no counterpart: several GPUs in one process (a rank has one),
complex and sparse parameters (refused, below), the peak memory of foreach, and LBFGS.
"""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import distopt
from distopt import LAMB, LARS, SGD, Adagrad, Adam, AdamW, RMSprop
from distopt.kernels.rules import Rule
from tests.harness.torch_configs import CONFIGS, Config, every_config, every_taken, every_way

CLASSES = (SGD, Adagrad, RMSprop, Adam, AdamW)
# The order of operations differs: 1e-16 and 6e-8 in each, stretched by Adam where a gradient is small.
CLOSE = {torch.float64: {"rtol": 1e-9, "atol": 1e-12}, torch.float32: {"rtol": 1e-4, "atol": 1e-5}}


def layer(dtype: torch.dtype = torch.float64, contiguous: bool = True) -> list[Tensor]:
    """A matrix and a vector."""
    numbers = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=numbers, dtype=dtype) for shape in ((10, 5, 2), (10, 2))]
    return [nn.Parameter(p[..., 0].contiguous() if contiguous else p[..., 0]) for p in params]


def forward_backward(opt: torch.optim.Optimizer, params: list[Tensor]) -> Tensor:
    opt.zero_grad()
    weight, bias = params[:2]
    loss = (weight.mv(torch.linspace(-1.0, 1.0, weight.shape[1], dtype=weight.dtype)) + bias).pow(2).sum()
    loss.backward()
    return loss


def walk(opt: torch.optim.Optimizer, params: list[Tensor], steps: int = 5) -> None:
    for _ in range(steps):
        forward_backward(opt, params)
        opt.step()


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, **CLOSE[p.dtype])


# The table itself.


@pytest.mark.matrix
def test_the_table_is_torchs() -> None:
    """In a process of its own, since torch's test utilities change settings of the process that imports them."""
    program = """
import json, sys, types, unittest
sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)  # what common_utils wants of a package
from torch.testing._internal.common_optimizers import optim_db
kwargs = lambda info: [x.kwargs for device in ("cpu", "cuda") for x in info.optim_inputs_func(device=device)]
print(json.dumps({info.name: [sorted((k, repr(v)) for k, v in x.items()) for x in kwargs(info)] for info in optim_db}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout.splitlines()[-1])
    for cls, configs in CONFIGS.items():
        ours = {tuple(sorted((k, repr(v)) for k, v in kwargs.items())) for kwargs in configs}
        assert ours == {tuple(map(tuple, kwargs)) for kwargs in theirs[cls.__name__]}, cls


@every_config
def test_refusals_are_the_same_everywhere(config: Config) -> None:
    """In the constructor, in a param group, and in one that is added."""
    if config.refused is None:
        opt = config.make(layer())
        assert not {"foreach", "fused", "differentiable", "amsgrad"} & opt.param_groups[0].keys()
        if config.refused_on_the_cpu:
            with pytest.raises(ValueError, match=r"capturable=True needs Triton's kernels"):
                walk(opt, opt.param_groups[0]["params"], 1)
        return
    with pytest.raises(ValueError, match=config.refused):
        config.make(layer())
    with pytest.raises(ValueError, match=config.refused):
        config.cls([{"params": layer(), **config.kwargs}])
    opt = config.cls(layer())
    with pytest.raises(ValueError, match=config.refused):
        opt.add_param_group({"params": layer(), **config.kwargs})
    assert len(opt.param_groups) == 1


# The update.


@every_way
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_equals_torch(config: Config, dtype: torch.dtype) -> None:
    ours, theirs = layer(dtype), layer(dtype)
    opt, peer = config.make(ours), config.make_peer(theirs)
    walk(opt, ours, 5)
    walk(peer, theirs, 5)
    assert_close(ours, theirs)
    for p, q in zip(ours, theirs):
        buffers = {name: value for name, value in peer.state[q].items() if value is not None and name != "step"}
        assert_close([opt.state[p][name] for name in buffers], [*buffers.values()])


@every_taken
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_goes_in_the_right_direction(config: Config, contiguous: bool) -> None:
    params = layer(torch.float32, contiguous)
    opt = config.make(params)
    plateau, steps = lr_scheduler.ReduceLROnPlateau(opt), lr_scheduler.StepLR(opt, gamma=0.9, step_size=10)
    start = forward_backward(opt, params).item()
    for _ in range(20):
        loss = opt.step(lambda: forward_backward(opt, params))
        steps.step()
        plateau.step(loss.item())
    end = forward_backward(opt, params).item()
    assert end > start if config.up else end < start


@every_taken
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-D", "1-element"])
def test_a_tensor_lr_is_a_learning_rate(config: Config, shape: tuple[int, ...]) -> None:
    """As its value; and a schedule changes it in place."""
    ours, again = layer(), layer()
    lr = torch.full(shape, 2.0**-10)
    opt, number = config.make(ours, lr=lr), config.make(again, lr=2.0**-10)
    schedules = [lr_scheduler.ExponentialLR(o, gamma=0.5) for o in (opt, number)]
    for _ in range(5):
        walk(opt, ours, 1)
        walk(number, again, 1)
        for schedule in schedules:
            schedule.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, again))
    assert opt.param_groups[0]["lr"] is lr
    assert lr.item() == number.param_groups[0]["lr"] == 2.0**-15
    assert opt.state_dict()["param_groups"][0]["lr"] is lr

    other = config.make(layer())
    other.load_state_dict(reloaded(opt.state_dict()))
    assert torch.equal(other.param_groups[0]["lr"], lr)
    assert other.param_groups[0]["lr"].shape == shape


@every_taken
def test_every_group_has_its_own_options(config: Config) -> None:
    """A parameter in a group of lr 1e-28 stays; weight_decay=0 in a group is that of the group."""
    if "initial_accumulator_value" in config.kwargs:  # of which torch's Adagrad takes the constructor's alone
        return
    ours, theirs = ([*layer(), nn.Parameter(torch.ones(2))] for _ in range(2))
    for make, params in ((config.cls, ours), (config.peer, theirs)):
        first, second = (copy.deepcopy(config.kwargs) | more for more in ({"lr": 1e-3}, {"weight_decay": 0.0}))
        groups = [{"params": params[:1], **first}, {"params": params[1:2], **second}, {"params": params[2:]}]
        opt = make(groups, lr=1e-28)
        for _ in range(5):
            forward_backward(opt, params)
            params[2].grad = torch.full((2,), 0.5)
            opt.step()
    assert_close(ours, theirs)
    assert torch.equal(ours[2], torch.ones(2))


@every_taken
def test_no_gradient_no_step(config: Config) -> None:
    params = [torch.ones(2, 3) for _ in range(2)]
    opt = config.make(params)
    assert opt.step(lambda: torch.tensor([1.0])) == 1.0
    assert all(torch.equal(p, torch.ones(2, 3)) for p in params)


@every_taken
@pytest.mark.parametrize("shape", [(5, 1), (), (0, 3)], ids=str)
def test_a_gradient_of_zeros_changes_weights_by_decay_only(config: Config, shape: tuple[int, ...]) -> None:
    ours, theirs = (torch.ones(shape, requires_grad=True) for _ in range(2))
    opt, peer = config.make([ours]), config.make_peer([theirs])
    for p, o in ((ours, opt), (theirs, peer)):
        p.grad = torch.zeros(shape)
        o.step()
    assert_close([ours], [theirs])
    if not opt.param_groups[0]["weight_decay"]:
        assert torch.equal(ours, torch.ones(shape))


@every_taken
def test_can_be_printed(config: Config) -> None:
    assert repr(config.make(layer())).startswith(f"{config.cls.__name__} (\nParameter Group 0")


# State dicts.


def reloaded(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def named(params: list[Tensor], names: bool) -> list[Any]:
    return [(f"name{i}", p) for i, p in enumerate(params)] if names else params


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    torch.testing.assert_close(a["state"], b["state"], rtol=0, atol=0)
    assert [sorted(group) for group in a["param_groups"]] == [sorted(group) for group in b["param_groups"]]
    for group, other in zip(a["param_groups"], b["param_groups"]):
        assert all(group[name] == other[name] for name in group)


@every_taken
@pytest.mark.parametrize(("names", "other_names"), [(False, False), (True, False), (False, True)])
def test_a_state_dict_is_the_state(config: Config, names: bool, other_names: bool) -> None:
    """Saved and loaded (`weights_only`), the other goes on bit for bit, and has the same state dict again."""
    params, again = layer(), layer()
    opt = config.make(named(params, names))
    walk(opt, params, 3)
    other = config.make(named(again, other_names))
    saved = reloaded(opt.state_dict())
    assert_same(saved, opt.state_dict())
    before = copy.deepcopy(saved)
    other.load_state_dict(saved)
    assert_same(saved, before)
    for p, q in zip(again, params):
        p.data.copy_(q.data)
    walk(opt, params, 3)
    walk(other, again, 3)
    assert all(torch.equal(p, q) for p, q in zip(params, again))
    if names or other_names:
        assert other.state_dict()["param_groups"][0]["param_names"] == ["name0", "name1"]
    if names == other_names:
        assert_same(opt.state_dict(), other.state_dict())


@every_taken
def test_older_state_dicts_are_loaded(config: Config) -> None:
    """Of versions of torch whose groups had none of the later options, and whose step was a number."""
    params = layer()
    opt, peer = config.make(params), config.make_peer(layer())
    walk(opt, params, 3)
    walk(peer, peer.param_groups[0]["params"], 3)
    for saved in (opt.state_dict(), peer.state_dict()):
        old = copy.deepcopy(saved)
        for group in old["param_groups"]:
            for name in ("foreach", "differentiable", "fused", "maximize", "capturable"):
                group.pop(name, None)
        for state in old["state"].values():
            if "step" in state:
                state["step"] = state["step"].item()
        opt.load_state_dict(old)
        walk(opt, params, 1)


@every_taken
def test_a_state_dict_does_not_tell_who_saved_it(config: Config) -> None:
    """One of torch's, loaded, added `foreach`, `fused`, `differentiable` and their like to ours."""
    params = layer()
    opt, peer = config.make(params), config.make_peer(layer())
    walk(opt, params, 1)
    walk(peer, peer.param_groups[0]["params"], 1)
    keys = [*opt.state_dict()["param_groups"][0]]
    for saved in (peer.state_dict(), opt.state_dict()):
        opt.load_state_dict(copy.deepcopy(saved))
        assert sorted(opt.state_dict()["param_groups"][0]) == sorted(keys)
    copied = copy.deepcopy(opt)
    copied.add_param_group({"params": layer()})
    assert [sorted(group) for group in copied.param_groups] == [sorted(keys)] * 2


@pytest.mark.parametrize(
    ("cls", "peer", "kwargs", "message"),
    [
        (AdamW, torch.optim.AdamW, {"amsgrad": True}, "amsgrad=True: distopt keeps no maximum"),
        (LAMB, torch.optim.AdamW, {"amsgrad": True}, "amsgrad=True: distopt keeps no maximum"),
        (SGD, torch.optim.SGD, {"differentiable": True}, "differentiable=True: no gradient flows"),
        (Adam, torch.optim.Adam, {"decoupled_weight_decay": True}, "decoupled_weight_decay=True: .* distopt.AdamW"),
        (AdamW, torch.optim.Adam, {}, "decoupled_weight_decay=False: .* always decoupled here: use distopt.Adam"),
    ],
)
def test_a_state_dict_of_another_update_is_refused(cls: Any, peer: Any, kwargs: dict[str, Any], message: str) -> None:
    """Adam's with decoupled decay was loaded, and another decay went on with it."""
    opt = cls(layer(), lr=0.5)
    walk(opt, opt.param_groups[0]["params"], 1)
    before = copy.deepcopy(opt.state_dict())
    theirs = peer(layer(), **kwargs)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(theirs.state_dict())
    assert_same(opt.state_dict(), before)


@pytest.mark.parametrize(
    ("cls", "option", "taken"),
    [
        (Adam, "decoupled_weight_decay", (False, None)),
        (AdamW, "decoupled_weight_decay", (True, None)),
        (LAMB, "decoupled_weight_decay", (True, None)),
        *[(cls, "amsgrad", (False, None)) for cls in (SGD, AdamW, LAMB, LARS)],
        *[(cls, "differentiable", (False, None)) for cls in (SGD, AdamW, LAMB, LARS)],
        *[(cls, name, (True, False, None)) for cls in (Adagrad, RMSprop, LAMB, LARS) for name in ("fused", "foreach")],
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_options_of_torch_are_accepted_where_they_change_nothing(cls: Any, option: str, taken: tuple[Any, ...]) -> None:
    """In the constructor, in a param group, and set in mid-run; everything else is refused in one line."""
    for value in (True, False, None, 1, "yes", torch.tensor(True)):
        opt = cls(layer())
        makes: list[Callable[[], Any]] = [
            lambda value=value: cls(layer(), **{option: value}),
            lambda value=value: cls([{"params": layer(), option: value}]),
            lambda value=value, opt=opt: (opt.param_groups[0].update({option: value}), opt.step()),
        ]
        for make in makes:
            if any(value is other for other in taken):
                make()
                continue
            with pytest.raises(ValueError, match=f"^{option}=") as error:
                make()
            assert "\n" not in str(error.value)


def test_an_unknown_argument_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"AdamW\(\) got an unexpected keyword argument 'learning_rate'"):
        AdamW(layer(), learning_rate=0.1)


# Hooks.


@every_taken
def test_hooks_run_around_steps_and_state_dicts(config: Config) -> None:
    calls: list[str] = []

    def note(name: str, result: Any = None) -> Callable[..., Any]:
        return lambda *_: (calls.append(name), result)[1]

    opt, other = config.make(layer()), SGD(layer())
    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        opt.register_step_pre_hook(note("pre")),
        opt.register_step_post_hook(note("post")),
    ]
    opt.step()
    other.step()
    for handle in handles:
        handle.remove()
    opt.step()
    assert calls == ["global pre", "pre", "post", "global post", "global pre", "global post"]

    calls.clear()
    opt.register_state_dict_pre_hook(lambda opt: opt.state.update(test=1))
    opt.register_state_dict_post_hook(lambda opt, state_dict: state_dict | {"seen": state_dict["state"].pop("test")})
    opt.register_load_state_dict_pre_hook(lambda opt, state: state["param_groups"][0].update(lr=0.002))
    opt.register_load_state_dict_pre_hook(lambda opt, state: state["param_groups"][0].update(lr=0.003), prepend=True)
    opt.register_load_state_dict_post_hook(note("loaded"))
    saved = opt.state_dict()
    assert saved["seen"] == 1
    opt.load_state_dict(copy.deepcopy(saved))
    assert opt.param_groups[0]["lr"] == 0.002
    assert calls == ["loaded"]


@every_taken
def test_a_copy_has_the_same_attributes(config: Config) -> None:
    params = layer()
    opt = config.make(params)
    walk(opt, params, 3)
    public = [{name for name in vars(o) if not name.startswith("_")} for o in (opt, copy.deepcopy(opt))]
    assert public[0] == public[1]


# What is an error there.


def first() -> Tensor:
    return nn.Parameter(torch.ones(1, 1))


P = nn.Parameter(torch.ones(1, 1))
BAD_PARAMS: list[tuple[Any, type[Exception], str]] = [
    (P, TypeError, "params argument given to the optimizer should be an iterable of Tensors or dicts"),
    ([{"params": P}, {"params": P}], ValueError, "some parameters appear in more than one parameter group"),
    ([("weight", P), nn.Parameter(torch.ones(1))], ValueError, "Some param names are missing"),
    ([{"params": [P]}, {"params": [("weight", nn.Parameter(torch.ones(1)))]}], ValueError, "with names to the optim"),
    ([], ValueError, "optimizer got an empty parameter list"),
    ([1.0], TypeError, "optimizer can only optimize Tensors, but one of the params is float"),
    ([{"params": {P}}], TypeError, "optimizer parameters need to be organized in ordered collections"),
    ([P * 2], ValueError, "can't optimize a non-leaf Tensor"),
    (nn.Linear(1, 1), TypeError, "'Linear' object is not iterable"),
    ([torch.ones(2, dtype=torch.complex64)], ValueError, "dtype torch.complex64: distopt's rules are for real numbers"),
]


@pytest.mark.parametrize("cls", [*CLASSES, LAMB, LARS])
def test_bad_parameters(cls: Any) -> None:
    for params, kind, message in BAD_PARAMS:
        with pytest.raises(kind, match=message):
            cls(params)
    with pytest.raises(UserWarning, match="a parameter group with duplicate parameters"):
        cls([P, P])


# (class, arguments, what torch says of them, what ours say: None where they are taken)
BAD: list[tuple[Any, dict[str, Any], str, str | None]] = [
    *[(cls, {"lr": LR2}, "Tensor lr must be 1-element", r"lr must be .* or a floating-point tensor of one, got .*\[2\]")
      for cls in CLASSES for LR2 in [torch.tensor([0.001, 0.001])]],
    (Adagrad, {"lr_decay": -0.5}, "Invalid lr_decay value: -0.5", "lr_decay must be a number >= 0, got -0.5"),
    (RMSprop, {"momentum": -1.0}, "Invalid momentum value: -1.0", r"momentum must be a number in \[0, 1\), got -1.0"),
    (SGD, {"momentum": -0.5}, "Invalid momentum value: -0.5", r"momentum must be a number in \[0, 1\), got -0.5"),
    (Adam, {"betas": (1.0, 0.0)}, "beta parameter at index 0", r"betas must be two numbers.* got .1.0, 0.0"),
    (Adam, {"weight_decay": -1}, "Invalid weight_decay value: -1", "weight_decay must be a number >= 0, got -1"),
    (Adam, {"betas": (0.9, torch.tensor(0.99))}, "either both floats or both Tensors", "betas must be two numbers"),
    (Adam, {"betas": (torch.tensor(0.9), 0.99)}, "either both floats or both Tensors", "betas must be two numbers"),
    (Adam, {"betas": (torch.tensor(0.9), torch.tensor(0.99)), "foreach": True}, "as a Tensor", "betas must be two num"),
    (Adam, {"lr": torch.tensor(0.001), "foreach": True}, "lr as a Tensor is not supported", None),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "kwargs", "theirs", "ours"), BAD, ids=lambda x: getattr(x, "__name__", str(x)))
def test_bad_hyper_parameters(cls: Any, kwargs: dict[str, Any], theirs: str, ours: str | None) -> None:
    with pytest.raises(ValueError, match=theirs):
        getattr(torch.optim, cls.__name__)([first()], **kwargs)
    if ours is None:
        cls([first()], **kwargs)
        return
    with pytest.raises(ValueError, match=ours):
        cls([first()], **kwargs)


@pytest.mark.parametrize("cls", [*CLASSES, LAMB, LARS])
def test_sparse_gradients_are_refused_before_anything_changes(cls: Any) -> None:
    """In the second group, the first one's steps had been counted; and clipping and SAM died of a kernel of torch's."""
    weight, embedding = nn.Parameter(torch.ones(3)), nn.Embedding(4, 2, sparse=True)
    opt = cls([{"params": [weight]}, {"params": embedding.parameters()}])
    opt.init_state()
    weight.grad = torch.ones(3)
    embedding(torch.tensor([1])).sum().backward()
    for use in (opt.step, distopt.SAM(opt).perturb, lambda: distopt.clip_grad_norm_(opt, 1.0)):
        with pytest.raises(ValueError, match=r"sparse gradients .*: use nn.Embedding\(sparse=False\)"):
            use()
    assert opt.state[weight]["step"].item() == 0.0
    assert torch.equal(weight, torch.ones(3))


# Options that change in mid-run.

CHANGES: list[tuple[type, dict[str, Any], list[dict[str, Any]]]] = [
    (SGD, {"dampening": 0.5}, [{"momentum": 0.9}]),
    (SGD, {"dampening": 0.5, "momentum": 0.9}, [{"momentum": 0.0}, {"momentum": 0.8}]),
    (SGD, {}, [{"momentum": 0.9, "nesterov": True}]),
    (SGD, {"momentum": 0.9}, [{"dampening": 0.5}, {"lr": 0.01, "weight_decay": 0.1}, {"maximize": True}]),
    (Adagrad, {}, [{"lr_decay": 0.1}, {"eps": 1e-3, "lr": 0.1}]),
    (RMSprop, {"momentum": 0.5}, [{"alpha": 0.9}, {"momentum": 0.9}]),
    (Adam, {}, [{"betas": (0.5, 0.9)}, {"eps": 1e-3}]),
    (AdamW, {}, [{"weight_decay": 0.5}, {"betas": (0.5, 0.999), "lr": 0.1}]),
]


@pytest.mark.parametrize(("cls", "kwargs", "changes"), CHANGES, ids=lambda x: getattr(x, "__name__", str(x)))
@pytest.mark.parametrize("saved", [False, True], ids=["", "saved between"])
def test_options_that_change_in_mid_run(cls: Any, kwargs: dict[str, Any], changes: list[Any], saved: bool) -> None:
    """As torch's, also through a checkpoint between the change and the next step.

    SGD's first momentum is the gradient, undampened: switched on at step 3 it was dampened.
    """
    ours, theirs = layer(), layer()
    opt, peer = cls(ours, **kwargs), getattr(torch.optim, cls.__name__)(theirs, **kwargs)
    for change in [{}, *changes]:
        for o in (opt, peer):
            o.param_groups[0].update(change)
        if saved:
            opt.init_state()
            state = reloaded(opt.state_dict())
            opt = cls(ours, **kwargs)
            opt.load_state_dict(state)
        for params, o in ((ours, opt), (theirs, peer)):
            if change:
                params[1].grad = None  # a parameter whose momentum begins a step later
                params[0].grad = torch.ones_like(params[0])
                o.step()
            walk(o, params, 2)
    assert_close(ours, theirs)


def test_momentum_may_be_switched_on_for_rmsprop_too() -> None:
    """torch's raises a KeyError there. From zero it is the same as if it had been there and stood still."""
    params, always = layer(), layer()
    opt, reference = RMSprop(params), RMSprop(always, momentum=0.9)
    walk(opt, params, 2)
    walk(reference, always, 2)
    for p, q in zip(params, always):
        q.data.copy_(p.data)
        reference.state[q]["momentum_buffer"].zero_()
    opt.param_groups[0]["momentum"] = 0.9
    walk(opt, params, 3)
    walk(reference, always, 3)
    assert all(torch.equal(p, q) for p, q in zip(params, always))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": float("nan")}, "lr must be a finite number, got nan"),
        ({"lr": float("-inf")}, "lr must be a finite number, got -inf"),
        ({"lr": "0.1"}, "lr must be a finite number, got '0.1'"),
        ({"lr": True}, "lr must be a finite number, got True"),
        ({"lr": None}, "lr must be a finite number, got None"),
        ({"lr": 10**400}, "lr must be a finite number, got an integer beyond the largest float"),
        ({"lr": torch.tensor([0.1, 0.1])}, r"lr must be .* a floating-point tensor of one, got torch.float32 of shape"),
        ({"lr": torch.tensor(1)}, r"lr must be .* a floating-point tensor of one, got torch.int64 of shape \[\]"),
        ({"lr": torch.tensor(float("nan"))}, "lr must be a finite number, got nan"),
        ({"lr": torch.tensor(0.1, device="meta")}, "lr is a tensor on meta"),
        ({"betas": (1.0, 0.9)}, r"betas must be two numbers in \[0, 1\), got \(1.0, 0.9\)"),
        ({"weight_decay": -0.1}, "weight_decay must be a number >= 0, got -0.1"),
        ({"amsgrad": True}, "amsgrad=True"),
    ],
    ids=str,
)
def test_a_bad_value_in_mid_run_is_refused_before_anything_changes(change: dict[str, Any], message: str) -> None:
    params = layer()
    opt = AdamW([{"params": params[:1]}, {"params": params[1:]}])
    walk(opt, params, 1)
    before = copy.deepcopy((opt.state_dict()["state"], params))
    opt.param_groups[1].update(change)
    with pytest.raises(ValueError, match=f"^{message}"):
        opt.step()
    torch.testing.assert_close((opt.state_dict()["state"], params), before, rtol=0, atol=0)


def test_an_lr_that_rounds_below_zero_is_accepted() -> None:
    """torch's LinearLR is a recurrence, whose last value may be -1e-20."""
    params = layer()
    opt = AdamW(params)
    walk(opt, params, 1)
    opt.param_groups[0]["lr"] = -1e-20
    walk(opt, params, 1)


def test_numbers_of_numpy_become_pythons() -> None:
    """Or a state dict of them could not be loaded with weights_only."""
    numpy = pytest.importorskip("numpy")
    opt = AdamW(layer(), lr=numpy.float32(0.125), betas=(numpy.float64(0.5), 0.75), weight_decay=numpy.int64(1))
    group = opt.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.125, (0.5, 0.75), 1.0)
    assert {type(x) for x in (group["lr"], *group["betas"], group["weight_decay"])} == {float}
    for bad in (numpy.bool_(True), numpy.array([0.1, 0.1])):
        with pytest.raises(ValueError, match="lr must be a number >= 0, got"):
            AdamW(layer(), lr=bad)
    group["lr"] = numpy.float32(0.25)  # as a schedule of somebody's sets it
    walk(opt, group["params"], 1)


# Schedules.

S = lr_scheduler
SCHEDULES: dict[str, Callable[[Any], list[Any]]] = {
    "step": lambda o: [S.StepLR(o, gamma=0.9, step_size=2)],
    "linear, plateau": lambda o: [S.LinearLR(o, 0.4, 0.8, total_iters=4), S.ReduceLROnPlateau(o, patience=1)],
    "constant, exponential": lambda o: [S.ConstantLR(o, 0.4, total_iters=4), S.ExponentialLR(o, gamma=0.9)],
    "polynomial": lambda o: [S.PolynomialLR(o, power=0.9, total_iters=4)],
    "chained": lambda o: [S.ChainedScheduler([S.ConstantLR(o, 0.4, total_iters=4), S.ExponentialLR(o, gamma=0.9)])],
    "sequential": lambda o: [S.SequentialLR(o, [S.LinearLR(o), S.CosineAnnealingLR(o, 5)], milestones=[3])],
    "restarts": lambda o: [S.CosineAnnealingWarmRestarts(o, T_0=3)],
    "one cycle": lambda o: [S.OneCycleLR(o, max_lr=0.1, total_steps=10, base_momentum=0.0)],
    "cyclic": lambda o: [S.CyclicLR(o, base_lr=0.001, max_lr=0.01, step_size_up=3)],
    "averaged": lambda o: [swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=3)],
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_schedules_change_lr_as_in_torch(name: str, tensor: bool) -> None:
    """The learning rate, a number or a tensor, and what some cycle with it: momentum, from 0 on too, and betas."""
    cycles = name in ("one cycle", "cyclic")
    rows: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (SGD, {"momentum": 0.0 if name == "one cycle" else 0.9, "dampening": 0.5}, {}),
        (RMSprop, {"momentum": 0.5}, {}),
        (AdamW, {}, {}),
        (LAMB, {}, {"trust_ratio": False, "eps": 1e-8}),
        (LARS, {"momentum": 0.9}, {"trust_ratio": False}),
        *([] if cycles else [(Adagrad, {}, {})]),
    ]
    peers = {LAMB: torch.optim.AdamW, LARS: torch.optim.SGD}
    for cls, kwargs, own in rows:
        lrs = []
        results = []
        for make, more in ((cls, own), (peers.get(cls) or getattr(torch.optim, cls.__name__), {})):
            params = layer()
            kwargs["lr"] = torch.tensor(0.01, dtype=torch.float64) if tensor else 0.01
            opt = make(params, **kwargs, **more)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SequentialLR's own, and those of schedules made before a step
                schedules = SCHEDULES[name](opt)
                for _ in range(9):
                    loss = forward_backward(opt, params)
                    opt.step()
                    for schedule in schedules:
                        schedule.step(*([loss.item()] if isinstance(schedule, S.ReduceLROnPlateau) else []))
            results.append(params)
            lrs.append(float(opt.param_groups[0]["lr"]))
        assert lrs[0] == lrs[1]
        assert_close(*results)


# Around the optimizer.


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_cleared_as_asked(set_to_none: bool) -> None:
    params = layer()
    opt = AdamW(params, foreach=True)
    forward_backward(opt, params)
    opt.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in params)


def test_named_parameters_and_averaged_models() -> None:
    model = nn.Linear(3, 2)
    opt = AdamW(model.named_parameters(), lr=0.1)
    assert opt.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    averaged = swa_utils.AveragedModel(model)
    for _ in range(2):
        model(torch.ones(2, 3)).square().sum().backward()
        opt.step()
        averaged.update_parameters(model)
    assert not torch.equal(averaged.module.weight, model.weight)


@pytest.mark.parametrize("inf", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_is_taken_off_and_an_overflow_left_out(inf: bool, fused: bool) -> None:
    """A `fused` optimizer of torch's does both itself, and tells GradScaler so; ours leaves it to GradScaler."""
    results = []
    for make in (AdamW, torch.optim.AdamW):
        params = layer()
        opt = make(params, lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(3):
            opt.zero_grad()
            scaler.scale(sum(p.square().sum() for p in params)).backward()
            if inf and step == 1:
                params[0].grad[0, 0] = torch.inf
            if step == 2:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
        results.append((params, scaler.get_scale()))
    (ours, scale), (theirs, other) = results
    assert scale == other
    assert_close(ours, theirs)


def test_a_profiler_sees_the_step() -> None:
    params = layer()
    opt = AdamW(params)
    forward_backward(opt, params)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
        opt.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#AdamW.step", "Optimizer.zero_grad#AdamW.zero_grad"} <= names


def test_a_rule_may_have_an_option_that_torch_has_too() -> None:
    class Own(distopt.ShardedOptimizer):
        torch_options = {k: v for k, v in distopt.ShardedOptimizer.torch_options.items() if k != "amsgrad"}  # noqa: RUF012

        def __init__(self, params: Any, lr: float = 0.5, amsgrad: bool = True) -> None:
            super().__init__(params, {"lr": lr, "amsgrad": amsgrad})

        def rule(self, group: dict[str, Any]) -> Rule:
            return Rule()

        def directions(self, shards: Any) -> list[Tensor]:
            assert shards.group["amsgrad"] is True
            return [g.clone() for g in shards.grads]

    params = layer()
    opt = Own(params)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    walk(opt, params, 1)
