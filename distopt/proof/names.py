"""The names of parameters without those of wrappers."""

from __future__ import annotations

# What DDP, DeepSpeed, torch.compile and activation checkpointing put into names. A model's own `module` stays, unless
# it is the first part of a name.
_ANYWHERE = ("_orig_mod", "_checkpoint_wrapped_module")


def bare_name(name: str) -> str:
    """A parameter's name as the model without wrappers has it."""
    parts = [part for part in name.split(".") if part not in _ANYWHERE]
    return ".".join(parts[1:] if len(parts) > 1 and parts[0] == "module" else parts)
