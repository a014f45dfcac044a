"""What each parameter of a model is to its module: a matrix with a fan, an embedding, or a constant."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from distopt.layout import full_shape
from distopt.layout.names import bare_name, bare_parameters

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Norms of transformers 5.23 that multiply by 1 + weight.
_OFFSET_NORMS = re.compile(
    r"(RecurrentGemma|VaultGemma|T5Gemma2?|Gemma[23]?|Qwen3Next|Qwen3_5(Moe)?|Qwen4Exp|Muse\w+|MiniMaxM3\w*|Step3p7)"
    r"(Text)?(RMS|ZeroCenteredRMS)Norm"
)


class Role(NamedTuple):
    """What a parameter is.

    Attributes:
        kind: "matrix", "embedding", "constant", or "" where the module says nothing of it.
        fan_in: For a matrix, the number of inputs that one output sums up; 1 for others.
        fan_out: For a matrix, the number of outputs that one input reaches; 1 for others.
        value: Of a constant.
        padding: The row of an embedding that stays 0, or None.
        module: The name of the module's class, for messages.
    """

    kind: str
    fan_in: int = 1
    fan_out: int = 1
    value: float = 0.0
    padding: int | None = None
    module: str = ""


class Named(NamedTuple):
    """A parameter, once, under its first name, with each module that has it and its role there."""

    name: str
    param: Tensor
    modules: list[nn.Module]
    roles: list[Role]

    @property
    def role(self) -> Role:
        """The role that decides: tied weights are an embedding if any of their modules is one."""
        return next((role for role in self.roles if role.kind == "embedding"), self.roles[0])

    def fans(self, shape: Sequence[int]) -> tuple[int, int]:
        """Returns fan_in and fan_out that a matrix of this shape would have in the module."""
        role = role_of(self.modules[0], self.name, shape)
        return role.fan_in, role.fan_out


def roles(model: nn.Module) -> list[Named]:
    """Returns the parameters of a model, tied ones once, with their roles; frozen ones too."""
    named = {id(p): Named(name, p, [], []) for name, p in bare_parameters(model).items()}
    for path, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            whole = bare_name(model, f"{path}.{name}" if path else name)
            named[id(param)].modules.append(module)
            named[id(param)].roles.append(role_of(module, whole, full_shape(param)))
    return list(named.values())


def role_of(module: nn.Module, name: str, shape: Sequence[int]) -> Role:
    """Returns the role of a parameter in its module.

    Convolutions count the elements of the kernel, and of several groups one (torch's `nn.init` ignores them in
    fan_out). transformers' Conv1D is a linear layer that stores its matrix transposed: [in, out].

    Args:
        module: The module.
        name: The name of the parameter in the model.
        shape: Its shape, or that of the same parameter in another model.
    """
    kind, leaf = type(module).__name__, name.rpartition(".")[2]
    if "lora_" in name:
        raise ValueError(f"{name} is an adapter's: initialize the model first, and add the adapter to it afterwards")
    if isinstance(module, nn.Embedding):
        return Role("embedding", padding=module.padding_idx, module=kind)
    if leaf.endswith("bias") and len(shape) == 1:
        return Role("constant", module=kind)
    if _is(module, "Norm") and len(shape) == 1:
        return Role("constant", value=0.0 if _is(module, _OFFSET_NORMS.pattern) else 1.0, module=kind)
    if fans := _fans(module, shape):
        return Role("matrix", *fans, module=kind)
    return Role("", module=kind)


def _fans(module: Any, shape: Sequence[int]) -> tuple[int, int] | None:
    kernel = math.prod(shape[2:])
    if isinstance(module, _CONVOLUTIONS):
        return shape[1] * kernel, shape[0] * kernel // module.groups
    if isinstance(module, _TRANSPOSED):
        return shape[0] * kernel // module.groups, shape[1] * kernel
    if len(shape) != 2:
        return None
    if _is(module, "Conv1D$"):
        return shape[0], shape[1]
    return (shape[1], shape[0]) if isinstance(module, (nn.Linear, nn.MultiheadAttention)) else None


def _is(module: nn.Module, pattern: str) -> bool:
    """Whether the name of the module's class, or of one that it inherits from (FSDP2 adds one), has a pattern."""
    return any(re.search(pattern, cls.__name__) for cls in type(module).__mro__)


def residual_factors(names: Sequence[str], pattern: str) -> Mapping[str, float]:
    """Returns 1 / sqrt(2 * blocks) for each projection into the residual stream, by name.

    Args:
        names: The names of all parameters.
        pattern: A regular expression for the names of the projections.

    Raises:
        ValueError: If no name matches.
    """
    found = [name for name in names if re.search(pattern, name)]
    if not found:
        raise ValueError(
            f"no parameter is a projection into the residual stream: none of {', '.join(names[:5])}, ... matches "
            f"{pattern!r}; give residual=, a regular expression for their names, or another scheme"
        )
    blocks = {(number.group() if (number := re.match(r"(.*?\.)?\d+(?=\.)", name)) else name) for name in found}
    return dict.fromkeys(found, 1.0 / math.sqrt(2 * len(blocks)))
