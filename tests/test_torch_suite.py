"""What torch's own tests of its optimizers check (TestOptimRenewed in its test/test_optim.py), of ours.

The configurations are torch's. Of its tests these have no counterpart: several GPUs in one process (a rank has one),
complex and sparse parameters (refused, in tests/test_torch_options.py), the peak memory of foreach, and LBFGS.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from tests.harness.torch_configs import CONFIGS, Config, every_config, every_taken, every_way
from tests.harness.torch_suite import CLOSE, assert_close, forward_backward, layer, reloaded, walk

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
