"""Which parameters of a model are hidden matrices, the ones that Muon is for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distopt.layout import full_shape
from distopt.layout.names import bare_parameters

_EMBEDDING = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|cls_token)(\.|$)")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|classifier|score|qa_outputs)\.\w+$|^(model\.)?(head|output|fc)\.\w+$")


def outside(model: nn.Module, trainable: Mapping[str, Tensor], vectors: Collection[str]) -> dict[str, str]:
    """Returns why parameters are no hidden matrices, by name; those that are not listed are.

    Args:
        model: The model, with its wrappers.
        trainable: Its trainable parameters by bare name.
        vectors: The names of stacks of vectors.

    Returns:
        For vectors, stacks of them and matrices of one row or column `vector`; for embeddings, the input layers of
        images and their positions `embedding`; for the output layer, also a tied one, `head`; for filters of one
        dimension, whose three dimensions would be taken for a stack of matrices, `filter`.
    """
    found = {}
    of_modules = _of_modules(model)
    for name, param in trainable.items():
        if name in vectors or _is_vector(full_shape(param)):
            found[name] = "vector"
        elif id(param) in of_modules:
            found[name] = of_modules[id(param)]
        elif _EMBEDDING.search(name):
            found[name] = "embedding"
        elif _HEAD.search(name):
            found[name] = "head"
    return found


def summary(groups: list[dict[str, Any]], reasons: Mapping[str, str]) -> str:
    """Returns one line: how many parameters have which rule, and why."""
    rules = Counter(group["rule"] for group in groups for _ in group["param_names"])
    line = ", ".join(f"{count} parameters have the rule {rule}" for rule, count in rules.items())
    why: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        why.setdefault(reason, []).append(name)
    named = (f"{len(names)} {kind} ({', '.join(names[:2])}{', ...' * (len(names) > 2)})" for kind, names in why.items())
    return f"{line}; no hidden matrices: {', '.join(named)}" if why else line


def _is_vector(shape: torch.Size) -> bool:
    if len(shape) < 2:
        return True
    return min(shape[-2:] if len(shape) == 3 else (shape[0], shape[1:].numel())) < 2


def _of_modules(model: nn.Module) -> dict[int, str]:
    """Returns the parameters whose modules say what they are."""
    found: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            kind = "embedding"
        elif isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            kind = "filter"
        else:
            continue
        found |= {id(p): kind for p in module.parameters(recurse=False)}
    for module in model.modules():
        get = getattr(module, "get_output_embeddings", None)
        if callable(get) and isinstance(head := get(), nn.Module):
            found |= {id(p): found.get(id(p), "head") for p in bare_parameters(head).values()}
    return found
