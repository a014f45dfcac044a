"""What torch's own tests check of state dicts, hooks and copies, of ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from distopt import ADOPT, LAMB, LARS, SGD, Adafactor, Adagrad, Adam, AdamW, AdEMAMix, Lion, RMSprop
from tests.harness.torch_configs import Config, every_taken
from tests.harness.torch_suite import layer, reloaded, walk

# State dicts.


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
    """Saved and loaded (`weights_only`), the other continues bit for bit, and has the same state dict again."""
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
        *[(cls, "decoupled_weight_decay", (True, None)) for cls in (LAMB, Lion, AdEMAMix, ADOPT, Adafactor)],
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
