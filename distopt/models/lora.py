"""Adapters: few trainable weights beside the frozen ones of a pretrained model, by `peft`."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

CONFIG = "adapter_config.json"
NAME = "default"


class LoRA:
    r"""Low-rank adaptation: the weight of some linear layers becomes W + alpha / r * B A, of which A and B are trained.

    A (r rows) starts as a linear layer's weight does, B at zero: the first step is that of the pretrained model.

    Args:
        r: the rank of the change, >= 1.
        alpha: its scale, >= 1.
        dropout: of what A gets, in [0, 1).
        target_modules: endings of the names of the layers, or one regular expression for the whole name; `all-linear`
            is every linear layer but the output; None is what `peft` takes for the model's family (attention).

    Raises ValueError for an argument out of bounds, and where `peft` is not installed.

    Reference: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv 2106.09685.
    """

    def __init__(
        self,
        r: int = 16,
        alpha: int = 32,
        dropout: float = 0.0,
        target_modules: str | Sequence[str] | None = "all-linear",
    ) -> None:
        if not isinstance(r, int) or isinstance(r, bool) or r < 1:
            raise ValueError(f"adapter.r must be an integer >= 1, got {r!r}; 16 is usual")
        if not isinstance(alpha, int) or isinstance(alpha, bool) or alpha < 1:
            raise ValueError(f"adapter.alpha must be an integer >= 1, got {alpha!r}; twice r is usual")
        if not isinstance(dropout, (int, float)) or isinstance(dropout, bool) or not 0 <= dropout < 1:
            raise ValueError(f"adapter.dropout must be a number in [0, 1), got {dropout!r}")
        if importlib.util.find_spec("peft") is None:
            raise ValueError("adapter=lora: peft is not installed: pip install 'distopt[finetune]'")
        _check_targets(target_modules)
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.target_modules = target_modules if isinstance(target_modules, (str, type(None))) else list(target_modules)

    def describe(self) -> dict[str, Any]:
        """What makes one adapter another: the arguments."""
        return dict(vars(self))

    def add(self, model: PreTrainedModel, path: Path | None) -> dict[str, bytes]:
        """Puts the adapter into a meta model, and freezes all else; returns the file that describes it.

        path: the pretrained model's folder. Raises ValueError if there is none, or no layer of one of these names, and
            for a layer whose weight is tied to another's, which would change with it.
        """
        from peft import LoraConfig, inject_adapter_in_model

        if path is None:
            raise ValueError("adapter=lora adapts a pretrained model: give model.path=<a folder of save_pretrained>")
        config = LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=str(path.absolute()),
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            fan_in_fan_out=_conv1d(model),
        )
        names = [name for name, _ in model.named_modules()]
        for ending in self.target_modules if isinstance(self.target_modules, list) else ():
            if not any(f".{name}".endswith(f".{ending}") for name in names):
                raise ValueError(
                    f"adapter.target_modules={self.target_modules}: {ending} is not found, no layer's name ends "
                    f"with it; there are {_endings(model)}"
                )
        try:
            inject_adapter_in_model(config, model, NAME, low_cpu_mem_usage=True)
        except ValueError as error:
            raise ValueError(f"adapter.target_modules={self.target_modules}: {error}") from error
        for name in {path for pair in model.all_tied_weights_keys.items() for path in pair}:
            layer = name.rpartition(".")[0].removesuffix(".base_layer")
            if hasattr(model.get_submodule(layer), "base_layer"):
                raise ValueError(
                    f"adapter.target_modules: the weight of {layer} is tied to another layer's: leave it out"
                )
        with tempfile.TemporaryDirectory() as written:
            config.save_pretrained(written)
            return {CONFIG: (Path(written) / CONFIG).read_bytes()}


def reset(module: nn.Module) -> None:
    """Gives a module's own adapter its first values, if it has one."""
    if hasattr(module, "reset_lora_parameters"):
        module.reset_lora_parameters(NAME, True)  # type: ignore[operator]


def pretrained_name(name: str) -> str | None:
    """The name that a parameter has in the pretrained model; None for an adapter's own."""
    return None if f".{NAME}." in name else name.replace(".base_layer.", ".")


def _check_targets(targets: object) -> None:
    """Raises ValueError unless it is a regular expression, or endings of names, or None."""
    several = isinstance(targets, Sequence) and all(isinstance(target, str) and target for target in targets)
    if targets is not None and not (several and targets):
        raise ValueError(
            f"adapter.target_modules must be all-linear, null, or names as [q_proj, v_proj], got {targets!r}"
        )
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(f"adapter.target_modules={targets} is not a regular expression ({error})") from error


def _endings(model: nn.Module) -> str:
    """The last parts of the names of the layers that may be adapted."""
    layers = [name for name, module in model.named_modules() if getattr(module, "weight", None) is not None]
    return ", ".join(sorted({name.rpartition(".")[2] for name in layers if not name.rpartition(".")[2].isdigit()}))


def _conv1d(model: nn.Module) -> bool:
    """Whether linear layers keep their weight transposed, as GPT-2's do."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())
