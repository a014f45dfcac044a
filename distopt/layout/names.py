"""The names of parameters in the model itself, whatever wraps it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# Inserted into names by torch.compile, activation checkpointing and FSDP1.
_INSERTED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def bare_name(model: nn.Module, name: str) -> str:
    """Removes the parts of a name that wrappers have inserted.

    Args:
        model: The model as it is, with its wrappers: `torch.compile`, activation checkpointing, DDP, DeepSpeed.
        name: A name in that model, as `named_parameters`, `named_modules` or `state_dict` gives it.

    Returns:
        The name in the model without wrappers, as torch's distributed checkpoints have it. A part `module` of the
        model's own stays.
    """
    parts, module = [], model
    for part in name.split("."):
        if part not in _INSERTED and not (part == "module" and _is_engine(module)):
            parts.append(part)
        module = getattr(module, part, None)  # type: ignore[assignment]
    return ".".join(parts)


def bare_parameters(model: nn.Module, remove_duplicate: bool = True) -> dict[str, Tensor]:
    """Returns the parameters of a model by their bare names; tied ones once, unless `remove_duplicate` is false."""
    named = model.named_parameters(remove_duplicate=remove_duplicate)
    return {bare_name(model, name): param for name, param in named}


def _is_engine(module: nn.Module) -> bool:
    """Returns whether a module is a wrapper whose attribute `module` is the model."""
    return isinstance(module, (DataParallel, DistributedDataParallel)) or hasattr(module, "zero_optimization_stage")
